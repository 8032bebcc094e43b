# SPDX-License-Identifier: Apache-2.0
"""A job of a workflow, as FedML's scripts write their own."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import Enum
from typing import Any

_OF_RUN = {
    "PROVISIONING": ("NOT_STARTED", "QUEUED", "PROVISIONING", "CLUSTER_QUEUE", "PRE_QUEUE"),
    "RUNNING": ("STARTING", "RUNNING", "LAUNCHED"),
    "FINISHED": ("FINISHED",),
    "FAILED": (
        "FAILED", "STOPPED", "LOST", "STOPPING", "KILLED", "ABANDONED", "ERROR", "BLOCKED",
        "INVALID", "EXCEPTION",
    ),
}  # fmt: skip


class JobStatus(Enum):
    """Where a job is."""

    PROVISIONING = "PROVISIONING"
    RUNNING = "RUNNING"
    FINISHED = "FINISHED"
    FAILED = "FAILED"
    UNDETERMINED = "UNDETERMINED"

    @classmethod
    def get_job_status_from_run_status(cls, run_status: Any) -> "JobStatus":
        """The same of a run's state: ours, or FedML's."""
        word = str(getattr(run_status, "value", run_status))
        for status, words in _OF_RUN.items():
            if word in words:
                return cls(status)
        return cls.UNDETERMINED


class Job(ABC):
    """Something that is started, looked at, and can be ended.

    Whoever writes one of his own writes `run`, `status` and `kill`: they are called in the process
    of the script.

    Attributes:
        name: Unique in its workflow.
        input_data_dict: What the jobs that it depends on have left, by their names.
        output_data_dict: What it leaves.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.input_data_dict: dict[Any, Any] = {}
        self.output_data_dict: dict[Any, Any] = {}
        self.workflow_id: str | None = None
        self.dependencies: Sequence[Job] = ()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"

    @abstractmethod
    def run(self) -> Any:
        """Start it."""

    @abstractmethod
    def status(self) -> JobStatus:
        """Where it is."""

    @abstractmethod
    def kill(self) -> Any:
        """End it, if it goes on."""

    def append_input(self, input_job_name: str, input: dict[Any, Any]) -> None:  # noqa: A002 - FedML's name
        """What a job that it depends on has left."""
        self.input_data_dict[input_job_name] = input

    def set_inputs(self, inputs: dict[Any, Any]) -> None:
        """What the workflow as a whole was given."""
        self.input_data_dict = inputs

    def get_outputs(self) -> dict[Any, Any]:
        """What it has left."""
        return self.output_data_dict


class NullJob(Job):
    """Hands on what it gets."""

    def __init__(self, name: str = "NullJob") -> None:
        super().__init__(name)

    def run(self) -> None:
        """At once."""
        self.output_data_dict = self.input_data_dict.copy()

    def status(self) -> JobStatus:
        """Always finished."""
        return JobStatus.FINISHED

    def kill(self) -> None:
        """Nothing goes on."""
