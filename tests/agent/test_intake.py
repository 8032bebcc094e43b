# SPDX-License-Identifier: Apache-2.0
"""Orders as the agent takes them: signed ones obeyed once, everything else refused and counted."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedml_agent.home import Home, Membership
from fedml_agent.intake import Intake
from fedml_agent.journal import Entry, Journal
from fedml_agent.policy import Policy
from fedml_agent.room import Room
from fedml_protocol.envelope import Envelope, pack
from fedml_protocol.keys import fingerprint, sign
from fedml_protocol.launch import LaunchSpec
from fedml_protocol.tasks import (
    Accept,
    Cancel,
    CloseSession,
    Drain,
    Offer,
    Order,
    Reject,
    RejectReason,
    Result,
    ResultAck,
    SignedOrder,
    TaskState,
)

DEVICE = "d-1"
BROKER = Ed25519PrivateKey.generate()
STRANGER = Ed25519PrivateKey.generate()


class Obedient:
    """Writes down what it is told to do."""

    def __init__(self) -> None:
        self.done: list[Any] = []

    def begin(self, entry: Entry) -> None:
        self.done.append(("begin", *entry.key))

    def answer(self, body: Accept | Reject) -> None:
        self.done.append(body)

    def cancel(self, order: Cancel) -> None:
        self.done.append(("cancel", order.task, order.epoch))

    def drain(self, on: bool) -> None:
        self.done.append(("drain", on))

    def tail(self, task: str, on: bool) -> None:
        self.done.append(("tail", task, on))

    def resync(self) -> None:
        self.done.append("resync")

    def close_session(self, session: str) -> None:
        self.done.append(("close", session))

    def confirmed(self, task: str, epoch: int) -> None:
        self.done.append(("confirmed", task, epoch))

    @property
    def refusals(self) -> list[RejectReason]:
        return [b.reason for b in self.done if isinstance(b, Reject)]


class Machine:
    """An intake with its journal on a real disk, and a clock that stands."""

    def __init__(self, folder: Path, policy: Policy | None = None) -> None:
        self.folder = folder
        self.policy = policy or Policy()
        self.now = 1000.0
        self.counter = 0
        self.start()

    def start(self) -> None:
        """Start it, or start it again."""
        home = Home(self.folder)
        home.make()
        self.journal = Journal(home.private / "journal.db")
        self.obedient = Obedient()
        membership = Membership(
            url="https://localhost:1",
            tenant="acme",
            device=DEVICE,
            mqtt_host="localhost",
            mqtt_port=1,
            heartbeat_s=10,
            verify_keys={
                fingerprint(BROKER.public_key()): BROKER.public_key().public_bytes_raw().hex()
            },
        )
        self.intake = Intake(
            home,
            self.journal,
            membership,
            Room((), 4),
            lambda: self.policy,
            (),
            self.obedient,
            clock=lambda: self.now,
        )

    def order(self, what: Any, **more: Any) -> SignedOrder:
        """The next order of the broker."""
        self.counter += 1
        fields = {"device": DEVICE, "counter": self.counter, "lifetime_s": 30.0, **more}
        return sign(Order(what=what, **fields), BROKER)

    async def take(self, body: Any) -> None:
        await self.intake.take("fed/1/acme/d/d-1/dn/task", pack(Envelope(device=DEVICE, body=body)))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def offer(task: str = "t-1", epoch: int = 1, **more: Any) -> Offer:
    return Offer(task=task, epoch=epoch, run="r-1", spec=LaunchSpec(command="true"), **more)


async def test_a_signed_offer_is_on_the_disk_before_it_is_accepted(machine: Machine) -> None:
    await machine.take(machine.order(offer()))
    assert machine.obedient.done == [Accept(task="t-1", epoch=1), ("begin", "t-1", 1)]
    machine.journal.close()
    again = Journal(machine.folder / "agent" / "private" / "journal.db")
    assert [e.key for e in again.held()] == [("t-1", 1)]
    again.close()


async def test_an_offer_that_comes_twice_is_answered_twice_and_begun_once(machine: Machine) -> None:
    order = machine.order(offer())
    await machine.take(order)
    await machine.take(order)
    assert machine.obedient.done.count(("begin", "t-1", 1)) == 1
    assert machine.obedient.done.count(Accept(task="t-1", epoch=1)) == 2


async def test_an_offer_of_what_was_done_and_confirmed_is_refused_not_done_again(
    machine: Machine,
) -> None:
    """Of a broker that was restored from a backup: it then makes another one."""
    await machine.take(machine.order(offer()))
    result = Result(task="t-1", epoch=1, state=TaskState.FINISHED)
    entry = machine.journal.get("t-1", 1)
    assert entry is not None
    machine.journal.end(entry, result)
    await machine.take(machine.order(offer()))
    assert machine.obedient.refusals == []  # the result is on its way
    machine.journal.confirm("t-1", 1)
    await machine.take(machine.order(offer()))
    assert machine.obedient.refusals == [RejectReason.STALE]
    await machine.take(machine.order(offer(epoch=2)))
    assert machine.obedient.done[-1] == ("begin", "t-1", 2)


@pytest.mark.parametrize(
    "forge",
    [
        pytest.param(lambda o: sign(_opened(o), STRANGER), id="somebody else's signature"),
        pytest.param(
            lambda o: dataclasses.replace(o, order=o.order.replace(b"true", b"evil")),
            id="another command under the same signature",
        ),
        pytest.param(
            lambda o: dataclasses.replace(o, signature=bytes(64)), id="no signature at all"
        ),
        pytest.param(
            lambda o: sign(dataclasses.replace(_opened(o), device="d-2"), BROKER),
            id="an order for another machine",
        ),
    ],
)
async def test_a_rewritten_order_is_refused_and_counted(machine: Machine, forge: Any) -> None:
    await machine.take(forge(machine.order(offer())))
    assert machine.obedient.done == []
    assert machine.intake.alarms == 1
    assert machine.journal.held() == []


async def test_garbage_on_the_topic_is_counted_and_harms_nobody(machine: Machine) -> None:
    await machine.intake.take("fed/1/acme/d/d-1/dn/task", b"\x00garbage")
    await machine.take(machine.order(offer()))
    assert machine.intake.alarms == 1
    assert ("begin", "t-1", 1) in machine.obedient.done


async def test_an_old_offer_is_a_replay_once_a_newer_epoch_was_seen(machine: Machine) -> None:
    first = machine.order(offer(epoch=1))
    await machine.take(machine.order(offer(epoch=2)))
    await machine.take(first)
    assert machine.obedient.refusals == [RejectReason.STALE]


async def test_a_newer_epoch_ends_the_older_one(machine: Machine) -> None:
    await machine.take(machine.order(offer(epoch=1)))
    await machine.take(machine.order(offer(epoch=2)))
    assert ("cancel", "t-1", 1) in machine.obedient.done
    assert ("begin", "t-1", 2) in machine.obedient.done


async def test_an_offer_of_a_task_long_forgotten_is_a_replay_after_a_restart_too(
    machine: Machine,
) -> None:
    first = machine.order(offer(task="t-0"))
    for n in range(1002):  # more than the journal keeps
        await machine.take(machine.order(offer(task=f"t-{n}")) if n else first)
        entry = machine.journal.get(f"t-{n}", 1)
        assert entry is not None
        machine.intake._room.give_back(f"t-{n}")
        machine.journal.end(entry, Result(task=f"t-{n}", epoch=1, state=TaskState.FINISHED))
        machine.journal.confirm(f"t-{n}", 1)
    assert machine.journal.get("t-0", 1) is None
    machine.journal.close()
    machine.start()
    await machine.take(first)
    assert machine.obedient.refusals == [RejectReason.STALE]
    assert machine.journal.held() == []


async def test_an_order_that_was_held_back_is_refused_after_its_lifetime(machine: Machine) -> None:
    held_back = machine.order(offer(), lifetime_s=30.0)
    machine.intake.sent_by_now(machine.counter)
    machine.now += 3600
    await machine.take(held_back)
    assert machine.obedient.refusals == [RejectReason.STALE]
    assert machine.intake.alarms == 1
    await machine.take(machine.order(offer(epoch=2)))  # a new one is none of those
    assert ("begin", "t-1", 2) in machine.obedient.done


async def test_an_order_that_was_only_slow_is_obeyed(machine: Machine) -> None:
    slow = machine.order(offer(), lifetime_s=30.0)
    machine.intake.sent_by_now(machine.counter)
    machine.now += 25
    await machine.take(slow)
    assert ("begin", "t-1", 1) in machine.obedient.done


async def test_an_old_order_to_drain_does_not_undo_a_newer_one(machine: Machine) -> None:
    drain, use = machine.order(Drain(on=True)), machine.order(Drain(on=False))
    await machine.take(drain)
    await machine.take(use)
    await machine.take(drain)
    assert not machine.intake.draining
    machine.journal.close()
    machine.start()
    await machine.take(drain)
    assert not machine.intake.draining
    assert machine.intake.alarms == 1


async def test_the_other_orders_may_come_twice(machine: Machine) -> None:
    for body in (
        machine.order(Cancel(task="t-9", epoch=1)),
        machine.order(CloseSession(session="r-9")),
        ResultAck(task="t-9", epoch=1),
    ):
        await machine.take(body)
        await machine.take(body)
    assert machine.intake.alarms == 0
    assert machine.obedient.done == [
        ("cancel", "t-9", 1),
        ("cancel", "t-9", 1),
        ("close", "r-9"),
        ("close", "r-9"),
        ("confirmed", "t-9", 1),
        ("confirmed", "t-9", 1),
    ]


async def test_no_more_tasks_than_slots_and_the_answer_says_why(machine: Machine) -> None:
    for n in range(5):
        await machine.take(machine.order(offer(task=f"t-{n}")))
    assert machine.obedient.refusals == [RejectReason.SLOTS]
    assert len(machine.journal.held()) == 4


async def test_the_owners_no_is_final(tmp_path: Path) -> None:
    machine = Machine(tmp_path, Policy(commands=False))
    await machine.take(machine.order(offer()))
    assert machine.obedient.refusals == [RejectReason.POLICY_REFUSED]


def _opened(signed: SignedOrder) -> Order:
    from fedml_protocol.codec import parse

    return parse(Order, signed.order)
