# SPDX-License-Identifier: Apache-2.0
"""Time for the endpoint: durations on a clock that nobody can set.

What is written to disk must keep its meaning over a restart, so `now` counts from the machine's
boot (suspended time included) and is stored together with the identity of that boot. Only when the
machine itself was rebooted does the wall clock say how long it was away.
"""

import asyncio
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Timer(Protocol):
    """Something that will happen unless cancelled."""

    def cancel(self) -> None: ...


class Clock(Protocol):
    """The endpoint's only source of time; tests bring their own and move it by hand."""

    @property
    def boot(self) -> str:
        """Readings of `now` are comparable exactly while this stays the same."""
        ...

    def now(self) -> float:
        """Seconds since some fixed moment of this boot; never goes back."""
        ...

    def wall(self) -> float:
        """Seconds since 1970 as far as the machine knows."""
        ...

    def call_later(self, delay_s: float, call: Callable[..., object], *args: Any) -> Timer:
        """Run `call(*args)` in the event loop in `delay_s` seconds."""
        ...


class SystemClock:
    """The machine's own time and the running event loop's timers."""

    def __init__(self) -> None:
        # Off Linux there is no clock that outlives the process: every start is a new "boot" there.
        if hasattr(time, "CLOCK_BOOTTIME") and _BOOT_ID.exists():
            self.boot = _BOOT_ID.read_text().strip()
            self._clock = time.CLOCK_BOOTTIME
        else:
            self.boot = str(uuid.uuid4())
            self._clock = time.CLOCK_MONOTONIC

    def now(self) -> float:
        return time.clock_gettime(self._clock)

    def wall(self) -> float:
        return time.time()

    def call_later(self, delay_s: float, call: Callable[..., object], *args: Any) -> Timer:
        return asyncio.get_running_loop().call_later(delay_s, call, *args)
