# SPDX-License-Identifier: Apache-2.0
"""The dispatcher with a real store, a fake post and a clock that is moved by hand.

What machines say goes in through `Reports`, as bytes; what they are told is read at the post.
"""

import asyncio
import hashlib
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection

from fedml_broker import runs, tables, tasks
from fedml_broker.accounts import User
from fedml_broker.blobs import Blobs
from fedml_broker.dispatch import Dispatcher
from fedml_broker.fleet import Fleet, Machine
from fedml_broker.identity import Identity
from fedml_broker.leases import Timing
from fedml_broker.match import Capacity, Gpu
from fedml_broker.mqtt import Unavailable
from fedml_broker.orders import Orders
from fedml_broker.queue import Terms
from fedml_broker.reports import Reports
from fedml_broker.store import Store, StoreUnavailable, Work
from fedml_broker.tasks import Task
from fedml_protocol.blob import Blob, NamedBlob
from fedml_protocol.cause import Cause, Fault
from fedml_protocol.devices import Heartbeat, Presence, TaskBeat
from fedml_protocol.envelope import Envelope, pack
from fedml_protocol.federate import StageKind, StageSpec
from fedml_protocol.launch import LaunchSpec
from fedml_protocol.tasks import (
    FINAL,
    Accept,
    Needs,
    Offer,
    Progress,
    Reject,
    RejectReason,
    Result,
    TaskState,
)
from fedml_protocol.topics import UP_TASK, Address
from tests.fakes.post import FakePost
from tests.fakes.standing_time import StandingTime, turns

QUEUED, OFFERED, LEASED, RUNNING = (TaskState(n) for n in range(1, 5))
FINISHED, FAILED, STOPPED, LOST = (TaskState(n) for n in range(5, 9))

ROOM = Capacity(slots=2, cpus=4, memory_bytes=1 << 30, disk_bytes=1 << 30)
BIG = replace(ROOM, gpus=(Gpu(uuid="GPU-1", name="H100", memory_bytes=1 << 36),))


class Disk(Store):
    """A store that knows whether it is at work, and that can be full."""

    full = False
    begun = 0
    ended = 0

    async def write(self, work: Work[Any]) -> Any:
        if self.full:
            raise StoreUnavailable("database or disk is full")
        self.begun += 1
        try:
            return await super().write(work)
        finally:
            self.ended += 1

    async def settle(self) -> None:
        """Until nothing moves any more."""
        while True:
            before = self.ended
            await turns()
            if self.begun == self.ended == before:
                return


class Effects:
    """What the word that asked for the tasks is told. `ended` counts commits only."""

    def __init__(self) -> None:
        self.ended_: list[tuple[str, TaskState]] = []
        self.told_: list[Result] = []
        self.running_: list[tuple[str, int]] = []

    def ended(self, tx: Connection, task: Task, result: Result) -> None:
        self.ended_.append((task.id, result.state))
        tx.execute(
            tables.events.insert().values(run=task.run, at=0, kind="ended", data={"task": task.id})
        )

    def told(self, task: Task, result: Result) -> None:
        self.told_.append(result)

    async def running(self, task: Task) -> None:
        self.running_.append((task.id, task.epoch))


class Device:
    """One machine, which says what a test makes it say."""

    def __init__(self, place: "Place", name: str, capacity: Capacity, labels: Any) -> None:
        self.name = name
        self.address = Address("acme", name)
        self.alive = True
        self.boot_n = 1
        self.holds: dict[tuple[str, int], TaskState] = {}
        self.capacity = capacity
        self.labels = labels
        self._place = place
        self._seq = 0

    async def say(self, body: Any, *, boot_n: int | None = None) -> None:
        """One message, and everything that it sets off."""
        self._seq += 1
        envelope = Envelope(
            device=self.name, body=body, boot_n=boot_n or self.boot_n, seq=self._seq
        )
        await self._place.reports.take(self.address.topic(UP_TASK), pack(envelope))
        await self._place.store.settle()

    async def beat(self, **more: Any) -> None:
        """A heartbeat with everything that it holds."""
        held = tuple(TaskBeat(task=t, epoch=e, state=s) for (t, e), s in self.holds.items())
        await self.say(Heartbeat(free_slots=1, tasks=held, **more))

    async def accept(self, task: str, epoch: int) -> None:
        self.holds[task, epoch] = LEASED
        await self.say(Accept(task=task, epoch=epoch))

    async def run(self, task: str, epoch: int) -> None:
        """Accept and start."""
        await self.accept(task, epoch)
        self.holds[task, epoch] = RUNNING
        await self.say(Progress(task=task, epoch=epoch, state=RUNNING))

    async def end(self, task: str, epoch: int, state: TaskState = FINISHED, **more: Any) -> None:
        self.holds.pop((task, epoch), None)
        await self.say(Result(task=task, epoch=epoch, state=state, **more))


class Place:
    """A broker's dispatcher with everything below it."""

    def __init__(self, folder: Path, identity: Identity) -> None:
        self.folder = folder
        self.identity = identity
        self.store = Disk.open(folder / "broker.db")
        self.time = StandingTime(self.store.settle)
        self.blobs = Blobs(folder / "blobs", reserve_bytes=0)
        self.post = FakePost(identity.verify_keys_raw)
        self.devices: list[Device] = []
        self.timing = Timing()
        self._begin()

    def _begin(self) -> None:
        self.effects = Effects()
        self.fleet = Fleet(heartbeat_s=self.timing.heartbeat_s, clock=self.time.now)
        self.orders = Orders(self.store, self.identity, self.post)
        self.dispatcher = Dispatcher(self.store, self.fleet, self.orders, self.blobs, self.timing)
        self.dispatcher.works = {"launch": self.effects, "federate": self.effects}
        self.reports = Reports(self.fleet, self.dispatcher)
        self.serving = asyncio.create_task(self.dispatcher.serve())

    async def restart(self) -> None:
        """The broker is killed and comes back; its devices have not been heard yet."""
        self.time.forget_timers()
        self.serving.cancel()
        self._begin()
        for device in self.devices:
            self._enlist(device)
        await self.dispatcher.load()
        await self.store.settle()

    async def close(self) -> None:
        self.serving.cancel()
        self.time.forget_timers()
        await self.store.settle()
        self.blobs.close()
        await asyncio.to_thread(self.store.close)

    async def device(
        self, name: str, capacity: Capacity = ROOM, labels: Any = None, *, beat: bool = True
    ) -> Device:
        """A machine that has joined, and beats."""
        device = Device(self, name, capacity, labels or {})
        row: dict[str, Any] = {"id": name, "tenant": "acme", "name": name}
        row |= {"machine_id": name, "public_key": b"", "labels": {}, "inventory": {}}
        row |= {"state": "active", "counter": 0, "boot_n": 0, "agent_version": ""}
        row |= {"enrolled_at": 0, "certificate_expires_at": 0}
        await self.store.write(lambda tx: tx.execute(tables.devices.insert().values(row)))
        self.devices.append(device)
        self._enlist(device)
        if beat:
            await device.beat()
        return device

    def _enlist(self, device: Device) -> None:
        machine = Machine(
            address=device.address,
            name=device.name,
            labels=device.labels,
            capacity=device.capacity,
        )
        self.fleet.put(machine)

    async def submit_run(self, run: str) -> None:
        """The run of a task: for tests that ask what the store says of it."""
        await self.store.write(
            lambda tx: runs.create(
                tx,
                User(name="ann", tenant="acme", role="member"),
                run=run,
                kind="launch",
                name="job",
                spec={},
                package=None,
            )
        )

    async def queue(self, *new: Task) -> None:
        await self.store.write(lambda tx: tasks.insert(tx, new))
        self.dispatcher.added(new)
        await self.store.settle()

    async def pass_by(self, seconds: float) -> None:
        """Time passes, and every device that is alive beats every 10 s."""
        while seconds > 0:
            await self.time.pass_by(min(seconds, 10))
            seconds -= 10
            for device in self.devices:
                if device.alive:
                    await device.beat()

    async def row(self, task: str = "t-1") -> Any:
        """What the store says of a task."""
        query = sa.select(tables.tasks).where(tables.tasks.c.id == task)
        return await self.store.read(lambda tx: tx.execute(query).one())

    async def state(self, task: str = "t-1") -> TaskState:
        return TaskState((await self.row(task)).state)


