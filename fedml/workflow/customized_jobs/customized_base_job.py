# SPDX-License-Identifier: Apache-2.0
"""A job file as a job of a workflow, made as FedML's scripts make it."""

from pathlib import Path
from typing import Any

import yaml

from fedml.workflow.file_jobs import LaunchJob


class CustomizedBaseJob(LaunchJob):
    """A job file by its path.

    The login is that of `fedml login`: `job_api_key`, `version` and where FedML's platform is are
    taken and have no effect.
    """

    def __init__(
        self,
        name: str,
        job_yaml_absolute_path: str | None = None,
        job_api_key: str | None = None,
        version: str = "release",
        **_: Any,
    ) -> None:
        super().__init__(name, job_yaml_absolute_path or "job.yaml")
        self.job_yaml_absolute_path = str(self.file)
        self.job_api_key = job_api_key
        self.config_version = version

    @staticmethod
    def load_yaml_config(yaml_path: str) -> Any:
        """What a file says."""
        return yaml.safe_load(Path(yaml_path).read_text())

    @staticmethod
    def generate_yaml_doc(run_config_object: Any, yaml_file: str) -> None:
        """Write it into a file."""
        Path(yaml_file).write_text(yaml.safe_dump(run_config_object, sort_keys=False))
