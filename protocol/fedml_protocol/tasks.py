# SPDX-License-Identifier: Apache-2.0
"""One task of one run: its states, and what broker and agent say about it.

broker -> agent   Offer, Cancel, Drain, Tail, Resync, CloseSession     each inside a signed Order
broker -> agent   ResultAck
agent  -> broker  Accept | Reject, Progress, Result, Cancelled

Every effect is fenced by (task, epoch): the broker gives each (re-)offer the next epoch, and a
result counts only while its epoch is the current one. Repeating any message is harmless.
"""

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from enum import IntEnum

from fedml_protocol.blob import Blob, NamedBlob
from fedml_protocol.cause import Cause
from fedml_protocol.errors import IllegalMove, MalformedMessage
from fedml_protocol.federate import StageSpec
from fedml_protocol.ids import check_id
from fedml_protocol.launch import LaunchSpec


class TaskState(IntEnum):
    """Where a task is; the numbers are the wire's."""

    QUEUED = 1
    OFFERED = 2
    LEASED = 3
    RUNNING = 4
    FINISHED = 5
    FAILED = 6
    STOPPED = 7
    LOST = 8


# https://www.w3.org/TR/trace-context/#traceparent-header, version 00.
TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")

_S = TaskState

# The whole life of a task. Anything absent from this table is illegal.
# LEASED and RUNNING lead back to QUEUED when the machine lost the task: it is offered again, one
# epoch later. LOST is where that ends when no further try is allowed.
NEXT: Mapping[TaskState, Set[TaskState]] = {
    _S.QUEUED: {_S.OFFERED, _S.STOPPED, _S.FAILED, _S.LOST},
    _S.OFFERED: {
        _S.QUEUED, _S.LEASED, _S.RUNNING, _S.FINISHED, _S.FAILED, _S.STOPPED, _S.LOST,
    },
    _S.LEASED: {_S.QUEUED, _S.RUNNING, _S.FINISHED, _S.FAILED, _S.STOPPED, _S.LOST},
    _S.RUNNING: {_S.QUEUED, _S.FINISHED, _S.FAILED, _S.STOPPED, _S.LOST},
    _S.FINISHED: set(),
    _S.FAILED: set(),
    _S.STOPPED: set(),
    _S.LOST: set(),
}  # fmt: skip

FINAL: Set[TaskState] = frozenset(state for state, after in NEXT.items() if not after)
HELD: Set[TaskState] = frozenset({_S.OFFERED, _S.LEASED, _S.RUNNING})


def move(now: TaskState, to: TaskState) -> TaskState:
    """The state after the move.

    Raises:
        IllegalMove: The table does not have it.
    """
    if to not in NEXT[now]:
        raise IllegalMove(f"a task that is {now.name} cannot become {to.name}")
    return to


class OnLost(IntEnum):
    """What the agent does with a task whose lease ends while the broker is out of reach."""

    STOP = 1
    FINISH_AND_HOLD = 2
    CONTINUE = 3


class RejectReason(IntEnum):
    """Why an offer was not taken. `PERMANENT` lists those that asking again will not change.

    NOT_NOW is the machine owner's no that may pass: other hours, a policy file that he must mend.
    """

    SIGNATURE = 1
    POLICY_REFUSED = 2
    DISK = 3
    SLOTS = 4
    RESOURCES = 5
    UNSUPPORTED = 6
    DRAINING = 7
    STALE = 8
    PACKAGE = 9
    NOT_NOW = 10


