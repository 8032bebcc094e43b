# SPDX-License-Identifier: Apache-2.0
"""Presence and heartbeat: what this machine is, and everything that it holds.

The heartbeat carries the whole set of tasks, so that whatever message was lost heals within one
interval. Most beats are QoS 0; each fourth asks for a confirmation, which tells us that the broker
hears.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedml_agent import hardware
from fedml_agent.journal import Entry, Journal
from fedml_agent.link import LinkDown
from fedml_protocol.devices import GpuReading, Heartbeat, TaskBeat

if TYPE_CHECKING:
    from fedml_agent.voice import Voice

log = logging.getLogger(__name__)

_CONFIRM_EVERY = 4


class Heart:
    """Beats; `now` makes it beat at once."""

    def __init__(
        self,
        voice: "Voice",
        journal: Journal,
        disk: Path,
        *,
        refusing: Callable[[], str],
        free_slots: Callable[[], int],
        draining: Callable[[], bool],
        seen: Callable[[hardware.Readings], None],
        port_of: Callable[[Entry], int],
        nvml: Any = None,
    ) -> None:
        """
        Args:
            seen: Is handed what was read of the machine for a beat.
            port_of: Where a task answers, if it is a service that does.
        """
        self.every_s = 10.0
        self._voice = voice
        self._journal = journal
        self._disk = disk
        self._refusing = refusing
        self._free_slots = free_slots
        self._draining = draining
        self._nvml = nvml
        self._seen = seen
        self._port_of = port_of
        self._last: hardware.Readings | None = None
        self._now = asyncio.Event()
        self._count = 0

    def now(self) -> None:
        """Something has changed that the broker should hear of at once."""
        self._now.set()

    async def beat_for_ever(self) -> None:
        """One beat per interval while connected."""
        while True:
            self._now.clear()
            await self.beat()
            try:
                async with asyncio.timeout(self.every_s):
                    await self._now.wait()
            except TimeoutError:
                pass

    async def beat(self) -> None:
        """One beat, if there is a connection."""
        self._count += 1
        qos = 1 if self._count % _CONFIRM_EVERY == 0 else 0
        try:
            await self._voice.heartbeat(await self._compose(), qos=qos)
        except LinkDown as error:
            log.debug("no heartbeat: %s", error)

    async def _compose(self) -> Heartbeat:
        # In a thread: a failing GPU can hold NVML up for seconds.
        read = await asyncio.to_thread(
            hardware.readings, disk=self._disk, since=self._last, nvml=self._nvml
        )
        self._last = read
        self._seen(read)
        entries = {e.key: e for e in (*self._journal.held(), *self._journal.owed())}
        return Heartbeat(
            free_slots=max(self._free_slots(), 0),
            tasks=tuple(
                TaskBeat(task=task, epoch=epoch, state=entry.state, port=self._port_of(entry))
                for (task, epoch), entry in entries.items()
            ),
            disk_free_bytes=read.disk.free,
            clock_ms=time.time_ns() // 1_000_000,
            draining=self._draining(),
            cpu_percent=read.cpu_percent or 0.0,
            memory_used_bytes=read.memory_used,
            gpus=tuple(
                GpuReading(
                    uuid=gpu.uuid,
                    utilisation_percent=gpu.utilisation or 0.0,
                    memory_used_bytes=gpu.memory_used or 0,
                    temperature_c=gpu.temperature or 0.0,
                )
                for gpu in read.gpus
                if gpu.uuid is not None
            ),
            refusing=self._refusing(),
        )
