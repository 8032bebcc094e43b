# SPDX-License-Identifier: Apache-2.0
"""What the broker remembers: one SQLite file, one writer, short transactions.

All writes go through one thread, which takes whatever has queued up, runs each piece under its own
savepoint and commits once: a hundred results that arrive together cost one fsync. A write has
happened when `write` returns, never before.

    await store.write(lambda tx: tx.execute(runs.update()...))
"""

import asyncio
import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, Self, TypeVar, cast

import sqlalchemy
from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Engine, event

from fedml_broker.prepared import Prepared, driver_of
from fedml_broker.problems import Problem

log = logging.getLogger(__name__)

T = TypeVar("T")
Work = Callable[[Connection], T]

# One commit covers at most this many pieces, so that the first of them does not wait for ever.
_GROUP = 256
# A full or failing disk, as SQLAlchemy says it, and as the driver does.
_UNAVAILABLE = (sqlalchemy.exc.OperationalError, sqlite3.OperationalError)


class StoreUnavailable(Problem):
    """The store could not write: a full or failing disk. Nothing of the piece has happened."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            503,
            "the broker cannot write to its disk",
            reason,
            hint="free some space on the broker's machine; nothing was lost, try again then",
        )


class Store:
    """Opened by `Store.open`, closed by `close`; both block and belong outside the event loop."""

    def __init__(self, engine: Engine, path: Path) -> None:
        self.path = path
        self._engine = engine
        self._queue: queue.SimpleQueue[_Piece[Any] | None] = queue.SimpleQueue()
        # Called in the writer's thread with the pieces of a commit and the seconds that it took.
        self.on_commit: Callable[[int, float], None] = lambda pieces, seconds: None
        self._readers = asyncio.Semaphore(4)
        self._finder = engine.raw_connection()
        self._writer = threading.Thread(target=self._serve, name="store.writer", daemon=True)
        self._writer.start()

    @classmethod
    def open(cls, path: Path) -> Self:
        """Create or upgrade the file, then open it.

        Raises:
            sqlalchemy.exc.DatabaseError: Not a database, or a damaged one.
        """
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        engine = _engine(path)
        _upgrade(engine)
        return cls(engine, path)

    async def write(self, work: Work[T]) -> T:
        """Run `work` in a transaction; when this returns, it is on the disk.

        Pieces run in the order in which `write` was called.

        Raises:
            StoreUnavailable: The disk refused; nothing of this piece has happened.
        """
        piece = _Piece(work, asyncio.get_running_loop())
        self._queue.put(piece)
        return await piece.done

    async def read(self, work: Work[T]) -> T:
        """Run `work`, which only reads, beside the writer."""
        async with self._readers:
            return await asyncio.to_thread(self._read, work)

    def _read(self, work: Work[T]) -> T:
        with self._engine.connect() as tx:
            return work(tx)

    def find(self, statement: Prepared, **values: Any) -> tuple[Any, ...] | None:
        """Look one row up by its key, in the event loop's own thread, beside the writer.

        To hand it to another thread takes ten times as long as the look itself.
        """
        return statement.first(cast(sqlite3.Connection, self._finder.driver_connection), **values)

    def close(self) -> None:
        """Finish what is queued, then close the file."""
        self._queue.put(None)
        self._writer.join()
        self._finder.close()
        self._engine.dispose()

    def _serve(self) -> None:
        with self._engine.connect().execution_options(writes=True) as connection:
            while pieces := self._next_group():
                if pieces[-1] is None:
                    self._commit(connection, pieces[:-1])
                    return
                self._commit(connection, pieces)

    def _next_group(self) -> list["_Piece[Any] | None"]:
        pieces = [self._queue.get()]
        while pieces[-1] is not None and len(pieces) < _GROUP:
            try:
                pieces.append(self._queue.get_nowait())
            except queue.Empty:
                break
        return pieces

    def _commit(self, connection: Connection, pieces: list[Any]) -> None:
        if not pieces:
            return
        begun = time.perf_counter()
        try:
            with connection.begin():
                for piece in pieces:
                    piece.run(connection)
        except _UNAVAILABLE as error:
            reason = _first(error)
            log.error("the store could not commit: %s", reason)
            for piece in pieces:
                piece.fail(StoreUnavailable(str(reason)))
        self.on_commit(len(pieces), time.perf_counter() - begun)
        # One wake-up for all who wait in one loop.
        for loop in {piece.loop for piece in pieces}:
            _tell(loop, [piece for piece in pieces if piece.loop is loop])


class _Piece(Generic[T]):
    """One write: what to do, and whom to tell."""

    def __init__(self, work: Work[T], loop: asyncio.AbstractEventLoop) -> None:
        self.done: asyncio.Future[T] = loop.create_future()
        self._work = work
        self.loop = loop
        self._value: T | None = None
        self._error: BaseException | None = None

    def run(self, connection: Connection) -> None:
        """In the writer's thread. What the work raises undoes this piece only."""
        driver = driver_of(connection)
        # In SQLite's own words: SQLAlchemy's savepoints cost a tenth of the writer's time.
        driver.execute("SAVEPOINT piece")
        try:
            self._value = self._work(connection)
        except _UNAVAILABLE:
            raise  # a full disk: it ends the whole group
        except Exception as error:
            driver.execute("ROLLBACK TO piece")
            self._error = error
        driver.execute("RELEASE piece")

    def fail(self, error: Exception) -> None:
        """In the writer's thread: the group was not committed."""
        self._error = self._error or error

    def settle(self) -> None:
        """In its loop: whoever waits goes on."""
        if self.done.cancelled():
            return
        if self._error is not None:
            self.done.set_exception(self._error)
        else:
            self.done.set_result(cast(T, self._value))