def job(task: str = "t-1", *, tries: int = 3, run: str = "r-1", **more: Any) -> Task:
    """A queued launch task."""
    fields = ("device", "bound", "labels", "terms", "rank", "restarts_left", "since")
    ours = {k: more.pop(k) for k in fields if k in more}
    offer = Offer(task=task, epoch=1, run=run, spec=LaunchSpec(command="true"), **more)
    return Task(offer=offer, tenant="acme", tries_left=tries, **ours)


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return Identity.open(tmp_path_factory.mktemp("identity"))


@pytest.fixture
async def place(tmp_path: Path, identity: Identity) -> AsyncIterator[Place]:
    place = Place(tmp_path, identity)
    yield place
    await place.close()


# ---------------------------------------------------------------------- the straight way


async def test_a_task_goes_to_the_machine_that_has_what_it_needs(place: Place) -> None:
    for name, capacity in (("one", ROOM), ("two", BIG), ("three", ROOM)):
        await place.device(name, capacity)
    task = job(needs=Needs(gpus=1))

    await place.queue(task)

    assert place.post.take() == [("two", "Offer t-1.1")]
    assert place.post.letters[-1].expiry_s == 30
    assert await place.state() is OFFERED
    assert (await place.row()).device == "two"


async def test_a_task_that_no_machine_can_take_waits_and_says_why_for_each(place: Place) -> None:
    await place.device("one")
    rung: list[str] = []
    place.dispatcher.on_waiting = rung.append
    await place.queue(job(needs=Needs(gpus=1), labels={"site": "lab"}))
    assert place.post.take() == []
    assert place.dispatcher.waiting("r-1") == "one: no label site"
    assert rung == ["r-1"]

    await place.device("two", BIG, {"site": "lab"})

    assert place.post.take() == [("two", "Offer t-1.1")]
    assert place.dispatcher.waiting("r-1") == ""


async def test_of_many_machines_it_is_said_how_many_have_each_reason(place: Place) -> None:
    for n in range(21):
        await place.device(f"m{n:02}", beat=n > 0)
    await place.queue(job(needs=Needs(gpus=1)))
    told = place.dispatcher.waiting("r-1")
    assert told == "has no GPU, 1 are asked for (m00, m01, m02 and 18 more)"
    await place.queue(*(job(f"f-{n}", run="r-2") for n in range(43)))
    told = place.dispatcher.waiting("r-2")
    assert told == "busy: 2 of 2 tasks run (m01, m02, m03 and 17 more); offline (m00)"


async def test_from_offer_to_result(place: Place) -> None:
    one = await place.device("one")
    await place.queue(job())
    await one.accept("t-1", 1)
    await one.run("t-1", 1)
    assert place.effects.running_ == [("t-1", 1)]

    await one.end("t-1", 1, exit_code=0)

    assert place.post.take() == [("one", "Offer t-1.1"), ("one", "ResultAck t-1.1")]
    assert place.effects.ended_ == [("t-1", FINISHED)]
    assert [r.exit_code for r in place.effects.told_] == [0]
    assert await place.state() is FINISHED
    assert place.dispatcher.of_run("r-1") == []


async def test_what_a_machine_notes_of_a_task_is_written_down_once_and_not_without_end(
    place: Place,
) -> None:
    rung: list[str] = []
    place.dispatcher.on_noted = rung.append
    one = await place.device("one")
    await place.queue(job())
    await one.run("t-1", 1)

    async def note(text: str, epoch: int = 1) -> None:
        await one.say(Progress(task="t-1", epoch=epoch, state=RUNNING, note=text))

    await note("computes on GPU-b, which it does not hold")
    await note("computes on GPU-b, which it does not hold")
    await note("of an older attempt", epoch=2)
    for n in range(40):
        await note(f"{n} " + "x" * 1000)

    kept = await place.store.read(
        lambda tx: [row.data for row in tx.execute(sa.select(tables.events)) if row.kind == "noted"]
    )
    assert kept[0] == {
        "task": "t-1",
        "name": "one",
        "text": "computes on GPU-b, which it does not hold",
    }
    assert len(kept) == len(rung) == 20
    assert max(len(data["text"]) for data in kept) == 500
    assert place.effects.running_ == [("t-1", 1)]


async def test_a_machine_never_has_more_tasks_than_slots(place: Place) -> None:
    one = await place.device("one")
    await place.queue(*(job(f"t-{n}") for n in range(4)))
    assert len(place.post.take()) == ROOM.slots
    assert "busy: 2 of 2 tasks run" in place.dispatcher.waiting("r-1")

    await one.accept("t-0", 1)
    await one.end("t-0", 1)

    assert place.post.take() == [("one", "ResultAck t-0.1"), ("one", "Offer t-2.1")]


async def test_work_spreads_over_the_fleet(place: Place) -> None:
    for name in ("one", "two", "three"):
        await place.device(name)
    await place.queue(*(job(f"t-{n}") for n in range(3)))
    assert sorted(device for device, _ in place.post.take()) == ["one", "three", "two"]


async def test_what_is_done_for_an_end_and_the_end_itself_are_one_transaction(
    place: Place,
) -> None:
    one = await place.device("one")
    await place.queue(job())

    class Broken(Effects):
        def ended(self, tx: Connection, task: Task, result: Result) -> None:
            super().ended(tx, task, result)
            raise RuntimeError("the disk of the logs is full")

    place.dispatcher.works["launch"] = Broken()
    with pytest.raises(RuntimeError, match="the logs"):
        await one.end("t-1", 1)  # not acknowledged over MQTT either: it comes again
    assert await place.state() is OFFERED

    place.dispatcher.works["launch"] = place.effects
    await one.end("t-1", 1)
    assert await place.state() is FINISHED
    found = await place.store.read(lambda tx: tx.execute(sa.select(tables.events)).all())
    assert len(found) == 1


# ---------------------------------------------------------------------- results, once


async def test_a_result_that_comes_again_is_acknowledged_and_changes_nothing(place: Place) -> None:
    one = await place.device("one")
    await place.queue(job())
    await one.run("t-1", 1)
    await one.end("t-1", 1, FAILED)
    place.post.take()

    await one.end("t-1", 1, FINISHED)

    assert place.post.take() == [("one", "ResultAck t-1.1")]
    assert place.effects.ended_ == [("t-1", FAILED)]
    assert await place.state() is FAILED


