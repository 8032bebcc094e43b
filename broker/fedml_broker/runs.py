# SPDX-License-Identifier: Apache-2.0
"""Runs: what a person asked for, from its submission to a final state with its cause.

Every word (`launch.py`, `federate.py`) starts its runs here and ends them here, so that a run looks
the same whatever it does.
"""

import re
import secrets
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection
from sqlalchemy.dialects import sqlite

from fedml_broker import audit
from fedml_broker.accounts import User, forget_run_key
from fedml_broker.observe import add_event
from fedml_broker.packages import Uploaded
from fedml_broker.prepared import Prepared, given
from fedml_broker.problems import Problem
from fedml_broker.store import Store
from fedml_broker.tables import (
    artifacts,
    blob_refs,
    clients,
    events,
    metrics,
    params,
    records,
    rounds,
    runs,
    tags,
    tasks,
    tracked,
)
from fedml_broker.tasks import cause_json
from fedml_protocol.cause import Cause
from fedml_protocol.codec import parse
from fedml_protocol.federate import StageSpec
from fedml_protocol.tasks import FINAL, Offer, Result, TaskState

_FINAL_NAMES = [s.name for s in FINAL]
# With every run.
_SUBMITTED = Prepared(
    sa.select(runs.c.tenant, runs.c.user, runs.c.spec).where(runs.c.id == given("id_"))
)
_CREATE = Prepared(
    sqlite.insert(runs).on_conflict_do_nothing(index_elements=["id"]),
    ("id", "tenant", "user", "kind", "name", "spec", "package", "state", "created_at"),
)
_RUNNING = Prepared(
    runs.update()
    .where(runs.c.id == given("id_"), runs.c.state == TaskState.QUEUED.name)
    .values(state=TaskState.RUNNING.name, started_at=given("started_at_"))
)
_END = Prepared(
    runs.update()
    .where(runs.c.id == given("id_"), runs.c.state.not_in(_FINAL_NAMES))
    .values(
        state=given("state_"),
        cause=given("cause_"),
        exit_code=given("exit_code_"),
        ended_at=given("ended_at_"),
    )
    .returning(runs.c.tenant)
)
# The kind of a run that its own program drives: nothing of it is scheduled here.
TRACKED = "tracked"


_ID = re.compile(r"r-[a-z0-9]{8,32}")


def new_id() -> str:
    """An id that sorts by nothing and fits into a topic."""
    return "r-" + secrets.token_hex(5)


def check_new_id(given: str) -> str:
    """The id that a client has chosen for its run, or a new one.

    Raises:
        Problem: 422.
    """
    if given and _ID.fullmatch(given) is None:
        raise Problem(422, "not a run's id", f"{given!r}: r- and 8 to 32 of a-z and 0-9")
    return given or new_id()


class RunFailed(Exception):
    """The run cannot go on; `cause` is for the person who started it."""

    def __init__(self, cause: Cause) -> None:
        super().__init__(cause.message)
        self.cause = cause

    @classmethod
    def too_few(cls, what: str, minimum: int, left: int, first: Cause) -> "RunFailed":
        """Too many clients have failed; the first of them says why."""
        message = f"{what} needs {minimum} updates and can get {left}: {first.message}"
        return cls(replace(first, message=message))


class RunStopped(Exception):
    """Somebody stopped the run."""


# Of a task, for people.
_SHOWN = ("id", "device", "state", "epoch", "round", "client", "rank")


class SubmittedBefore(Exception):
    """This very run is there: whoever asks for it gets its id, and nothing is begun."""

    def __init__(self, run: str) -> None:
        super().__init__(run)
        self.run = run


