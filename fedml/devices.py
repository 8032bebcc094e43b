# SPDX-License-Identifier: Apache-2.0
"""A machine as a person sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedml.client import Client


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


def everything(client: Client) -> list[Device]:
    """Every machine that you may use, by name."""
    return [Device.of(told) for told in client.call("GET", "/v1/devices")["devices"]]


def find(client: Client, device: str) -> Device:
    """One machine, by name or id.

    Raises:
        BrokerRefused: There is none.
    """
    return Device.of(client.call("GET", f"/v1/devices/{device}"))