async def test_two_results_at_the_same_moment_count_once(place: Place) -> None:
    one = await place.device("one")
    await place.queue(job())
    await asyncio.gather(*(one.end("t-1", 1, state) for state in (FINISHED, FAILED)))
    assert place.effects.ended_ == [("t-1", FINISHED)]
    assert len(place.effects.told_) == 1
    assert place.post.take()[1:] == [("one", "ResultAck t-1.1")] * 2


async def test_a_result_of_an_older_epoch_is_refused_and_acknowledged(place: Place) -> None:
    one = await place.device("one")
    await place.queue(job())
    await place.pass_by(31)  # nobody answers: offered again
    assert [e for _, _, e in place.post.offers()] == [1, 2]
    place.post.take()

    await one.end("t-1", 1)

    assert place.post.take() == [("one", "ResultAck t-1.1")]
    assert place.effects.ended_ == []
    assert await place.state() is OFFERED
    await one.end("t-1", 2)
    assert place.effects.ended_ == [("t-1", FINISHED)]


async def test_a_result_of_another_device_is_refused_and_acknowledged(place: Place) -> None:
    await place.device("one")
    await place.queue(job())
    thief = await place.device("two")
    place.post.take()

    await thief.end("t-1", 1)

    assert place.post.take() == [("two", "ResultAck t-1.1")]
    assert place.effects.ended_ == []
    assert await place.state() is OFFERED


async def test_a_result_of_a_task_that_was_never_here_is_acknowledged(place: Place) -> None:
    one = await place.device("one")
    await one.end("t-of-old", 7)
    assert place.post.take() == [("one", "ResultAck t-of-old.7")]


async def test_a_result_that_names_absent_files_is_not_acknowledged_before_they_are_here(
    place: Place,
) -> None:
    one = await place.device("one")
    await place.queue(job())
    await one.run("t-1", 1)
    place.post.take()
    model = b"model"
    blob = Blob(sha256=hashlib.sha256(model).hexdigest(), size=len(model))
    files = (NamedBlob(name="model", blob=blob),)

    await one.end("t-1", 1, artifacts=files)
    assert place.post.take() == []
    assert await place.state() is OFFERED  # the store's view of what is held

    await place.blobs.add(model, owner="one")
    await one.end("t-1", 1, artifacts=files)
    assert place.post.take() == [("one", "ResultAck t-1.1")]
    assert await place.state() is FINISHED
    assert not place.blobs.claimed(blob.sha256)  # whoever ended it refers to it, or nobody does


async def test_a_result_is_acknowledged_only_when_it_is_on_the_disk(place: Place) -> None:
    one = await place.device("one")
    await place.queue(job())
    await one.run("t-1", 1)
    place.post.take()
    place.store.full = True
    with pytest.raises(StoreUnavailable):
        await one.end("t-1", 1)
    assert place.post.take() == []

    place.store.full = False
    await one.end("t-1", 1)
    assert place.post.take() == [("one", "ResultAck t-1.1")]
    assert place.effects.ended_ == [("t-1", FINISHED)]


# ---------------------------------------------------------------------- refusals


async def test_a_refusal_that_may_pass_sends_the_task_elsewhere_and_later_back(
    place: Place,
) -> None:
    one = await place.device("one")
    await place.queue(job())
    await one.say(Reject(task="t-1", epoch=1, reason=RejectReason.DISK, detail="full"))
    assert place.post.take() == [("one", "Offer t-1.1")]
    assert await place.state() is QUEUED

    await place.time.pass_by(11)  # it was asked to wait for one heartbeat

    assert place.post.take() == [("one", "Offer t-1.2")]
    two = await place.device("two")
    await one.say(Reject(task="t-1", epoch=2, reason=RejectReason.SLOTS))
    assert place.post.take() == [("two", "Offer t-1.3")]
    await two.end("t-1", 3)
    assert (await place.row()).tries_left == 3  # nothing was lost by it


async def test_a_refusal_for_good_is_not_asked_again(place: Place) -> None:
    one = await place.device("one")
    await place.queue(job())
    no = Reject(task="t-1", epoch=1, reason=RejectReason.POLICY_REFUSED, detail="no such publisher")
    await one.say(no)
    await place.pass_by(60)
    assert place.post.offers() == [("one", "t-1", 1)]
    assert place.dispatcher.waiting("r-1") == "one: refused: no such publisher"

    await place.device("two")
    assert place.post.offers()[1:] == [("two", "t-1", 2)]


async def test_a_refusal_for_good_ends_a_task_that_is_bound_to_the_machine(place: Place) -> None:
    one = await place.device("one")
    await place.device("two")
    await place.queue(job(device="one", bound=True))
    await one.say(Reject(task="t-1", epoch=1, reason=RejectReason.POLICY_REFUSED, detail="never"))
    assert place.effects.ended_ == [("t-1", FAILED)]
    cause = place.effects.told_[0].cause
    assert cause == Cause(fault=Fault.POLICY, message="one refused: never")


async def test_a_bound_task_waits_for_its_machine_alone(place: Place) -> None:
    one = await place.device("one", beat=False)
    await place.device("two")
    await place.queue(job(device="one", bound=True))
    assert place.post.take() == []
    assert place.dispatcher.waiting("r-1") == "one: offline"

    await one.beat()
    assert place.post.take() == [("one", "Offer t-1.1")]
    await one.say(Reject(task="t-1", epoch=1, reason=RejectReason.NOT_NOW))
    assert place.dispatcher.waiting("r-1") == "one: asked to wait"
    await place.time.pass_by(11)
    assert place.post.take() == [("one", "Offer t-1.2")]

    place.fleet.drop("one")
    await place.time.pass_by(31)
    assert place.dispatcher.waiting("r-1") == "one: revoked or removed"


async def test_a_refusal_of_what_was_offered_before_is_ignored(place: Place) -> None:
    one = await place.device("one")
    await place.queue(job())
    await one.accept("t-1", 1)
    await one.say(Reject(task="t-1", epoch=1, reason=RejectReason.POLICY_REFUSED))
    await one.say(Reject(task="t-1", epoch=9, reason=RejectReason.POLICY_REFUSED))
    await one.say(Reject(task="unknown", epoch=1, reason=RejectReason.POLICY_REFUSED))
    assert await place.state() is OFFERED
    assert place.post.offers() == [("one", "t-1", 1)]


# ---------------------------------------------------------------------- leases


async def test_an_offer_that_nobody_answers_is_made_again_and_costs_no_try(place: Place) -> None:
    await place.device("one")
    await place.queue(job())
    await place.pass_by(31)
    assert place.post.offers() == [("one", "t-1", 1), ("one", "t-1", 2)]
    assert (await place.row()).tries_left == 3


async def test_a_task_of_a_silent_machine_is_offered_elsewhere_with_the_next_epoch(
    place: Place,
) -> None:
    one = await place.device("one")
    await place.queue(job())
    await one.run("t-1", 1)
    await place.device("two")
    one.alive = False
    await place.pass_by(44)
    assert place.post.offers() == [("one", "t-1", 1)]

    await place.pass_by(2)

    assert place.post.offers() == [("one", "t-1", 1), ("two", "t-1", 2)]
    assert (await place.row()).tries_left == 2


async def test_heartbeats_keep_a_task_for_ever(place: Place) -> None:
    one = await place.device("one")
    await place.queue(job())
    await one.run("t-1", 1)
    await place.device("two")
    await place.pass_by(600)
    assert place.post.offers() == [("one", "t-1", 1)]
    one.alive = False
    await place.pass_by(50)
    assert len(place.post.offers()) == 2


