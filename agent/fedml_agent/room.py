# SPDX-License-Identifier: Apache-2.0
"""What this machine lets out, and what of it is taken. GPUs are leased by UUID, one task each."""

import contextlib
import dataclasses
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedml_agent import containers, sandbox
from fedml_agent.hardware import Gpu, Inventory
from fedml_agent.policy import Held, Policy, may_use
from fedml_protocol.gpus import is_model
from fedml_protocol.tasks import Needs


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator that can be leased: a GPU, or an instance of one in MIG mode."""

    uuid: str
    name: str
    memory_bytes: int
    names: tuple[int | str | None, ...]


@dataclass(slots=True)
class Room:
    """Who holds what, under the name of a task or of a session."""

    devices: tuple[Device, ...]
    slots: int
    taken: dict[str, tuple[Needs, tuple[str, ...]]] = field(default_factory=dict)

    def free_devices(self, needs: Needs) -> list[Device]:
        """Accelerators that nobody holds and that are what is asked for, the smallest first."""
        held = {uuid for _, uuids in self.taken.values() for uuid in uuids}
        fitting = [
            d
            for d in self.devices
            if d.uuid not in held
            and d.memory_bytes >= needs.gpu_memory_bytes
            and is_model(needs.gpu_model, d.name, d.memory_bytes)
        ]
        return sorted(fitting, key=lambda d: (d.memory_bytes, d.uuid))

    def take(self, name: str, needs: Needs, gpus: tuple[str, ...] | None = None) -> tuple[str, ...]:
        """Lease what `needs` asks for; the UUIDs. Taking again gives what is held already."""
        if name not in self.taken:
            if gpus is None:
                gpus = tuple(d.uuid for d in self.free_devices(needs)[: needs.gpus])
            self.taken[name] = (needs, gpus)
        return self.taken[name][1]

    def give_back(self, name: str) -> None:
        """The task or session is over."""
        self.taken.pop(name, None)

    def held(self, but: str = "") -> Held:
        """All leases but one together, as the policy counts them."""
        others = {name: lease for name, lease in self.taken.items() if name != but}
        needs = [n for n, _ in others.values()]
        return Held(
            tasks=len(needs),
            gpus=sum(len(uuids) for _, uuids in others.values()),
            cpus=float(sum(n.cpus for n in needs)),
            memory=sum(n.memory_bytes for n in needs),
        )


def leasable(inventory: Inventory, policy: Policy) -> tuple[Device, ...]:
    """The sound accelerators that the machine's owner lets out."""
    return tuple(
        device
        for gpu in inventory.accelerators.gpus
        for device in _devices(gpu)
        if may_use(policy, device.names)
    )


def all_names(inventory: Inventory) -> tuple[tuple[int | str | None, ...], ...]:
    """Every sound accelerator by all its names, as the policy asks for them."""
    return tuple(d.names for gpu in inventory.accelerators.gpus for d in _devices(gpu))


def slots(inventory: Inventory, policy: Policy) -> int:
    """Tasks at the same time: the owner's number, else one a core and at least two."""
    if policy.at_once is not None:
        return max(1, policy.at_once)  # with 0 the policy refuses each offer, and says so
    return max(2, int(inventory.cpu.usable))


def kinds(policy: Policy) -> list[str]:
    """Kinds of task that can run here: allowed, and what they need is installed."""
    allowed = [kind for kind in policy.kinds if kind in ("launch", "federate")]
    if importlib.util.find_spec("numpy") is None or importlib.util.find_spec("fedml") is None:
        return [kind for kind in allowed if kind != "federate"]
    return allowed


def report(inventory: Inventory, policy: Policy, disk_free: int) -> dict[str, Any]:
    """What the broker is told: what may be leased, and the hardware for people to look at."""
    return {
        "capacity": {
            "slots": slots(inventory, policy),
            "cpus": int(inventory.cpu.usable if policy.cpus is None else policy.cpus),
            "memory_bytes": inventory.memory
            if policy.memory is None
            else min(inventory.memory, policy.memory),
            "disk_bytes": max(disk_free - policy.disk_reserve, 0),
            "gpus": [
                {"uuid": d.uuid, "name": d.name, "memory_bytes": d.memory_bytes}
                for d in leasable(inventory, policy)
            ],
            "kinds": kinds(policy),
            "price": policy.price_per_hour,
            "offline": sandbox.capabilities()[sandbox.NETWORK].works,
            **_engine(policy),
        },
        "hardware": dataclasses.asdict(inventory)
        | {"sandbox": {n: c.by or c.why_not for n, c in sandbox.capabilities().items()}},
    }


def _engine(policy: Policy) -> dict[str, str]:
    engine = containers.here(policy)
    if isinstance(engine, str):
        return {"engine": "", "no_engine": engine}
    return {"engine": str(engine), "no_engine": ""}


def disk_free(path: Path) -> int:
    """Bytes that a normal user may still write where `path` lies."""
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def size_of(folder: Path) -> int:
    """Bytes on the disk below a directory, as far as they can be looked at."""
    total = 0
    for base, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):  # it went meanwhile
                total += (Path(base) / name).lstat().st_blocks * 512
    return total


def _devices(gpu: Gpu) -> Iterator[Device]:
    if gpu.fault is not None:
        return
    if gpu.mig:
        for instance in gpu.instances:
            if instance.uuid is not None:
                yield Device(
                    instance.uuid,
                    f"{gpu.name} {instance.profile}",
                    instance.memory or 0,
                    (gpu.index, gpu.uuid, instance.uuid),
                )
    elif gpu.uuid is not None:
        names = (gpu.index, gpu.uuid, None)
        yield Device(gpu.uuid, gpu.name or "GPU", gpu.memory or 0, names)
