# SPDX-License-Identifier: Apache-2.0
"""Logs and records of tasks to the broker: at once while somebody watches, else in large pieces.

The files in the task's directory are the truth; the journal remembers how far the broker has them.
A cut, a crash or an answer that was lost makes a piece come twice, and the broker skips what it
has. What came when follows the two streams as a third one, so that the bytes that it tells of are
there. Of records the broker takes whole lines: what comes after the last one is sent again.
"""

import asyncio
import gzip
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Protocol

from fedml_agent.capped_log import LogReader
from fedml_agent.errors import AgentError, BrokerRefused
from fedml_agent.https import Https
from fedml_agent.journal import Journal
from fedml_agent.records import STREAM, Records
from fedml_agent.tending import End, Ended, LogGrown, Stream, StreamSize

log = logging.getLogger(__name__)

PIECE_BYTES = 256 * 1024
# Of a task that writes faster than that: fewer questions, and no stream waits long for the other.
_LARGE_BYTES = 1024 * 1024
_LARGE_AT_ONCE = 4
LAZY_S = 5.0
# While somebody watches, lines that come close together travel together.
EAGER_S = 0.03
# Nobody tells us of records: how often they are looked for, watched and not.
RECORDS_S, RECORDS_LAZY_S = 1.0, 5.0
_GZIP_ABOVE = 2048
_RETRY_S = 5.0
_STREAMS: tuple[tuple[Stream, str], ...] = (
    ("out", "stdout"),
    ("err", "stderr"),
    ("order", "order"),
)


class Logged(Protocol):
    """A task that writes, or has written, two logs: `tending.Tended`, or `Finished`."""

    logs: LogGrown
    taskdir: Path

    @property
    def is_over(self) -> bool:
        """Whether it writes no more."""
        ...

    def log(self, stream: Stream) -> LogReader:
        """A reader of one log."""
        ...

    def events(self) -> AsyncIterator[LogGrown | End]:
        """Growth, and at last the end."""
        ...


class Finished:
    """The logs of a task that ended while no agent was there, however that was."""

    is_over = True

    def __init__(self, taskdir: Path, end: End) -> None:
        nothing = StreamSize(0, 0)
        self.logs = end.logs if isinstance(end, Ended) else LogGrown(nothing, nothing)
        self.taskdir = taskdir
        self._end = end

    def log(self, stream: Stream) -> LogReader:
        """A reader of one log."""
        return LogReader(self.taskdir, stream)

    async def events(self) -> AsyncIterator[LogGrown | End]:
        """Only the end is left."""
        yield self._end


