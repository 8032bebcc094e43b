# SPDX-License-Identifier: Apache-2.0
"""Workflows: jobs and federated runs that wait for each other, carried out by the broker.

A workflow is submitted once, with all that its steps need; who submitted it may go. `walk.py` says
what is done when, `steps.py` keeps it, `step_kinds.py` is what a step can be, and `inputs.py` hands
on what steps leave.
"""

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection

from fedml_broker import audit, steps
from fedml_broker.accounts import Accounts, User
from fedml_broker.blobs import Blobs
from fedml_broker.inputs import Left
from fedml_broker.observe import Observer, add_event
from fedml_broker.packages import Uploaded
from fedml_broker.problems import Problem
from fedml_broker.runs import Runs, refer_all, release
from fedml_broker.step_kinds import Kind, StepBody, body_of, graph_of, kind_of
from fedml_broker.steps import Step
from fedml_broker.store import Store
from fedml_broker.tables import events, workflow_steps, workflows
from fedml_broker.walk import Walker
from fedml_protocol.workflow import StepState, again

log = logging.getLogger(__name__)

_ID = re.compile(r"w-[a-z0-9]{8,32}")
_MAX_NAME = 100


class WorkflowRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A workflow, as `fedml workflow run` sends it.

    A client that chooses the id of its `workflow` may ask again until it is answered.
    """

    name: str
    steps: list[StepBody]
    workflow: str = ""


class ResumeBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Another try; with `steps` in place of those that it had."""

    steps: list[StepBody] | None = None