async def test_a_heartbeat_says_accept_again(place: Place) -> None:
    one = await place.device("one")
    await place.queue(job())
    one.holds["t-1", 1] = LEASED  # its Accept was lost
    await place.pass_by(120)
    assert place.post.offers() == [("one", "t-1", 1)]


async def test_a_heartbeat_says_again_that_a_task_runs(place: Place) -> None:
    one = await place.device("one")
    await place.queue(job())
    one.holds["t-1", 1] = RUNNING  # its Accept and its Progress were lost
    await one.beat()
    await one.beat()
    assert place.effects.running_ == [("t-1", 1)]


async def test_a_heartbeat_without_the_task_gives_it_back(place: Place) -> None:
    one = await place.device("one")
    await place.queue(job())
    await one.run("t-1", 1)
    one.holds.clear()  # its disk was replaced
    await one.beat()
    assert place.post.offers() == [("one", "t-1", 1), ("one", "t-1", 2)]
    assert (await place.row()).tries_left == 2


async def test_a_heartbeat_that_was_said_before_the_accept_gives_nothing_back(
    place: Place,
) -> None:
    one = await place.device("one")
    await place.queue(job())
    before = Envelope(device="one", body=Heartbeat(free_slots=2), boot_n=1, seq=1)
    await one.accept("t-1", 1)
    await place.reports.take(one.address.topic(UP_TASK), pack(before))
    await place.store.settle()
    assert place.post.offers() == [("one", "t-1", 1)]


async def test_a_heartbeat_with_a_task_that_is_not_its_own_is_told_to_end_it(
    place: Place,
) -> None:
    one, two = await place.device("one"), await place.device("two")
    await place.queue(job(device="one", bound=True))
    await one.run("t-1", 1)
    place.post.take()

    two.holds = {("t-1", 1): RUNNING, ("t-gone", 4): RUNNING, ("t-done", 1): FINISHED}
    await two.beat()

    # A result that waits for its acknowledgement is nothing to cancel.
    assert place.post.take() == [("two", "Cancel t-1.1"), ("two", "Cancel t-gone.4")]


async def test_who_accepts_too_late_is_told_to_drop_it(place: Place) -> None:
    one = await place.device("one")
    await place.queue(job())
    one.alive = False
    two = await place.device("two")
    await place.pass_by(61)  # its second offer was still made to the first
    assert place.post.offers()[-1] == ("two", "t-1", 3)
    await two.accept("t-1", 3)
    place.post.take()

    await one.accept("t-1", 2)

    assert place.post.take() == [("one", "Cancel t-1.2")]
    assert place.post.letters[-1].body.grace_s == 0
    await two.end("t-1", 3)
    assert place.effects.ended_ == [("t-1", FINISHED)]


async def test_a_machine_that_comes_online_hears_again_what_was_offered(place: Place) -> None:
    one = await place.device("one")
    await place.queue(job("t-1"), job("t-2"))
    await one.accept("t-2", 1)
    place.post.take()
    online = Presence(online=True, boot_n=1, oldest_schema=1, newest_schema=1)
    await one.say(online)
    assert place.post.take() == [("one", "Offer t-1.1")]


async def test_a_process_that_was_frozen_takes_no_task_away(place: Place) -> None:
    one = await place.device("one")
    await place.queue(job())
    await one.run("t-1", 1)
    await place.device("two")

    place.time.jump(3600)  # the broker was suspended; so nobody could be heard
    await place.store.settle()
    await place.pass_by(120)  # they are heard again, within a lease

    assert place.post.offers() == [("one", "t-1", 1)]
    await one.end("t-1", 1)
    assert place.effects.ended_ == [("t-1", FINISHED)]


async def test_after_a_freeze_a_machine_that_is_really_gone_has_one_lease_more(
    place: Place,
) -> None:
    one = await place.device("one")
    await place.queue(job())
    await one.run("t-1", 1)
    await place.device("two")
    one.alive = False
    place.time.jump(3600)
    await place.store.settle()
    await place.pass_by(44)
    assert len(place.post.offers()) == 1
    await place.pass_by(2)
    assert place.post.offers()[1:] == [("two", "t-1", 2)]


class Watched(Task):
    """A task that counts how often somebody looks at one."""

    __slots__ = ()
    looks: ClassVar[int] = 0

    def __getattribute__(self, name: str) -> Any:
        Watched.looks += 1
        return super().__getattribute__(name)


@pytest.mark.parametrize("others", ["held", "queued"])
async def test_a_heartbeat_looks_at_no_tasks_but_its_machines_own(
    place: Place, others: str
) -> None:
    one = await place.device("one")
    await place.device("two", beat=others == "held")
    await place.queue(job("t-mine", device="one", bound=True))
    await one.run("t-mine", 1)
    theirs = [job(f"t-{n}", run="r-2", device="two", bound=True) for n in range(50)]
    for task in theirs:
        task.__class__ = Watched
    await place.queue(*theirs)
    assert {t.state for t in theirs} == {OFFERED if others == "held" else QUEUED}
    Watched.looks = 0

    for _ in range(5):
        await one.beat()
    await one.say(Presence(online=True, boot_n=1, oldest_schema=1, newest_schema=1))

    assert Watched.looks == 0
    await place.pass_by(10)
    assert Watched.looks > 0  # it does count


async def test_what_a_run_waits_for_names_a_machine_that_fell_silent_since(place: Place) -> None:
    one = await place.device("one")
    await place.queue(job(needs=Needs(memory_bytes=ROOM.memory_bytes)), job("t-2", run="r-2"))
    await place.queue(job("t-3", run="r-3", needs=Needs(memory_bytes=ROOM.memory_bytes)))
    assert "busy" in place.dispatcher.waiting("r-3")
    one.alive = False
    await place.pass_by(44)
    assert place.dispatcher.waiting("r-3") == "one: offline"


# ---------------------------------------------------------------------- losses


async def test_losses_that_repeat_back_off_and_the_last_one_ends_it(place: Place) -> None:
    one = await place.device("one")
    await place.queue(job(tries=3))
    waited = []
    cause = Cause(fault=Fault.MACHINE, message="the sandbox did not start")
    for epoch in (1, 2, 3, 4):
        await one.end("t-1", epoch, LOST, cause=cause)
        since = place.time.now()
        while epoch < 4 and len(place.post.offers()) == epoch:
            await place.pass_by(1)
        waited.append(place.time.now() - since)

    assert waited == [0, 1, 3, 0]
    assert place.effects.ended_ == [("t-1", LOST)]
    end = place.effects.told_[0]
    assert end.cause == Cause(fault=Fault.MACHINE, message="one: the sandbox did not start")
    assert place.post.offers() == [("one", "t-1", n) for n in (1, 2, 3, 4)]
    assert [b for _, b in place.post.take() if "Ack" in b] == [
        f"ResultAck t-1.{n}" for n in (1, 2, 3, 4)
    ]


async def test_who_loses_a_task_repeatedly_does_not_keep_it_from_others(place: Place) -> None:
    one = await place.device("one")
    await place.queue(job(tries=9))
    await one.end("t-1", 1, LOST)
    await one.end("t-1", 2, LOST)
    await place.device("two")
    assert place.post.offers()[2:] == [("two", "t-1", 3)]


