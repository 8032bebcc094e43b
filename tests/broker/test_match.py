# SPDX-License-Identifier: Apache-2.0
"""Which machine a task goes to, and what people are told when it goes to none."""

from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedml_broker.federate import ClientsBody, MachinesRequest
from fedml_broker.match import (
    GIB,
    Candidate,
    Capacity,
    Gpu,
    Wanted,
    choose,
    never,
    now,
    summary,
    verdicts,
)
from fedml_protocol.tasks import Needs
from tests.fakes.messages import LAW

LARGE = Gpu(uuid="GPU-a", name="H100", memory_bytes=80 * GIB)
SMALL = Gpu(uuid="GPU-b", name="T4", memory_bytes=16 * GIB)
CAPACITY = Capacity(
    slots=2, cpus=8, memory_bytes=32 * GIB, disk_bytes=100 * GIB, gpus=(LARGE, SMALL)
)
MACHINE = Candidate(
    device="d-1", name="node-1", capacity=CAPACITY, labels={"site": "lab", "owner": "ann"}
)
JOB = Wanted(kind="launch")


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        (JOB, ""),
        (Wanted(kind="train"), "its owner takes no train tasks"),
        (Wanted(kind="launch", labels={"site": "lab", "owner": "ann"}), ""),
        (Wanted(kind="launch", labels={"rack": "7"}), "no label rack"),
        (Wanted(kind="launch", labels={"site": "home"}), "label site is 'lab', not 'home'"),
        (Wanted(kind="launch", container=True), "runs no containers: it has no container engine"),
        (
            Wanted(kind="launch", offline=True),
            "cannot run a job without a network (`network: none`)",
        ),
        (Wanted(kind="launch", needs=Needs(gpus=2)), ""),
        (Wanted(kind="launch", needs=Needs(gpus=3)), "has 2 GPUs, 3 are asked for"),
        (Wanted(kind="launch", needs=Needs(gpus=1, gpu_memory_bytes=80 * GIB)), ""),
        (
            Wanted(kind="launch", needs=Needs(gpus=2, gpu_memory_bytes=20 * GIB)),
            "its GPUs have less than 20.0 GiB of memory each",
        ),
        (Wanted(kind="launch", needs=Needs(gpu_memory_bytes=999 * GIB)), ""),  # of no GPU
        (Wanted(kind="launch", needs=Needs(cpus=8)), ""),
        (Wanted(kind="launch", needs=Needs(cpus=9)), "has 8 CPUs, 9 are asked for"),
        (
            Wanted(kind="launch", needs=Needs(memory_bytes=33 * GIB)),
            "has 32.0 GiB of memory, 33.0 GiB are asked for",
        ),
        (
            Wanted(kind="launch", needs=Needs(disk_bytes=101 * GIB)),
            "has 100.0 GiB of disk, 101.0 GiB are asked for",
        ),
    ],
)
def test_what_a_machine_can_never_do_is_said_in_its_own_numbers(
    wanted: Wanted, reason: str
) -> None:
    assert never(wanted, MACHINE) == reason


@pytest.mark.parametrize(
    ("needs", "reason"),
    [
        (Needs(gpus=1, gpu_model="T4"), ""),
        (Needs(gpus=2, gpu_model="T4"), "has 1 × H100, 1 × T4: 1 of 2 are T4"),
        (Needs(gpus=1, gpu_model="RTX-4090"), "has 1 × H100, 1 × T4: 0 of 1 are RTX-4090"),
        (Needs(gpu_model="RTX-4090"), ""),  # of no GPU
    ],
)
def test_gpus_of_another_model_are_named(needs: Needs, reason: str) -> None:
    assert never(Wanted(kind="launch", needs=needs), MACHINE) == reason


def test_a_busy_gpu_is_missed_by_its_model() -> None:
    wanted = Wanted(kind="launch", needs=Needs(gpus=1, gpu_model="T4"))
    busy = replace(MACHINE, busy=(Needs(gpus=1),))
    assert now(wanted, busy) == "busy: 0 of 1 GPUs of the model T4 are free"
    assert now(wanted, replace(MACHINE, busy=(Needs(gpus=1, gpu_model="H100"),))) == ""


