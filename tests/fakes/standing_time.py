# SPDX-License-Identifier: Apache-2.0
"""The event loop's time, standing still until a test moves it.

    time = StandingTime()                # in the running loop, from now on
    Fleet(heartbeat_s=10, clock=time.now)
    await time.pass_by(45)               # timers fire on the way, each in its second
    time.jump(60)                        # the process was frozen: they fire late, at the next turn

Nothing else changes: sockets and threads wake the loop as ever. A `call_later`, an
`asyncio.timeout` and an `asyncio.sleep` that is longer than 0 wait for the test.
"""

import asyncio
from collections.abc import Awaitable, Callable

# Turns of the loop after which whatever needs no thread has come to rest.
_TURNS = 12


async def turns() -> None:
    """Let everything that is ready run."""
    for _ in range(_TURNS):
        await asyncio.sleep(0)


class StandingTime:
    """See the module. `settle` is awaited after each second; it may wait for threads."""

    def __init__(self, settle: Callable[[], Awaitable[None]] = turns) -> None:
        self._loop = asyncio.get_running_loop()
        self._settle = settle
        self._now = 1000.0
        self._loop.time = self.now  # type: ignore[method-assign]

    def now(self) -> float:
        """What the loop believes."""
        return self._now

    def jump(self, seconds: float) -> None:
        """All at once."""
        self._now += seconds

    async def pass_by(self, seconds: float) -> None:
        """Second by second."""
        end = self._now + seconds
        while self._now < end:
            self._now = min(self._now + 1, end)
            await self._settle()

    def forget_timers(self) -> None:
        """The process was killed: nothing that it had in mind will happen."""
        for timer in list(self._loop._scheduled):  # type: ignore[attr-defined]
            timer.cancel()
