# SPDX-License-Identifier: Apache-2.0
"""Rounds in the store: each function is one step, to be run inside a transaction.

Round 0 is the first model. A round with `ended_at` is done: its model, the algorithm's state and
the metrics are there, and the updates that made it are not needed any more. A round of several
stages is a turn for each of them; between two it holds what the last one has made. So is a round in
which groups of clients have rounds of their own: between two turns it holds the models of the
groups. A run that is asynchronous has versions of its model, not rounds: they are kept as rounds
all the same.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from fedml_broker import runs
from fedml_broker.observe import add_event
from fedml_broker.tables import blob_refs, clients, rounds, tasks
from fedml_protocol.blob import Blob
from fedml_protocol.tasks import FINAL, TaskState


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What the members of a group start their next turn from; no model: that of the whole."""

    model: Blob | None
    sent: Blob | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What a turn has made.

    Attributes:
        model: None in the middle of a round of groups: it is the one from before.
        groups: What groups that have rounds of their own go on with, by number.
    """

    model: Blob | None
    state: Blob | None = None
    sent: Blob | None = None
    groups: Mapping[int, Start] = field(default_factory=dict)

    def for_clients(self) -> Iterator[Blob]:
        """What clients are sent beside the model of the whole."""
        theirs = [blob for start in self.groups.values() for blob in (start.model, start.sent)]
        yield from (blob for blob in (self.sent, *theirs) if blob is not None)

    def blobs(self) -> Iterator[Blob]:
        """All of it."""
        yield from (blob for blob in (self.model, self.state) if blob is not None)
        yield from self.for_clients()

    def columns(self) -> dict[str, Any]:
        """As the table has it."""
        groups = {
            str(g): {"model": _json(start.model), "sent": _json(start.sent)}
            for g, start in self.groups.items()
        }
        return {
            "model": _json(self.model),
            "state": _json(self.state),
            "sent": _json(self.sent),
            "groups": groups,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One round, as the driver needs it.

    Attributes:
        clients: Who was asked, in its latest stage.
        kept: What it made; while it is open, what the last of its stages made.
        stage: How many of its stages are done, while it is open.
    """

    number: int
    clients: tuple[int, ...]
    kept: Kept
    done: bool
    stage: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """How many have answered so far in a round."""

    replies: int = 0
    refused: int = 0
    received_bytes: int = 0


def load(tx: Connection, run: str) -> list[Round]:
    """The rounds of a run, ascending; only the last may be open."""
    query = sa.select(rounds).where(rounds.c.run == run).order_by(rounds.c.round)
    return [
        Round(
            number=row.round,
            clients=tuple(row.clients),
            kept=_kept(row),
            done=row.ended_at is not None,
            stage=row.stage,
        )
        for row in tx.execute(query)
    ]


def begin(
    tx: Connection, run: str, number: int, asked: Sequence[int], *, count: int | None = None
) -> None:
    """Open a round, in the transaction that queues its tasks.

    Args:
        count: How many updates it waits for, where it asks no clients of its own.
    """
    tx.execute(
        rounds.insert().values(
            run=run, round=number, clients=list(asked), metrics={}, started_at=time.time()
        )
    )
    clients = len(asked) if count is None else count
    add_event(tx, run, "round_begins", {"round": number, "clients": clients})


def stage_done(
    tx: Connection,
    run: str,
    number: int,
    *,
    stage: int,
    clients: Sequence[int],
    kept: Kept,
    turn: int,
) -> list[str]:
    """Keep what a stage made, in the transaction that queues the next one's tasks.

    Args:
        stage: How many are done now.
        clients: Who serves the next one.
        turn: The one whose updates are not needed any more.

    Returns:
        The blobs that nobody needs any more.
    """
    owner = f"run/{run}/stage/{number}"
    for blob in kept.blobs():
        runs.refer(tx, blob.sha256, f"{owner}/{stage}")
    tx.execute(
        rounds.update()
        .where(rounds.c.run == run, rounds.c.round == number)
        .values(clients=list(clients), stage=stage, **kept.columns())
    )
    idle = runs.release(tx, f"run/{run}/updates/{turn}")
    return [*idle, *runs.release(tx, f"{owner}/{stage - 1}")]


