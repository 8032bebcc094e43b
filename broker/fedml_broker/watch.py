# SPDX-License-Identifier: Apache-2.0
"""Who looks at the fleet and at lists of runs, and what has changed for them.

A heartbeat or a step of a run leaves its id with each watcher and wakes him; what became of it is
looked up when he reads, so that ten changes of one machine in a second are one line to him.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Changes(NamedTuple):
    """Ids of what has changed since a watcher looked last."""

    devices: set[str]
    runs: set[str]


class Watcher:
    """One open stream. Ids are of all tenants: whoever looks them up asks for his own."""

    def __init__(self) -> None:
        self._changes = Changes(set(), set())
        self._woken = asyncio.Event()

    def device(self, device: str) -> None:
        """Something of a machine has changed."""
        self._changes.devices.add(device)
        self._woken.set()

    def run(self, run: str) -> None:
        """Something of a run has changed."""
        self._changes.runs.add(run)
        self._woken.set()

    async def changes(self, timeout_s: float) -> Changes:
        """What has changed, once anything has, or after so many seconds: then it may be nothing."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._woken.wait()
        except TimeoutError:
            pass
        found, self._changes = self._changes, Changes(set(), set())
        self._woken.clear()
        return found


class Watch:
    """All watchers."""

    def __init__(self) -> None:
        self._watchers: set[Watcher] = set()

    @contextmanager
    def watching(self) -> Iterator[Watcher]:
        """A watcher, as long as this context is open."""
        watcher = Watcher()
        self._watchers.add(watcher)
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)

    def device(self, device: str) -> None:
        """Tell everybody of a machine."""
        for watcher in self._watchers:
            watcher.device(device)

    def run(self, run: str) -> None:
        """Tell everybody of a run."""
        for watcher in self._watchers:
            watcher.run(run)
