# SPDX-License-Identifier: Apache-2.0
"""Machines that somebody has reserved under a name, as an object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedml.client import Client


class Cluster:
    """One cluster of one broker, as it was when it was last looked at.

    Attributes:
        name: Unique in its tenant.
        details: Everything that the broker says of it; `refresh` looks again.
    """

    def __init__(self, client: Client, details: Mapping[str, Any]) -> None:
        self.name = str(details["name"])
        self.details = dict(details)
        self._client = client

    @classmethod
    def find(cls, client: Client, name: str) -> Cluster:
        """The cluster with this name.

        Raises:
            BrokerRefused: There is none.
        """
        return cls(client, client.call("GET", f"/v1/clusters/{name}"))

    @classmethod
    def create(
        cls,
        client: Client,
        name: str,
        devices: Sequence[str] = (),
        *,
        count: int = 0,
        labels: Mapping[str, str] | None = None,
        autostop_minutes: float | None = None,
        **needs: Any,
    ) -> Cluster:
        """Reserve the machines named, or `count` that wear the labels and have what is needed.

        Args:
            client: The broker.
            name: Its name.
            devices: Names or ids of machines.
            count: How many, where none is named.
            labels: What these must wear.
            autostop_minutes: It stops by itself when it has been idle for so long.
            needs: `gpus`, `gpu_model`, `gpu_memory_bytes`, `cpus`, `memory_bytes`, `disk_bytes`.

        Raises:
            BrokerRefused: The name or a machine is taken, or too few fit.
        """
        request = {
            "name": name,
            "devices": list(devices),
            "count": count,
            "labels": dict(labels or {}),
            "needs": needs,
            "autostop_minutes": autostop_minutes,
        }
        return cls(client, client.call("POST", "/v1/clusters", request))

    def __repr__(self) -> str:
        return f"<Cluster {self.name} {self.status}>"

    @property
    def status(self) -> str:
        """up: its machines are reserved; stopped: they are not."""
        return str(self.details["status"])

    @property
    def devices(self) -> list[str]:
        """The names of its machines."""
        return [device["name"] for device in self.details["devices"]]

    @property
    def runs(self) -> list[str]:
        """The runs on it, or waiting for it."""
        return list(self.details["runs"])

    def refresh(self) -> Cluster:
        """Look again; itself."""
        return self._ask("GET", "")

    def start(self) -> Cluster:
        """Reserve its machines again."""
        return self._ask("POST", "/start")

    def stop(self) -> Cluster:
        """Give its machines back; what runs on them goes on."""
        return self._ask("POST", "/stop")

    def autostop(self, minutes: float | None) -> Cluster:
        """Stop by itself when it has been idle for so long; None: never."""
        return self._ask("PUT", "/autostop", {"minutes": minutes})

    def kill(self) -> list[str]:
        """Forget it and stop its runs; which these are."""
        told = self._client.call("DELETE", f"/v1/clusters/{self.name}")
        return list(told["stopped"])

    def _ask(self, method: str, what: str, body: Mapping[str, Any] | None = None) -> Cluster:
        self.details = dict(self._client.call(method, f"/v1/clusters/{self.name}{what}", body))
        return self


def everything(client: Client) -> list[Cluster]:
    """Every cluster, by name."""
    return [Cluster(client, told) for told in client.call("GET", "/v1/clusters")["clusters"]]
