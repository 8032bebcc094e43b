# SPDX-License-Identifier: Apache-2.0
"""Results on their way to the broker: sent until it has confirmed each of them.

What is owed is in the journal. This loop only decides when to send again: at once when there is a
new result or a new connection, else after 5 s, doubling. The files that a result names go first,
each time: a broker that does not confirm may be missing them, and what it has costs no bytes.
"""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from fedml_agent.errors import AgentError, BrokerRefused, BrokerUnreachable
from fedml_agent.https import Https, file_blob
from fedml_agent.journal import Entry, Journal
from fedml_agent.link import LinkDown
from fedml_agent.voice import Voice
from fedml_protocol.blob import NamedBlob
from fedml_protocol.errors import MalformedMessage

log = logging.getLogger(__name__)

FIRST_S, LAST_S = 5.0, 120.0
# At most so many results are on their way at once.
WINDOW = 20


class FilesSpoilt(AgentError):
    """The files of a result are not what they were (a power cut, somebody who deletes)."""


class Upload(Protocol):
    """Sends the files that a result names."""

    async def __call__(self, entry: Entry, *, again: bool) -> None:
        """`again`: some may be there already."""
        ...


class Outbox:
    """Sends what the journal owes."""

    def __init__(
        self, voice: Voice, journal: Journal, upload: Upload, lose: Callable[[Entry, str], None]
    ) -> None:
        """
        Args:
            upload: Sends the files that a result names.
            lose: Makes a result whose files are gone that of a lost task.
        """
        self._voice = voice
        self._journal = journal
        self._upload = upload
        self._lose = lose
        self._due: dict[tuple[str, int], float] = {}
        self._pause: dict[tuple[str, int], float] = {}
        self._sending: set[tuple[str, int]] = set()
        # Whose files were never sent: they need not be asked for first.
        self._fresh: set[tuple[str, int]] = set()
        self._dead: set[tuple[str, int]] = set()
        self._wake = asyncio.Event()

    def new(self, entry: Entry) -> None:
        """There is a new result."""
        self._fresh.add(entry.key)
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
        """Send whenever something is due; a slow one does not hold up the others."""
        async with asyncio.TaskGroup() as sending:
            while True:
                self._wake.clear()
                now = asyncio.get_running_loop().time()
                skipped = self._dead | self._sending
                waiting = [e for e in self._journal.owed() if e.key not in skipped]
                for entry in waiting:
                    if self._due.get(entry.key, 0.0) <= now and len(self._sending) < WINDOW:
                        self._sending.add(entry.key)
                        sending.create_task(self._send(entry), name=f"outbox.{entry.key[0]}")
                later = [t for e in waiting if (t := self._due.get(e.key, 0.0)) > now]
                try:
                    async with asyncio.timeout_at(min(later, default=None)):
                        await self._wake.wait()
                except TimeoutError:
                    pass

    async def _send(self, entry: Entry) -> None:
        try:
            await self._try(entry)
        except Exception:  # the one place: a broken result must not hold up the others
            log.exception("the result of %s cannot be sent", entry.key[0])
            self._dead.add(entry.key)
        finally:
            self._sending.discard(entry.key)
            self._wake.set()

    async def _try(self, entry: Entry) -> None:
        if entry.result is None:
            return
        pause = self._pause.get(entry.key, FIRST_S)
        try:
            await self._upload(entry, again=entry.key not in self._fresh)
            await self._voice.task(entry.result)
        except LinkDown:
            pass  # a new connection sends it at once
        except BrokerUnreachable as error:
            log.info("the result of %s waits: %s", entry.key[0], error)
            pause = FIRST_S / 2
        except FilesSpoilt as error:
            log.error("the result of %s is lost: %s", entry.key[0], error)
            self._lose(entry, str(error))
            return
        except (BrokerRefused, OSError) as error:
            log.warning("the files of %s were not taken: %s", entry.key[0], error)
        except MalformedMessage as error:
            # It will never fit: an alarm, not a loop. The task's state reaches the broker all the
            # same, with the heartbeat.
            log.error("the result of %s cannot be sent: %s", entry.key[0], error)
            self._dead.add(entry.key)
            return
        finally:
            self._fresh.discard(entry.key)
        if not entry.confirmed:
            self._pause[entry.key] = min(pause * 2, LAST_S)
            self._due[entry.key] = asyncio.get_running_loop().time() + pause


async def send_file(
    https: Callable[[], Https], path: Path, artifact: NamedBlob, *, again: bool
) -> None:
    """Send one file of a result.

    Raises:
        FilesSpoilt: It is not what it was.
        AgentError: It did not arrive.
    """
    try:
        await asyncio.to_thread(https().store, path, artifact.blob, again=again)
    except BrokerRefused as error:
        if error.status == 422 and await asyncio.to_thread(file_blob, path) != artifact.blob:
            raise FilesSpoilt(f"{artifact.name} was damaged on this machine") from error
        raise