class Runs:
    """Reading and listing; the steps that change a run are the functions below."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def row(self, run: str) -> dict[str, Any]:
        """The run, as the API shows it.

        Raises:
            Problem: 404.
        """
        query = sa.select(runs).where(runs.c.id == run)
        row = await self._store.read(lambda tx: tx.execute(query).mappings().first())
        if row is None:
            raise Problem(404, "no such run", f"{run!r} is unknown", hint="`fedml run list`")
        return dict(row)

    def submitted(self, user: User, run: str, spec: dict[str, Any]) -> bool:
        """Whether this very run was submitted before: its client has not heard the answer.

        Raises:
            Problem: 409 when another run has the id.
        """
        return _is_same(self._store.find(_SUBMITTED, id_=run), user, run, spec)

    async def of_tenant(self, tenant: str, run: str) -> dict[str, Any]:
        """The run, if it is the tenant's.

        Raises:
            Problem: 404, also for another tenant's.
        """
        row = await self.row(run)
        if row["tenant"] != tenant:
            raise Problem(404, "no such run", f"{run!r} is unknown", hint="`fedml run list`")
        return row

    async def newest(
        self,
        tenant: str,
        *,
        limit: int = 50,
        ended_before: float | None = None,
        ids: Collection[str] | None = None,
        states: Sequence[str] = (),
        name: str = "",
        user: str = "",
        before: str = "",
    ) -> list[dict[str, Any]]:
        """The tenant's runs, newest first, without their specs.

        Args:
            ended_before: Only those that ended before, seconds since 1970.
            ids: Only these.
            name: Only those with this in their name, or with an id that begins with it.
            before: The id of a run: only those that are older, for the next page.
        """
        columns = [c for c in runs.c if c.name != "spec"]
        query = (
            sa.select(*columns)
            .where(runs.c.tenant == tenant)
            .order_by(runs.c.created_at.desc(), runs.c.id.desc())
            .limit(limit)
        )
        if ended_before is not None:
            query = query.where(runs.c.ended_at < ended_before)
        if ids is not None:
            query = query.where(runs.c.id.in_(ids))
        if states:
            query = query.where(runs.c.state.in_(states))
        if name:
            within = runs.c.name.contains(name, autoescape=True)
            query = query.where(sa.or_(within, runs.c.id.startswith(name, autoescape=True)))
        if user:
            query = query.where(runs.c.user == user)
        if before:
            last = sa.select(runs.c.created_at).where(runs.c.id == before).scalar_subquery()
            earlier = sa.and_(runs.c.created_at == last, runs.c.id < before)
            query = query.where(sa.or_(runs.c.created_at < last, earlier))
        return await self._store.read(lambda tx: [dict(r) for r in tx.execute(query).mappings()])

    async def named(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Runs by their ids, without their specs."""
        columns = [c for c in runs.c if c.name != "spec"]
        query = sa.select(*columns).where(runs.c.id.in_(names))
        found = await self._store.read(lambda tx: [dict(r) for r in tx.execute(query).mappings()])
        return {row["id"]: row for row in found}

    async def counts(self, tenant: str) -> dict[str, int]:
        """How many runs of the tenant are in each state."""
        query = (
            sa.select(runs.c.state, sa.func.count())
            .where(runs.c.tenant == tenant)
            .group_by(runs.c.state)
        )
        return await self._store.read(lambda tx: {r[0]: r[1] for r in tx.execute(query)})

    async def open(self, kind: str) -> list[dict[str, Any]]:
        """Runs of a kind that have not ended."""
        query = sa.select(runs).where(runs.c.kind == kind, runs.c.state.not_in(_FINAL_NAMES))
        return await self._store.read(lambda tx: [dict(r) for r in tx.execute(query).mappings()])

    async def over(self, names: Sequence[str]) -> list[str]:
        """Which of these runs have ended, or were never here."""
        going_on = sa.select(runs.c.id).where(
            runs.c.id.in_(names), runs.c.state.not_in(_FINAL_NAMES)
        )
        found = await self._store.read(lambda tx: set(tx.execute(going_on).scalars()))
        return [name for name in names if name not in found]

    async def tasks(self, run: str) -> list[dict[str, Any]]:
        """The tasks of a run, for people."""
        columns = [tasks.c[n] for n in _SHOWN]
        query = (
            sa.select(*columns).where(tasks.c.run == run).order_by(tasks.c.created_at, tasks.c.rank)
        )
        found = await self._store.read(lambda tx: [dict(r) for r in tx.execute(query).mappings()])
        for row in found:
            row["state"] = TaskState(row["state"]).name
        return found

    async def rounds(self, run: str) -> list[dict[str, Any]]:
        """The rounds of a federated run, ascending."""
        query = sa.select(rounds).where(rounds.c.run == run).order_by(rounds.c.round)
        return await self._store.read(lambda tx: [dict(r) for r in tx.execute(query).mappings()])

    async def contributions(self, run: str) -> list[dict[str, Any]]:
        """What each client of a federated run has brought so far, and what it took to have it.

        `sent_bytes` counts models (and what goes with them) as often as a client was given one;
        `examples` and `metrics` are those of what was counted, the latter of its latest answer.
        """
        query = (
            sa.select(tasks.c.client, tasks.c.device, tasks.c.state, tasks.c.epoch)
            .add_columns(tasks.c.offer, tasks.c.result)
            .where(tasks.c.run == run, tasks.c.client.is_not(None))
            .order_by(tasks.c.round)
        )
        return await self._store.read(lambda tx: _contributions(tx.execute(query)))

    async def clients(self, run: str) -> dict[int, str]:
        """Which device is which client of a federated run."""
        query = sa.select(clients.c.client, clients.c.device).where(clients.c.run == run)
        return await self._store.read(lambda tx: {r.client: r.device for r in tx.execute(query)})