class LogShipper:
    """Ships the logs and records of one task while it runs, and the rest when it has ended."""

    def __init__(
        self,
        tended: Logged,
        task: str,
        epoch: int,
        *,
        https: Callable[[], Https],
        journal: Journal,
        watched: bool,
    ) -> None:
        self._tended = tended
        self._task = task
        self._epoch = epoch
        self._https = https
        self._journal = journal
        self._watched = watched
        self._look = asyncio.Event()
        self._records = Records(tended.taskdir)
        self._carrying: asyncio.Task[None] | None = None

    def watch(self, on: bool) -> None:
        """Somebody starts or stops watching."""
        self._watched = on
        self._look.set()

    async def run(self) -> None:
        """Ship until the task has ended and the broker has everything."""
        ended = False
        first = True
        following = asyncio.get_running_loop().create_task(self._follow())
        try:
            while True:
                self._look.clear()
                ended = ended or self._tended.is_over
                await self._ship()
                if ended:
                    await self._carry()
                    return
                await self._wait()
                # The first line goes at once; what follows it is collected for a moment.
                if not first and not self._tended.is_over:
                    await self._collect()
                first = False
        finally:
            following.cancel()
            if self._carrying is not None:
                self._carrying.cancel()

    async def _wait(self) -> None:
        """Until there is something to ship."""
        every = RECORDS_S if self._watched else RECORDS_LAZY_S
        while not self._look.is_set():
            try:
                async with asyncio.timeout(every):
                    await self._look.wait()
            except TimeoutError:
                known = self._journal.shipped(self._task, self._epoch, STREAM)
                if self._records.size() > known or self._records.files():
                    return

    async def _follow(self) -> None:
        async for _ in self._tended.events():
            self._look.set()
        self._look.set()

    async def _collect(self) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + (EAGER_S if self._watched else LAZY_S)
        try:
            async with asyncio.timeout_at(until):
                while not self._tended.is_over and not self._watched and not self._much():
                    self._look.clear()
                    await self._look.wait()
                if self._watched:
                    await asyncio.sleep(until - loop.time())
        except TimeoutError:
            pass

    def _much(self) -> bool:
        size = sum(size.size for size in self._tended.logs)
        known = sum(
            self._journal.shipped(self._task, self._epoch, name) for _, name in _STREAMS[:2]
        )
        return size - known >= PIECE_BYTES

    async def _ship(self) -> None:
        more = True
        while more:
            # All of it in turns: a flood on one stream does not keep the other from going.
            more = False
            for stream, name in _STREAMS:
                more = await self._ship_some(self._tended.log(stream), name) or more
            more = await self._ship_some(self._records, STREAM) or more
        if self._records.files() and (self._carrying is None or self._carrying.done()):
            # A model of gigabytes does not hold up the lines that are printed meanwhile.
            carrying = asyncio.get_running_loop().create_task(self._send_files())
            self._carrying = carrying

    async def _ship_some(self, reader: "LogReader | Records", name: str) -> bool:
        """Whether there may be more."""
        offset = self._journal.shipped(self._task, self._epoch, name)
        for _ in range(_LARGE_AT_ONCE):
            begin, data, dropped = reader.read(offset, _LARGE_BYTES)
            if not data:
                return False
            size = await self._put(name, begin, data, dropped)
            if size == offset:  # half a record: the rest of it will come, or its writer was killed
                return False
            offset = size
        return True

    async def _carry(self) -> None:
        """Until the broker has every artifact."""
        if self._carrying is not None:
            await self._carrying
        await self._send_files()

    async def _send_files(self) -> None:
        for sha256 in self._records.files():
            while True:
                try:
                    await asyncio.to_thread(self._send_file, sha256)
                    break
                except (AgentError, OSError) as error:
                    log.info("an artifact of %s waits: %s", self._task, error)
                    await asyncio.sleep(_RETRY_S)

    def _send_file(self, sha256: str) -> None:
        self._records.send(self._https(), sha256)

    async def _put(self, stream: str, offset: int, data: bytes, gap: int) -> int:
        while True:
            try:
                size = await asyncio.to_thread(self._send, stream, offset, data, gap)
            except AgentError as error:
                if isinstance(error, BrokerRefused) and error.is_final:
                    # The task is another's now, or unknown there: nobody will ever read this.
                    log.warning("the log of %s is not wanted: %s", self._task, error)
                    size = offset + len(data)
                    self._journal.set_shipped(self._task, self._epoch, stream, size)
                    return size
                log.debug("the log of %s waits: %s", self._task, error)
                await asyncio.sleep(_RETRY_S)
                continue
            self._journal.set_shipped(self._task, self._epoch, stream, size)
            return size

    def _send(self, stream: str, offset: int, data: bytes, gap: int) -> int:
        # A shim of an earlier version, which still runs, keeps no order to be waited for.
        ordered = self._tended.log("order").is_there
        gzipped = len(data) > _GZIP_ABOVE
        body = gzip.compress(data, compresslevel=1) if gzipped else data
        return self._https().put_log(
            self._task, self._epoch, stream, offset, body,
            gap=gap, gzipped=gzipped, ordered=ordered,
        )  # fmt: skip
