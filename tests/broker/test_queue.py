# SPDX-License-Identifier: Apache-2.0
"""Who goes first, and where: order, reservations, those that give way, and all or none."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from fedml_broker import match, queue
from fedml_broker.match import Candidate, Capacity, Gpu, Wanted
from fedml_broker.queue import Held, Plan, Waiting
from fedml_protocol.tasks import Needs

GIB = 1 << 30


def machine(name: str, *busy: Needs, gpus: int = 0, slots: int = 4, **more: Any) -> Candidate:
    """A machine with 8 CPUs and 16 GiB."""
    cards = tuple(Gpu(uuid=f"{name}-{n}", name="A100", memory_bytes=80 * GIB) for n in range(gpus))
    price = more.pop("price", 0.0)
    capacity = Capacity(
        slots=slots, cpus=8, memory_bytes=16 * GIB, disk_bytes=GIB, gpus=cards, price=price
    )
    return Candidate(device=name, name=name, capacity=capacity, busy=busy, **more)


def waits(run: str, since: float = 0, *, user: str = "ann", gpus: int = 0, **more: Any) -> Waiting:
    """A run that waits."""
    needs = Needs(gpus=gpus, cpus=more.pop("cpus", 0))
    cluster, price = more.pop("cluster", ""), more.pop("max_price", None)
    wanted = Wanted(kind="launch", needs=needs, cluster=cluster, max_price=price)
    return Waiting(key=run, run=run, user=user, since=since, wanted=wanted, **more)


def has(task: str, device: str, gpus: int = 0, **more: Any) -> Held:
    """A task on a machine."""
    more = {"user": "bob", **more}
    return Held(task=task, run=f"r-{task}", device=device, needs=Needs(gpus=gpus), **more)


@dataclass
class View:
    """What a test says that there is."""

    machines: Sequence[Candidate]
    tasks: Sequence[Held] = ()

    def everybody(self) -> Sequence[Candidate]:
        return self.machines

    def ranked(self, wanted: Wanted) -> Iterator[Candidate]:
        able = [c for c in self.machines if not c.away and not match.never(wanted, c)]
        free = [c for c in able if len(c.busy) < c.capacity.slots]
        return iter(sorted(free, key=lambda c: (len(c.busy) / c.capacity.slots, c.name)))

    def held(self) -> Sequence[Held]:
        return self.tasks


def plan(
    waiting: Sequence[Waiting], machines: Sequence[Candidate], held: Sequence[Held] = ()
) -> Plan:
    return queue.plan(waiting, View(machines, held), 0.0)


def starts(made: Plan) -> list[str]:
    return list(made.places)


# ---------------------------------------------------------------------- the order


def test_who_came_first_goes_first() -> None:
    one_slot = machine("m", slots=1)
    assert starts(plan([waits("late", 2), waits("early", 1)], [one_slot])) == ["early"]


def test_a_higher_priority_goes_before_who_came_earlier() -> None:
    made = plan([waits("early", 1), waits("urgent", 2, priority=5)], [machine("m", slots=1)])
    assert starts(made) == ["urgent"]


def test_who_has_less_of_the_machines_goes_before_who_has_more() -> None:
    held = [has("t", "m", gpus=1, user="ann")]
    busy = machine("m", Needs(gpus=1), gpus=2)
    waiting = [waits("of-ann", 1, gpus=1), waits("of-eve", 2, user="eve", gpus=1)]
    assert starts(plan(waiting, [busy], held)) == ["of-eve"]


def test_the_share_of_who_is_served_grows_at_once() -> None:
    waiting = [waits(f"a{n}", n) for n in range(3)] + [waits("e", 9, user="eve")]
    assert starts(plan(waiting, [machine("m", slots=2)])) == ["a0", "e"]


def test_a_share_is_that_of_the_resource_of_which_one_has_most() -> None:
    machines = [machine("m", gpus=4, slots=8)]
    held = [
        has("t1", "m", gpus=2, user="ann"),
        has("t2", "m", user="eve"),
        has("t3", "m", user="eve"),
    ]
    assert queue.shares_of(View(machines, held)) == {"ann": 0.5, "eve": 0.25}


# ---------------------------------------------------------------------- where


def test_work_goes_to_the_emptiest_machine() -> None:
    machines = [machine("a", Needs()), machine("b"), machine("c", Needs(), Needs())]
    assert plan([waits("r")], machines).places == {"r": ("b",)}


def test_a_machine_that_costs_more_than_is_allowed_is_never_taken() -> None:
    dear, cheap = machine("dear", price=3.0), machine("cheap", Needs(), price=0.5)
    asked = waits("r", max_price=1.0)
    assert plan([asked], [dear, cheap]).places == {"r": ("cheap",)}
    assert queue.why(asked, [dear], {}, 0.0) == {"dear": "costs 3 an hour, at most 1 is allowed"}


def test_a_cluster_keeps_its_machines_for_those_that_name_it() -> None:
    machines = [machine("kept", cluster="mine"), machine("open", Needs())]
    waiting = [waits("anybody", 1), waits("of-it", 2, cluster="mine")]
    assert plan(waiting, machines).places == {"anybody": ("open",), "of-it": ("kept",)}
    assert queue.why(waits("r"), machines[:1], {}, 0) == {"kept": "is kept for the cluster mine"}
    told = queue.why(waits("r", cluster="mine"), machines[1:], {}, 0)
    assert told == {"open": "is not in the cluster mine"}


# ---------------------------------------------------------------------- all or none


def test_a_run_of_several_machines_gets_all_or_none() -> None:
    two = waits("pair", nodes=2)
    free, full = machine("a"), machine("b", slots=1)
    assert plan([two], [free, full]).places == {"pair": ("a", "b")}
    full = machine("b", Needs(), slots=1)
    assert plan([two], [free, full]).places == {}
    told = queue.why(two, [free, full], {}, 0.0)
    assert told == {"a": "free; 1 of 2 machines are", "b": "busy: 1 of 1 tasks run"}


def test_each_task_of_a_run_has_a_machine_of_its_own() -> None:
    assert plan([waits("pair", nodes=2)], [machine("a", slots=8)]).places == {}


# ---------------------------------------------------------------------- what cannot start yet


def test_a_small_run_passes_a_large_one_where_it_takes_nothing_from_it() -> None:
    busy = machine("m", Needs(gpus=1), gpus=2)
    waiting = [waits("large", 1, gpus=2), waits("no-gpu", 2), waits("one-gpu", 3, gpus=1)]
    made = plan(waiting, [busy], [has("t", "m", gpus=1)])
    assert starts(made) == ["no-gpu"]
    assert made.reserved["m"].run == "large"
    told = queue.why(waiting[2], [busy], made.reserved, 0.0)
    assert told == {"m": "kept free for large, which waits longer or has a higher priority"}


def test_a_run_that_ends_before_the_reserved_machine_is_free_may_use_it_meanwhile() -> None:
    busy = machine("m", Needs(gpus=1), gpus=2)
    held = [has("t", "m", gpus=1, ends_by=600.0)]
    short, long = waits("short", 2, gpus=1, lasts_s=500), waits("long", 3, gpus=1, lasts_s=700)
    made = plan([waits("large", 1, gpus=2), short, long], [busy], held)
    assert starts(made) == ["short"]
    # Once the short one is there no GPU is free; as if it were:
    told = queue.why(long, [busy], made.reserved, 0.0)
    assert told["m"].endswith("a `deadline` of at most 600 s would let it go first")


def test_the_other_machines_are_not_kept_for_who_waits() -> None:
    machines = [machine("a", Needs(gpus=2), gpus=2), machine("b", Needs(gpus=1), gpus=2)]
    held = [has("t1", "a", gpus=2), has("t2", "b", gpus=1, ends_by=60.0)]
    made = plan([waits("large", 1, gpus=2), waits("small", 2, gpus=1)], machines, held)
    assert list(made.reserved) == ["b"]  # free soonest, for all that is known
    held = [has("t1", "a", gpus=2, ends_by=60.0), has("t2", "b", gpus=1)]
    made = plan([waits("large", 1, gpus=2), waits("small", 2, gpus=1)], machines, held)
    assert made.places == {"small": ("b",)}


def test_nothing_is_kept_for_a_run_whose_machines_are_away() -> None:
    machines = [machine("a"), machine("b", away="offline")]
    made = plan([waits("pair", 1, nodes=2), waits("other", 2)], machines)
    assert made.places == {"other": ("a",)}
    assert made.reserved == {}


# ---------------------------------------------------------------------- giving way


def test_what_may_be_ended_gives_way_to_a_higher_priority() -> None:
    busy = machine("m", Needs(gpus=1), Needs(gpus=1), gpus=2)
    held = [has("kept", "m", gpus=1), has("cheap", "m", gpus=1, priority=-1, preemptible=True)]
    made = plan([waits("urgent", gpus=1, priority=5)], [busy], held)
    assert made.recall == {"cheap": "urgent"}
    assert made.places == {}
    assert made.reserved["m"].run == "urgent"


def test_nothing_gives_way_to_its_own_priority_or_without_being_preemptible() -> None:
    busy = machine("m", Needs(gpus=1), gpus=1)
    for held in (has("t", "m", gpus=1, preemptible=True), has("t", "m", gpus=1, priority=-9)):
        assert plan([waits("r", gpus=1)], [busy], [held]).recall == {}


def test_no_more_give_way_than_are_needed_and_the_youngest_of_the_lowest_first() -> None:
    busy = machine("m", *[Needs(gpus=1)] * 3, gpus=3)
    held = [
        has("older", "m", gpus=1, priority=-2, preemptible=True),
        has("younger", "m", gpus=1, priority=-2, preemptible=True),
        has("higher", "m", gpus=1, priority=-1, preemptible=True),
    ]
    made = plan([waits("r", gpus=1)], [busy], held)
    assert made.recall == {"younger": "r"}


def test_nobody_gives_way_when_that_would_not_be_enough() -> None:
    busy = machine("m", Needs(gpus=1), Needs(gpus=1), gpus=2)
    held = [has("firm", "m", gpus=1), has("soft", "m", gpus=1, preemptible=True, priority=-1)]
    assert plan([waits("r", gpus=2)], [busy], held).recall == {}


def test_who_gives_way_already_is_not_asked_again_and_nobody_else_is() -> None:
    busy = machine("m", Needs(gpus=1), Needs(gpus=1), gpus=2)
    soft = {"gpus": 1, "preemptible": True, "priority": -1}
    held = [has("one", "m", **soft), has("two", "m", recalled=True, **soft)]
    made = plan([waits("r", gpus=1)], [busy], held)
    assert made.recall == {}
    assert made.reserved["m"].run == "r"


def test_several_machines_are_cleared_at_once_for_a_run_that_needs_them() -> None:
    machines = [machine(n, Needs(gpus=1), gpus=1) for n in "abc"]
    soft = {"gpus": 1, "preemptible": True, "priority": -1}
    held = [has("1", "a", **soft), has("2", "b", gpus=1), has("3", "c", **soft)]
    made = plan([waits("pair", gpus=1, nodes=2)], machines, held)
    assert made.recall == {"1": "pair", "3": "pair"}
    assert set(made.reserved) == {"a", "c"}


# ---------------------------------------------------------------------- laws

needs = st.builds(Needs, gpus=st.integers(0, 2), cpus=st.integers(0, 8))
machines = st.lists(
    st.builds(
        lambda gpus, slots, busy: (gpus, slots, busy[:slots]),
        st.integers(0, 3),
        st.integers(1, 3),
        st.lists(needs, max_size=3),
    ),
    max_size=4,
).map(lambda made: [machine(f"m{n}", *b, gpus=g, slots=s) for n, (g, s, b) in enumerate(made)])
runs = st.lists(
    st.builds(
        dict,
        needs=needs,
        user=st.sampled_from(["ann", "bob", "eve"]),
        priority=st.integers(-1, 1),
        nodes=st.integers(1, 3),
        lasts_s=st.sampled_from([0.0, 10.0]),
    ),
    max_size=6,
).map(
    lambda made: [
        Waiting(
            key=f"r{n}",
            run=f"r{n}",
            since=float(n),
            wanted=Wanted(kind="launch", needs=one.pop("needs")),
            **one,
        )
        for n, one in enumerate(made)
    ]
)


@given(runs, machines)
def test_what_starts_has_its_room_and_what_does_not_is_told_why(
    waiting: list[Waiting], fleet: list[Candidate]
) -> None:
    made = plan(waiting, fleet)
    busy = {c.device: list(c.busy) for c in fleet}
    by_key = {w.key: w for w in waiting}
    for key, devices in made.places.items():
        assert len(devices) == len(set(devices)) == by_key[key].nodes
        for device in devices:
            busy[device].append(by_key[key].wanted.needs)
    for one in fleet:
        before = match.shortfall(Needs(), one.capacity, one.busy)
        added = busy[one.device][len(one.busy) :]
        if added:
            *rest, last = busy[one.device]
            assert not any(match.shortfall(last, one.capacity, rest)), before
    later = [
        Candidate(device=c.device, name=c.name, capacity=c.capacity, busy=tuple(busy[c.device]))
        for c in fleet
    ]
    for run in waiting:
        if run.key not in made.places and fleet:
            told = queue.why(run, later, made.reserved, 0.0)
            assert len(told) == len(fleet)


@given(runs, machines)
def test_the_first_in_the_order_starts_if_anybody_could_let_it(
    waiting: list[Waiting], fleet: list[Candidate]
) -> None:
    if not waiting:
        return
    first = next(queue.in_order(waiting, {}))
    alone = plan([first], fleet)
    assert (first.key in plan(waiting, fleet).places) == (first.key in alone.places)
