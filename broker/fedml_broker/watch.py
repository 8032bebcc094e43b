# SPDX-License-Identifier: Apache-2.0
"""Who looks at the fleet and at lists of runs, and what has changed for them.

A heartbeat or a step of a run leaves its id with each watcher and wakes him; what became of it is
looked up when he reads, so that ten changes of one machine in a second are one line to him.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from fedml_protocol.topics import Address


class Changes(NamedTuple):
    """Ids of what has changed since a watcher looked last.

    Attributes:
        devices: Machines of his tenant.
        runs: Runs of anybody: it is not known here whose they are.
        removed: Runs of his tenant that are no more.
    """

    devices: set[str]
    runs: set[str]
    removed: set[str]


class Watcher:
    """One open stream of somebody of a tenant."""

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        self._changes = Changes(set(), set(), set())
        self._woken = asyncio.Event()

    def device(self, device: str) -> None:
        """Something of a machine has changed."""
        self._changes.devices.add(device)
        self._woken.set()

    def run(self, run: str) -> None:
        """Something of a run has changed."""
        self._changes.runs.add(run)
        self._woken.set()

    def removed(self, run: str) -> None:
        """A run is no more."""
        self._changes.removed.add(run)
        self._woken.set()

    async def changes(self, timeout_s: float) -> Changes:
        """What has changed, once anything has, or after so many seconds: then it may be nothing."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._woken.wait()
        except TimeoutError:
            pass
        found, self._changes = self._changes, Changes(set(), set(), set())
        self._woken.clear()
        return found


class Watch:
    """All watchers."""

    def __init__(self) -> None:
        self._watchers: set[Watcher] = set()

    @contextmanager
    def watching(self, tenant: str) -> Iterator[Watcher]:
        """A watcher, as long as this context is open."""
        watcher = Watcher(tenant)
        self._watchers.add(watcher)
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)

    def device(self, address: Address) -> None:
        """Tell its tenant's watchers of a machine."""
        for watcher in self._watchers:
            if watcher.tenant == address.tenant:
                watcher.device(address.device)

    def run(self, run: str) -> None:
        """Tell everybody of a run."""
        for watcher in self._watchers:
            watcher.run(run)

    def removed(self, tenant: str, run: str) -> None:
        """Tell its tenant's watchers that a run is no more."""
        for watcher in self._watchers:
            if watcher.tenant == tenant:
                watcher.removed(run)
