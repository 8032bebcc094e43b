# SPDX-License-Identifier: Apache-2.0
"""Machines that somebody has reserved under a name, as an object."""

from __future__ import annotations

import builtins
from collections.abc import Mapping, Sequence
from typing import Any

from fedml.client import At, Client
from fedml.client import at as _at


class ClusterFacts:
    """What is known of a cluster: what `Cluster` and `fedml.aio.Cluster` have in common.

    Attributes:
        name: Unique in its tenant.
        details: Everything that the broker said of it when it was last looked at.
    """

    def __init__(self, client: Client, details: Mapping[str, Any]) -> None:
        self.name = str(details["name"])
        self.details = dict(details)
        self._client = client

    def __repr__(self) -> str:
        return f"<Cluster {self.name} {self.status}>"

    @property
    def status(self) -> str:
        """up: its machines are reserved; stopped: they are not."""
        return str(self.details["status"])

    @property
    def devices(self) -> builtins.list[str]:
        """The names of its machines."""
        return [device["name"] for device in self.details["devices"]]

    @property
    def runs(self) -> builtins.list[str]:
        """The runs on it, or waiting for it."""
        return [*self.details["runs"]]


class Cluster(ClusterFacts):
    """One cluster of one broker, as it was when it was last looked at; `refresh` looks again."""

    @classmethod
    def list(cls, *, at: At = None) -> builtins.list[Cluster]:
        """Every cluster, by name."""
        client = _at(at)
        return [cls(client, told) for told in client.call("GET", "/v1/clusters")["clusters"]]

    @classmethod
    def find(cls, name: str, *, at: At = None) -> Cluster:
        """The cluster with this name.

        Raises:
            BrokerRefused: There is none.
        """
        client = _at(at)
        return cls(client, client.call("GET", f"/v1/clusters/{name}"))

    @classmethod
    def create(
        cls,
        name: str,
        devices: Sequence[str] = (),
        *,
        count: int = 0,
        labels: Mapping[str, str] | None = None,
        autostop_minutes: float | None = None,
        at: At = None,
        **needs: Any,
    ) -> Cluster:
        """Reserve the machines named, or `count` that wear the labels and have what is needed.

        Args:
            name: Its name.
            devices: Names or ids of machines.
            count: How many, where none is named.
            labels: What these must wear.
            autostop_minutes: It stops by itself when it has been idle for so long.
            at: The home of a login (`~/.fedml`), or a client.
            needs: `gpus`, `gpu_model`, `gpu_memory_bytes`, `cpus`, `memory_bytes`, `disk_bytes`.

        Raises:
            BrokerRefused: The name or a machine is taken, or too few fit.
        """
        client = _at(at)
        request = {
            "name": name,
            "devices": [*devices],
            "count": count,
            "labels": dict(labels or {}),
            "needs": needs,
            "autostop_minutes": autostop_minutes,
        }
        return cls(client, client.call("POST", "/v1/clusters", request))

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

    def kill(self) -> builtins.list[str]:
        """Forget it and stop its runs; which these are."""
        told = self._client.call("DELETE", f"/v1/clusters/{self.name}")
        return [*told["stopped"]]

    def _ask(self, method: str, what: str, body: Mapping[str, Any] | None = None) -> Cluster:
        self.details = dict(self._client.call(method, f"/v1/clusters/{self.name}{what}", body))
        return self