def _tell(loop: asyncio.AbstractEventLoop, pieces: list["_Piece[Any]"]) -> None:
    """In the writer's thread: wake whoever waits."""

    def settle() -> None:
        for piece in pieces:
            piece.settle()

    try:
        loop.call_soon_threadsafe(settle)
    except RuntimeError:  # the loop is gone, and with it everybody who could wait
        log.debug("a write ended after its event loop")


def _first(error: BaseException) -> sqlite3.Error:
    """What went wrong before anything else.

    A transaction that finds the disk full is undone by SQLite itself; what is said last is then
    only that there is no savepoint to go back to.
    """
    found: sqlite3.Error = sqlite3.OperationalError(str(error))
    cause: BaseException | None = error
    while cause is not None:
        found = cause if isinstance(cause, sqlite3.Error) else found
        cause = cause.__context__
    return found


@contextmanager
def beside(path: Path) -> Iterator[Connection]:
    """One transaction of a command beside the running broker, which waits for it as it does."""
    engine = _engine(path)
    try:
        with engine.connect().execution_options(writes=True) as tx, tx.begin():
            yield tx
    finally:
        engine.dispose()


def _engine(path: Path) -> Engine:
    engine = sqlalchemy.create_engine(f"sqlite:///{path}", connect_args={"timeout": 30})
    event.listen(engine, "connect", _configure)
    event.listen(engine, "begin", _begin)
    return engine


def _configure(connection: sqlite3.Connection, _: object) -> None:
    # SQLAlchemy's own BEGIN (see `open`) replaces the driver's guesses about transactions.
    connection.isolation_level = None
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        "busy_timeout=30000",
        "wal_autocheckpoint=2000",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin(tx: Connection) -> None:
    # At once as a writer: had we only read so far and a command (`backup`) wrote, SQLite would
    # refuse our first write instead of letting us wait for our turn.
    words = "BEGIN IMMEDIATE" if tx.get_execution_options().get("writes") else "BEGIN"
    driver_of(tx).execute(words)


def _upgrade(engine: Engine, to: str = "head") -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, to)
