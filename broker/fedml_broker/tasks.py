# SPDX-License-Identifier: Apache-2.0
"""Tasks in the store: each function is one step, to be run inside a transaction.

The fence lives here: a step names the (task, epoch) that it believes in, and changes nothing when
that is no longer the current one. `open_tasks` in the dispatcher mirrors the rows that are not
final.
"""

import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection

from fedml_broker.match import Wanted
from fedml_broker.prepared import Prepared, given
from fedml_broker.queue import Terms
from fedml_broker.tables import runs, tasks
from fedml_protocol.cause import Cause, Fault
from fedml_protocol.codec import parse, serialise
from fedml_protocol.launch import LaunchSpec
from fedml_protocol.tasks import FINAL, HELD, Offer, Result, TaskState

_FINAL = [int(s) for s in FINAL]
_HELD = [int(s) for s in HELD]
# With every task.
_INSERT = Prepared(
    tasks.insert(),
    (
        "id",
        "run",
        "tenant",
        "device",
        "bound",
        "state",
        "epoch",
        "tries_left",
        "restarts_left",
        "offer",
        "labels",
        "terms",
        "rank",
        "round",
        "client",
        "version",
        "created_at",
    ),
)
_QUEUED = tasks.update().where(
    tasks.c.id == given("id_"),
    tasks.c.epoch == given("epoch_") - 1,
    tasks.c.state == int(TaskState.QUEUED),
)
_OFFERED = {
    "state": int(TaskState.OFFERED),
    "epoch": given("epoch_"),
    "device": given("device_"),
}
_OFFER = Prepared(_QUEUED.values(_OFFERED))
_OFFER_ANEW = Prepared(_QUEUED.values({**_OFFERED, "offer": given("offer_")}))
_END = Prepared(
    tasks.update()
    .where(
        tasks.c.id == given("id_"),
        tasks.c.epoch == given("epoch_"),
        tasks.c.state.not_in(_FINAL),
        # Without a device: whatever it is, also none.
        tasks.c.device.is_not_distinct_from(
            sa.func.coalesce(given("device_", sa.String), tasks.c.device)
        ),
    )
    .values(state=given("state_"), result=given("result_"), ended_at=given("ended_at_"))
)


@dataclass(slots=True, kw_only=True)
class Task:
    """One task that is not final, as the dispatcher holds it in memory.

    Attributes:
        offer: The template; `epoch` there is not the current one.
        device: Whom it was offered to last, or is bound to.
        round: The turn of a federated run that it belongs to.
        version: The round whose model it starts from, where a run has versions, not rounds.
        lease_until: On the monotonic clock; 0 while nobody holds it.
        refused: Devices that rejected it for good, and why.
        not_before: Devices that rejected it for now, and until when (monotonic).
        losses: How often machines have said that they lost it, since this process began.
        failures: How often it has failed and was queued again, since this process began.
        not_until: It is offered to nobody before (monotonic).
        ends_by: When it is over at the latest (monotonic); infinite: nobody knows.
        since: When it was submitted, seconds since 1970.
        recalled: Why its device was told to hand it back; it is queued again. Empty: it was not.
        moments: When it was queued, offered, and its result received, since this process began.
        stopping: Why its device was told to end it; it is not offered again. Empty: it was not.
        noted: What its devices have noted of it, since this process began.
        port: Where it answers, if it is a service; 0: nowhere; None: its device has not said.
    """

    offer: Offer
    tenant: str
    tries_left: int
    restarts_left: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    terms: Terms = field(default_factory=Terms)
    rank: int = 0
    device: str | None = None
    bound: bool = False
    state: TaskState = TaskState.QUEUED
    epoch: int = 0
    round: int | None = None
    client: int | None = None
    version: int | None = None
    lease_until: float = 0.0
    accepted_seq: int = -1
    refused: dict[str, str] = field(default_factory=dict)
    not_before: dict[str, float] = field(default_factory=dict)
    losses: int = 0
    failures: int = 0
    not_until: float = 0.0
    ends_by: float = math.inf
    since: float = field(default_factory=time.time)
    recalled: str = ""
    stopping: str = ""
    moments: dict[str, float] = field(default_factory=dict)
    noted: set[str] = field(default_factory=set)
    port: int | None = None

    @property
    def id(self) -> str:
        """The task's id."""
        return self.offer.task

    @property
    def run(self) -> str:
        """The run it belongs to."""
        return self.offer.run

    @property
    def kind(self) -> str:
        """The word that asked for it."""
        return "launch" if isinstance(self.offer.spec, LaunchSpec) else "federate"

    @property
    def serves(self) -> bool:
        """Whether it is a service."""
        return isinstance(self.offer.spec, LaunchSpec) and self.offer.spec.service is not None

    @property
    def room(self) -> str:
        """Under which name it takes room on a device: its own, or its session's."""
        spec = self.offer.spec
        return self.id if isinstance(spec, LaunchSpec) else spec.session

    def wanted(self) -> Wanted:
        """What it asks of a machine, for `match`."""
        spec = self.offer.spec
        job = spec if isinstance(spec, LaunchSpec) else None
        return Wanted(
            kind=self.kind,
            needs=self.offer.needs,
            labels=self.labels,
            cluster=self.terms.cluster,
            max_price=self.terms.max_price,
            container=job is not None and job.container is not None,
            offline=job is not None and job.offline,
        )

    def current_offer(self) -> Offer:
        """The offer with the current epoch."""
        return replace(self.offer, epoch=self.epoch)


