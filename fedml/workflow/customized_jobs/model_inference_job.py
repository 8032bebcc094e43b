# SPDX-License-Identifier: Apache-2.0
"""One question to a service, as a job of a workflow, made as FedML's scripts make it."""

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from fedml.workflow.jobs import Job, JobStatus

_ANSWER_S = 600


class ModelInferenceJob(Job):
    """POST of JSON, by this process, to the service that a job before it has deployed.

    What it sends is what it was given by the workflow (`set_workflow_input`), or else by the other
    jobs before it. It leaves the service's answer.
    """

    def __init__(
        self,
        name: str,
        endpoint_name: str | None = None,
        job_api_key: str | None = None,
        endpoint_user_name: str | None = None,
    ) -> None:
        """
        Args:
            endpoint_name: Which one, where several were deployed before it.
            job_api_key: Sent along as a bearer token, if there is one.
            endpoint_user_name: Has no effect.
        """
        super().__init__(name)
        self.endpoint_name = endpoint_name
        self.job_api_key = job_api_key
        self.endpoint_user_name = endpoint_user_name
        self._status = JobStatus.PROVISIONING

    def run(self) -> None:
        """Ask, and wait for the answer."""
        url, question = self._question()
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.job_api_key:
            headers["Authorization"] = f"Bearer {self.job_api_key}"
        self._status = JobStatus.FAILED
        if url is None:
            text = "no job before it has deployed a service that answers"
            self.output_data_dict = {"error": True, "message": text}
            return
        asked = urllib.request.Request(url, json.dumps(question).encode(), headers)  # noqa: S310 - our own
        try:
            with urllib.request.urlopen(asked, timeout=_ANSWER_S) as answer:  # noqa: S310
                said = json.loads(answer.read())
        except (OSError, ValueError) as error:
            words = (
                error.read().decode(errors="replace")
                if isinstance(error, urllib.error.HTTPError)
                else ""
            )
            self.output_data_dict = {"error": True, "message": f"{url}: {error} {words}".rstrip()}
            return
        self.output_data_dict = dict(said) if isinstance(said, Mapping) else {"answer": said}
        self._status = JobStatus.FINISHED

    def status(self) -> JobStatus:
        """Whether it was answered."""
        return self._status

    def kill(self) -> None:
        """Nothing goes on."""

    def _question(self) -> tuple[str | None, Any]:
        url, rest = None, {}
        for job, values in self.input_data_dict.items():
            deployed = isinstance(values, Mapping) and "inference_url" in values
            if deployed and self.endpoint_name in (None, values["endpoint_name"]):
                url = str(values["inference_url"])
            elif not deployed:
                rest[job] = values
        if len(rest) == 1 and isinstance(only := next(iter(rest.values())), Mapping):
            return url, only
        return url, rest
