# SPDX-License-Identifier: Apache-2.0
"""Time that stands still until a test moves it.

clock = FakeClock()
clock.advance(90)            # runs the timers that are due on the way, in their order
clock.reboot(off_s=3600)     # another boot: `now` starts again, the wall clock went on
"""

import itertools
from collections.abc import Callable
from typing import Any


class _Timer:
    def __init__(self, due: float, call: Callable[[], object]) -> None:
        self.due = due
        self.call = call
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class FakeClock:
    """A `Clock` moved by hand. `timers` are those that were set and not cancelled."""

    def __init__(self) -> None:
        self.boot = "boot-1"
        self._now = 1000.0
        self._wall = 1_700_000_000.0
        self._timers: list[_Timer] = []
        self._boots = itertools.count(2)

    def now(self) -> float:
        return self._now

    def wall(self) -> float:
        return self._wall

    def call_later(self, delay_s: float, call: Callable[..., object], *args: Any) -> _Timer:
        timer = _Timer(self._now + delay_s, lambda: call(*args))
        self._timers.append(timer)
        return timer

    @property
    def delays(self) -> list[float]:
        """How long each timer still has to run."""
        return [timer.due - self._now for timer in self._timers if not timer.cancelled]

    def advance(self, seconds: float) -> None:
        end = self._now + seconds
        while True:
            due = [t for t in self._timers if not t.cancelled and t.due <= end]
            if not due:
                break
            first = min(due, key=lambda timer: timer.due)
            self._timers.remove(first)
            self._wall += first.due - self._now
            self._now = first.due
            first.call()
        self._wall += end - self._now
        self._now = end

    def set_wall(self, change_s: float) -> None:
        """Somebody sets the clock on the wall."""
        self._wall += change_s

    def reboot(self, off_s: float) -> None:
        """The machine was off; the process's timers are gone with it."""
        self.boot = f"boot-{next(self._boots)}"
        self._timers.clear()
        self._now = 5.0
        self._wall += off_s