def insert(tx: Connection, new: Sequence[Task]) -> None:
    """Add queued tasks."""
    _INSERT.each(
        tx,
        (
            {
                "id": t.id,
                "run": t.run,
                "tenant": t.tenant,
                "device": t.device,
                "bound": t.bound,
                "state": int(TaskState.QUEUED),
                "epoch": 0,
                "tries_left": t.tries_left,
                "restarts_left": t.restarts_left,
                "offer": serialise(t.offer),
                "labels": dict(t.labels),
                "terms": msgspec.to_builtins(t.terms),
                "rank": t.rank,
                "round": t.round,
                "client": t.client,
                "version": t.version,
                "created_at": t.since,
            }
            for t in new
        ),
    )


def load_open(tx: Connection) -> list[Task]:
    """Every task that is not final, oldest first."""
    query = (
        sa.select(tasks, runs.c.stopped_by)
        .join_from(tasks, runs, tasks.c.run == runs.c.id, isouter=True)
        .where(tasks.c.state.not_in(_FINAL))
        .order_by(tasks.c.created_at)
    )
    return [
        Task(
            offer=parse(Offer, row.offer),
            tenant=row.tenant,
            tries_left=row.tries_left,
            restarts_left=row.restarts_left,
            labels=row.labels,
            terms=Terms(**row.terms),
            rank=row.rank,
            device=row.device,
            bound=row.bound,
            state=TaskState(row.state),
            epoch=row.epoch,
            round=row.round,
            client=row.client,
            version=row.version,
            since=row.created_at,
            recalled=row.recalled,
            stopping=f"stopped by {row.stopped_by}" if row.stopped_by else "",
        )
        for row in tx.execute(query)
    ]


def offered(tx: Connection, task: str, epoch: int, device: str, offer: Offer | None = None) -> bool:
    """QUEUED -> OFFERED with the next epoch; False when it is no longer queued.

    Args:
        offer: Replaces the task's, where it says more than was known when the task was queued.
    """
    if offer is None:
        return bool(_OFFER.run(tx, id_=task, epoch_=epoch, device_=device))
    new = serialise(offer)
    return bool(_OFFER_ANEW.run(tx, id_=task, epoch_=epoch, device_=device, offer_=new))


def queued_again(
    tx: Connection, task: str, epoch: int, tries_left: int, restarts_left: int
) -> bool:
    """OFFERED, LEASED or RUNNING -> QUEUED; False when somebody was faster."""
    return _step(
        tx,
        _held(task, epoch),
        state=int(TaskState.QUEUED),
        tries_left=tries_left,
        restarts_left=restarts_left,
        recalled="",
    )


def recalled(tx: Connection, task: str, epoch: int, reason: str) -> bool:
    """Note that its device is told to hand it back; False when it holds it no longer."""
    return _step(tx, _held(task, epoch), recalled=reason)


