# SPDX-License-Identifier: Apache-2.0
"""The store on a real disk: groups, savepoints, kills, full and damaged files."""

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection

from fedml_broker import rounds
from fedml_broker.prepared import Prepared, given
from fedml_broker.store import Store, StoreUnavailable, _upgrade
from fedml_broker.tables import metadata, settings


def put(name: str, value: Any = 1) -> Any:
    return lambda tx: tx.execute(settings.insert().values(name=name, value=value))


PUT = Prepared(settings.insert(), ("name", "value"))
FIND = Prepared(sa.select(settings.c.value).where(settings.c.name == given("name")))


def put_prepared(name: str, value: Any = 1) -> Any:
    return lambda tx: PUT.run(tx, name=name, value=value)


async def names(store: Store) -> list[str]:
    """What is written, in the order in which it was."""
    query = sa.select(settings.c.name).order_by(sa.text("rowid"))
    return await store.read(lambda tx: list(tx.execute(query).scalars()))


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = await asyncio.to_thread(Store.open, tmp_path / "broker.db")
    yield store
    await asyncio.to_thread(store.close)


class Gate:
    """Holds the writer in one piece until it is opened."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._opened = threading.Event()

    def __call__(self, tx: Connection) -> None:
        self.reached.set()
        assert self._opened.wait(30)

    def open(self) -> None:
        self._opened.set()


def count_commits(store: Store) -> list[None]:
    """Grows by one with each commit."""
    commits: list[None] = []
    sa.event.listen(store._engine, "commit", lambda connection: commits.append(None))
    return commits


# ---------------------------------------------------------------------- groups


async def test_what_comes_together_is_committed_together_and_in_order(store: Store) -> None:
    gate, commits = Gate(), count_commits(store)
    first = asyncio.create_task(store.write(gate))
    await asyncio.to_thread(gate.reached.wait)
    others = [asyncio.create_task(store.write(put(f"s-{n}"))) for n in range(100)]
    await asyncio.sleep(0)
    assert commits == []

    gate.open()
    await asyncio.gather(first, *others)

    assert len(commits) == 2
    assert await names(store) == [f"s-{n}" for n in range(100)]


async def test_what_a_piece_returns_comes_back(store: Store) -> None:
    assert await store.write(lambda tx: 41 + 1) == 42


async def test_what_is_written_is_found_at_once(store: Store) -> None:
    assert store.find(FIND, name="a") is None
    await store.write(put("a", {"b": 1}))
    assert store.find(FIND, name="a") == ({"b": 1},)
    gate = Gate()
    held = asyncio.create_task(store.write(gate))
    await asyncio.to_thread(gate.reached.wait)
    assert store.find(FIND, name="a") == ({"b": 1},), "whoever looks does not wait for who writes"
    gate.open()
    await held


async def test_a_piece_that_fails_undoes_only_itself(store: Store) -> None:
    gate = Gate()
    held = asyncio.create_task(store.write(gate))
    await asyncio.to_thread(gate.reached.wait)

    def half(tx: Connection) -> None:
        put("half")(tx)
        raise ValueError("changed my mind")

    pieces = [put("before"), half, put("before"), put("after")]
    done = [asyncio.ensure_future(store.write(piece)) for piece in pieces]
    gate.open()
    results = await asyncio.gather(held, *done, return_exceptions=True)

    kinds = [type(r) for r in results if isinstance(r, BaseException)]
    assert kinds == [ValueError, sa.exc.IntegrityError]
    assert await names(store) == ["before", "after"]


async def test_a_piece_sees_what_those_before_it_in_the_group_have_done(store: Store) -> None:
    gate = Gate()
    held = asyncio.create_task(store.write(gate))
    await asyncio.to_thread(gate.reached.wait)

    def add(tx: Connection) -> int:
        value = int(tx.execute(sa.select(sa.func.count()).select_from(settings)).scalar_one())
        put(f"s-{value}")(tx)
        return value

    counted = [asyncio.ensure_future(store.write(add)) for _ in range(20)]
    gate.open()
    assert await asyncio.gather(*counted) == list(range(20))
    await held


async def test_who_does_not_wait_any_more_has_written_all_the_same(store: Store) -> None:
    complaints: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: complaints.append(what))
    gate = Gate()
    held = asyncio.create_task(store.write(gate))
    await asyncio.to_thread(gate.reached.wait)
    impatient = asyncio.create_task(store.write(put("mine")))
    await asyncio.sleep(0)
    impatient.cancel()
    gate.open()
    await held
    await store.write(lambda tx: None)
    assert await names(store) == ["mine"]
    assert impatient.cancelled()
    assert complaints == []


async def test_reads_go_beside_the_writer_and_see_only_what_is_committed(store: Store) -> None:
    await store.write(put("old"))
    gate = Gate()

    def slow(tx: Connection) -> None:
        put("new")(tx)
        gate(tx)

    writing = asyncio.create_task(store.write(slow))
    await asyncio.to_thread(gate.reached.wait)
    assert await names(store) == ["old"]  # it neither waits for the writer nor sees its work
    gate.open()
    await writing
    assert await names(store) == ["old", "new"]


async def test_close_finishes_what_is_queued(tmp_path: Path) -> None:
    store = await asyncio.to_thread(Store.open, tmp_path / "broker.db")
    writes = [asyncio.ensure_future(store.write(put(f"s-{n}"))) for n in range(600)]
    await asyncio.sleep(0)
    await asyncio.to_thread(store.close)
    await asyncio.gather(*writes)
    again = await asyncio.to_thread(Store.open, tmp_path / "broker.db")
    assert len(await names(again)) == 600
    await asyncio.to_thread(again.close)


def test_a_write_outlives_the_loop_that_asked_for_it(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "broker.db")
    gate = Gate()

    async def ask() -> None:
        left = [asyncio.ensure_future(store.write(w)) for w in (gate, put("left behind"))]
        await asyncio.sleep(0)
        assert not any(write.done() for write in left)

    asyncio.run(ask())
    gate.open()
    store.close()
    again = Store.open(tmp_path / "broker.db")
    assert asyncio.run(names(again)) == ["left behind"]
    again.close()


# ---------------------------------------------------------------------- kills

# Writes for ever, and says the number of each write only when it has returned.
WRITER = """
import asyncio, sys
from pathlib import Path
from fedml_broker.store import Store
from fedml_broker.tables import settings

