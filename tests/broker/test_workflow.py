# SPDX-License-Identifier: Apache-2.0
"""Workflows on a real store: dying before or after any write, each step still runs once."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from fedml_broker import runs, walk
from fedml_broker.accounts import Accounts, User
from fedml_broker.blobs import Blobs
from fedml_broker.inputs import Left
from fedml_broker.launch import LaunchRequest
from fedml_broker.observe import Observer
from fedml_broker.packages import Uploaded
from fedml_broker.problems import Problem
from fedml_broker.runs import Runs
from fedml_broker.step_kinds import StepBody
from fedml_broker.store import Store, StoreUnavailable, Work
from fedml_broker.tables import DEFAULT_TENANT
from fedml_broker.workflow import ResumeBody, WorkflowRequest, Workflows
from fedml_protocol.cause import Cause, Fault
from fedml_protocol.tasks import TaskState
from fedml_protocol.workflow import When

ANN = User(name="ann", tenant=DEFAULT_TENANT, role="member")


class Dies:
    """A store whose process dies at its nth write: before it, or when it is on the disk."""

    def __init__(self, store: Store, n: int, *, after: bool) -> None:
        self._store = store
        self._left = n
        self._after = after

    async def read(self, work: Work[Any]) -> Any:
        return await self._store.read(work)

    async def write(self, work: Work[Any]) -> Any:
        self._left -= 1
        if self._left == 0 and not self._after:
            raise asyncio.CancelledError
        done = await self._store.write(work)
        if self._left <= 0:
            raise asyncio.CancelledError
        return done


class Full:
    """A store that refuses every other write, as a disk does on which there is hardly room."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._full = False

    async def read(self, work: Work[Any]) -> Any:
        return await self._store.read(work)

    async def write(self, work: Work[Any]) -> Any:
        self._full = not self._full
        if self._full:
            raise StoreUnavailable("database or disk is full")
        return await self._store.write(work)


