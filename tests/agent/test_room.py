# SPDX-License-Identifier: Apache-2.0
"""What of a machine is leased, to whom, and when it is free again."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from fedml_agent import hardware
from fedml_agent.hardware import Accelerators, Gpu, Inventory, MigInstance
from fedml_agent.policy import Held, Policy
from fedml_agent.room import Device, Room, all_names, kinds, leasable, report, slots
from fedml_protocol.tasks import Needs
from tests.fakes.messages import LAW

GB = 10**9
LARGE = Device("GPU-a", "H100", 80 * GB, (0, "GPU-a", None))
SMALL = Device("GPU-b", "T4", 16 * GB, (1, "GPU-b", None))
MACHINE = hardware.inventory(nvml=None)


def room(*devices: Device, slots: int = 4) -> Room:
    return Room(devices, slots)


def gpu(index: int, uuid: str | None = None, **more: object) -> Gpu:
    facts: dict[str, object] = {"name": "H100", "memory": 80 * GB, "compute_capability": "9.0"}
    facts |= {"mig": False, **more}
    return Gpu(index=index, uuid=uuid or f"GPU-{index}", **facts)  # type: ignore[arg-type]


def machine(*gpus: Gpu) -> Inventory:
    return replace(MACHINE, accelerators=Accelerators(gpus=gpus))


# ---------------------------------------------------------------------- leases


def test_the_smallest_accelerator_that_is_large_enough_is_leased() -> None:
    place = room(LARGE, SMALL)
    assert place.take("t-1", Needs(gpus=1)) == ("GPU-b",)
    assert place.take("t-2", Needs(gpus=1, gpu_memory_bytes=20 * GB)) == ("GPU-a",)
    assert place.free_devices(Needs()) == []


def test_a_lease_asked_for_again_is_the_same_one() -> None:
    place = room(LARGE, SMALL)
    held = place.take("r-1", Needs(gpus=1))
    assert place.take("r-1", Needs(gpus=2)) == held
    assert len(place.taken) == 1


def test_what_is_given_back_is_free_and_giving_back_again_is_harmless() -> None:
    place = room(LARGE)
    place.take("t-1", Needs(gpus=1))
    for _ in range(2):
        place.give_back("t-1")
    assert place.taken == {}
    assert place.take("t-2", Needs(gpus=1)) == ("GPU-a",)


def test_after_a_restart_a_task_holds_the_accelerators_that_it_had() -> None:
    place = room(LARGE, SMALL)
    assert place.take("t-1", Needs(gpus=1), ("GPU-a",)) == ("GPU-a",)
    assert [d.uuid for d in place.free_devices(Needs())] == ["GPU-b"]


def test_a_lease_outlives_what_its_owner_lets_out_from_now_on() -> None:
    place = room(LARGE, SMALL)
    place.take("t-1", Needs(gpus=1))
    place.devices = (LARGE,)
    assert [d.uuid for d in place.free_devices(Needs())] == ["GPU-a"]
    place.give_back("t-1")
    assert [d.uuid for d in place.free_devices(Needs())] == ["GPU-a"]


def test_all_that_is_held_is_added_up_for_the_policy_but_for_who_asks() -> None:
    place = room(LARGE, SMALL)
    place.take("t-1", Needs(gpus=2, cpus=3, memory_bytes=5 * GB))
    place.take("r-1", Needs(cpus=1, memory_bytes=GB))
    assert place.held() == Held(tasks=2, gpus=2, cpus=4.0, memory=6 * GB)
    assert place.held(but="t-1") == Held(tasks=1, gpus=0, cpus=1.0, memory=GB)
    assert place.held(but="nobody") == place.held()


NAMES = st.sampled_from(["t-1", "t-2", "r-1"])
STEPS = st.lists(st.tuples(NAMES, st.integers(-1, 3), st.sampled_from([0, 20 * GB])), max_size=20)


@LAW
@given(steps=STEPS)
def test_no_accelerator_is_ever_leased_twice(steps: list[tuple[str, int, int]]) -> None:
    place = room(LARGE, SMALL, replace(SMALL, uuid="GPU-c"))
    for name, gpus, size in steps:
        if gpus < 0:
            place.give_back(name)
        else:
            place.take(name, Needs(gpus=gpus, gpu_memory_bytes=size))
        held = [uuid for _, uuids in place.taken.values() for uuid in uuids]
        free = [d.uuid for d in place.free_devices(Needs())]
        assert sorted(held + free) == ["GPU-a", "GPU-b", "GPU-c"]


# ---------------------------------------------------------------------- what is let out


def test_a_broken_gpu_and_one_that_its_owner_keeps_are_not_leased() -> None:
    inventory = machine(gpu(0), gpu(1, fault="GPU is lost"), gpu(2))
    assert [d.uuid for d in leasable(inventory, Policy())] == ["GPU-0", "GPU-2"]
    assert [d.uuid for d in leasable(inventory, Policy(gpus=(2,)))] == ["GPU-2"]
    assert leasable(inventory, Policy(gpus=())) == ()
    assert all_names(inventory) == ((0, "GPU-0", None), (2, "GPU-2", None))


def test_of_a_gpu_in_mig_mode_its_instances_are_leased_and_not_itself() -> None:
    slices = tuple(
        MigInstance(uuid=uuid, profile="1g.10gb", memory=10 * GB) for uuid in ("MIG-a", "MIG-b")
    )
    nameless = MigInstance(uuid=None, profile=None, memory=None)
    inventory = machine(gpu(0, mig=True, instances=(*slices, nameless)), gpu(1, mig=True))
    devices = leasable(inventory, Policy())
    assert [(d.uuid, d.name, d.memory_bytes) for d in devices] == [
        ("MIG-a", "H100 1g.10gb", 10 * GB),
        ("MIG-b", "H100 1g.10gb", 10 * GB),
    ]
    assert [d.uuid for d in leasable(inventory, Policy(gpus=("MIG-b",)))] == ["MIG-b"]
    assert len(leasable(inventory, Policy(gpus=(0,)))) == 2


def test_as_many_tasks_at_once_as_the_owner_says_or_else_one_a_core() -> None:
    cores = replace(MACHINE, cpu=replace(MACHINE.cpu, usable=1))
    assert slots(cores, Policy()) == 2
    assert slots(replace(cores, cpu=replace(cores.cpu, usable=16)), Policy()) == 16
    assert slots(cores, Policy(at_once=7)) == 7
    assert slots(cores, Policy(at_once=0)) == 1  # the policy itself refuses each offer


def test_the_broker_is_told_of_what_is_let_out_and_of_no_more() -> None:
    inventory = replace(machine(gpu(0), gpu(1)), memory=64 * GB)
    policy = Policy(gpus=(1,), cpus=2.5, memory=8 * GB, disk_reserve=5 * GB, kinds=("launch",))
    policy = replace(policy, price_per_hour=0.25)
    told = report(inventory, policy, disk_free=20 * GB)
    assert told["capacity"] == {
        "slots": slots(inventory, policy),
        "cpus": 2,
        "memory_bytes": 8 * GB,
        "disk_bytes": 15 * GB,
        "gpus": [{"uuid": "GPU-1", "name": "H100", "memory_bytes": 80 * GB}],
        "kinds": ["launch"],
        "price": 0.25,
        "offline": True,
        "engine": "",
        "no_engine": told["capacity"]["no_engine"],
    }
    assert told["capacity"]["no_engine"]
    assert report(inventory, Policy(memory=100 * GB), 0)["capacity"]["memory_bytes"] == 64 * GB
    assert report(inventory, policy, disk_free=GB)["capacity"]["disk_bytes"] == 0


def test_only_kinds_that_the_owner_allows_and_this_agent_can_do_are_offered() -> None:
    assert kinds(Policy()) == ["launch", "federate"]
    assert kinds(Policy(kinds=("federate", "deploy"))) == ["federate"]
    assert kinds(Policy(kinds=())) == []


def test_a_task_that_names_a_model_gets_no_other_even_where_that_is_smaller() -> None:
    small = Device("GPU-1", "Tesla T4", 16 * 2**30, ())
    large = Device("GPU-2", "NVIDIA A100 80GB PCIe", 80 * 2**30, ())
    room = Room((small, large), slots=4)
    assert room.take("t-1", Needs(gpus=1, gpu_model="A100-80G")) == ("GPU-2",)
    assert room.free_devices(Needs(gpus=1, gpu_model="A100-80G")) == []
    assert room.take("t-2", Needs(gpus=1)) == ("GPU-1",)
