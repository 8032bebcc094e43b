# SPDX-License-Identifier: Apache-2.0
"""What can be seen of a run: its events, and the logs of its tasks.

Events are rows, written in the transaction that they tell of. Logs are files, one per task, epoch
and stream, to which agents append at stated offsets: a chunk that came twice changes nothing.
Whoever follows is woken by the write, not by a timer.
"""

import asyncio
import codecs
import errno
import json
import os
import shutil
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import sqlalchemy as sa
from sqlalchemy import Connection

from fedml_broker.problems import Problem
from fedml_broker.store import Store
from fedml_broker.tables import events
from fedml_protocol.errors import MalformedMessage
from fedml_protocol.ids import check_id

STREAMS = ("stdout", "stderr")
_CHUNK = 256 * 1024


class RunState(Protocol):
    """What `follow` asks of whoever keeps the runs."""

    async def row(self, run: str) -> dict[str, Any]:
        """The run as the API shows it."""
        ...


class LogFile(NamedTuple):
    """One stream of one attempt at a task."""

    task: str
    epoch: int
    stream: str


def add_event(tx: Connection, run: str, kind: str, data: dict[str, Any]) -> None:
    """Write down that something happened, in the transaction in which it does."""
    tx.execute(events.insert().values(run=run, at=time.time(), kind=kind, data=data))


class _Seen:
    """How far a follower has read one log. Chunks may end inside a character."""

    def __init__(self) -> None:
        self.offset = 0
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")


