# SPDX-License-Identifier: Apache-2.0
"""What can be seen of a run: its events, and the logs of its tasks.

Events are rows, written in the transaction that they tell of. Logs are files, one per task, epoch
and stream, to which agents append at stated offsets: a chunk that came twice changes nothing. Which
lines of a task's two streams came when is a third file, see log_order.py.
Whoever follows is woken by the write, not by a timer.
"""

import asyncio
import errno
import json
import os
import shutil
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import sqlalchemy as sa
from sqlalchemy import Connection

from fedml_broker.log_order import CHUNK, ORDER, STREAMS, LogFile, Ordered, Text
from fedml_broker.prepared import Prepared
from fedml_broker.problems import Problem
from fedml_broker.store import Store
from fedml_broker.tables import events
from fedml_protocol.errors import MalformedMessage
from fedml_protocol.ids import check_id

# Handed to who follows at once; the next ones are read when he has taken these.
_BATCH = 1 << 20


# With every task.
_INSERT = Prepared(events.insert(), ("run", "at", "kind", "data"))


class RunState(Protocol):
    """What `follow` asks of whoever keeps the runs."""

    async def row(self, run: str) -> dict[str, Any]:
        """The run as the API shows it."""
        ...


def add_event(tx: Connection, run: str, kind: str, data: dict[str, Any]) -> None:
    """Write down that something happened, in the transaction in which it does."""
    _INSERT.run(tx, run=run, at=time.time(), kind=kind, data=data)


def has_event(tx: Connection, run: str, kind: str, data: Mapping[str, Any]) -> bool:
    """Whether something was written down before of which all this is true."""
    query = sa.select(events.c.data).where(events.c.run == run, events.c.kind == kind)
    return any(data.items() <= known.items() for known in tx.execute(query).scalars())


class _Reading:
    """How far a follower has read one attempt at a task."""

    def __init__(self, ordered: Ordered, starts: Mapping[LogFile, int]) -> None:
        self.ordered = ordered
        self.texts = {stream: Text() for stream in STREAMS}
        for log, offset in starts.items():
            if (log.task, log.epoch) == (ordered.task, ordered.epoch):
                self.begin_at(log.stream, offset)

    def begin_at(self, stream: str, offset: int) -> None:
        """Nobody asks for what lies before."""
        self.ordered.skip(stream, offset)
        self.texts[stream].begin_at(offset)


