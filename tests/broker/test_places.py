# SPDX-License-Identifier: Apache-2.0
"""Choosing among few machines gives what choosing among all of them would."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from fedml_broker.fleet import Fleet, Machine
from fedml_broker.match import GIB, Capacity, Gpu, Wanted, choose, never
from fedml_protocol.devices import Heartbeat
from fedml_protocol.tasks import Needs
from fedml_protocol.topics import Address
from tests.fakes.messages import LAW

DEVICES = [f"d-{n}" for n in range(2)]
NEEDS = [
    Needs(),
    Needs(),
    Needs(cpus=2),
    Needs(gpus=1),
    Needs(memory_bytes=3 * GIB),
    Needs(cpus=99),
]

device = st.sampled_from(DEVICES)
wanted = st.builds(
    Wanted,
    kind=st.sampled_from(["launch", "federate"]),
    needs=st.sampled_from(NEEDS),
    labels=st.sampled_from([{}, {"site": "north"}]),
)
machine = st.builds(
    lambda name, slots, gpus, site, kinds, draining: {
        "name": name,
        "labels": {"site": "north"} if site else {},
        "draining": draining,
        "capacity": Capacity(
            slots=slots,
            cpus=4,
            memory_bytes=4 * GIB,
            disk_bytes=GIB,
            gpus=tuple(Gpu(uuid=f"g{n}", name="T4", memory_bytes=16 * GIB) for n in range(gpus)),
            kinds=frozenset(kinds),
        ),
    },
    st.sampled_from("abc"),
    st.integers(1, 2),
    st.integers(0, 1),
    st.booleans(),
    st.sampled_from([("launch",), ("launch", "federate")]),
    st.sampled_from([False, False, False, True]),
)
step = st.one_of(
    st.tuples(st.just("put"), device, machine),
    st.tuples(st.sampled_from(["drop", "gone"]), device),
    st.tuples(st.just("beat"), device, st.booleans()),
    st.tuples(st.just("hold"), device, st.sampled_from("xy"), st.sampled_from(NEEDS)),
    st.tuples(st.just("free"), device, st.sampled_from("xy")),
    st.tuples(st.just("free"), device, st.sampled_from("xy")),
    st.tuples(st.just("wait"), st.floats(0.0, 30.0)),
)
question = st.tuples(wanted, st.sets(device, max_size=1))


class Clock:
    """Moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@LAW
@given(
    st.lists(machine, min_size=2, max_size=2),
    st.lists(step, min_size=8, max_size=40),
    st.lists(question, min_size=1, max_size=3),
)
def test_few_are_looked_at_and_the_choice_is_that_among_all(
    machines: list[Any], steps: list[Any], questions: list[Any]
) -> None:
    clock = Clock()
    fleet = Fleet(heartbeat_s=10, clock=clock)
    begin = [("put", *one) for one in zip(DEVICES, machines, strict=True)]
    beats = [("beat", device, False) for device in DEVICES]
    for verb, *rest in (*begin, *beats, *steps):
        known = fleet.get(rest[0])
        match verb:
            case "put":
                fleet.put(Machine(address=Address("acme", rest[0]), **rest[1]))
            case "drop":
                fleet.drop(rest[0])
            case "beat":
                fleet.heard(rest[0], 1, Heartbeat(free_slots=1, refusing="no" if rest[1] else ""))
            case "gone":
                fleet.gone(rest[0], 1)
            case "hold" if known is not None:
                fleet.hold(known, rest[1], rest[2])
            case "free" if known is not None:
                fleet.free(known, rest[1])
            case "wait":
                clock.now += rest[0]
        for wish, without in questions:
            everybody = fleet.candidates("acme")
            expected, _ = choose(wish, [c for c in everybody if c.device not in without])
            chosen = fleet.choose("acme", wish, without)
            assert (chosen and chosen.address.device) == expected
            assert fleet.could("acme", wish) == {c.device for c in everybody if not never(wish, c)}


def test_a_machine_that_fell_silent_is_chosen_again_once_it_beats() -> None:
    clock = Clock()
    fleet = Fleet(heartbeat_s=10, clock=clock)
    capacity = Capacity(slots=1, cpus=1, memory_bytes=GIB, disk_bytes=GIB)
    fleet.put(Machine(address=Address("acme", "d-1"), name="one", labels={}, capacity=capacity))
    fleet.heard("d-1", 1, Heartbeat(free_slots=1))
    assert fleet.choose("acme", Wanted(kind="launch")) is not None

    clock.now += 100
    assert fleet.choose("acme", Wanted(kind="launch")) is None

    fleet.heard("d-1", 1, Heartbeat(free_slots=1))
    assert fleet.choose("acme", Wanted(kind="launch")) is not None