async def test_tries_that_run_out_by_silence_end_it_too(place: Place) -> None:
    one = await place.device("one")
    await place.queue(job(tries=0))
    await one.run("t-1", 1)
    one.alive = False
    await place.pass_by(50)
    assert place.effects.ended_ == [("t-1", LOST)]
    cause = place.effects.told_[0].cause
    assert cause is not None
    assert cause.message == "one was not heard of for 45 s"


# ---------------------------------------------------------------------- restarts


async def test_after_a_restart_held_tasks_wait_for_their_machines(place: Place) -> None:
    one = await place.device("one")
    await place.device("two")
    await place.queue(job("t-1", device="one"), job("t-2"))
    await one.run("t-1", 1)
    before = place.post.offers()
    await place.restart()
    for device in place.devices:
        device.alive = False
    two = place.devices[1]
    two.alive = True  # it has never accepted t-2

    await place.pass_by(74)  # 3 heartbeats to come back, and a lease
    assert [o for o in place.post.offers() if o not in before] == []

    await place.pass_by(12)
    assert ("two", "t-1", 2) in place.post.offers()


async def test_after_a_restart_a_task_goes_on_where_it_was(place: Place) -> None:
    one = await place.device("one")
    await place.queue(job())
    await one.run("t-1", 1)
    await place.restart()
    await place.device("two")
    await place.pass_by(200)
    await one.end("t-1", 1)
    assert place.post.offers() == [("one", "t-1", 1)]
    assert place.effects.ended_ == [("t-1", FINISHED)]
    assert await place.state() is FINISHED


async def test_after_a_restart_a_held_task_takes_its_room_from_the_start(place: Place) -> None:
    one = await place.device("one", replace(ROOM, slots=1))
    await place.queue(job())
    await one.run("t-1", 1)
    await place.restart()
    await one.beat()
    await place.queue(job("t-2"))
    assert place.post.offers() == [("one", "t-1", 1)]


async def test_a_queued_task_survives_a_restart(place: Place) -> None:
    await place.queue(job())
    await place.restart()
    await place.device("one")
    assert place.post.offers() == [("one", "t-1", 1)]


async def test_what_has_ended_stays_ended_after_a_restart(place: Place) -> None:
    one = await place.device("one")
    await place.queue(job())
    await one.end("t-1", 1)
    await place.restart()
    place.post.take()
    await one.beat()
    await one.end("t-1", 1)
    assert place.post.take() == [("one", "ResultAck t-1.1")]
    assert place.effects.ended_ == []  # of this process
    assert await place.state() is FINISHED


