# SPDX-License-Identifier: Apache-2.0
"""A service as a job of a workflow, made as FedML's scripts make it."""

from typing import Any

from fedml.workflow.customized_jobs.customized_base_job import CustomizedBaseJob
from fedml.workflow.file_jobs import DeployJob


class ModelDeployJob(CustomizedBaseJob, DeployJob):
    """A job file with `service`; there are no model cards, its workspace brings the model.

    `endpoint_name` is how the run is called where it runs alone.
    """

    kind = "deploy"

    def __init__(
        self,
        name: str,
        endpoint_name: str | None = None,
        job_yaml_absolute_path: str | None = None,
        job_api_key: str | None = None,
        **more: Any,
    ) -> None:
        super().__init__(name, job_yaml_absolute_path, job_api_key, **more)
        self.endpoint_name = endpoint_name or name

    def get_outputs(self) -> dict[Any, Any]:
        """Where it answers: FedML's names beside those of the broker."""
        found = super().get_outputs()
        if "url" not in found:
            return found
        self.output_data_dict = {
            **found,
            "endpoint_id": found["run"],
            "endpoint_name": self.endpoint_name,
            "inference_url": f"{found['url']}/predict",
        }
        return self.output_data_dict