def _held(task: str, epoch: int) -> Any:
    return sa.and_(tasks.c.id == task, tasks.c.epoch == epoch, tasks.c.state.in_(_HELD))


def set_terms(tx: Connection, run: str, terms: Terms) -> None:
    """Other terms for what of the run has not ended."""
    mine = sa.and_(tasks.c.run == run, tasks.c.state.not_in(_FINAL))
    _step(tx, mine, terms=asdict(terms))


def of_run(tx: Connection, run: str) -> list[tuple[TaskState, int, Result | None]]:
    """State, rank and result of each task of a run, in the order in which they ended."""
    query = (
        sa.select(tasks.c.state, tasks.c.rank, tasks.c.result)
        .where(tasks.c.run == run)
        .order_by(tasks.c.ended_at, tasks.c.rank)
    )
    return [
        (TaskState(r.state), r.rank, None if r.result is None else parse(Result, r.result))
        for r in tx.execute(query)
    ]


def ended(tx: Connection, device: str | None, result: Result) -> bool:
    """To the result's final state, if (task, epoch, device) is current; else False: refused."""
    return bool(
        _END.run(
            tx,
            id_=result.task,
            epoch_=result.epoch,
            device_=device,
            state_=int(result.state),
            result_=serialise(result),
            ended_at_=time.time(),
        )
    )


def stop_queued(tx: Connection, run: str) -> list[str]:
    """Stop what nobody holds yet."""
    condition = sa.and_(tasks.c.run == run, tasks.c.state == int(TaskState.QUEUED))
    ids = list(tx.execute(sa.select(tasks.c.id).where(condition)).scalars())
    _step(tx, condition, state=int(TaskState.STOPPED), ended_at=time.time())
    return ids


def results(
    tx: Connection, run: str, round_n: int, known: Collection[int] = ()
) -> list[tuple[int, str, Result]]:
    """What the clients of one round have sent, but for those whose answer is known already.

    Returns:
        Client, device, result; ascending by client.
    """
    query = (
        sa.select(tasks.c.client, tasks.c.device, tasks.c.result)
        .where(tasks.c.run == run, tasks.c.round == round_n, tasks.c.result.is_not(None))
        .order_by(tasks.c.client)
    )
    return [
        (r.client, r.device, parse(Result, r.result))
        for r in tx.execute(query)
        if r.client not in known
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one start of a client has brought, in a run that has no rounds."""

    task: str
    start: int
    client: int
    version: int
    result: Result


def uncounted(tx: Connection, run: str, known: Collection[str] = ()) -> list[Answer]:
    """What no version of the model has in it yet, but for tasks that are known; as it came."""
    query = (
        sa.select(tasks.c.id, tasks.c.round, tasks.c.client, tasks.c.version, tasks.c.result)
        .where(
            tasks.c.run == run,
            tasks.c.counted.is_(None),
            tasks.c.version.is_not(None),
            tasks.c.result.is_not(None),
        )
        .order_by(tasks.c.ended_at, tasks.c.round)
    )
    return [
        Answer(
            task=r.id,
            start=r.round,
            client=r.client,
            version=r.version,
            result=parse(Result, r.result),
        )
        for r in tx.execute(query)
        if r.id not in known
    ]


def starts(tx: Connection, run: str) -> int:
    """How many times a client was started in a run that has no rounds."""
    query = sa.select(sa.func.max(tasks.c.round)).where(
        tasks.c.run == run, tasks.c.version.is_not(None)
    )
    return tx.execute(query).scalar() or 0


def lost(task: Task, why: str) -> Result:
    """The end of a task that no machine brought to an end."""
    return Result(
        task=task.id,
        epoch=max(task.epoch, 1),
        state=TaskState.LOST,
        cause=Cause(fault=Fault.MACHINE, message=why),
    )


def cause_json(cause: Cause | None) -> dict[str, Any] | None:
    """A cause as the API and the run's row show it."""
    if cause is None:
        return None
    return {**asdict(cause), "fault": cause.fault.name.lower()}


def _step(tx: Connection, condition: Any, **values: Any) -> bool:
    return bool(tx.execute(tasks.update().where(condition).values(values)).rowcount)
