# SPDX-License-Identifier: Apache-2.0
"""Logs in real files and events in a real store, and whoever follows them."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedml_broker.log_order import LogFile
from fedml_broker.observe import Observer, add_event, line
from fedml_broker.problems import Problem
from fedml_broker.store import Store
from tests.fakes.messages import LAW
from tests.fakes.standing_time import StandingTime

RUN = "r-1"
OUT = LogFile("t-1", 1, "stdout")
ERR = LogFile("t-1", 1, "stderr")


class State:
    """The run's row, as the test says it is."""

    def __init__(self) -> None:
        self.ended_at: float | None = None

    async def row(self, run: str) -> dict[str, Any]:
        return {"id": run, "ended_at": self.ended_at}


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = await asyncio.to_thread(Store.open, tmp_path / "broker.db")
    yield store
    await asyncio.to_thread(store.close)


@pytest.fixture
def observer(store: Store, tmp_path: Path) -> Observer:
    return Observer(store, tmp_path / "logs")


class Follower:
    """Reads a follow stream item by item."""

    def __init__(self, observer: Observer, state: State, **more: Any) -> None:
        self.why = ""
        self._stream = observer.follow(RUN, state, lambda run: self.why, **more)

    async def next(self) -> dict[str, Any]:
        return await anext(self._stream)

    async def rest(self) -> list[dict[str, Any]]:
        return [item async for item in self._stream]

    def ahead(self) -> "asyncio.Task[dict[str, Any]]":
        """The next item, which is not there yet."""
        return asyncio.create_task(self.next())


def text_of(items: Sequence[dict[str, Any]], stream: str = "stdout") -> str:
    logs = [item["log"] for item in items if "log" in item]
    return "".join(log["text"] for log in logs if log["stream"] == stream)


async def tell(observer: Observer, store: Store, kind: str) -> None:
    """Something happens in the run."""
    await store.write(lambda tx: add_event(tx, RUN, kind, {}))
    observer.ring(RUN)


# ---------------------------------------------------------------------- chunks at offsets


async def test_chunks_are_put_where_they_belong(observer: Observer) -> None:
    assert await observer.append(RUN, OUT, 0, b"one ") == 4
    assert await observer.append(RUN, OUT, 4, b"two") == 7
    assert await observer.append(RUN, ERR, 0, b"oops") == 4
    assert observer.read(RUN, OUT, 0) == (0, b"one two")
    assert observer.read(RUN, OUT, 4, 2) == (4, b"tw")
    assert observer.read(RUN, OUT, 7) == (7, b"")
    assert observer.logs(RUN) == [ERR, OUT]


async def test_a_chunk_that_comes_again_changes_nothing(observer: Observer) -> None:
    await observer.append(RUN, OUT, 0, b"one two")
    assert await observer.append(RUN, OUT, 0, b"one ") == 7
    assert await observer.append(RUN, OUT, 4, b"two three") == 13  # partly known
    assert observer.read(RUN, OUT, 0) == (0, b"one two three")


async def test_a_chunk_after_a_gap_is_refused_by_the_answer(observer: Observer) -> None:
    await observer.append(RUN, OUT, 0, b"one")
    assert await observer.append(RUN, OUT, 100, b"far") == 3
    assert await observer.append(RUN, ERR, 5, b"far") == 0
    assert observer.read(RUN, OUT, 0) == (0, b"one")


async def test_a_gap_that_the_agent_admits_becomes_a_hole(observer: Observer) -> None:
    await observer.append(RUN, OUT, 0, b"begin\n")
    far = 6 + 10_000_000
    assert await observer.append(RUN, OUT, far, b"end\n", gap=10_000_000) == far + 4
    assert await observer.append(RUN, OUT, far, b"end\n", gap=10_000_000) == far + 4
    begin, data = observer.read(RUN, OUT, 1 << 20)
    assert begin > 1 << 20
    assert data.replace(b"\0", b"") == b"end\n"

    items = await Follower(observer, State(), stay=False).rest()
    assert text_of(items).startswith("begin\n")
    assert text_of(items).endswith("bytes were not kept]\nend\n")
    assert "\0" not in text_of(items)
    assert observer.read(RUN, OUT, 1 << 40) == (1 << 40, b"")


