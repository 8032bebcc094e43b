# SPDX-License-Identifier: Apache-2.0
"""Results on their way to the broker: sent until it has confirmed each of them.

What is owed is in the journal. This loop only decides when to send again: at once when there is a
new result or a new connection, else after 5 s, doubling. Before a second try the files that the
result names are offered again, since a broker that does not confirm may be missing them.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from fedml_agent.journal import Entry, Journal
from fedml_agent.link import LinkDown
from fedml_agent.voice import Voice
from fedml_protocol.errors import MalformedMessage

log = logging.getLogger(__name__)

FIRST_S, LAST_S = 5.0, 120.0
# At most so many results are on their way at once.
WINDOW = 20


class Outbox:
    """Sends what the journal owes."""

    def __init__(
        self, voice: Voice, journal: Journal, upload: Callable[[Entry], Awaitable[None]]
    ) -> None:
        self._voice = voice
        self._journal = journal
        self._upload = upload
        self._due: dict[tuple[str, int], float] = {}
        self._pause: dict[tuple[str, int], float] = {}
        self._dead: set[tuple[str, int]] = set()
        self._wake = asyncio.Event()

    def new(self) -> None:
        """There is a new result."""
        self._wake.set()

    def again(self) -> None:
        """A new connection: everything at once."""
        self._due.clear()
        self._pause.clear()
        self._wake.set()

    def confirmed(self, key: tuple[str, int]) -> None:
        """The broker has it."""
        self._due.pop(key, None)
        self._pause.pop(key, None)

    async def serve(self) -> None:
        """Send whenever something is due."""
        loop = asyncio.get_running_loop()
        while True:
            self._wake.clear()
            now = loop.time()
            owed = [e for e in self._journal.owed() if e.key not in self._dead]
            due = [e for e in owed if self._due.get(e.key, 0.0) <= now][:WINDOW]
            if due:
                async with asyncio.TaskGroup() as sending:
                    for entry in due:
                        sending.create_task(self._send(entry), name=f"outbox.{entry.key[0]}")
                continue
            waits = [self._due[e.key] for e in owed]
            try:
                async with asyncio.timeout_at(min(waits) if waits else None):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def _send(self, entry: Entry) -> None:
        if entry.result is None:
            return
        again = entry.key in self._pause
        pause = self._pause.get(entry.key, FIRST_S)
        try:
            if again:
                await self._upload(entry)
            await self._voice.task(entry.result)
        except LinkDown:
            pass  # a new connection sends it at once
        except MalformedMessage as error:
            # It will never fit: an alarm, not a loop. The task's state reaches the broker all the
            # same, with the heartbeat.
            log.error("the result of %s cannot be sent: %s", entry.key[0], error)
            self._dead.add(entry.key)
            return
        except Exception:
            log.exception("the files of %s could not be offered again", entry.key[0])
        if not entry.confirmed:
            self._pause[entry.key] = min(pause * 2, LAST_S)
            self._due[entry.key] = asyncio.get_running_loop().time() + pause
