# SPDX-License-Identifier: Apache-2.0
"""What FedML's functions answer: their names and attributes, filled from what our broker says."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Any

from fedml.clusters import Cluster
from fedml.runs import Run


class RunStatus(StrEnum):
    """A run's status in FedML's words: our STOPPED is KILLED there, LOST is FAILED."""

    QUEUED = "QUEUED"
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    STOPPING = "STOPPING"
    KILLED = "KILLED"
    FAILED = "FAILED"
    FINISHED = "FINISHED"
    UNDETERMINED = "UNDETERMINED"

    @classmethod
    def of(cls, run: Run) -> RunStatus:
        """That of a run as it was last looked at."""
        if not run.ended and run.details.get("stopped_by"):
            return cls.STOPPING
        return cls({"STOPPED": "KILLED", "LOST": "FAILED"}.get(run.state, run.state))


class RunId(str):
    """A run's id, which is a number where a script asks for one: FedML's ask `int(run_id) > 0`."""

    __slots__ = ()

    def __int__(self) -> int:
        return int(self.removeprefix("r-"), 36)


@dataclass(frozen=True, slots=True)
class LaunchResult:
    """What became of a job file.

    Attributes:
        result_code: 0: it is queued. Else as FedML numbers it: 8 no machine can ever run it, 10 no
            answer, 17 the file is wrong, 20 another reason.
        result_message: The reason. FedML's documentation calls it `result_msg`.
        run_id: Of the run; None if there is none.
        project_id: There are no projects: always None.
        inner_id: As `run_id`, as FedML has it where nothing is deployed.
        result_object: The run itself.
    """

    result_code: int
    result_message: str
    run_id: RunId | None = None
    project_id: str | None = None
    inner_id: RunId | None = None
    result_object: Run | None = None

    @property
    def result_msg(self) -> str:
        """`result_message`."""
        return self.result_message


@dataclass(frozen=True, slots=True)
class FedMLRunModel:
    """One run.

    Attributes:
        status: A `RunStatus`, which is a text as well.
        started_time: When it was asked for, local; `ended_time` likewise, empty while it goes on.
        running_time: Milliseconds. `compute_duration` is the same in hours.
        cost: Machines are yours: always 0.
        run_url: Where the broker shows it.
    """

    run_id: str
    run_name: str
    status: RunStatus
    started_time: str
    ended_time: str
    running_time: int
    compute_start_time: str
    compute_end_time: str
    compute_duration: float
    run_url: str
    cost: float = 0.0
    device_infos: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, run: Run) -> FedMLRunModel:
        """A run of ours."""
        told = run.details
        began, ended = told["started_at"], told["ended_at"]
        began_text = _moment(began)
        took_s = 0.0 if began is None else (ended or time.time()) - began
        return cls(
            run_id=run.id,
            run_name=run.name,
            status=RunStatus.of(run),
            started_time=_moment(told["created_at"]),
            ended_time=_moment(ended),
            running_time=round(took_s * 1000),
            compute_start_time=began_text,
            compute_end_time=_moment(ended),
            compute_duration=round(took_s / 3600, 4),
            run_url=run.url,
            device_infos=[f"Device Name: {t['device']}" for t in told.get("tasks", ())],
        )


@dataclass(frozen=True, slots=True)
class FedMLRunModelList:
    """Runs, newest first."""

    run_list: list[FedMLRunModel]

    @classmethod
    def of(cls, runs: Iterable[Run]) -> FedMLRunModelList:
        """Runs of ours."""
        return cls([FedMLRunModel.of(run) for run in runs])


@dataclass(frozen=True, slots=True)
class RunLogResult:
    """A page of a run's log.

    Attributes:
        log_line_list: The lines of the page, or all.
    """

    run_status: RunStatus
    total_log_lines: int
    total_log_pages: int
    log_line_list: list[str]

    @classmethod
    def of(cls, run: Run, page: int, size: int, *, everything: bool) -> RunLogResult:
        """A page of the lines of a run, counted from 1; or all of them.

        Raises:
            ValueError: There is no such page in any run.
        """
        if page < 1 or size < 1:
            raise ValueError(f"pages and their size count from 1, got {page} and {size}")
        if everything:
            lines = "".join(run.logs()).splitlines()
            total = len(lines)
        else:
            found = run.log_lines(skip=(page - 1) * size, limit=size)
            lines, total = [line["text"] for line in found["lines"]], found["total"]
        return cls(RunStatus.of(run), total, -(-total // size), lines)


@dataclass(frozen=True, slots=True)
class FedMLClusterModel:
    """One cluster.

    Attributes:
        cluster_id: Its name, too: a tenant has no two of one name.
        status: `up`, or `stopped`.
    """

    cluster_id: str
    cluster_name: str
    status: str


@dataclass(frozen=True, slots=True)
class FedMLClusterModelList:
    """Clusters, by name."""

    cluster_list: list[FedMLClusterModel]

    @classmethod
    def of(cls, clusters: Iterable[Cluster]) -> FedMLClusterModelList:
        """Clusters of ours."""
        return cls([FedMLClusterModel(c.name, c.name, c.status) for c in clusters])


class ResponseCode(Enum):
    """Whether it was done."""

    SUCCESS = "SUCCESS"
    FAILURE = "FAILURE"
    ERROR = "ERROR"


@dataclass(frozen=True, slots=True)
class FedMLResponse:
    """Whether it was done, what is to be said, and what came out of it."""

    code: ResponseCode
    message: str
    data: Any = None


@dataclass(frozen=True, slots=True)
class StorageMetadata:
    """A stored object, with FedML's attributes.

    Attributes:
        size: For people, such as `1.50 MB`.
        sha256, bytes: What FedML does not say.
    """

    dataName: str  # noqa: N815 - FedML's spelling
    description: str | None
    tags: list[str]
    createdAt: str  # noqa: N815
    updatedAt: str  # noqa: N815
    size: str
    sha256: str
    bytes: int

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> StorageMetadata:
        """What our broker says of an object."""
        own = told["metadata"]
        at = _moment(told["created_at"])
        return cls(
            dataName=told["name"],
            description=own.get("description"),
            tags=list(own.get("tags", ())),
            createdAt=at,
            updatedAt=at,
            size=_size(told["size"]),
            sha256=told["sha256"],
            bytes=told["size"],
        )


def _moment(at: float | None) -> str:
    """Local, as FedML writes it."""
    if at is None:
        return ""
    return datetime.datetime.fromtimestamp(at).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} GB"