async def test_a_gap_that_does_not_begin_where_the_log_ends_is_refused(
    observer: Observer,
) -> None:
    await observer.append(RUN, OUT, 0, b"begin\n")
    assert await observer.append(RUN, OUT, 100, b"end", gap=50) == 6
    assert observer.read(RUN, OUT, 0) == (0, b"begin\n")


CONTENT = bytes(range(1, 201))
CHUNKS = st.lists(
    st.tuples(st.integers(0, 200), st.integers(0, 80)).map(
        lambda two: (two[0], CONTENT[two[0] : two[0] + two[1]])
    ),
    max_size=15,
)


@LAW
@given(chunks=CHUNKS)
def test_whatever_chunks_come_the_log_is_the_beginning_of_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, chunks: list[tuple[int, bytes]]
) -> None:
    observer = Observer(None, tmp_path_factory.mktemp("logs"))  # type: ignore[arg-type]

    async def send() -> None:
        size = 0
        for offset, data in chunks:
            told = await observer.append(RUN, OUT, offset, data)
            expected = max(size, offset + len(data)) if offset <= size else size
            assert told == expected
            size = told
        assert observer.read(RUN, OUT, 0) == (0, CONTENT[:size])
        # The agent goes on where the answer says, and all of it arrives.
        assert await observer.append(RUN, OUT, size, CONTENT[size:]) == len(CONTENT)

    asyncio.run(send())


@pytest.mark.parametrize(
    ("run", "log"),
    [
        ("../r", OUT),
        ("", OUT),
        (RUN, LogFile("../../etc/passwd", 1, "stdout")),
        (RUN, LogFile("t-1", 0, "stdout")),
        (RUN, LogFile("t-1", 1, "stdin")),
        (RUN, LogFile("t-1", 1, "../stdout")),
    ],
)
async def test_no_name_leads_out_of_the_logs(
    observer: Observer, tmp_path: Path, run: str, log: LogFile
) -> None:
    with pytest.raises(Problem) as told:
        await observer.append(run, log, 0, b"x")
    assert told.value.status == 422
    assert not list(tmp_path.glob("logs/**/*"))


# ---------------------------------------------------------------------- following


async def test_who_follows_is_woken_by_the_write(observer: Observer, store: Store) -> None:
    StandingTime()  # no timer does it
    state = State()
    follower = Follower(observer, state)
    coming = follower.ahead()
    await observer.append(RUN, OUT, 0, b"hello\n")
    assert (await coming)["log"]["text"] == "hello\n"

    coming = follower.ahead()
    await tell(observer, store, "started")
    assert (await coming)["event"]["kind"] == "started"

    coming = follower.ahead()
    follower.why = "one: busy"
    observer.ring(RUN)
    assert await coming == {"waiting": "one: busy"}
    coming = follower.ahead()
    follower.why = ""
    observer.ring(RUN)
    assert await coming == {"waiting": ""}

    coming = follower.ahead()
    state.ended_at = time.time()
    await tell(observer, store, "state")  # a run ends with one
    assert (await coming)["event"]["kind"] == "state"
    assert await follower.rest() == [{"end": {"id": RUN, "ended_at": state.ended_at}}]


async def test_another_runs_write_wakes_nobody(observer: Observer) -> None:
    follower = Follower(observer, State())
    coming = follower.ahead()
    await observer.append("r-2", OUT, 0, b"not yours\n")
    await observer.append(RUN, OUT, 0, b"yours\n")
    assert (await coming)["log"]["text"] == "yours\n"


async def test_everything_before_is_told_to_who_comes_late(
    observer: Observer, store: Store
) -> None:
    for kind in ("a", "b", "c"):
        await tell(observer, store, kind)
    await observer.append(RUN, OUT, 0, b"1\n2\n")
    state = State()
    state.ended_at = time.time()
    items = await Follower(observer, state).rest()
    assert [i["event"]["kind"] for i in items if "event" in i] == ["a", "b", "c"]
    assert text_of(items) == "1\n2\n"
    assert "end" in items[-1]
    second = [i["event"]["id"] for i in items if "event" in i][1]
    later = await Follower(observer, state, after=second, logs=False).rest()
    assert [i["event"]["kind"] for i in later if "event" in i] == ["c"]
    assert text_of(later) == ""


