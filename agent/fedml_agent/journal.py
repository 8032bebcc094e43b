# SPDX-License-Identifier: Apache-2.0
"""What this machine is doing, on its own disk: it knows after a crash what it was about.

A task's row is written before its offer is acknowledged, and its result in the same step as its
end; the row stays until the broker has confirmed the result. Rows with a result that is not
confirmed are the outbox.

SQLite in WAL mode with `synchronous=NORMAL`: a killed process loses nothing; a power cut may lose
the last moments, which the next heartbeat then heals. It is written from the event loop's thread
only.
"""

import json
import logging
import sqlite3
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedml_agent.errors import HomeUnusable
from fedml_protocol.codec import parse, serialise
from fedml_protocol.federate import StageSpec
from fedml_protocol.tasks import FINAL, Offer, Result, TaskState

log = logging.getLogger(__name__)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS tasks (
    task TEXT NOT NULL, epoch INTEGER NOT NULL,
    counter INTEGER NOT NULL,          -- of the order that brought it
    offer BLOB NOT NULL,
    state INTEGER NOT NULL,
    gpus TEXT NOT NULL,                -- JSON list of UUIDs that it holds
    result BLOB,
    confirmed INTEGER NOT NULL DEFAULT 0,
    created_at REAL NOT NULL,
    PRIMARY KEY (task, epoch));
CREATE TABLE IF NOT EXISTS logs (
    task TEXT NOT NULL, epoch INTEGER NOT NULL, stream TEXT NOT NULL,
    shipped INTEGER NOT NULL,
    PRIMARY KEY (task, epoch, stream));
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""

# Orders below the floor are replays. Confirmed rows are kept this long above it, so that a repeated
# offer is recognised as such.
_KEEP_CONFIRMED = 1000


@dataclass(slots=True, kw_only=True)
class Entry:
    """One task that this machine holds, or whose result it still owes."""

    offer: Offer
    counter: int
    state: TaskState
    gpus: tuple[str, ...] = ()
    result: Result | None = None
    confirmed: bool = False

    @property
    def key(self) -> tuple[str, int]:
        """(task, epoch)."""
        return self.offer.task, self.offer.epoch

    @property
    def folder(self) -> str:
        """The name of its directory."""
        return f"{self.offer.task}.{self.offer.epoch}"

    @property
    def session(self) -> str:
        """The federated run that it is a stage of, or nothing."""
        return self.offer.spec.session if isinstance(self.offer.spec, StageSpec) else ""


