# SPDX-License-Identifier: Apache-2.0
"""A training job whose program hands values on, as FedML's scripts write it."""

import json
import os
from pathlib import Path
from typing import Any

from fedml.errors import ConfigError
from fedml.workflow.customized_jobs.customized_base_job import CustomizedBaseJob


class TrainJob(CustomizedBaseJob):
    """A job file; `get_inputs` and `set_outputs` are for the program that it runs."""

    @staticmethod
    def get_inputs() -> dict[str, Any] | None:
        """In the job's program: what the jobs before it have left, by name; None: nothing."""
        given = os.environ.get("FEDML_INPUTS")
        if given is None:
            return None
        return {job: _decoded(values) for job, values in json.loads(given).items()}

    @staticmethod
    def set_outputs(output_dict: dict[Any, Any]) -> None:
        """In the job's program: leave values for the jobs after it.

        Raises:
            ConfigError: It is not run as a job.
        """
        file = os.environ.get("FEDML_OUTPUT")
        if file is None:
            raise ConfigError("set_outputs is for the program of a job", "`fedml launch` runs one")
        lines = [f"{name}={json.dumps(value)}\n" for name, value in output_dict.items()]
        with Path(file).open("a") as values:
            values.writelines(lines)

    def get_outputs(self) -> dict[Any, Any]:
        """In the script: what its program has left."""
        self.output_data_dict = _decoded(super().get_outputs())
        return self.output_data_dict


def _decoded(values: Any) -> Any:
    """Values as they were given to `set_outputs`; other ones stay the text that they are."""
    if not isinstance(values, dict):
        return values
    return {name: _json_or_text(value) for name, value in values.items()}


def _json_or_text(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value