PERMANENT: Set[RejectReason] = frozenset(
    {RejectReason.SIGNATURE, RejectReason.POLICY_REFUSED, RejectReason.UNSUPPORTED}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a task asks of a machine. 0, or an empty text, means: no demand.

    Attributes:
        gpu_model: As people write it; `fedml_protocol.gpus` says which accelerators are one.
    """

    gpus: int = 0
    gpu_memory_bytes: int = 0
    cpus: int = 0
    memory_bytes: int = 0
    disk_bytes: int = 0
    gpu_model: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """Ask one device to do one task. Sending it twice is harmless: (task, epoch) decides.

    Attributes:
        epoch: 1 at the first offer, +1 with each further one.
        publisher: The user whose run it is; the machine owner's policy may name him.
        lease_s: How long the agent may go on without hearing from the broker.
        grace_s: Between TERM and KILL when the task is stopped.
        deadline_s: The task is ended after this many seconds; 0 means never.
        package: The files it needs, checked against their hash before use.
        tail: Somebody watches: ship log lines as they come.
        traceparent: W3C Trace Context of the run; empty: nobody traces it.
    """

    task: str
    epoch: int
    run: str
    spec: LaunchSpec | StageSpec
    publisher: str = ""
    lease_s: float = 45.0
    on_lost: OnLost = OnLost.FINISH_AND_HOLD
    grace_s: float = 10.0
    deadline_s: float = 0.0
    package: Blob | None = None
    needs: Needs = field(default_factory=Needs)
    tail: bool = False
    traceparent: str = ""

    def __post_init__(self) -> None:
        _check_task(self.task, self.epoch)
        check_id(self.run, "run")
        if self.traceparent and TRACEPARENT.fullmatch(self.traceparent) is None:
            raise MalformedMessage(f"not a traceparent: {self.traceparent[:60]!r}")
        if not self.lease_s > 0 or not self.grace_s >= 0 or not self.deadline_s >= 0:
            raise MalformedMessage("lease_s must be > 0, grace_s and deadline_s >= 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """End a task: TERM, grace, KILL. The answer is a Result, or Cancelled when it never ran."""

    task: str
    epoch: int
    grace_s: float = 10.0
    reason: str = ""

    def __post_init__(self) -> None:
        _check_task(self.task, self.epoch)
        if not self.grace_s >= 0:
            raise MalformedMessage("grace_s must be >= 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """Take no more offers (on), or take them again (off)."""

    on: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """Somebody starts (or stops) watching a task's log."""

    task: str
    on: bool

    def __post_init__(self) -> None:
        check_id(self.task, "task")


@dataclass(frozen=True, slots=True, kw_only=True)
class Resync:
    """Say at once what you run: the broker has forgotten, or doubts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CloseSession:
    """A federated run is over: end its warm worker and forget its files."""

    session: str

    def __post_init__(self) -> None:
        check_id(self.session, "session")


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What the broker signs: one order to one device.

    Attributes:
        counter: Grows with every order to this device; an old one is a replay.
        lifetime_s: From its receipt, how long the order may be acted upon.
    """

    device: str
    counter: int
    lifetime_s: float
    what: Offer | Cancel | Drain | Tail | Resync | CloseSession

    def __post_init__(self) -> None:
        check_id(self.device, "device")
        if self.counter < 1 or not self.lifetime_s > 0:
            raise MalformedMessage("an order needs a counter >= 1 and a lifetime > 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedOrder:
    """An order as it travels. `order` is not parsed before `signature` has been verified."""

    key_id: str
    order: bytes
    signature: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Accept:
    """The agent takes the task; from now on its lease runs."""

    task: str
    epoch: int

    def __post_init__(self) -> None:
        _check_task(self.task, self.epoch)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reject:
    """The agent does not take the task; nothing has happened."""

    task: str
    epoch: int
    reason: RejectReason
    detail: str = ""

    def __post_init__(self) -> None:
        _check_task(self.task, self.epoch)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """The task runs."""

    task: str
    epoch: int
    state: TaskState
    note: str = ""

    def __post_init__(self) -> None:
        _check_task(self.task, self.epoch)
        if self.state is not TaskState.RUNNING:
            raise MalformedMessage(f"progress reports RUNNING, not {self.state.name}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How the task ended. Sent again until a ResultAck comes; counted once.

    Attributes:
        weight: For a training stage, usually the examples seen.
        stdout_bytes, stderr_bytes: How long the logs are, so that a reader knows when he has all.
    """

    task: str
    epoch: int
    state: TaskState
    exit_code: int | None = None
    signal: int | None = None
    cause: Cause | None = None
    artifacts: tuple[NamedBlob, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    weight: float = 0.0
    stdout_bytes: int = 0
    stderr_bytes: int = 0

    def __post_init__(self) -> None:
        _check_task(self.task, self.epoch)
        if self.state not in FINAL:
            raise MalformedMessage(f"a result is final, {self.state.name} is not")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancelled:
    """The cancelled task is not here (never was, or ended before)."""

    task: str
    epoch: int

    def __post_init__(self) -> None:
        _check_task(self.task, self.epoch)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultAck:
    """The result is in the broker's store (counted, or refused as late): stop sending it."""

    task: str
    epoch: int

    def __post_init__(self) -> None:
        _check_task(self.task, self.epoch)


def _check_task(task: str, epoch: int) -> None:
    check_id(task, "task")
    if epoch < 1:
        raise MalformedMessage(f"epoch must be >= 1, got {epoch}")