def test_the_verdicts_name_every_machine_and_tell_now_from_later_from_never() -> None:
    away = replace(MACHINE, device="d-2", name="away", away="offline")
    small = replace(MACHINE, device="d-3", name="small", capacity=replace(CAPACITY, cpus=1))
    found = verdicts(Wanted(kind="launch", needs=Needs(cpus=2)), [small, MACHINE, away])
    assert [(v.name, v.fits, v.why) for v in found] == [
        ("away", "later", "offline"),
        ("node-1", "now", ""),
        ("small", "never", "has 1 CPUs, 2 are asked for"),
    ]


def test_a_machine_without_gpus_says_so() -> None:
    plain = replace(MACHINE, capacity=replace(CAPACITY, gpus=()))
    wanted = Wanted(kind="launch", needs=Needs(gpus=1))
    assert never(wanted, plain) == "has no GPU, 1 are asked for"


@pytest.mark.parametrize(
    ("busy", "needs", "reason"),
    [
        ((), Needs(gpus=2, cpus=8, memory_bytes=32 * GIB), ""),
        ((Needs(), Needs()), Needs(), "busy: 2 of 2 tasks run"),
        ((Needs(gpus=1),), Needs(gpus=1), ""),
        ((Needs(gpus=1),), Needs(gpus=2), "busy: 1 of 2 GPUs are free"),
        ((Needs(gpus=1),), Needs(gpus=1, gpu_memory_bytes=80 * GIB), ""),  # that one took the T4
        (
            (Needs(gpus=1, gpu_memory_bytes=20 * GIB),),
            Needs(gpus=1, gpu_memory_bytes=80 * GIB),
            "busy: 0 of 1 GPUs with 80.0 GiB are free",
        ),
        ((Needs(gpus=1, gpu_memory_bytes=20 * GIB),), Needs(gpus=1), ""),
        ((Needs(memory_bytes=30 * GIB),), Needs(memory_bytes=2 * GIB), ""),
        (
            (Needs(memory_bytes=30 * GIB),),
            Needs(memory_bytes=3 * GIB),
            "busy: 2.0 GiB of memory are not promised",
        ),
        ((Needs(cpus=5),), Needs(cpus=3), ""),
        ((Needs(cpus=5),), Needs(cpus=4), "busy: too few CPUs are free"),
    ],
)
def test_what_is_promised_is_not_promised_again(
    busy: tuple[Needs, ...], needs: Needs, reason: str
) -> None:
    assert now(Wanted(kind="launch", needs=needs), replace(MACHINE, busy=busy)) == reason


def test_a_machine_that_is_away_says_why_before_anything_else() -> None:
    full = replace(MACHINE, busy=(Needs(), Needs()), away="draining")
    assert now(JOB, full) == "draining"


def test_the_emptiest_machine_is_chosen_then_the_first_by_name() -> None:
    two_of_four = replace(
        MACHINE,
        device="d-2",
        name="b",
        capacity=replace(CAPACITY, slots=4),
        busy=(Needs(), Needs()),
    )
    one_of_four = replace(two_of_four, device="d-3", name="c", busy=(Needs(),))
    half = replace(MACHINE, device="d-1", name="a", busy=(Needs(),))
    assert choose(JOB, [half, two_of_four, one_of_four]) == ("d-3", {})
    assert choose(JOB, [two_of_four, half]) == ("d-1", {})


def test_nobody_fits_and_each_says_why() -> None:
    away = replace(MACHINE, name="one", away="offline")
    other = replace(MACHINE, name="two", labels={})
    wanted = Wanted(kind="launch", labels={"site": "lab"})
    assert choose(wanted, [away, other]) == (None, {"one": "offline", "two": "no label site"})
    assert choose(wanted, []) == (None, {})