@pytest.mark.parametrize("block", [1, 2, 1000])
async def test_numbers_of_orders_grow_across_restarts(
    place: Place, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    """`FakePost` refuses an order whose number is not above all before."""
    monkeypatch.setattr("fedml_broker.orders._BLOCK", block)
    one = await place.device("one")
    assert await place.orders.last("one") == 0
    for n in range(3):
        await place.queue(job(f"t-{n}"))
        place.dispatcher.release("one", f"r-{n}")
        await one.end(f"t-{n}", 1)
        last = max(letter.counter for letter in place.post.letters)
        assert await place.orders.last("one") >= last > 0
        await place.restart()
        assert await place.orders.last("one") >= last
        await one.beat()
    assert len(place.post.offers()) == 3


async def test_a_store_that_was_restored_from_a_backup_numbers_no_order_as_before(
    place: Place,
) -> None:
    one = await place.device("one")
    for n in range(2):
        await place.queue(job(f"t-{n}"))
        place.dispatcher.release("one", f"r-{n}")
        await one.end(f"t-{n}", 1)
        await place.store.write(lambda tx: tx.execute(tables.devices.update().values(counter=0)))
        await place.restart()
        await one.beat()
    assert len(place.post.offers()) == 2  # the post refuses a number that is not above all before


async def test_orders_at_the_same_moment_have_different_numbers(place: Place) -> None:
    one = await place.device("one")
    for _ in range(2):
        for n in range(30):
            place.dispatcher.release("one", f"r-{n}")
        await place.store.settle()
    numbers = [letter.counter for letter in place.post.letters]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == 60
    assert await place.orders.last(one.name) == numbers[-1]


# ---------------------------------------------------------------------- stopping


async def test_stopping_ends_the_queued_at_once_and_asks_for_the_held(place: Place) -> None:
    one = await place.device("one", replace(ROOM, slots=1))
    await place.queue(job("t-1"), job("t-2"), job("t-3", run="r-2"))
    await one.run("t-1", 1)
    place.post.take()

    await place.dispatcher.stop_run("r-1", "stopped by ann")
    await place.store.settle()

    assert place.effects.ended_ == [("t-2", STOPPED)]
    assert place.post.take() == [("one", "Cancel t-1.1")]
    assert place.post.letters[-1].body.reason == "stopped by ann"
    await one.end("t-1", 1, STOPPED)
    assert place.effects.ended_ == [("t-2", STOPPED), ("t-1", STOPPED)]
    assert place.post.take() == [("one", "ResultAck t-1.1"), ("one", "Offer t-3.1")]
    assert [r.task for r in place.effects.told_] == ["t-2", "t-1"]


async def test_stopping_does_not_wait_for_a_machine_that_is_offline(place: Place) -> None:
    one = await place.device("one")
    await place.queue(job())
    await one.run("t-1", 1)
    one.alive = False
    await place.pass_by(40)  # silent for longer than 3.5 beats, its lease not over

    await place.dispatcher.stop_run("r-1", "stopped by ann")

    assert place.effects.ended_ == [("t-1", STOPPED)]
    cause = place.effects.told_[0].cause
    assert cause is not None
    assert cause.message == "stopped by ann (its device is offline)"


async def test_stopping_does_not_wait_for_ever_for_a_machine_that_does_not_obey(
    place: Place,
) -> None:
    one = await place.device("one")
    await place.queue(job(grace_s=5))
    await one.run("t-1", 1)
    await place.dispatcher.stop_run("r-1", "stopped by ann")
    await place.pass_by(34)
    assert place.effects.ended_ == []
    await place.pass_by(2)
    assert place.effects.ended_ == [("t-1", STOPPED)]
    place.post.take()

    await one.beat()  # it still has it: told again, for as long as it does
    assert place.post.take() == [("one", "Cancel t-1.1")]


@pytest.mark.parametrize("answer", ["lost", "rejected", "gone", "silent", "never accepted"])
async def test_what_was_stopped_is_not_offered_again_whatever_its_machine_does(
    place: Place, answer: str
) -> None:
    one = await place.device("one")
    await place.queue(job(grace_s=60))
    if answer not in ("rejected", "never accepted"):
        await one.run("t-1", 1)
    await place.device("two")
    await place.dispatcher.stop_run("r-1", "stopped by ann")

    match answer:
        case "lost":
            await one.end("t-1", 1, LOST)
        case "rejected":
            await one.say(Reject(task="t-1", epoch=1, reason=RejectReason.SLOTS))
        case "gone":
            one.holds.clear()
            await one.beat()
        case "silent":
            one.alive = False
    await place.pass_by(95)

    assert place.post.offers() == [("one", "t-1", 1)]
    assert place.effects.ended_ == [("t-1", STOPPED)]


async def test_giving_tasks_up_frees_their_machines(place: Place) -> None:
    one = await place.device("one", replace(ROOM, slots=1))
    await place.queue(job("t-1"), job("t-2", run="r-2"))
    await one.run("t-1", 1)
    place.post.take()
    open_tasks = place.dispatcher.of_run("r-1")

    place.dispatcher.give_up("r-1", open_tasks)
    await place.store.settle()

    assert sorted(place.post.take()) == [("one", "Cancel t-1.1"), ("one", "Offer t-2.1")]
    assert place.effects.ended_ == []  # whoever gave it up has written that down himself
    assert place.dispatcher.of_run("r-1") == []


@pytest.mark.parametrize("when", ["held", "queued"])
async def test_what_was_stopped_ends_after_a_restart_though_its_cancel_was_lost(
    place: Place, when: str
) -> None:
    one = await place.device("one")
    await place.submit_run("r-1")
    await place.queue(job(needs=Needs(gpus=int(when == "queued"))))
    if when == "held":
        await one.run("t-1", 1)
    # The broker dies between the note that it was stopped and the first word to a device.
    await place.store.write(lambda tx: runs.stop_asked(tx, "r-1", "ann"))
    await place.restart()
    place.post.take()

    if when == "held":
        await one.beat()
        assert place.post.take() == [("one", "Cancel t-1.1")]
        assert place.post.letters[-1].body.reason == "stopped by ann"
        await one.beat()  # this one was lost too
        assert place.post.take() == [("one", "Cancel t-1.1")]
        await one.end("t-1", 1, STOPPED)

    assert place.effects.ended_ == [("t-1", STOPPED)]
    assert await place.state() is STOPPED


@pytest.mark.parametrize("comes_back", [True, False])
async def test_after_a_restart_too_who_does_not_obey_a_stop_is_not_waited_for(
    place: Place, comes_back: bool
) -> None:
    one = await place.device("one")
    await place.device("two")
    await place.submit_run("r-1")
    await place.queue(job(device="one", bound=True, grace_s=5))
    await one.run("t-1", 1)
    await place.store.write(lambda tx: runs.stop_asked(tx, "r-1", "ann"))
    await place.restart()
    one.alive = comes_back
    await place.pass_by(120)
    assert place.effects.ended_ == [("t-1", STOPPED)]
    assert place.post.offers() == [("one", "t-1", 1)]


# ---------------------------------------------------------------------- those that go together

ONE_SLOT = replace(ROOM, slots=1)
TORN = Cause(fault=Fault.TASK, message="its command ended with exit code 3")


def pair(run: str = "r-1", **more: Any) -> tuple[Task, Task]:
    """A run of two machines."""
    terms = Terms(nodes=2)
    first, second = (
        job(f"{run}-t{rank}", run=run, terms=terms, rank=rank, since=1.0, **more) for rank in (0, 1)
    )
    return first, second


async def test_the_tasks_of_a_run_are_offered_together_or_not_at_all(place: Place) -> None:
    told: list[list[str]] = []
    place.dispatcher.on_together = lambda members: told.append([t.id for t, _ in members])
    await place.device("one", ONE_SLOT)
    await place.queue(*pair())
    assert place.post.offers() == []
    assert place.dispatcher.waiting("r-1") == "one: free; 1 of 2 machines are"

    await place.device("two", ONE_SLOT)

    assert sorted(place.post.offers()) == [("one", "r-1-t0", 1), ("two", "r-1-t1", 1)]
    assert told == [["r-1-t0", "r-1-t1"]]


async def test_what_a_task_was_told_of_the_others_is_on_the_disk(place: Place) -> None:
    def tell(members: Sequence[tuple[Task, Machine]]) -> None:
        for task, _ in members:
            task.offer = replace(task.offer, spec=LaunchSpec(command="true", env={"RANK": "7"}))

    place.dispatcher.on_together = tell
    for name in ("one", "two"):
        await place.device(name)
    await place.queue(*pair())
    await place.restart()
    assert place.dispatcher.of_run("r-1")[0].offer.spec.env == {"RANK": "7"}  # type: ignore[union-attr]


async def test_when_one_is_refused_for_now_the_others_come_back_and_all_start_again(
    place: Place,
) -> None:
    one, two = [await place.device(name, ONE_SLOT) for name in ("one", "two")]
    await place.queue(*pair())
    await one.run("r-1-t0", 1)
    place.post.take()

    await two.say(Reject(task="r-1-t1", epoch=1, reason=RejectReason.DISK))
    assert place.post.take() == [("one", "Cancel r-1-t0.1")]
    await one.end("r-1-t0", 1, STOPPED)
    await place.pass_by(20)

    assert sorted(place.post.offers()[2:]) == [("one", "r-1-t0", 2), ("two", "r-1-t1", 2)]
    assert place.effects.ended_ == []


async def test_when_one_machine_is_lost_all_start_again_with_one_try_less(place: Place) -> None:
    one, two = [await place.device(name, ONE_SLOT) for name in ("one", "two")]
    await place.queue(*pair(tries=1))
    await one.run("r-1-t0", 1)
    await two.run("r-1-t1", 1)
    await place.device("three", ONE_SLOT)
    two.alive = False
    await place.pass_by(60)
    assert ("one", "Cancel r-1-t0.1") in place.post.take()
    await one.end("r-1-t0", 1, FINISHED)  # too late: it starts with the others
    await place.pass_by(1)

    assert {(t, e) for _, t, e in place.post.offers()[2:]} == {("r-1-t0", 2), ("r-1-t1", 2)}
    assert (await place.row("r-1-t0")).tries_left == 0
    assert (await place.row("r-1-t1")).tries_left == 0


async def test_when_one_fails_the_others_are_stopped(place: Place) -> None:
    one, two = [await place.device(name, ONE_SLOT) for name in ("one", "two")]
    await place.queue(*pair())
    await one.run("r-1-t0", 1)
    await two.run("r-1-t1", 1)
    place.post.take()

    await two.end("r-1-t1", 1, FAILED, exit_code=3, cause=TORN)

    assert ("one", "Cancel r-1-t0.1") in place.post.take()
    await one.end("r-1-t0", 1, STOPPED)
    assert place.effects.ended_ == [("r-1-t1", FAILED), ("r-1-t0", STOPPED)]


async def test_a_broker_that_died_in_between_stops_the_others_when_it_is_back(
    place: Place,
) -> None:
    one, two = [await place.device(name, ONE_SLOT) for name in ("one", "two")]
    await place.queue(*pair())
    await one.run("r-1-t0", 1)
    await two.run("r-1-t1", 1)
    failed = Result(task="r-1-t1", epoch=1, state=FAILED, exit_code=3, cause=TORN)
    await place.store.write(lambda tx: tasks.ended(tx, "two", failed))
    await place.restart()
    await one.beat()
    await place.store.settle()
    assert ("one", "Cancel r-1-t0.1") in place.post.take()


# ---------------------------------------------------------------------- giving way, starting again


async def test_who_gives_way_is_queued_again_and_loses_no_try(place: Place) -> None:
    one = await place.device("one", ONE_SLOT)
    await place.queue(job("t-1", tries=0, terms=Terms(priority=-1, preemptible=True)))
    await one.run("t-1", 1)
    place.post.take()

    await place.queue(job("t-2", run="r-2"))
    assert place.post.take() == [("one", "Cancel t-1.1")]
    assert place.post.letters[-1].body.reason == "r-2 goes first"
    await one.end("t-1", 1, STOPPED)

    assert place.post.take() == [("one", "ResultAck t-1.1"), ("one", "Offer t-2.1")]
    assert place.effects.ended_ == []
    assert await place.state("t-1") is QUEUED
    await one.run("t-2", 1)
    await one.end("t-2", 1)
    assert place.post.offers()[-1] == ("one", "t-1", 2)


async def test_on_a_full_disk_nobody_gives_way_and_once_there_is_room_they_do(place: Place) -> None:
    one = await place.device("one", ONE_SLOT)
    await place.queue(job("t-1", terms=Terms(priority=-1, preemptible=True)))
    await one.run("t-1", 1)
    place.post.take()
    urgent = job("t-2", run="r-2")
    await place.store.write(lambda tx: tasks.insert(tx, [urgent]))

    place.store.full = True
    place.dispatcher.added([urgent])
    await place.store.settle()
    assert place.post.take() == []
    assert not place.serving.done()

    place.store.full = False
    await place.pass_by(11)
    assert ("one", "Cancel t-1.1") in place.post.take()


async def test_who_ends_by_itself_while_it_gives_way_has_ended(place: Place) -> None:
    one = await place.device("one", ONE_SLOT)
    await place.queue(job("t-1", terms=Terms(priority=-1, preemptible=True)))
    await one.run("t-1", 1)
    await place.queue(job("t-2", run="r-2"))
    await one.end("t-1", 1, FINISHED)
    assert place.effects.ended_ == [("t-1", FINISHED)]


async def test_a_restart_of_the_broker_does_not_forget_who_gives_way(place: Place) -> None:
    one = await place.device("one", ONE_SLOT)
    await place.queue(job("t-1", tries=0, terms=Terms(priority=-1, preemptible=True)))
    await one.run("t-1", 1)
    await place.queue(job("t-2", run="r-2"))
    await place.restart()
    await one.beat()
    assert place.post.take()[-1] == ("one", "Cancel t-1.1")  # in case the first one was lost
    await one.end("t-1", 1, STOPPED)
    assert place.effects.ended_ == []
    assert place.post.offers()[-1] == ("one", "t-2", 1)


async def test_who_is_stopped_while_it_gives_way_is_stopped(place: Place) -> None:
    one = await place.device("one", ONE_SLOT)
    await place.queue(job("t-1", terms=Terms(priority=-1, preemptible=True)))
    await one.run("t-1", 1)
    await place.queue(job("t-2", run="r-2"))
    await place.dispatcher.stop_run("r-1", "stopped by ann")
    await one.end("t-1", 1, STOPPED)
    assert place.effects.ended_ == [("t-1", STOPPED)]


async def test_another_priority_counts_at_once_and_after_a_restart(place: Place) -> None:
    await place.device("one", ONE_SLOT)
    await place.queue(job("t-0", run="r-0"))
    await place.queue(job("t-1", since=1.0), job("t-2", run="r-2", since=2.0))
    assert place.dispatcher.queued("acme") == ["r-1", "r-2"]
    await place.dispatcher.set_priority("r-2", 5, lambda tx: None)
    assert place.dispatcher.queued("acme") == ["r-2", "r-1"]
    await place.restart()
    assert place.dispatcher.queued("acme") == ["r-2", "r-1"]


async def test_a_failure_is_final_unless_the_job_asked_to_be_started_again(place: Place) -> None:
    one = await place.device("one")
    await place.queue(job("t-1"), job("t-2", run="r-2", restarts_left=1))
    for task in ("t-1", "t-2"):
        await one.run(task, 1)
        await one.end(task, 1, FAILED, exit_code=3, cause=TORN)
    assert place.effects.ended_ == [("t-1", FAILED)]
    told = place.dispatcher.waiting("r-2")
    assert told == "every machine: it failed, and starts again in 1 s"
    await place.pass_by(2)
    assert place.post.offers()[-1] == ("one", "t-2", 2)
    await one.run("t-2", 2)
    await one.end("t-2", 2, FAILED, exit_code=3, cause=TORN)
    assert place.effects.ended_ == [("t-1", FAILED), ("t-2", FAILED)]


async def test_what_a_machine_did_to_a_job_is_no_failure_of_its_own(place: Place) -> None:
    one = await place.device("one")
    await place.queue(job("t-1", restarts_left=5))
    await one.run("t-1", 1)
    late = Cause(fault=Fault.POLICY, message="the machine's owner lets no task run longer")
    await one.end("t-1", 1, FAILED, cause=late)
    assert place.effects.ended_ == [("t-1", FAILED)]


# ---------------------------------------------------------------------- machines that do not take


@pytest.mark.parametrize(
    ("beat", "why"),
    [
        ({"draining": True}, "its agent is stopping"),
        ({"refusing": "the disk is full"}, "the disk is full"),
    ],
)
async def test_a_machine_that_says_so_gets_nothing(
    place: Place, beat: dict[str, Any], why: str
) -> None:
    one = await place.device("one")
    await one.beat(**beat)
    await place.queue(job())
    assert place.post.take() == []
    assert place.dispatcher.waiting("r-1") == f"one: {why}"
    await one.beat()
    assert place.post.take() == [("one", "Offer t-1.1")]


async def test_a_machine_that_is_drained_keeps_what_it_has_and_gets_nothing_new(
    place: Place,
) -> None:
    one = await place.device("one")
    await place.queue(job("t-1"))
    await one.run("t-1", 1)
    machine = place.fleet.get("one")
    assert machine is not None
    machine.draining = True
    await place.queue(job("t-2"))
    assert place.dispatcher.waiting("r-1") == "one: draining"
    await one.end("t-1", 1)
    assert place.effects.ended_ == [("t-1", FINISHED)]
    assert place.post.offers() == [("one", "t-1", 1)]


async def test_a_goodbye_stops_offers_and_that_of_an_older_boot_does_not(place: Place) -> None:
    one = await place.device("one")
    one.boot_n = 3
    await one.beat()
    gone = Presence(online=False, boot_n=2, oldest_schema=1, newest_schema=1)
    await one.say(gone)
    await place.queue(job("t-1"))
    assert place.post.take() == [("one", "Offer t-1.1")]

    await one.say(replace(gone, boot_n=3))
    await place.queue(job("t-2"))
    assert place.post.take() == []
    assert place.dispatcher.waiting("r-1") == "one: offline"


async def test_a_heartbeat_of_an_older_boot_renews_nothing(place: Place) -> None:
    one = await place.device("one")
    await place.queue(job())
    one.boot_n = 2
    await one.run("t-1", 1)
    await one.beat()
    one.boot_n = 1
    await place.pass_by(46)
    assert place.fleet.get("one").boot_n == 2  # type: ignore[union-attr]
    assert await place.state() is QUEUED
    assert place.dispatcher.waiting("r-1") == "one: offline"


async def test_a_machine_that_was_revoked_is_not_heard(place: Place) -> None:
    one = await place.device("one")
    await place.queue(job())
    place.fleet.drop("one")
    await one.end("t-1", 1)
    assert place.effects.ended_ == []
    assert sum(place.reports.refused.values()) == 1


async def test_a_message_under_a_false_name_is_not_heard(place: Place) -> None:
    one = await place.device("one")
    await place.device("two")
    await place.queue(job(device="one", bound=True))
    result = Result(task="t-1", epoch=1, state=FINISHED)
    topic = Address("acme", "two").topic(UP_TASK)
    await place.reports.take(topic, pack(Envelope(device="one", body=result)))
    await place.reports.take("fed/1/evil/d/one/up/task", pack(Envelope(device="one", body=result)))
    await place.reports.take(one.address.topic(UP_TASK), b"rubbish")
    await place.store.settle()
    assert place.effects.ended_ == []
    assert sum(place.reports.refused.values()) == 3


# ---------------------------------------------------------------------- sessions and watchers


async def test_stages_of_a_session_share_its_room_and_leave_it_reserved(place: Place) -> None:
    one = await place.device("one", replace(ROOM, slots=1))
    spec = StageSpec(
        session="r-1",
        kind=StageKind.TRAIN,
        round=1,
        client=0,
        clients=1,
        seed=1,
        app="app.py",
        model=Blob(sha256="0" * 64),
    )
    place.dispatcher.reserve("one", "r-1", Needs())
    stage = Task(
        offer=Offer(task="s-1", epoch=1, run="r-1", spec=spec),
        tenant="acme",
        tries_left=1,
        device="one",
        bound=True,
    )
    await place.queue(stage)
    await one.end("s-1", 1)
    await place.queue(job("t-1"))
    assert place.post.offers() == [("one", "s-1", 1)]  # its warm worker still has the slot

    place.dispatcher.release("one", "r-1")
    await place.store.settle()
    assert ("one", "CloseSession r-1") in place.post.take()
    assert place.post.offers()[1:] == [("one", "t-1", 1)]


async def test_who_holds_a_task_is_told_that_somebody_watches(place: Place) -> None:
    one = await place.device("one", replace(ROOM, slots=1))
    await place.queue(job("t-1"), job("t-2"))
    await one.run("t-1", 1)
    place.post.take()
    place.dispatcher.tail("r-1", True)
    place.dispatcher.tail("r-1", False)
    await place.store.settle()
    assert place.post.take() == [("one", "Tail t-1 on"), ("one", "Tail t-1 off")]


# ---------------------------------------------------------------------- trouble of our own


async def test_an_offer_that_could_not_be_sent_is_made_again(place: Place) -> None:
    one = await place.device("one")
    place.post.trouble = Unavailable("the MQTT broker is away")
    await place.queue(job())
    assert place.post.offers() == []
    place.post.trouble = None
    await place.pass_by(31)
    assert place.post.offers() == [("one", "t-1", 2)]
    await one.end("t-1", 2)
    assert place.effects.ended_ == [("t-1", FINISHED)]


async def test_offers_go_on_when_a_full_disk_has_room_again(place: Place) -> None:
    await place.device("one")
    await place.queue(job())
    one = place.devices[0]
    await one.say(Reject(task="t-1", epoch=1, reason=RejectReason.DISK))
    place.store.full = True
    await place.time.pass_by(12)
    assert not place.serving.done()
    assert len(place.post.offers()) == 1

    place.store.full = False
    await place.pass_by(30)
    assert [e for _, _, e in place.post.offers()] == [1, 2]


async def test_a_lease_that_ends_while_the_disk_is_full_is_not_forgotten(place: Place) -> None:
    one = await place.device("one")
    await place.queue(job())
    await one.run("t-1", 1)
    await place.device("two")
    one.alive = False
    place.store.full = True
    await place.pass_by(60)
    place.store.full = False
    await place.pass_by(11)
    assert place.post.offers() == [("one", "t-1", 1), ("two", "t-1", 2)]
    assert (await place.row()).tries_left == 2  # it was lost once, however often that was tried


# ---------------------------------------------------------------------- the law


# What a device says, and what else can happen.
VERBS = (
    *("accept", "progress", "finish", "fail", "lose", "reject", "refuse"),
    *("beat", "beat-nothing", "online", "silent"),
    *("wait 3", "wait 12", "wait 50", "freeze", "stop"),
)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(VERBS),
        st.integers(0, 5),  # who speaks: one of three, or (3 and above) whom it was offered to
        st.integers(0, 5),  # about which of the latest offers
    ),
    min_size=5,
    max_size=40,
)