def finish(
    tx: Connection,
    run: str,
    number: int,
    kept: Kept,
    *,
    metrics: Mapping[str, float],
    tally: Tally,
    turns: Sequence[int],
    counted: Sequence[str] = (),
) -> list[str]:
    """Close a round with its model; the blobs that nobody needs any more.

    Args:
        turns: Whose updates are in it; the first model has none.
        counted: Of a version of an asynchronous run, the tasks that are in it or were refused.
    """
    if kept.model is None:
        raise ValueError(f"round {number} has no model")
    runs.refer(tx, kept.model.sha256, f"run/{run}/model/{number}")
    if kept.state is not None:
        runs.refer(tx, kept.state.sha256, f"run/{run}/state/{number}")
    for blob in kept.for_clients():
        runs.refer(tx, blob.sha256, f"run/{run}/sent/{number}")
    now = time.time()
    tx.execute(
        rounds.update()
        .where(rounds.c.run == run, rounds.c.round == number)
        .values(metrics=dict(metrics), ended_at=now, **kept.columns())
    )
    data = {
        "round": number,
        "metrics": dict(metrics),
        "model": kept.model.sha256,
        "replies": tally.replies,
        "refused": tally.refused,
        "received_bytes": tally.received_bytes,
    }
    add_event(tx, run, "round_ends", data)
    idle = []
    for turn in turns:
        idle += runs.release(tx, f"run/{run}/updates/{turn}")
    idle += runs.release(tx, f"run/{run}/stage/{number}")
    # A model is kept for every round; what the algorithm needs is the latest.
    idle += runs.release(tx, f"run/{run}/state/{number - 1}")
    oldest = number
    if counted:
        mine = sa.and_(tasks.c.run == run, tasks.c.id.in_(counted))
        tx.execute(tasks.update().where(mine).values(counted=number))
        oldest = _oldest_at_work(tx, run, number)
    for old in _sent_before(tx, run, oldest):
        idle += runs.release(tx, f"run/{run}/sent/{old}")
    return idle


def _sent_before(tx: Connection, run: str, number: int) -> list[int]:
    owner = f"run/{run}/sent/"
    query = sa.select(blob_refs.c.owner).where(blob_refs.c.owner.startswith(owner))
    kept = [int(name.removeprefix(owner)) for name in tx.execute(query).scalars()]
    return sorted(n for n in kept if n < number)


def _oldest_at_work(tx: Connection, run: str, newest: int) -> int:
    """The oldest version that a client of an asynchronous run still works from."""
    query = sa.select(sa.func.min(tasks.c.version)).where(
        tasks.c.run == run, tasks.c.state.not_in([int(s) for s in FINAL])
    )
    oldest = tx.execute(query).scalar()
    return newest if oldest is None else oldest


def add_metrics(tx: Connection, run: str, number: int, metrics: Mapping[str, float]) -> None:
    """What became known later of a round's model: the devices evaluate it in the next one."""
    if not metrics:
        return
    where = sa.and_(rounds.c.run == run, rounds.c.round == number)
    known = tx.execute(sa.select(rounds.c.metrics).where(where)).scalar() or {}
    tx.execute(rounds.update().where(where).values(metrics={**known, **metrics}))
    add_event(tx, run, "metrics", {"round": number, "metrics": dict(metrics)})


def stop_waiting(tx: Connection, run: str, turn: int | None = None) -> list[str]:
    """Stop the tasks of a turn (None: of all) that have not answered: it goes on without them."""
    condition = sa.and_(
        tasks.c.run == run,
        sa.true() if turn is None else tasks.c.round == turn,
        tasks.c.state.not_in([int(s) for s in FINAL]),
    )
    ids = list(tx.execute(sa.select(tasks.c.id).where(condition)).scalars())
    tx.execute(
        tasks.update().where(condition).values(state=int(TaskState.STOPPED), ended_at=time.time())
    )
    return ids


def set_clients(tx: Connection, run: str, devices: Sequence[str]) -> None:
    """Which device is which client, for the whole run."""
    tx.execute(
        clients.insert(),
        [{"run": run, "client": i, "device": device} for i, device in enumerate(devices)],
    )


def mean_metrics(reports: Sequence[Mapping[str, float]], prefix: str) -> dict[str, float]:
    """Metrics under a prefix, averaged over clients by their `{prefix}examples`.

    ``{"eval.examples": 10, "eval.accuracy": 0.5}`` of two clients gives ``{"accuracy": …}`` with
    the prefix taken off, and ``examples`` added up. What a client says of no examples counts for
    nothing, also where it is NaN.
    """
    totals: dict[str, float] = {}
    weights: dict[str, float] = {}
    examples = 0.0
    for report in reports:
        weight = report.get(prefix + "examples", 0.0)
        examples += weight
        for name, value in report.items() if weight else ():
            if name.startswith(prefix) and name != prefix + "examples":
                key = name.removeprefix(prefix)
                totals[key] = totals.get(key, 0.0) + value * weight
                weights[key] = weights.get(key, 0.0) + weight
    means = {key: totals[key] / weights[key] for key in sorted(totals)}
    return {**means, "examples": examples} if means else {}


def _kept(row: Any) -> Kept:
    groups = {
        int(g): Start(model=_blob(start["model"]), sent=_blob(start["sent"]))
        for g, start in row.groups.items()
    }
    return Kept(model=_blob(row.model), state=_blob(row.state), sent=_blob(row.sent), groups=groups)


def _blob(value: Mapping[str, Any] | None) -> Blob | None:
    return None if value is None else Blob(sha256=value["sha256"], size=value["size"])


def _json(blob: Blob | None) -> dict[str, Any] | None:
    return None if blob is None else {"sha256": blob.sha256, "size": blob.size}