async def main():
    store = Store.open(Path(sys.argv[1]))
    print("ready", flush=True)
    async def write(n):
        await store.write(lambda tx: tx.execute(settings.insert().values(name=str(n), value=n)))
        print(n, flush=True)
    for start in range(0, 1_000_000, 7):
        await asyncio.gather(*(write(n) for n in range(start, start + 7)))

asyncio.run(main())
"""


def test_a_killed_broker_has_lost_nothing_that_it_acknowledged(tmp_path: Path) -> None:
    path = tmp_path / "broker.db"
    acknowledged: set[str] = set()
    for least in (1, 100):
        start = 1_000_000 * len(acknowledged)
        script = WRITER.replace("range(0, 1_000_000, 7)", f"range({start}, {start + 999_999}, 7)")
        writer = subprocess.Popen(
            [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        said = [writer.stdout.readline() for _ in range(least)]
        writer.kill()
        said += writer.stdout.readlines()
        writer.wait()
        writer.stdout.close()
        acknowledged |= {line.strip() for line in said if line.endswith("\n")}

        store = Store.open(path)
        found = set(asyncio.run(names(store)))
        store.close()
        assert acknowledged <= found
        assert len(found) <= len(acknowledged) + 3 * 7  # and little that it did not


# ---------------------------------------------------------------------- full disks

# Fills the disk through the store until it refuses; then makes room and writes again.
FILLER = """
import asyncio, sys
from pathlib import Path
import sqlalchemy as sa
from fedml_broker.problems import Problem
from fedml_broker import rounds
from fedml_broker.store import Store, StoreUnavailable, _upgrade
from fedml_broker.tables import settings

def put(name, size):
    value = "x" * size
    return lambda tx: tx.execute(settings.insert().values(name=name, value=value))

async def names(store):
    return await store.read(lambda tx: set(tx.execute(sa.select(settings.c.name)).scalars()))

async def main(folder):
    filler = folder / "filler"
    filler.write_bytes(bytes(3 << 20))
    store = Store.open(folder / "broker.db")
    taken, refused = set(), []
    for n in range(200):
        both = [f"{n}-small", f"{n}-large"]  # one group: both or neither
        results = await asyncio.gather(
            store.write(put(both[0], 10)), store.write(put(both[1], 200_000)),
            return_exceptions=True,
        )
        for name, result in zip(both, results):
            if isinstance(result, BaseException):
                refused.append(result)
            else:
                taken.add(name)
        if len(refused) >= 4:
            break
    assert refused and all(isinstance(r, StoreUnavailable) for r in refused), refused
    assert all('full' in str(r) for r in refused), refused
    assert isinstance(refused[0], Problem) and refused[0].status == 503
    assert await names(store) == taken  # reading goes on, and nothing is there by halves
    filler.unlink()
    await store.write(put("after", 100_000))
    assert await names(store) == taken | {"after"}
    store.close()
    again = Store.open(folder / "broker.db")
    assert await names(again) == taken | {"after"}
    again.close()
    print("survived", len(taken))