class Observer:
    """Logs on disk, events in the store, and a bell for each run."""

    def __init__(self, store: Store, root: Path) -> None:
        self._store = store
        self._root = root
        # Each called with a run that has changed, and not only in what there is to see of it.
        self.on_change: list[Callable[[str], None]] = []
        self._bells: dict[str, asyncio.Event] = {}
        self._watchers: dict[str, int] = {}

    # ------------------------------------------------------------------ the bell

    def ring(self, run: str) -> None:
        """What this run is has changed: its state, it may be."""
        self.wake(run)
        for tell in self.on_change:
            tell(run)

    def wake(self, run: str) -> None:
        """There is more to see of this run; whoever follows it looks again."""
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
        self,
        run: str,
        log: LogFile,
        offset: int,
        data: bytes,
        *,
        gap: int = 0,
        ordered: bool = False,
    ) -> int:
        """Add a chunk at its offset; how long the log is now.

        What lies before the end is known already and skipped; a gap is told by the answer, which is
        then smaller than `offset`. A `gap` that the agent admits (a capped log) becomes a hole.
        `ordered`: it sends the order too, which readers then wait for.
        """
        path, order = self._path(run, log), self._path(run, log._replace(stream=ORDER))
        if ordered and not path.exists() and not order.exists():
            await asyncio.to_thread(_append, order, 0, b"", 0)
        size = await asyncio.to_thread(_append, path, offset, data, gap)
        if data:
            self.wake(run)
        return size

    def finish(self, run: str, log: LogFile, size: int) -> None:
        """The agent says that this log ends at `size`; an empty one is as good as none."""
        if size:
            path = self._path(run, log)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".end").write_text(str(size))

    def logs(self, run: str) -> list[LogFile]:
        """Every log that the run has so far, by task, epoch and stream."""
        folder = self._root / check_id(run, "run")
        found = set()
        for path in folder.glob("*.*.*.*"):  # the log, or its end, which may come first
            task, epoch, stream = path.stem.rsplit(".", 2)
            if stream != ORDER:
                found.add(LogFile(task, int(epoch), stream))
        return sorted(found)

    def attempts(self, run: str) -> list[tuple[str, int]]:
        """The attempts at tasks that have a log."""
        return sorted({(log.task, log.epoch) for log in self.logs(run)})

    def size(self, run: str, log: LogFile) -> int | None:
        """How long a log is by now; None: there is none."""
        try:
            return self._path(run, log).stat().st_size
        except FileNotFoundError:
            return None

    def _lacks_its_end(self, run: str, log: LogFile, covered: int) -> bool:
        """Whether a log is known to be longer than what is here and in order."""
        try:
            end = int(self._path(run, log).with_suffix(".end").read_text())
        except (OSError, ValueError):
            return False
        return end > 0 and min(self.size(run, log) or 0, covered) < end

    def read(self, run: str, log: LogFile, offset: int, limit: int = CHUNK) -> tuple[int, bytes]:
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
        if log.stream not in (*STREAMS, ORDER) or log.epoch < 1:
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
        starts: Mapping[LogFile, int] | None = None,
        tail: int | None = None,
    ) -> AsyncIterator[dict[str, Any]]:
        """Everything of a run as it happens: events, log lines, and at last its end.

        Args:
            state: Gives the run's present row, and whether all its logs have arrived.
            waiting: Says what the run waits for, in words; empty when it does not.
            progress: The open round of a federated run in numbers; goes beside `waiting`.
            after: Events up to this id are known to the caller.
            stay: Until the run has ended; otherwise only what there is by now.
            starts: How much of which log is known to the caller.
            tail: Of each log only about so many bytes of its end, also when it is written faster
                than the caller reads.

        Yields:
            ``{"event": …}``, ``{"log": …}`` and ``{"waiting": …}`` objects; the last one is
            ``{"end": run}``.
        """
        seen: dict[tuple[str, int], _Reading] = {}
        starts = starts or {}
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
                async for chunk in self._new_chunks(run, seen, starts, tail, all_of_it=not stay):
                    yield chunk
            if row["ended_at"] is None and (reason := waiting(run)) != told:
                told = reason
                numbers = progress(run)
                yield {"waiting": reason} | ({} if numbers is None else {"round": numbers})
            if not stay:
                yield {"end": row}
                return
            ended = row["ended_at"] is not None
            if ended and (not logs or await self._arrived(run, row, bell, seen)):
                if logs:
                    async for chunk in self._new_chunks(run, seen, starts, tail, all_of_it=True):
                        yield chunk
                for event in await self.events(run, after):
                    yield {"event": event}
                yield {"end": await state.row(run)}
                return
            await bell.wait()

    async def _new_chunks(
        self,
        run: str,
        seen: dict[tuple[str, int], _Reading],
        starts: Mapping[LogFile, int],
        tail: int | None,
        *,
        all_of_it: bool,
    ) -> AsyncIterator[dict[str, Any]]:
        while batch := await asyncio.to_thread(self._batch, run, seen, starts, tail, all_of_it):
            for item in batch:
                yield item

    def _batch(
        self,
        run: str,
        seen: dict[tuple[str, int], _Reading],
        starts: Mapping[LogFile, int],
        tail: int | None,
        all_of_it: bool,
    ) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = []
        size = 0
        for attempt in self.attempts(run):
            if attempt not in seen:
                seen[attempt] = _Reading(Ordered(self, run, *attempt), starts)
            reading = seen[attempt]
            if tail is not None:
                for stream in STREAMS:
                    whole = self.size(run, LogFile(*attempt, stream)) or 0
                    reading.begin_at(stream, whole - tail)
            for chunk in reading.ordered.chunks(all_of_it=all_of_it):
                text = reading.texts[chunk.log.stream].of(chunk)
                place = {"offset": chunk.offset, "end": chunk.end, "at": chunk.at}
                items.append({"log": {**chunk.log._asdict(), **place, "text": text}})
                size += len(chunk.data)
                if size > _BATCH:
                    return items
        return items

    async def _arrived(
        self,
        run: str,
        row: dict[str, Any],
        bell: asyncio.Event,
        seen: Mapping[tuple[str, int], _Reading],
    ) -> bool:
        """Whether all logs of an ended run are here; a lost machine is not waited for long."""
        waiting = []
        for log in self.logs(run):
            reading = seen.get((log.task, log.epoch))
            covered = reading.ordered.covered(log.stream) if reading is not None else 0
            waiting += [log] if self._lacks_its_end(run, log, covered) else []
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