class Jobs:
    """A kind of step whose runs end at once, as the command says: `true`, or `false`."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.begun: list[str] = []
        self.broken = False

    async def check(self, user: User, body: StepBody) -> Uploaded | None:
        if body.job is not None and body.job.command == "never":
            raise Problem(422, "no machine can ever run this")
        return None

    async def submit(self, user: User, run: str, name: str, body: StepBody, left: Left) -> None:
        assert body.job is not None
        if self.broken:
            raise RuntimeError("a mistake of ours")
        good = body.job.command == "true"

        def commit(tx: Any) -> bool:
            spec = {"name": name}
            runs.create(tx, user, run=run, kind="launch", name=name, spec=spec, package=None)
            cause = None if good else Cause(fault=Fault.TASK, message="it said false")
            state = TaskState.FINISHED if good else TaskState.FAILED
            return runs.end(tx, run, state, cause=cause)

        with contextlib.suppress(runs.SubmittedBefore):
            if await self.store.write(commit):
                self.begun.append(body.name)


class Yard:
    """A store and all that workflows need; `workflows` are those of one process."""

    def __init__(self, folder: Path) -> None:
        self.store = Store.open(folder / "broker.db")
        self.blobs = Blobs(folder / "blobs", reserve_bytes=0)
        self.accounts = Accounts(self.store, url="https://b:1", ca_sha256=bytes(32))
        self.observer = Observer(self.store, folder / "logs")
        self.jobs = Jobs(self.store)

    def workflows(self, store: Any = None) -> Workflows:
        async def stop_run(row: dict[str, Any], by: str) -> None:
            raise AssertionError("nothing is stopped here")

        store = store or self.store
        runs_ = Runs(self.store)
        kinds = {"job": self.jobs}
        return Workflows(
            store, self.accounts, self.observer, self.blobs, runs_, kinds, stop_run, lambda run: ""
        )


@pytest.fixture
async def yard(tmp_path: Path) -> AsyncIterator[Yard]:
    yard = Yard(tmp_path)
    await yard.accounts.create_user("ann", "member", by="cli")
    yield yard
    yard.blobs.close()
    yard.store.close()


def step(name: str, *needs: str, says: str = "true", when: When = When.FINISHED) -> StepBody:
    return StepBody(name=name, job=LaunchRequest(command=says), needs=list(needs), when=when)


def request(name: str) -> WorkflowRequest:
    """A fork whose one side fails, and what runs because of that."""
    steps = [
        step("a"),
        step("b", "a"),
        step("c", "a", says="false"),
        step("d", "b", "c"),
        step("e", "c", when=When.FAILED),
        step("f", "d", when=When.ALWAYS),
    ]
    return WorkflowRequest(name=name, steps=steps)


END = {
    "a": "FINISHED",
    "b": "FINISHED",
    "c": "FAILED",
    "d": "SKIPPED",
    "e": "FINISHED",
    "f": "FINISHED",
}


async def to_its_end(workflows: Workflows, workflow: str) -> dict[str, Any]:
    async for _ in workflows.observer.follow(workflow, workflows, lambda w: "", logs=False):
        pass
    return await workflows.row(workflow)


async def test_dying_at_any_write_leads_to_the_same_end_with_each_step_once(yard: Yard) -> None:
    deaths = 0
    for after in (False, True):
        for n in range(1, 60):
            yard.jobs.begun = []
            first = yard.workflows()
            workflow = await first.submit(ANN, request(f"flow-{after}-{n}"))
            await first.close()  # before it has done anything
            mortal = yard.workflows(Dies(yard.store, n, after=after))
            await mortal.take_up()
            await asyncio.wait(mortal._walking.values())
            died = (await first.row(workflow))["ended_at"] is None
            deaths += died
            last = yard.workflows()
            await last.take_up()
            row = await to_its_end(last, workflow)
            assert {s["name"]: s["state"] for s in row["steps"]} == END
            assert row["state"] == "FAILED"
            assert sorted(yard.jobs.begun) == ["a", "b", "c", "e", "f"]
            assert all(len(s["runs"]) == (s["name"] != "d") for s in row["steps"])
            await last.close()
            if not died:
                break
    # A write for each move: there were many places to die in.
    assert deaths > 20


async def test_a_full_disk_is_waited_for(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "_DISK_PAUSE_S", 0.0)
    workflow = await (first := yard.workflows()).submit(ANN, request("flow"))
    await first.close()
    workflows = yard.workflows(Full(yard.store))
    await workflows.take_up()
    row = await to_its_end(workflows, workflow)
    assert {s["name"]: s["state"] for s in row["steps"]} == END
    assert sorted(yard.jobs.begun) == ["a", "b", "c", "e", "f"]
    await workflows.close()


async def test_what_breaks_our_own_code_ends_the_workflow_which_can_be_resumed(
    yard: Yard, caplog: pytest.LogCaptureFixture
) -> None:
    workflows = yard.workflows()
    yard.jobs.broken = True
    workflow = await workflows.submit(ANN, WorkflowRequest(name="flow", steps=[step("a")]))
    assert (await to_its_end(workflows, workflow))["state"] == "FAILED"
    assert "the walker of" in caplog.text
    yard.jobs.broken = False
    assert (await workflows.resume(ANN, workflow, ResumeBody()))["again"] == ["a"]
    assert (await to_its_end(workflows, workflow))["state"] == "FINISHED"
    await workflows.close()


async def test_what_is_resumed_begins_with_what_has_failed(yard: Yard) -> None:
    workflows = yard.workflows()
    workflow = await workflows.submit(ANN, request("flow"))
    await to_its_end(workflows, workflow)
    yard.jobs.begun = []
    mended = [s if s.name != "c" else step("c", "a") for s in request("flow").steps]
    told = await workflows.resume(ANN, "flow", ResumeBody(steps=mended))
    assert told["again"] == ["c", "d", "e", "f"]
    row = await to_its_end(workflows, workflow)
    assert (row["state"], row["tries"]) == ("FINISHED", 2)
    assert sorted(yard.jobs.begun) == ["c", "d", "f"]
    # Without the step that is not needed any more, nothing runs again.
    told = await workflows.resume(ANN, workflow, ResumeBody(steps=mended[:4]))
    assert told["again"] == []
    await workflows.close()


async def test_a_step_that_could_never_run_is_named_and_nothing_is_kept(yard: Yard) -> None:
    workflows = yard.workflows()
    steps = [step("a"), step("b", "a", says="never")]
    with pytest.raises(Problem, match="the step b: no machine can ever run this"):
        await workflows.submit(ANN, WorkflowRequest(name="flow", steps=steps))
    assert await workflows.newest(DEFAULT_TENANT, 10) == []


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([], "it has 1 to 200 steps"),
        ([step("a"), step("a")], "'a' is there twice"),
        ([step("a b")], "names are of a-z"),
        ([StepBody(name="a")], "a job, a federated run or a service"),
        ([step("a", "b")], "the step a needs b, which is no step"),
        ([step("a", "b"), step("b", "a")], "a → b → a"),
        ([step("a", when=When.ALWAYS)], "names none in `needs`"),
    ],
)
async def test_what_is_no_workflow_is_refused(yard: Yard, steps: list[StepBody], said: str) -> None:
    with pytest.raises(Problem, match=said):
        await yard.workflows().submit(ANN, WorkflowRequest(name="flow", steps=steps))


async def test_a_step_gets_nothing_from_a_step_that_it_does_not_need(yard: Yard) -> None:
    job = LaunchRequest(command="true", env={"X": "${{ steps.a.outputs.x }}"})
    for other in (
        StepBody(name="b", job=job),
        StepBody(name="b", job=LaunchRequest(command="true"), inputs={"x": "a/x"}),
    ):
        with pytest.raises(Problem, match="does not need a"):
            await yard.workflows().submit(ANN, WorkflowRequest(name="w", steps=[step("a"), other]))