async def test_the_end_comes_after_the_last_log_line(observer: Observer, store: Store) -> None:
    state = State()
    follower = Follower(observer, state)
    await observer.append(RUN, OUT, 0, b"first\n")
    assert text_of([await follower.next()]) == "first\n"
    observer.finish(RUN, OUT, 11)  # the result came before its logs
    observer.finish(RUN, ERR, 0)
    state.ended_at = time.time()
    await tell(observer, store, "state")
    assert (await follower.next())["event"]["kind"] == "state"
    coming = follower.ahead()
    await observer.append(RUN, OUT, 6, b"last\n")
    assert text_of([await coming]) == "last\n"
    assert "end" in await follower.next()


async def test_the_logs_of_a_machine_that_is_lost_are_not_waited_for_long(
    observer: Observer,
) -> None:
    standing = StandingTime()
    observer.finish(RUN, OUT, 100)
    row = {"id": RUN, "ended_at": time.time()}

    class Row(State):
        async def row(self, run: str) -> dict[str, Any]:
            return row

    coming = Follower(observer, Row()).ahead()
    await asyncio.to_thread(lambda: None)
    await standing.pass_by(2)
    assert not coming.done()
    row["ended_at"] = time.time() - 11  # the wall clock goes on with the loop's
    await standing.pass_by(30)
    assert "end" in await coming


async def test_a_character_that_is_cut_by_a_chunk_is_whole_for_the_reader(
    observer: Observer,
) -> None:
    data = "Zürich → ☃\n".encode()
    state = State()
    follower = Follower(observer, state)
    texts = []
    for n in range(len(data)):
        await observer.append(RUN, OUT, n, data[n : n + 1])
        texts.append((await follower.next())["log"]["text"])
    assert "".join(texts) == data.decode()
    assert "\ufffd" not in "".join(texts)


async def test_long_logs_come_in_pieces_that_say_where_they_are(observer: Observer) -> None:
    data = b"0123456789abcde\n" * 60_000
    await observer.append(RUN, OUT, 0, data)
    items = [i["log"] for i in await Follower(observer, State(), stay=False).rest() if "log" in i]
    assert len(items) > 1
    assert [i["offset"] for i in items] == [0, *(i["end"] for i in items[:-1])]
    assert "".join(i["text"] for i in items) == data.decode()


async def test_each_attempt_has_logs_of_its_own(observer: Observer) -> None:
    await observer.append(RUN, OUT, 0, b"first try\n")
    await observer.append(RUN, OUT._replace(epoch=2), 0, b"second try\n")
    items = [i["log"] for i in await Follower(observer, State(), stay=False).rest() if "log" in i]
    assert [(i["epoch"], i["text"]) for i in items] == [(1, "first try\n"), (2, "second try\n")]


async def test_numbers_go_beside_the_reason_for_waiting(observer: Observer) -> None:
    state = State()
    stream = observer.follow(
        RUN, state, lambda run: "round 3", progress=lambda run: {"replies": 2}, stay=False
    )
    assert (await anext(stream)) == {"waiting": "round 3", "round": {"replies": 2}}


async def test_a_run_that_is_removed_takes_its_logs_along(
    observer: Observer, tmp_path: Path
) -> None:
    await observer.append(RUN, OUT, 0, b"x")
    await observer.append("r-2", OUT, 0, b"y")
    bell = observer.bell(RUN)
    observer.forget(RUN)
    assert bell.is_set()
    assert observer.logs(RUN) == []
    assert observer.read("r-2", OUT, 0) == (0, b"y")
    observer.forget("r-unknown")


def test_followers_are_counted(observer: Observer) -> None:
    assert not observer.watched(RUN)
    assert [observer.watch(RUN, by) for by in (1, 1, -1)] == [1, 2, 1]
    assert observer.watched(RUN)
    assert observer.watch(RUN, -1) == 0
    assert not observer.watched(RUN)


def test_an_item_is_one_line() -> None:
    assert line({"log": {"text": "a\nb"}}) == b'{"log":{"text":"a\\nb"}}\n'