class Workflows:
    """Every workflow; a walker for each that has not ended."""

    def __init__(
        self,
        store: Store,
        accounts: Accounts,
        observer: Observer,
        blobs: Blobs,
        runs: Runs,
        kinds: Mapping[str, Kind],
        stop_run: Callable[[dict[str, Any], str], Awaitable[None]],
        waiting: Callable[[str], str],
    ) -> None:
        """
        Args:
            stop_run: Ends a run (its row) in the name of a user.
            waiting: What a run waits for, in words.
        """
        self.store = store
        self.observer = observer
        self.blobs = blobs
        self.runs = runs
        self._accounts = accounts
        self._kinds = kinds
        self._stop_run = stop_run
        self._waiting = waiting
        self._walkers: dict[str, Walker] = {}
        self._of_run: dict[str, str] = {}  # the workflows of the runs at work
        self._walking: dict[str, asyncio.Task[None]] = {}
        # Called with the final state of each try.
        self.on_ended: Callable[[StepState], None] = lambda state: None
        observer.on_change.append(self._heard)

    # ------------------------------------------------------------------ what people ask for

    async def submit(self, user: User, request: WorkflowRequest) -> str:
        """Take a workflow; its id.

        Raises:
            Problem: 422 its steps cannot be put in an order, or one of them cannot run.
        """
        if request.workflow and _ID.fullmatch(request.workflow) is None:
            raise Problem(422, "not a workflow's id", f"{request.workflow!r}")
        if not 0 < len(request.name) <= _MAX_NAME or not request.name.isprintable():
            raise Problem(422, "not the name of a workflow", repr(request.name[:_MAX_NAME]))
        workflow = request.workflow or "w-" + secrets.token_hex(5)
        graph_of(request.steps)
        asked = {body.name: body for body in request.steps}
        uploaded = await self._checked(user, request.steps)
        now = time.time()

        def commit(tx: Connection) -> bool:
            if _is_there(tx, user, workflow, asked):
                return False
            row = {
                "id": workflow,
                "tenant": user.tenant,
                "user": user.name,
                "name": request.name,
                "state": StepState.RUNNING,
                "tries": 1,
                "created_at": now,
                "started_at": now,
            }
            tx.execute(workflows.insert(), row)
            for position, (name, step) in enumerate(asked.items()):
                steps.insert(tx, workflow, position, name, msgspec.to_builtins(step))
            _keep(tx, workflow, uploaded)
            facts = {"name": request.name, "steps": ", ".join(asked)}
            who = audit.user(user.name)
            audit.note(tx, user.tenant, who, "workflow.submit", workflow, **facts)
            return True

        new = await self.store.write(commit)
        self._release(uploaded, user)
        if new:
            self._walk(workflow)
        return workflow

    async def resume(self, user: User, workflow: str, body: ResumeBody) -> dict[str, Any]:
        """Another try: what has not finished runs again, with what was changed and hangs on it.

        Returns:
            `again`: the steps that run; none: there is nothing to be done, and nothing is.

        Raises:
            Problem: 404; 403 it is another user's; 409 it has not ended; 422 as for `submit`.
        """
        row, its = await self.of_tenant(user.tenant, workflow)
        if row["user"] != user.name and not user.may("admin"):
            raise Problem(
                403,
                f"the workflow {row['name']} is {row['user']}'s",
                "who has submitted it, or an admin, runs it again",
                hint=f"ask {row['user']}, or submit it as your own: `fedml workflow run`",
            )
        bodies = [body_of(step) for step in its] if body.steps is None else body.steps
        graph = graph_of(bodies)
        asked, known = {body.name: body for body in bodies}, {step.name: step for step in its}
        # The files of a step are in its definition, as the hash of its package.
        changed = [n for n, b in asked.items() if n in known and body_of(known[n]) != b]
        names = again(graph, {name: step.state for name, step in known.items()}, changed)
        workflow = row["id"]
        if row["ended_at"] is None:
            raise _goes_on(row)
        if not names:
            return {"workflow": workflow, "again": []}
        uploaded = await self._checked(user, [b for b in bodies if b.name in names])

        def commit(tx: Connection) -> list[str]:
            # As it was looked at: nobody else has begun another try meanwhile.
            as_seen = workflows.c.ended_at.is_not(None), workflows.c.tries == row["tries"]
            opened = (
                workflows.update()
                .where(workflows.c.id == workflow, *as_seen)
                .values(
                    state=StepState.RUNNING,
                    user=user.name,
                    tries=workflows.c.tries + 1,
                    stopped_by=None,
                    started_at=time.time(),
                    ended_at=None,
                )
            )
            if not tx.execute(opened).rowcount:
                raise _goes_on(row)
            add_event(tx, workflow, "again", {"steps": names})
            idle: list[str] = []
            for gone in known.keys() - asked.keys():
                idle += steps.remove(tx, workflow, gone)
            for position, (name, step) in enumerate(asked.items()):
                definition = msgspec.to_builtins(step)
                if name not in known:
                    steps.insert(tx, workflow, position, name, definition)
                    continue
                steps.redefine(tx, workflow, position, name, definition)
                if name in names:
                    idle += steps.wait_again(tx, workflow, name)
            _keep(tx, workflow, uploaded)
            facts = {"name": row["name"], "again": ", ".join(names)}
            audit.note(tx, user.tenant, audit.user(user.name), "workflow.resume", workflow, **facts)
            return idle

        idle = await self.store.write(commit)
        self._release(uploaded, user)
        await self._discard(idle)
        self._walk(workflow)
        return {"workflow": workflow, "again": names}

    async def stop(self, user: User, workflow: str) -> dict[str, Any]:
        """End a workflow, and with it the runs of its steps. Again is harmless.

        Raises:
            Problem: 404.
        """
        row, _ = await self.of_tenant(user.tenant, workflow)

        def commit(tx: Connection) -> None:
            asked = workflows.c.stopped_by.is_(None), workflows.c.ended_at.is_(None)
            changed = tx.execute(
                workflows.update()
                .where(workflows.c.id == row["id"], *asked)
                .values(stopped_by=user.name)
            ).rowcount
            if changed:
                add_event(tx, row["id"], "stopping", {"by": user.name})
                who = audit.user(user.name)
                audit.note(tx, user.tenant, who, "workflow.stop", row["id"], name=row["name"])

        await self.store.write(commit)
        self._tell(row["id"])
        return {"workflow": row["id"], "state": row["state"]}

    async def remove(self, user: User, workflow: str) -> int:
        """Forget a workflow that has ended; its runs stay. How many bytes are free now.

        Raises:
            Problem: 404; 409 it has not ended.
        """
        row, _ = await self.of_tenant(user.tenant, workflow)

        def commit(tx: Connection) -> list[str]:
            gone = workflows.c.id == row["id"], workflows.c.ended_at.is_not(None)
            if not tx.execute(workflows.delete().where(*gone)).rowcount:
                raise _goes_on(row)
            facts = {"name": row["name"], "of": row["user"], "state": row["state"]}
            who = audit.user(user.name)
            audit.note(tx, user.tenant, who, "workflow.remove", row["id"], **facts)
            tx.execute(events.delete().where(events.c.run == row["id"]))
            of_it = workflow_steps.c.workflow == row["id"]
            tx.execute(workflow_steps.delete().where(of_it))
            return release(tx, f"workflow/{row['id']}")

        return await self._discard(await self.store.write(commit))

    async def newest(self, tenant: str, limit: int) -> list[dict[str, Any]]:
        """The tenant's workflows, newest first, each with the states of its steps by name."""
        query = (
            sa.select(workflows)
            .where(workflows.c.tenant == tenant)
            .order_by(workflows.c.created_at.desc())
            .limit(limit)
        )

        def read(tx: Connection) -> list[dict[str, Any]]:
            found = [dict(row) for row in tx.execute(query).mappings()]
            return [
                {**row, "steps": {s.name: s.state for s in steps.load(tx, row["id"])}}
                for row in found
            ]

        return await self.store.read(read)

    async def show(self, tenant: str, workflow: str) -> dict[str, Any]:
        """One workflow and its steps, by its id or by its name (the newest).

        Raises:
            Problem: 404.
        """
        row, its = await self.of_tenant(tenant, workflow)
        return self._shown(row, its)

    async def row(self, workflow: str) -> dict[str, Any]:
        """The same, as `Observer.follow` asks for it."""
        return self._shown(*await self.read(workflow))

    async def of_tenant(self, tenant: str, workflow: str) -> tuple[dict[str, Any], list[Step]]:
        """A workflow by its id or name, if it is the tenant's.

        Raises:
            Problem: 404, also for another tenant's.
        """
        named = sa.or_(workflows.c.id == workflow, workflows.c.name == workflow)
        query = (
            sa.select(workflows.c.id)
            .where(workflows.c.tenant == tenant, named)
            .order_by((workflows.c.id == workflow).desc(), workflows.c.created_at.desc())
            .limit(1)
        )
        found = await self.store.read(lambda tx: tx.execute(query).scalar())
        if found is None:
            raise _unknown(workflow)
        return await self.read(found)

    async def read(self, workflow: str) -> tuple[dict[str, Any], list[Step]]:
        """A workflow and its steps. `since`: the event with which its latest try began.

        Raises:
            Problem: 404.
        """
        query = sa.select(workflows).where(workflows.c.id == workflow)
        again = events.c.run == workflow, events.c.kind == "again"
        newest = sa.select(sa.func.max(events.c.id)).where(*again)

        def read(tx: Connection) -> tuple[dict[str, Any], list[Step]] | None:
            row = tx.execute(query).mappings().first()
            if row is None:
                return None
            since = tx.execute(newest).scalar() if row["tries"] > 1 else 0
            return {**row, "since": since or 0}, steps.load(tx, workflow)

        found = await self.store.read(read)
        if found is None:
            raise _unknown(workflow)
        return found

    @property
    def open(self) -> int:
        """How many have not ended."""
        return len(self._walkers)

    def waiting(self, workflow: str) -> str:
        """What its steps wait for, a line each; empty when none does."""
        walker = self._walkers.get(workflow)
        waits = {} if walker is None else {n: self._waiting(r) for r, n in walker.runs.items()}
        return "\n".join(f"{name}: {why}" for name, why in waits.items() if why)

    # ------------------------------------------------------------------ what walkers ask for

    async def submit_run(self, row: Mapping[str, Any], step: Step, left: Left) -> None:
        """Submit the run of a step; again is harmless.

        Args:
            left: What the steps that it needs have left.

        Raises:
            Problem: It cannot be any more.
            Missing: Something that it was to get was not left.
        """
        user = await self._accounts.user(row["user"])
        if user is None or not user.may("member"):
            raise Problem(
                403, f"{row['user']} starts no runs any more", hint="somebody else may resume it"
            )
        body = body_of(step)
        # As people find it in lists of runs.
        name = f"{row['name']}.{step.name}"
        await self._kinds[kind_of(body)].submit(user, step.run, name, body, left)

    async def stop_run(self, run: str, by: str) -> None:
        """End the run of a step."""
        found = (await self.runs.named([run])).get(run)
        if found is not None:
            await self._stop_run(found, by)

    # ------------------------------------------------------------------ small print

    async def take_up(self) -> None:
        """A walker for every workflow that has not ended."""
        query = sa.select(workflows.c.id).where(workflows.c.state == StepState.RUNNING)
        for workflow in await self.store.read(lambda tx: list(tx.execute(query).scalars())):
            self._walk(workflow)

    async def close(self) -> None:
        """Leave every workflow where it is; `take_up` goes on."""
        for task in self._walking.values():
            task.cancel()
        await asyncio.gather(*self._walking.values(), return_exceptions=True)

    def _walk(self, workflow: str) -> None:
        walker = Walker(self, workflow)
        self._walkers[workflow] = walker
        walked = self._walked(walker, workflow)
        task = asyncio.get_running_loop().create_task(walked, name=f"workflow.{workflow}")
        self._walking[workflow] = task

        def gone(task: asyncio.Task[None]) -> None:
            self.at_work(workflow, walker, {})
            if self._walkers.get(workflow) is walker:  # not that of the next try
                del self._walkers[workflow], self._walking[workflow]
            if not task.cancelled() and task.exception() is not None:
                log.error("the walker of %s broke", workflow, exc_info=task.exception())

        task.add_done_callback(gone)

    async def _walked(self, walker: Walker, workflow: str) -> None:
        await walker.walk()
        query = sa.select(workflows.c.state).where(workflows.c.id == workflow)
        state = await self.store.read(lambda tx: tx.execute(query).scalar())
        if state is not None:  # or else it has been deleted
            self.on_ended(StepState(state))

    def at_work(self, workflow: str, walker: Walker, runs: Mapping[str, str]) -> None:
        """The runs of a workflow's steps at this moment, each with its step."""
        for run in walker.runs:
            self._of_run.pop(run, None)
        walker.runs = runs
        self._of_run |= dict.fromkeys(runs, workflow)

    def waits(self, run: str) -> None:
        """A run still waits, for other reasons it may be: that moves no step."""
        if (workflow := self._of_run.get(run)) is not None:
            self.observer.wake(workflow)

    def _heard(self, run: str) -> None:
        """A run has changed: the workflow whose step it is may go on."""
        if (workflow := self._of_run.get(run)) is not None:
            self._tell(workflow)

    def _tell(self, workflow: str) -> None:
        if (walker := self._walkers.get(workflow)) is not None:
            walker.told.set()
        self.observer.ring(workflow)

    def _shown(self, row: dict[str, Any], its: Sequence[Step]) -> dict[str, Any]:
        """For people. The definitions may hold secrets, and stay here."""
        shown = [
            {
                "name": step.name,
                "kind": kind_of(body_of(step)),
                "needs": step.definition["needs"],
                "when": step.definition["when"],
                "state": step.state,
                "run": step.run,
                "runs": [run for run in step.runs if run],
                "cause": step.cause,
                "waiting": self._waiting(step.run) if step.state is StepState.RUNNING else "",
                "outputs": step.outputs.shown(),
                "started_at": step.started_at,
                "ended_at": step.ended_at,
            }
            for step in its
        ]
        return {**row, "waiting": self.waiting(row["id"]), "steps": shown}

    async def _checked(self, user: User, bodies: Sequence[StepBody]) -> list[Uploaded]:
        """The packages of steps that could all run at this moment.

        Raises:
            Problem: Of the first that could not.
        """
        found = []
        for body in bodies:
            try:
                package = await self._kinds[kind_of(body)].check(user, body)
            except Problem as error:
                title = f"the step {body.name}: {error.title}"
                raise Problem(error.status, title, error.detail, error.hint) from error
            found += [] if package is None else [package]
        return found

    def _release(self, uploaded: Iterable[Uploaded], user: User) -> None:
        for package in uploaded:
            package.release(self.blobs, f"u/{user.name}")

    async def _discard(self, idle: Iterable[str]) -> int:
        freed = 0
        for sha256 in idle:
            size = self.blobs.size(sha256) or 0
            freed += size if await self.blobs.discard(sha256) else 0
        return freed


def _keep(tx: Connection, workflow: str, uploaded: Iterable[Uploaded]) -> None:
    refer_all(tx, {b for u in uploaded for b in u.blobs}, f"workflow/{workflow}/packages")


def _is_there(tx: Connection, user: User, workflow: str, asked: Mapping[str, StepBody]) -> bool:
    """Whether this very workflow was submitted before: its client has not heard the answer.

    Raises:
        Problem: 409 another one has the id.
    """
    row = tx.execute(sa.select(workflows).where(workflows.c.id == workflow)).first()
    if row is None:
        return False
    same = {step.name: body_of(step) for step in steps.load(tx, workflow)} == asked
    if (row.tenant, row.user) != (user.tenant, user.name) or not same:
        raise Problem(409, "this workflow's id is taken", workflow, "leave it out: one is chosen")
    return True


def _unknown(workflow: str) -> Problem:
    return Problem(404, "no such workflow", f"{workflow!r} is unknown", "`fedml workflow list`")


def _goes_on(row: Mapping[str, Any]) -> Problem:
    return Problem(
        409,
        f"the workflow {row['name']} has not ended",
        f"{row['id']} is {row['state']}",
        hint=f"`fedml workflow stop {row['id']}` ends it",
    )
