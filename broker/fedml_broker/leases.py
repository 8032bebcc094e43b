# SPDX-License-Identifier: Apache-2.0
"""How long a machine may keep a task without a word: one timer for each task that is held."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from fedml_broker.fleet import Fleet
from fedml_broker.tasks import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How long things may take, seconds. Tests shorten them."""

    heartbeat_s: float = 10.0
    lease_s: float = 45.0
    offer_s: float = 30.0
    # A timer that fires this much late means that this process itself was away (suspended).
    away_s: float = 5.0


class Leases:
    """`task.lease_until`, watched; whoever hears of the task moves it."""

    def __init__(self, fleet: Fleet, timing: Timing, over: Callable[[Task], None]) -> None:
        """
        Args:
            over: Called when a task's lease has ended, and again where that has changed nothing (a
                full disk).
        """
        self._fleet = fleet
        self._timing = timing
        self._over = over
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def extend(self, task: Task, seconds: float) -> None:
        """So long from now."""
        task.lease_until = self._fleet.clock() + seconds
        self.drop(task)
        self._watch(task)

    def drop(self, task: Task) -> None:
        """Nobody holds it, if anybody did."""
        timer = self._timers.pop(task.id, None)
        if timer is not None:
            timer.cancel()

    def _watch(self, task: Task) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + max(task.lease_until - self._fleet.clock(), 0.0)
        self._timers[task.id] = loop.call_at(due, self._fired, task, due)

    def _fired(self, task: Task, due: float) -> None:
        late = asyncio.get_running_loop().time() - due
        if late > self._timing.away_s:
            # This process was frozen, not the agents: let each of them be heard first.
            task.lease_until = self._fleet.clock() + self._timing.lease_s
        if self._fleet.clock() < task.lease_until - 0.001:  # heartbeats have renewed it
            self._watch(task)
            return
        # Should the step fail (a full disk), it is tried again.
        task.lease_until = self._fleet.clock() + self._timing.heartbeat_s
        self._watch(task)
        self._over(task)
