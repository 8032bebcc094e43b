# SPDX-License-Identifier: Apache-2.0
"""The endpoint's own SQLite file: what must survive `kill -9`.

Memory is ahead of the file. Changes collect in one batch, "the newest state of these rows", while
the writer thread commits the batch before; so one fsync serves everything that happened meanwhile,
and a message that was delivered and acknowledged before its turn never touches the disk.
Row numbers are never used twice, so the order within a batch does not matter. Whoever needs a
change to be safe (a PUBACK, a SUBACK) leaves a receipt, settled once the batch is on the disk.

One file belongs to one process: it is locked exclusively, and the lock dies with the process.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import threading
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from fedml_broker.mqtt import PostError
from fedml_broker.mqtt.clock import Clock

log = logging.getLogger(__name__)

Row = tuple[Any, ...]

# table -> (columns, of which the first so many are the key)
_TABLES = {
    "meta": ("name TEXT, value", 1),
    "session": ("id INTEGER, client TEXT, expiry_s INTEGER, ends_at REAL", 1),
    "subscription": (
        "session INTEGER, filter TEXT, qos INTEGER, no_local INTEGER, as_published INTEGER,"
        " ident INTEGER",
        2,
    ),
    "message": (
        "id INTEGER, topic TEXT, payload BLOB, properties BLOB, expires_at REAL, retain INTEGER",
        1,
    ),
    "delivery": (
        "id INTEGER, session INTEGER, message INTEGER, retain INTEGER, idents BLOB, share TEXT",
        1,
    ),
    "retained": ("topic TEXT, payload BLOB, properties BLOB, qos INTEGER, expires_at REAL", 1),
    "will": (
        "id INTEGER, client TEXT, topic TEXT, payload BLOB, properties BLOB, qos INTEGER,"
        " retain INTEGER, delay_s REAL, expiry_s INTEGER, due_at REAL",
        1,
    ),
}
_TIMES = (
    ("session", "ends_at"),
    ("message", "expires_at"),
    ("retained", "expires_at"),
    ("will", "due_at"),
)
# One statement steps through many rows: every step gives up the interpreter lock and has to win it
# back from the busy event loop.
_ROWS_PER_STATEMENT = 64
_RETRY_S = 1.0
# How old the two clocks may be that a reboot is measured by.
_STAMP_S = 1.0
SCHEMA = 1


class Receipt(Protocol):
    """Something that waits for a commit."""

    def settle(self, reason: int = 0) -> None: ...


class JournalUnusable(PostError):
    """The file cannot be used; the text says what to do."""


@dataclass(slots=True)
class _Batch:
    rows: dict[str, dict[Hashable, Row | None]]
    receipts: list[Receipt]

    @classmethod
    def new(cls) -> _Batch:
        return cls({table: {} for table in _TABLES}, [])

    def __bool__(self) -> bool:
        return bool(self.receipts) or any(self.rows.values())


class Journal:
    """Rows in, receipts out. All methods belong to the event loop's thread.

    Attributes:
        failing: The last commit failed (disk full, I/O error); it is tried again every second,
            and until one succeeds nothing new should be promised to anybody.
    """

    def __init__(self, path: Path, clock: Clock) -> None:
        self.failing = False
        self._path = path
        self._clock = clock
        self._batch = _Batch.new()
        self._rows = self._batch.rows
        self._busy = False
        self._scheduled = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._last_id = 0
        self._stamped_at = 0.0
        self._todo: SimpleQueue[_Batch | None] = SimpleQueue()
        self._loop: asyncio.AbstractEventLoop
        self._writer: threading.Thread | None = None

    async def open(self) -> dict[str, list[Row]]:
        """Start the writer and return what the file holds, table by table, times made current.

        Raises:
            JournalUnusable: Another process uses the file, or it cannot be opened at all.
        """
        self._loop = asyncio.get_running_loop()
        opened: asyncio.Future[dict[str, list[Row]]] = self._loop.create_future()
        self._writer = threading.Thread(
            target=self._write_all, args=(opened,), name="mqtt.journal", daemon=True
        )
        self._writer.start()
        stored = await opened
        ids = [
            row[0] for table in ("session", "message", "delivery", "will") for row in stored[table]
        ]
        self._last_id = max(ids, default=0)
        return stored

    async def close(self) -> None:
        """Commit what is pending, if the disk allows, and end the writer."""
        if self._writer is None:
            return
        await self.drain()
        self._todo.put(None)
        await asyncio.to_thread(self._writer.join)
        self._writer = None

    async def drain(self) -> None:
        """Return when everything so far is committed, or the disk has refused it."""
        if self._batch:
            self._scheduled = True
            self._idle.clear()
        self._hand_over()
        await self._idle.wait()

    def next_id(self) -> int:
        """A row number that was never used before."""
        self._last_id += 1
        return self._last_id

    def put(self, table: str, key: Hashable, row: Row) -> None:
        """Insert or replace one row."""
        self._rows[table][key] = row
        if not self._scheduled:
            self._schedule()

    def drop(self, table: str, key: Hashable) -> None:
        """Delete one row, if it is there."""
        self._rows[table][key] = None
        if not self._scheduled:
            self._schedule()

    def forget(self, table: str, key: Hashable) -> None:
        """Delete a row that is only ever inserted once: nothing is written if it still waits."""
        rows = self._rows[table]
        if rows.pop(key, None) is None:
            rows[key] = None
            if not self._scheduled:
                self._schedule()

    def after_commit(self, receipt: Receipt) -> None:
        """Settle a receipt once everything so far is on the disk (reason 0x97 if it cannot be)."""
        self._batch.receipts.append(receipt)
        if not self._scheduled:
            self._schedule()

    def _schedule(self) -> None:
        self._scheduled = True
        self._idle.clear()
        self._loop.call_soon(self._hand_over)

    def _hand_over(self) -> None:
        if self._busy or not self._scheduled:
            return
        self._busy, self._scheduled = True, False
        batch, self._batch = self._batch, _Batch.new()
        self._rows = self._batch.rows
        self._todo.put(batch)

    def _committed(self, batch: _Batch, error: sqlite3.Error | None) -> None:
        self._busy = False
        if error is None:
            if self.failing:
                log.warning("%s can be written again", self._path)
            self.failing = False
            for receipt in batch.receipts:
                receipt.settle()
            if self._scheduled:
                self._hand_over()
            else:
                self._idle.set()
            return
        if not self.failing:
            log.error("cannot write %s: %s; free some space or repair the disk", self._path, error)
        self.failing = True
        # What waits is newer than what failed.
        for table, rows in batch.rows.items():
            self._rows[table] = rows | self._rows[table]
        receipts = batch.receipts + self._batch.receipts
        self._batch.receipts = []
        for receipt in receipts:
            receipt.settle(0x97)
        self._idle.set()
        self._clock.call_later(_RETRY_S, self._retry)

    def _retry(self) -> None:
        self._scheduled = True
        self._idle.clear()
        self._hand_over()

    # --- the writer thread ------------------------------------------------------------------

    def _write_all(self, opened: asyncio.Future[dict[str, list[Row]]]) -> None:
        try:
            database, stored = self._open_or_set_aside()
        except (sqlite3.Error, OSError) as error:
            text = f"cannot open {self._path}: {error}; is another broker using it?"
            self._tell(opened.set_exception, JournalUnusable(text))
            return
        self._tell(opened.set_result, stored)
        while (batch := self._todo.get()) is not None:
            failure: sqlite3.Error | None = None
            try:
                self._commit(database, batch)
            except sqlite3.Error as error:
                failure = error
                if database.in_transaction:
                    database.rollback()
            self._tell(self._committed, batch, failure)
        database.close()

    def _tell(self, call: Any, *args: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(call, *args)
        except RuntimeError:  # the loop was closed without us: nobody is left to be told
            log.warning("the event loop ended before %s was closed", self._path)

    def _open_or_set_aside(self) -> tuple[sqlite3.Connection, dict[str, list[Row]]]:
        try:
            return self._open()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise
            aside = self._path.with_name(f"{self._path.name}.corrupt-{int(self._clock.wall())}")
            log.error("%s is damaged (%s): kept as %s, beginning anew", self._path, error, aside)
            self._path.rename(aside)
            for suffix in ("-wal", "-shm"):
                companion = self._path.with_name(self._path.name + suffix)
                if companion.exists():
                    companion.rename(aside.with_name(aside.name + suffix))
            return self._open()

    def _open(self) -> tuple[sqlite3.Connection, dict[str, list[Row]]]:
        database = sqlite3.connect(self._path, isolation_level=None, cached_statements=512)
        try:
            return database, self._load(database)
        except BaseException:
            database.close()
            raise

    def _load(self, database: sqlite3.Connection) -> dict[str, list[Row]]:
        for pragma in ("locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = FULL"):
            database.execute(f"PRAGMA {pragma}")
        problem = database.execute("PRAGMA quick_check(1)").fetchone()[0]
        if problem != "ok":
            raise sqlite3.DatabaseError(problem)
        database.execute("BEGIN IMMEDIATE")
        for table, (columns, keys) in _TABLES.items():
            names = [column.split()[0] for column in columns.split(", ")]
            key = ", ".join(names[:keys])
            # A single integer key becomes the row's own number; anything else is its own B-tree.
            tail = "" if keys == 1 and columns.startswith("id INTEGER") else " WITHOUT ROWID"
            database.execute(
                f"CREATE TABLE IF NOT EXISTS {table} ({columns}, PRIMARY KEY ({key})){tail}"
            )
        meta = dict(database.execute("SELECT name, value FROM meta").fetchall())
        if meta.get("schema", SCHEMA) != SCHEMA:
            raise sqlite3.OperationalError(f"it was written by another version ({meta['schema']})")
        if meta and meta["boot"] != self._clock.boot:
            self._translate_times(database, meta)
        database.execute("INSERT OR REPLACE INTO meta VALUES ('schema', ?)", (SCHEMA,))
        self._stamp(database)
        database.execute("COMMIT")
        return {
            table: database.execute(
                f"SELECT * FROM {table} ORDER BY 1"  # noqa: S608 - our own table names
            ).fetchall()
            for table in _TABLES
        }

    def _translate_times(self, database: sqlite3.Connection, meta: dict[str, Any]) -> None:
        """The machine was rebooted: carry moments of the old boot's clock over to the new one.

        How long it was off only the wall clock can say. One that was set back counts as no time,
        so that nothing ends early.
        """
        away = max(0.0, self._clock.wall() - meta["wall"])
        shift = self._clock.now() - away - meta["now"]
        for table, column in _TIMES:
            database.execute(
                f"UPDATE {table} SET {column} = {column} + ?",  # noqa: S608
                (shift,),
            )

    def _stamp(self, database: sqlite3.Connection) -> None:
        """Note what both clocks show; only how they stand to each other counts later."""
        clock = self._clock
        database.execute(
            "INSERT OR REPLACE INTO meta VALUES ('boot', ?), ('now', ?), ('wall', ?)",
            (clock.boot, clock.now(), clock.wall()),
        )
        self._stamped_at = clock.now()

    def _commit(self, database: sqlite3.Connection, batch: _Batch) -> None:
        database.execute("BEGIN IMMEDIATE")
        for table, rows in batch.rows.items():
            if rows:
                _insert(database, table, [row for row in rows.values() if row is not None])
                _delete(database, table, [key for key, row in rows.items() if row is None])
        if self._clock.now() - self._stamped_at >= _STAMP_S:
            self._stamp(database)
        database.execute("COMMIT")


def _insert(database: sqlite3.Connection, table: str, rows: list[Row]) -> None:
    for start in range(0, len(rows), _ROWS_PER_STATEMENT):
        some = rows[start : start + _ROWS_PER_STATEMENT]
        one = f"({', '.join('?' * len(some[0]))})"
        database.execute(
            f"INSERT OR REPLACE INTO {table} VALUES {', '.join([one] * len(some))}",  # noqa: S608
            [value for row in some for value in row],
        )


def _delete(database: sqlite3.Connection, table: str, keys: list[Any]) -> None:
    columns, count = _TABLES[table]
    names = [column.split()[0] for column in columns.split(", ")][:count]
    if count == 1:
        _delete_by_key(database, table, names[0], keys)
    else:
        where = " AND ".join(f"{name} = ?" for name in names)
        database.executemany(f"DELETE FROM {table} WHERE {where}", keys)  # noqa: S608


def _delete_by_key(
    database: sqlite3.Connection, table: str, name: str, keys: Iterable[Any]
) -> None:
    wanted = list(keys)
    for start in range(0, len(wanted), 8 * _ROWS_PER_STATEMENT):
        some = wanted[start : start + 8 * _ROWS_PER_STATEMENT]
        marks = ", ".join("?" * len(some))
        database.execute(f"DELETE FROM {table} WHERE {name} IN ({marks})", some)  # noqa: S608