async def _walk(folder: Path, identity: Identity, steps: Sequence[tuple[str, int, int]]) -> None:
    place = Place(folder, identity)
    try:
        names = [f"t-{n}" for n in range(3)]
        for n in range(3):
            await place.device(f"d-{n}")
        await place.queue(job("t-0", tries=1), job("t-1", tries=2, run="r-2", grace_s=1))
        await place.queue(job("t-2", tries=2, run="r-3", device="d-0", bound=True))
        for verb, who, about in steps:
            await _step(place, verb, who, about)
        await _to_the_end(place)
        _lawful(place, names)
        stored = {name: await place.state(name) for name in names}
        assert set(stored.values()) <= FINAL
        assert dict(place.effects.ended_) == stored
    finally:
        await place.close()


async def _step(place: Place, verb: str, who: int, about: int) -> None:
    offers = place.post.offers()
    name, task, epoch = offers[-1 - about % len(offers)]
    by_name = {device.name: device for device in place.devices}
    device = by_name[name] if who > 2 else place.devices[who]
    match verb:
        case "accept":
            await device.accept(task, epoch)
        case "progress":
            await device.run(task, epoch)
        case "finish" | "fail" | "lose":
            state = {"finish": FINISHED, "fail": FAILED, "lose": LOST}[verb]
            place.post.take()
            await device.end(task, epoch, state)
            assert (device.name, f"ResultAck {task}.{epoch}") in place.post.take()
        case "reject":
            await device.say(Reject(task=task, epoch=epoch, reason=RejectReason.SLOTS))
        case "refuse":
            await device.say(Reject(task=task, epoch=epoch, reason=RejectReason.POLICY_REFUSED))
        case "beat":
            device.alive = True
            await device.beat()
        case "beat-nothing":
            device.holds.clear()
            await device.beat()
        case "online":
            await device.say(Presence(online=True, boot_n=1, oldest_schema=1, newest_schema=1))
        case "silent":
            device.alive = False
        case "freeze":
            place.time.jump(100)
            await place.store.settle()
        case "stop":
            await place.dispatcher.stop_run("r-2", "stopped by ann")
        case _:
            await place.pass_by(int(verb.split()[1]))


async def _to_the_end(place: Place) -> None:
    """Somebody stops everything, and no machine says another word."""
    for device in place.devices:
        device.alive = False
    for run in ("r-1", "r-2", "r-3"):
        await place.dispatcher.stop_run(run, "enough")
    await place.pass_by(150)
    await place.store.settle()


def _lawful(place: Place, names: list[str]) -> None:
    assert sorted(task for task, _ in place.effects.ended_) == names, "each ends exactly once"
    assert sorted(r.task for r in place.effects.told_) == names
    of_task: dict[str, list[tuple[int, str]]] = {}
    for device, task, epoch in place.post.offers():
        of_task.setdefault(task, []).append((epoch, device))
    for offers in of_task.values():
        epochs = [epoch for epoch, _ in offers]
        assert epochs == sorted(epochs), "epochs only grow"
        assert len(set(offers)) == len(set(epochs)), "one epoch is one device's"
    for machine in place.fleet:
        assert machine.holds == {}, "nothing takes room for ever"


@settings(max_examples=15, deadline=None)
@given(steps=STEPS)
def test_each_task_ends_once_whatever_is_said_in_whatever_order(
    identity: Identity, steps: list[tuple[str, int, int]]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(_walk(Path(folder), identity, steps))