SIZES = st.integers(0, 4)
NEEDS = st.builds(
    Needs,
    gpus=SIZES,
    gpu_memory_bytes=SIZES,
    cpus=SIZES,
    memory_bytes=SIZES,
    disk_bytes=SIZES,
)
MACHINES = st.lists(
    st.builds(
        Candidate,
        device=st.text("abcdefgh", min_size=3, max_size=3),
        name=st.text("abcdefgh", min_size=3, max_size=3),
        capacity=st.builds(
            Capacity,
            slots=st.integers(1, 3),
            cpus=SIZES,
            memory_bytes=SIZES,
            disk_bytes=SIZES,
            gpus=st.lists(
                st.builds(Gpu, uuid=st.uuids().map(str), name=st.just("G"), memory_bytes=SIZES),
                max_size=3,
            ).map(tuple),
        ),
        labels=st.sampled_from([{}, {"site": "lab"}]),
        busy=st.lists(NEEDS, max_size=2).map(tuple),
        away=st.sampled_from(["", "", "offline"]),
    ),
    max_size=5,
    unique_by=(lambda m: m.device, lambda m: m.name),
)
WANTED = st.builds(
    Wanted,
    kind=st.sampled_from(["launch", "launch", "train"]),
    needs=NEEDS,
    labels=st.sampled_from([{}, {"site": "lab"}]),
)


@LAW
@given(wanted=WANTED, machines=MACHINES)
def test_a_choice_is_explained_fits_and_does_not_hang_on_the_order(
    wanted: Wanted, machines: list[Candidate]
) -> None:
    chosen, reasons = choose(wanted, machines)
    assert choose(wanted, reversed(machines)) == (chosen, reasons)
    fitting = {m.device for m in machines if m.name not in reasons}
    assert chosen in fitting if fitting else chosen is None
    for m in machines:
        if m.device != chosen:
            continue
        # Whatever the words say, the numbers must hold.
        promised = [*m.busy, wanted.needs]
        assert len(promised) <= m.capacity.slots
        assert not wanted.needs.gpus or sum(n.gpus for n in promised) <= len(m.capacity.gpus)
        assert sum(n.memory_bytes for n in promised) <= m.capacity.memory_bytes
        assert sum(n.cpus for n in promised) <= m.capacity.cpus
        assert wanted.needs.disk_bytes <= m.capacity.disk_bytes
        assert all(m.labels.get(k) == v for k, v in wanted.labels.items())
        assert not m.away
        # If those who are there found theirs, however large, so do they and the new one together.
        if wanted.needs.gpus and _all_find_gpus(m.busy, m.capacity):
            assert _all_find_gpus(promised, m.capacity)


def _all_find_gpus(promised: Iterable[Needs], capacity: Capacity) -> bool:
    """Hall's condition: whatever size one looks at, not more are asked for than there are."""
    return all(
        sum(n.gpus for n in promised if n.gpu_memory_bytes >= size)
        <= sum(gpu.memory_bytes >= size for gpu in capacity.gpus)
        for size in range(5)
    )


def test_reasons_of_many_machines_are_told_in_few_words() -> None:
    reasons = {f"m{i}": "offline" for i in range(5)} | {"x": "draining", "a": "no label gpu"}
    assert summary(reasons) == ("offline (m0, m1, m2 and 2 more); draining (x); no label gpu (a)")
    assert summary({}) == ""


def test_each_machine_of_a_federated_run_is_of_its_cluster_and_its_price() -> None:
    clients = ClientsBody(count=3, labels={"site": "lab"})
    asked = MachinesRequest(clients=clients, cluster="ours", max_price_per_hour=2.0).wanted()
    ours = replace(
        MACHINE, cluster="ours", capacity=replace(CAPACITY, kinds=("federate",), price=2.0)
    )
    assert (never(asked, ours), now(asked, ours)) == ("", "")
    dear = replace(ours, capacity=replace(ours.capacity, price=2.5))
    assert never(asked, dear) == "costs 2.5 an hour, at most 2 is allowed"
    assert never(asked, replace(ours, cluster="")) == "is not in the cluster ours"
    assert never(asked, replace(ours, labels={})) == "no label site"