def _contributions(rows: Iterable[Any]) -> list[dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for row in rows:
        of = found.setdefault(
            row.client,
            {
                "client": row.client,
                "device": row.device,
                "asked": 0,
                "answered": 0,
                "failed": 0,
                "examples": 0.0,
                "sent_bytes": 0,
                "received_bytes": 0,
                "metrics": {},
            },
        )
        of["asked"] += 1
        spec = parse(Offer, row.offer).spec
        if isinstance(spec, StageSpec) and row.epoch:
            extra = 0 if spec.sent is None else spec.sent.size
            of["sent_bytes"] += row.epoch * (spec.model.size + extra)
        if row.result is None:
            continue
        result = parse(Result, row.result)
        of["received_bytes"] += sum(artifact.blob.size for artifact in result.artifacts)
        if result.state is TaskState.FINISHED:
            of["answered"] += 1
            of["examples"] += result.weight
            of["metrics"] = dict(result.metrics)
        else:
            of["failed"] += 1
    return [found[client] for client in sorted(found)]


def create(
    tx: Connection,
    user: User,
    *,
    run: str,
    kind: str,
    name: str,
    spec: dict[str, Any],
    package: Uploaded | None,
) -> None:
    """Write down a new run, queued.

    Raises:
        SubmittedBefore: A request that came at the same moment has done it.
        Problem: 409 when another run has the id.
    """
    created = _CREATE.run(
        tx,
        id=run,
        tenant=user.tenant,
        user=user.name,
        kind=kind,
        name=name,
        spec=spec,
        package=None if package is None else msgspec.to_builtins(package.manifest),
        state=TaskState.QUEUED.name,
        created_at=time.time(),
    )
    if not created and _is_same(_SUBMITTED.first(tx, id_=run), user, run, spec):
        raise SubmittedBefore(run)
    if package is not None:
        refer_all(tx, package.blobs, f"run/{run}/package")
    add_event(tx, run, "state", {"state": TaskState.QUEUED.name})
    # Not the spec: commands, environment and configuration may hold somebody's secrets.
    sha256 = None if package is None else package.manifest.sha256
    facts = {"kind": kind, "name": name, "package": sha256}
    audit.note(tx, user.tenant, audit.user(user.name), "run.submit", run, **facts)


def _is_same(row: tuple[Any, ...] | None, user: User, run: str, spec: dict[str, Any]) -> bool:
    """Whether it is this very run that has the id.

    Raises:
        Problem: 409 it is another one.
    """
    if row is None:
        return False
    if row != (user.tenant, user.name, spec):
        raise Problem(409, "this run's id is taken", run, hint="leave it out: one is chosen")
    return True


def running(tx: Connection, run: str) -> None:
    """The run has begun to do something; again is harmless."""
    if _RUNNING.run(tx, id_=run, started_at_=time.time()):
        add_event(tx, run, "state", {"state": TaskState.RUNNING.name})


def end(
    tx: Connection,
    run: str,
    state: TaskState,
    *,
    cause: Cause | None = None,
    exit_code: int | None = None,
) -> bool:
    """The run's final state with its cause; False when it had ended before."""
    told = cause_json(cause)
    row = _END.first(
        tx,
        id_=run,
        state_=state.name,
        cause_=told,
        exit_code_=exit_code,
        ended_at_=time.time(),
    )
    if row is not None:
        forget_run_key(tx, run)
        data = {"state": state.name, "cause": told, "exit_code": exit_code}
        add_event(tx, run, "state", data)
        # Not the cause's text: a task's traceback shows what the task had in its hands.
        fault = None if cause is None else cause.fault.name.lower()
        facts = {"state": state.name, "fault": fault, "exit_code": exit_code}
        audit.note(tx, row[0], audit.BROKER, "run.end", run, **facts)
    return row is not None


def reopen(tx: Connection, run: str, by: str) -> bool:
    """A tracked run goes on after its end: its own program says so; False when it had not ended."""
    changed = tx.execute(
        runs.update()
        .where(runs.c.id == run, runs.c.kind == TRACKED, runs.c.state.in_(_FINAL_NAMES))
        .values(state=TaskState.RUNNING.name, ended_at=None, cause=None, stopped_by=None)
    ).rowcount
    if changed:
        add_event(tx, run, "state", {"state": TaskState.RUNNING.name})
        audit.note(tx, _tenant(tx, run), audit.user(by), "run.reopen", run)
    return bool(changed)


def stop_asked(tx: Connection, run: str, by: str, *, itself: bool = False) -> bool:
    """Note who stopped the run first; False when it has ended or was asked before.

    Args:
        by: As people are told.
        itself: A job of the run did it.
    """
    changed = tx.execute(
        runs.update()
        .where(runs.c.id == run, runs.c.state.not_in(_FINAL_NAMES), runs.c.stopped_by.is_(None))
        .values(stopped_by=by)
    ).rowcount
    if changed:
        add_event(tx, run, "stopping", {"by": by})
        actor = audit.run(run) if itself else audit.user(by)
        audit.note(tx, _tenant(tx, run), actor, "run.stop", run)
    return bool(changed)


def remove(tx: Connection, run: str, by: str) -> list[str]:
    """Forget a run that has ended; the blobs that nobody needs now. Again is harmless.

    What a device may still report of it is acknowledged and changes nothing.
    """
    row = tx.execute(sa.select(runs).where(runs.c.id == run)).first()
    if row is not None:
        facts = {"kind": row.kind, "name": row.name, "of": row.user, "state": row.state}
        audit.note(tx, row.tenant, audit.user(by), "run.remove", run, **facts)
    recorded = (metrics, params, tags, artifacts, records, tracked)
    for table in (events, rounds, clients, tasks, *recorded):
        tx.execute(table.delete().where(table.c.run == run))
    tx.execute(runs.delete().where(runs.c.id == run))
    return release(tx, f"run/{run}")


def _tenant(tx: Connection, run: str) -> str:
    return str(tx.execute(sa.select(runs.c.tenant).where(runs.c.id == run)).scalar_one())


# ---------------------------------------------------------------------- blobs of a run


def refer(tx: Connection, sha256: str, owner: str) -> None:
    """Keep a blob as long as `owner` is there; again is harmless."""
    refer_all(tx, (sha256,), owner)


def refer_all(tx: Connection, blobs: Iterable[str], owner: str) -> None:
    """Keep blobs as long as `owner` is there; again is harmless."""
    if not (blobs := list(blobs)):
        return
    kept = set(
        tx.execute(sa.select(blob_refs.c.sha256).where(blob_refs.c.owner == owner)).scalars()
    )
    if new := [{"sha256": sha256, "owner": owner} for sha256 in {*blobs} - kept]:
        tx.execute(blob_refs.insert(), new)


def release(tx: Connection, owner: str) -> list[str]:
    """Drop what `owner` and everything below it refers to; the blobs that nobody needs now."""
    mine = sa.or_(blob_refs.c.owner == owner, blob_refs.c.owner.startswith(owner + "/"))
    hashes = sa.select(blob_refs.c.sha256).where(mine)
    others = sa.select(blob_refs.c.sha256).where(blob_refs.c.sha256.in_(hashes), sa.not_(mine))
    idle = set(tx.execute(hashes).scalars()) - set(tx.execute(others).scalars())
    tx.execute(blob_refs.delete().where(mine))
    return sorted(idle)