class Journal:
    """The file, and a mirror of its open rows in memory."""

    def __init__(self, path: Path) -> None:
        """Open or create it; a damaged one is set aside and a new one begun.

        Raises:
            HomeUnusable: Neither can be done.
        """
        self.set_aside: Path | None = None
        # Of logs, that the broker has taken since this process began.
        self.log_bytes = 0
        try:
            self._db = _open(path)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError) and "disk" in str(error):
                raise HomeUnusable(f"cannot open {path}: {error}", "free some space") from error
            self.set_aside = path.with_name(f"{path.name}.damaged-{int(time.time())}")
            log.error("the journal is damaged (%s); it is kept as %s", error, self.set_aside)
            path.rename(self.set_aside)
            for leftover in ("-wal", "-shm"):
                path.with_name(path.name + leftover).unlink(missing_ok=True)
            self._db = _open(path)
        self._entries: dict[tuple[str, int], Entry] = {}
        for entry in self._load():
            self._entries[entry.key] = entry
        self.floor = int(self._meta("floor") or 0)
        self.drain_counter = int(self._meta("drain_counter") or 0)

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    # ------------------------------------------------------------------ reading

    def get(self, task: str, epoch: int) -> Entry | None:
        """The row, if it is still known."""
        return self._entries.get((task, epoch))

    def of_task(self, task: str) -> list[Entry]:
        """Every epoch of a task that is still known."""
        return [e for (t, _), e in self._entries.items() if t == task]

    def held(self) -> list[Entry]:
        """What runs here, or is about to."""
        return [e for e in self._entries.values() if e.state not in FINAL]

    def owed(self) -> list[Entry]:
        """Results that the broker has not confirmed."""
        return [e for e in self._entries.values() if e.result is not None and not e.confirmed]

    def knows_session(self, session: str) -> bool:
        """Whether a task of the session is held or owed."""
        return any(e.session == session for e in (*self.held(), *self.owed()))

    # ------------------------------------------------------------------ writing

    def add(self, entry: Entry) -> None:
        """A task that this machine takes. On return it is on the disk."""
        with self._db:
            self._db.execute(
                "INSERT INTO tasks (task, epoch, counter, offer, state, gpus, created_at)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    *entry.key,
                    entry.counter,
                    serialise(entry.offer),
                    int(entry.state),
                    json.dumps(entry.gpus),
                    time.time(),
                ),
            )
        self._entries[entry.key] = entry

    def running(self, entry: Entry) -> None:
        """It has begun."""
        with self._db:
            self._db.execute(
                "UPDATE tasks SET state = ? WHERE task = ? AND epoch = ?",
                (int(TaskState.RUNNING), *entry.key),
            )
        entry.state = TaskState.RUNNING

    def end(self, entry: Entry, result: Result) -> None:
        """It has ended; from now on the result is owed."""
        with self._db:
            self._db.execute(
                "UPDATE tasks SET state = ?, result = ? WHERE task = ? AND epoch = ?",
                (int(result.state), serialise(result), *entry.key),
            )
        entry.state, entry.result = result.state, result

    def confirm(self, task: str, epoch: int) -> Entry | None:
        """The broker has the result; the row, if this is news."""
        entry = self._entries.get((task, epoch))
        if entry is None or entry.confirmed or entry.result is None:
            return None
        with self._db:
            self._db.execute(
                "UPDATE tasks SET confirmed = 1 WHERE task = ? AND epoch = ?", (task, epoch)
            )
        entry.confirmed = True
        self._prune()
        return entry

    def set_drain_counter(self, counter: int) -> None:
        """The number of the newest order to drain; older ones are replays."""
        self._set_meta("drain_counter", str(counter))
        self.drain_counter = counter

    def shipped(self, task: str, epoch: int, stream: str) -> int:
        """How much of a log the broker has."""
        row = self._db.execute(
            "SELECT shipped FROM logs WHERE task = ? AND epoch = ? AND stream = ?",
            (task, epoch, stream),
        ).fetchone()
        return int(row[0]) if row else 0

    def set_shipped(self, task: str, epoch: int, stream: str, size: int) -> None:
        """The broker has so much of a log."""
        self.log_bytes += max(0, size - self.shipped(task, epoch, stream))
        with self._db:
            self._db.execute(
                "INSERT OR REPLACE INTO logs VALUES (?, ?, ?, ?)", (task, epoch, stream, size)
            )

    # ------------------------------------------------------------------ small print

    def _prune(self) -> None:
        done = [e for e in self._entries.values() if e.confirmed]
        if len(done) <= _KEEP_CONFIRMED:
            return
        done.sort(key=lambda e: e.counter)
        old = done[: len(done) - _KEEP_CONFIRMED // 2]
        # A row still held may have a lower counter; it is found by its key, not by the floor.
        self.floor = max(self.floor, old[-1].counter)
        self._set_meta("floor", str(self.floor))
        with self._db:
            self._db.executemany(
                "DELETE FROM tasks WHERE task = ? AND epoch = ?", [e.key for e in old]
            )
            self._db.executemany(
                "DELETE FROM logs WHERE task = ? AND epoch = ?", [e.key for e in old]
            )
        for entry in old:
            del self._entries[entry.key]

    def _load(self) -> Iterator[Entry]:
        rows: Sequence[tuple[int, bytes, int, str, bytes | None, int]] = self._db.execute(
            "SELECT counter, offer, state, gpus, result, confirmed FROM tasks ORDER BY counter"
        ).fetchall()
        for counter, offer, state, gpus, result, confirmed in rows:
            yield Entry(
                offer=parse(Offer, offer),
                counter=counter,
                state=TaskState(state),
                gpus=tuple(json.loads(gpus)),
                result=None if result is None else parse(Result, result),
                confirmed=bool(confirmed),
            )

    def _set_meta(self, name: str, value: str) -> None:
        with self._db:
            self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))

    def _meta(self, name: str) -> str | None:
        row = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return str(row[0]) if row else None


def _open(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=10)
    try:
        path.chmod(0o600)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=NORMAL")
        verdict = db.execute("PRAGMA quick_check").fetchone()[0]
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)
        db.executescript(_SCHEMA)
    except BaseException:
        db.close()
        raise
    return db