asyncio.run(main(Path(sys.argv[1])))
"""


def can_mount() -> bool:
    return (
        os.geteuid() == 0 and not subprocess.run(["unshare", "-m", "true"], check=False).returncode
    )


@pytest.mark.skipif(not can_mount(), reason="needs root, to mount a small disk")
def test_a_full_disk_refuses_writes_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    script = 'mount -t tmpfs -o size=8m none "$0" && exec "$@"'
    command = ("unshare", "-m", "sh", "-c", script, str(tmp_path))
    done = subprocess.run(
        [*command, sys.executable, "-c", FILLER, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith("survived"), done.stderr
    assert int(done.stdout.split()[1]) > 2


@pytest.mark.parametrize("put", [put, put_prepared])
async def test_a_refused_commit_is_told_to_everybody_in_it_and_the_next_one_works(
    store: Store, put: Callable[..., Any]
) -> None:
    """The same as a limit of SQLite's own, where nothing can be mounted."""

    def limit(pages: int) -> Any:
        # Outside a transaction of ours, since the file's size is the connection's business.
        return lambda tx: tx.exec_driver_sql(f"PRAGMA max_page_count = {pages}")

    await store.write(limit(1))  # it is set to the present size, which is more
    gate = Gate()
    held = asyncio.create_task(store.write(gate))
    await asyncio.to_thread(gate.reached.wait)
    pieces = [store.write(put("small")), store.write(put("large", "x" * 100_000))]
    done = [asyncio.ensure_future(piece) for piece in pieces]
    gate.open()
    await held
    refused = await asyncio.gather(*done, return_exceptions=True)
    assert [type(r) for r in refused] == [StoreUnavailable] * 2
    assert "full" in str(refused[0])
    assert await names(store) == []

    await store.write(limit(1_000_000))
    await store.write(put("large", "x" * 100_000))
    assert await names(store) == ["large"]


# ---------------------------------------------------------------------- the file


def test_an_empty_file_gets_every_table_as_the_code_knows_it(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "down" / "broker.db"
    Store.open(path).close()
    assert path.parent.stat().st_mode & 0o777 == 0o700
    engine = sa.create_engine(f"sqlite:///{path}")
    with engine.connect() as tx:
        context = MigrationContext.configure(tx, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
    engine.dispose()


def test_opening_again_keeps_what_is_there(tmp_path: Path) -> None:
    for n in range(3):
        store = Store.open(tmp_path / "broker.db")
        asyncio.run(store.write(put(f"s-{n}")))
        assert asyncio.run(names(store)) == [f"s-{i}" for i in range(n + 1)]
        store.close()


def test_a_store_of_an_older_release_is_brought_up_to_date_with_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "broker.db"
    engine = sa.create_engine(f"sqlite:///{path}")
    _upgrade(engine, "0001")
    with engine.begin() as tx:
        tx.exec_driver_sql(
            "INSERT INTO rounds (run, round, clients, metrics, started_at) "
            "VALUES ('r-12345678', 3, '[0, 2]', '{}', 0)"
        )
    engine.dispose()
    store = Store.open(path)
    (found,) = asyncio.run(store.read(lambda tx: rounds.load(tx, "r-12345678")))
    assert (found.number, found.clients, found.stage, found.done) == (3, (0, 2), 0, False)
    store.close()


def test_every_commit_waits_for_the_disk(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "broker.db")

    def ask(tx: Connection) -> list[Any]:
        pragmas = ("journal_mode", "synchronous", "foreign_keys")
        return [tx.exec_driver_sql(f"PRAGMA {name}").scalar() for name in pragmas]

    assert asyncio.run(store.write(ask)) == ["wal", 2, 1]  # 2: FULL
    store.close()


@pytest.mark.parametrize("damage", ["not a database", "its pages"])
def test_a_damaged_file_is_refused_and_left_as_it_is(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "broker.db"
    if damage == "its pages":
        Store.open(path).close()
        data = bytearray(path.read_bytes())
        data[100:] = b"\xa5" * (len(data) - 100)  # the header is whole
    else:
        data = bytearray(b"once upon a time " * 1000)
    path.write_bytes(data)

    with pytest.raises(sa.exc.DatabaseError):
        Store.open(path)

    assert path.read_bytes() == data
