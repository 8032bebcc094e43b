# SPDX-License-Identifier: Apache-2.0
"""A machine as a person sees it, and what all machines have together."""

from __future__ import annotations

import builtins
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fedml.client import At
from fedml.client import at as _at
from fedml_protocol.gpus import short_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One machine that has joined.

    Attributes:
        status: online, offline, draining or revoked.
        tasks: What it holds now.
        slots: How many tasks it takes at the same time.
        gpus: Names of the accelerators that its owner lets out.
        kinds: Kinds of task that its owner takes.
        details: Everything that the broker says of it.
    """

    id: str
    name: str
    status: str
    labels: Mapping[str, str]
    tasks: tuple[str, ...]
    slots: int
    cpus: int
    memory_bytes: int
    disk_bytes: int
    gpus: tuple[str, ...]
    kinds: tuple[str, ...]
    details: Mapping[str, Any]

    @property
    def cluster(self) -> str:
        """Who has reserved it: only runs that name this cluster go there; empty: none has."""
        return str(self.details.get("cluster", ""))

    @classmethod
    def list(cls, *, at: At = None) -> builtins.list[Device]:
        """Every machine that you may use, by name."""
        return [cls.of(told) for told in _at(at).call("GET", "/v1/devices")["devices"]]

    @classmethod
    def find(cls, device: str, *, at: At = None) -> Device:
        """One machine, by name or id.

        Raises:
            BrokerRefused: There is none.
        """
        return cls.of(_at(at).call("GET", f"/v1/devices/{device}"))

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Device:
        """What the broker says, as an object."""
        capacity = told["capacity"]
        return cls(
            id=told["id"],
            name=told["name"],
            status=told["status"],
            labels=told["labels"],
            tasks=tuple(told["tasks"]),
            slots=capacity["slots"],
            cpus=capacity["cpus"],
            memory_bytes=capacity["memory_bytes"],
            disk_bytes=capacity["disk_bytes"],
            gpus=tuple(gpu["name"] for gpu in capacity["gpus"]),
            kinds=tuple(capacity["kinds"]),
            details=told,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """One kind of thing that machines let out.

    Attributes:
        resource_type: What a job file's `computing.resource_type` says; `CPU` for those.
        gpu: The accelerator's full name; empty for CPUs.
        memory_bytes: Of one of them; of CPUs, of the largest machine.
        count: How many there are.
        online: How many of them are on machines that take tasks now.
        machines: Who has some, by name.
    """

    resource_type: str
    gpu: str
    memory_bytes: int
    count: int
    online: int
    machines: tuple[str, ...]


def resources(devices: Iterable[Device]) -> list[Resource]:
    """What these machines have together: CPUs, then each model of accelerator by name."""
    found: dict[tuple[str, int], list[Device]] = {}
    devices = [*devices]
    for device in devices:
        for gpu in device.details["capacity"]["gpus"]:
            # Cards of one model differ by some megabytes.
            gigabytes = round(gpu["memory_bytes"] / 2**30)
            found.setdefault((gpu["name"], gigabytes), []).append(device)
    made = []
    if devices:
        made.append(
            Resource(
                resource_type="CPU",
                gpu="",
                memory_bytes=max(d.memory_bytes for d in devices),
                count=sum(d.cpus for d in devices),
                online=sum(d.cpus for d in devices if d.status == "online"),
                machines=tuple(d.name for d in devices),
            )
        )
    for (name, gigabytes), on in sorted(found.items()):
        made.append(
            Resource(
                resource_type=short_name(name),
                gpu=name,
                memory_bytes=gigabytes * 2**30,
                count=len(on),
                online=sum(d.status == "online" for d in on),
                machines=tuple(dict.fromkeys(d.name for d in on)),
            )
        )
    return made