class Observer:
    """Logs on disk, events in the store, and a bell for each run."""

    def __init__(self, store: Store, root: Path) -> None:
        self._store = store
        self._root = root
        self._bells: dict[str, asyncio.Event] = {}
        self._watchers: dict[str, int] = {}
        # Called with a run of which more than its logs has changed.
        self.on_change: Callable[[str], None] = lambda run: None

    # ------------------------------------------------------------------ the bell

    def ring(self, run: str) -> None:
        """Something of this run has changed; whoever follows it looks again."""
        self._wake(run)
        self.on_change(run)

    def _wake(self, run: str) -> None:
        bell = self._bells.pop(run, None)
        if bell is not None:
            bell.set()

    def bell(self, run: str) -> asyncio.Event:
        """An event that is set at the next ring. Get it first, look second, then wait."""
        return self._bells.setdefault(run, asyncio.Event())

    def watch(self, run: str, by: int) -> int:
        """Count one follower more or less; how many there are now."""
        count = self._watchers.get(run, 0) + by
        self._watchers[run] = count
        if count <= 0:
            del self._watchers[run]
        return count

    def watched(self, run: str) -> bool:
        """Whether anybody follows the run."""
        return run in self._watchers

    # ------------------------------------------------------------------ events

    async def events(self, run: str, after: int = 0) -> list[dict[str, Any]]:
        """The events of a run with an id above `after`, oldest first."""
        query = (
            sa.select(events).where(events.c.run == run, events.c.id > after).order_by(events.c.id)
        )
        return await self._store.read(lambda tx: [dict(r) for r in tx.execute(query).mappings()])

    # ------------------------------------------------------------------ logs

    async def append(
        self, run: str, log: LogFile, offset: int, data: bytes, *, gap: int = 0
    ) -> int:
        """Add a chunk at its offset; how long the log is now.

        What lies before the end is known already and skipped; a gap is told by the answer, which is
        then smaller than `offset`. A `gap` that the agent admits (a capped log) becomes a hole.
        """
        size = await asyncio.to_thread(_append, self._path(run, log), offset, data, gap)
        if data:
            self._wake(run)
        return size

    def finish(self, run: str, log: LogFile, size: int) -> None:
        """The agent says that this log ends at `size`."""
        path = self._path(run, log)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".end").write_text(str(size))

    def logs(self, run: str) -> list[LogFile]:
        """Every log that the run has so far, by task, epoch and stream."""
        folder = self._root / check_id(run, "run")
        found = set()
        for path in folder.glob("*.*.*.*"):  # the log, or its end, which may come first
            task, epoch, stream = path.stem.rsplit(".", 2)
            found.add(LogFile(task, int(epoch), stream))
        return sorted(found)

    def _lacks_its_end(self, run: str, log: LogFile) -> bool:
        """Whether a log is known to be longer than what is here."""
        path = self._path(run, log)
        try:
            end = int(path.with_suffix(".end").read_text())
        except (OSError, ValueError):
            return False
        return end > 0 and (not path.exists() or path.stat().st_size < end)

    def _size(self, run: str, log: LogFile) -> int:
        path = self._path(run, log)
        return path.stat().st_size if path.exists() else 0

    def read(self, run: str, log: LogFile, offset: int, limit: int = _CHUNK) -> tuple[int, bytes]:
        """Up to `limit` bytes of a log from `offset` on, and where they begin."""
        try:
            with self._path(run, log).open("rb") as file:
                begin = os.lseek(file.fileno(), offset, os.SEEK_DATA)  # over a hole
                return begin, os.pread(file.fileno(), limit, begin)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENXIO):  # no such file, no more data
                return offset, b""
            raise

    def forget(self, run: str) -> None:
        """Delete the logs of a run that is being removed; whoever follows it looks again."""
        shutil.rmtree(self._root / check_id(run, "run"), ignore_errors=True)
        self.ring(run)

    def _path(self, run: str, log: LogFile) -> Path:
        try:
            check_id(run, "run")
            check_id(log.task, "task")
        except MalformedMessage as error:
            raise Problem(422, "not a log's name", str(error)) from error
        if log.stream not in STREAMS or log.epoch < 1:
            raise Problem(422, "not a log's name", f"{log.stream}, epoch {log.epoch}")
        return self._root / run / f"{log.task}.{log.epoch}.{log.stream}.log"

    # ------------------------------------------------------------------ following

    async def follow(
        self,
        run: str,
        state: RunState,
        waiting: Callable[[str], str],
        *,
        progress: Callable[[str], dict[str, Any] | None] = lambda run: None,
        after: int = 0,
        logs: bool = True,
        stay: bool = True,
        tail: int | None = None,
    ) -> AsyncIterator[dict[str, Any]]:
        """Everything of a run as it happens: events, log lines, and at last its end.

        Args:
            state: Gives the run's present row, and whether all its logs have arrived.
            waiting: Says what the run waits for, in words; empty when it does not.
            progress: The open round of a federated run in numbers; goes beside `waiting`.
            after: Events up to this id are known to the caller.
            stay: Until the run has ended; otherwise only what there is by now.
            tail: Of each log only about so many bytes of its end, also when it is written faster
                than the caller reads.

        Yields:
            ``{"event": …}``, ``{"log": …}`` and ``{"waiting": …}`` objects; the last one is
            ``{"end": run}``.
        """
        seen: dict[LogFile, _Seen] = {}
        told = ""
        row = await state.row(run)
        while True:
            bell = self.bell(run)
            for event in await self.events(run, after):
                after = event["id"]
                if event["kind"] == "state":  # the end of a run is one: its row tells nothing else
                    row = await state.row(run)
                yield {"event": event}
            if logs:
                for chunk in self._new_chunks(run, seen, tail):
                    yield chunk
            if row["ended_at"] is None and (reason := waiting(run)) != told:
                told = reason
                numbers = progress(run)
                yield {"waiting": reason} | ({} if numbers is None else {"round": numbers})
            if not stay:
                yield {"end": row}
                return
            if row["ended_at"] is not None and (not logs or await self._arrived(run, row, bell)):
                for chunk in self._new_chunks(run, seen, tail) if logs else ():
                    yield chunk
                for event in await self.events(run, after):
                    yield {"event": event}
                yield {"end": await state.row(run)}
                return
            await bell.wait()

    def _new_chunks(
        self, run: str, seen: dict[LogFile, "_Seen"], tail: int | None
    ) -> list[dict[str, Any]]:
        chunks = []
        for log in self.logs(run):
            so_far = seen.setdefault(log, _Seen())
            if tail is not None:
                so_far.offset = max(so_far.offset, self._size(run, log) - tail)
            while True:
                begin, data = self.read(run, log, so_far.offset)
                if not data:
                    break
                # The end of a hole reads as NULs; a log has no other use for them.
                text = so_far.decoder.decode(data).replace("\0", "")
                if begin > so_far.offset:
                    text = f"\n[about {begin - so_far.offset} bytes were not kept]\n{text}"
                end = begin + len(data)
                place = {"offset": begin, "end": end}
                chunks.append({"log": {**log._asdict(), **place, "text": text}})
                so_far.offset = end
        return chunks

    async def _arrived(self, run: str, row: dict[str, Any], bell: asyncio.Event) -> bool:
        """Whether all logs of an ended run are here; a lost machine is not waited for long."""
        waiting = [log for log in self.logs(run) if self._lacks_its_end(run, log)]
        patience = row["ended_at"] + 10 - time.time()
        if not waiting or patience <= 0:
            return True
        asyncio.get_running_loop().call_later(patience + 0.1, bell.set)
        return False


def _append(path: Path, offset: int, data: bytes, gap: int) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        size = file.seek(0, os.SEEK_END)
        if gap and size == offset - gap:
            file.truncate(offset)
            size = file.seek(0, os.SEEK_END)
        if offset <= size < offset + len(data):
            file.write(data[size - offset :])
            size = offset + len(data)
    return size


def line(item: dict[str, Any]) -> bytes:
    """One line of a follow stream (newline-delimited JSON)."""
    return json.dumps(item, separators=(",", ":")).encode() + b"\n"
