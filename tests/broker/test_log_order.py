# SPDX-License-Identifier: Apache-2.0
"""Lines of both streams of a task come back in the order in which it wrote them."""

import asyncio
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedml_broker.log_order import ORDER, Chunk, LogFile, Ordered, Text
from fedml_broker.observe import Observer
from tests.broker.test_observe import State
from tests.fakes.messages import LAW

RUN = "r-1"
LOGS = {stream: LogFile("t-1", 1, stream) for stream in ("stdout", "stderr", ORDER)}


class Task:
    """Writes as a shim does; `send` brings a stream to the broker, `order` last or not."""

    def __init__(self, root: Path) -> None:
        self.observer = Observer(None, root)  # type: ignore[arg-type]
        self.streams = {"stdout": b"", "stderr": b"", ORDER: b""}

    def write(self, stream: str, text: bytes, at: float = 1.0) -> None:
        self.streams[stream] += text
        when = int(at * 1000) << 1 | (stream == "stderr")
        self.streams[ORDER] += struct.pack("<QQ", when, len(self.streams[stream]))

    async def send(self, stream: str) -> None:
        size = self.observer.size(RUN, LOGS[stream]) or 0
        data = self.streams[stream][size:]
        await self.observer.append(RUN, LOGS[stream], size, data, ordered=True)

    def reader(self) -> Ordered:
        return Ordered(self.observer, RUN, "t-1", 1)


def said(chunks: list[Chunk]) -> str:
    return "".join(f"{c.log.stream[3]}{c.data.decode()}" for c in chunks)


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return Task(tmp_path)


async def test_lines_come_as_they_were_written_and_when(task: Task) -> None:
    task.write("stdout", b"1\n", at=10.0)
    task.write("stderr", b"2\n", at=10.5)
    task.write("stdout", b"3\n", at=1790000000.123)
    for stream in ("stdout", "stderr", ORDER):
        await task.send(stream)
    chunks = list(task.reader().chunks())
    assert [(c.log.stream, c.data, c.at) for c in chunks] == [
        ("stdout", b"1\n", 10.0),
        ("stderr", b"2\n", 10.5),
        ("stdout", b"3\n", 1790000000.123),
    ]


async def test_a_line_waits_for_the_one_before_it_that_is_on_its_way(task: Task) -> None:
    task.write("stderr", b"first\n")
    task.write("stdout", b"second\n")
    reader = task.reader()
    await task.send("stdout")
    assert list(reader.chunks()) == []
    await task.send(ORDER)
    assert list(reader.chunks()) == []
    await task.send("stderr")
    assert said(list(reader.chunks())) == "efirst\nosecond\n"


async def test_who_does_not_wait_gets_all_that_is_there(task: Task) -> None:
    task.write("stderr", b"lost\n")
    task.write("stdout", b"here\n")
    await task.send("stdout")
    await task.send(ORDER)
    task.write("stdout", b"not noted\n")
    await task.send("stdout")
    assert said(list(task.reader().chunks(all_of_it=True))) == "ohere\nonot noted\n"


async def test_a_task_of_an_older_agent_has_no_order(task: Task) -> None:
    await task.observer.append(RUN, LOGS["stdout"], 0, b"out\n")
    await task.observer.append(RUN, LOGS["stderr"], 0, b"err\n")
    assert said(list(task.reader().chunks())) == "eerr\noout\n"


async def test_what_was_not_kept_keeps_nothing_waiting(task: Task) -> None:
    task.write("stdout", b"x" * 10_000)
    task.write("stderr", b"e\n")
    task.write("stdout", b"last\n")
    log = LOGS["stdout"]
    await task.observer.append(RUN, log, 10_000, b"last\n", gap=10_000, ordered=True)
    await task.send("stderr")
    await task.send(ORDER)
    chunks = list(task.reader().chunks())
    text = Text()
    texts = [text.of(c) if c.log == log else c.data.decode() for c in chunks]
    assert "".join(texts).replace("\n", " ").endswith("last ")
    assert "e\n" in texts
    assert "bytes were not kept" in "".join(texts)


PIECES = st.lists(
    st.tuples(st.sampled_from(["stdout", "stderr"]), st.binary(min_size=1, max_size=4)),
    min_size=1,
    max_size=12,
)


@LAW
@given(pieces=PIECES, sends=st.lists(st.sampled_from([*LOGS, "read"]), max_size=30))
def test_whatever_arrives_when_the_order_is_that_of_writing(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[tuple[str, bytes]], sends: list[str]
) -> None:
    task = Task(tmp_path_factory.mktemp("logs"))

    async def run() -> None:
        reader, got, left = task.reader(), list[Chunk](), list(pieces)
        await task.send("stdout")  # as an agent does: something of it comes first
        for step in [*sends, "stdout", "stderr", ORDER, "read"]:
            if left:
                task.write(*left.pop(0))
            if step == "read":
                got += reader.chunks()
            else:
                await task.send(step)
        for piece in left:
            task.write(*piece)
        for stream in LOGS:
            await task.send(stream)
        got += reader.chunks()
        assert _bytes(got) == [(s, b) for s, data in pieces for b in data]

    asyncio.run(run())


def _bytes(chunks: list[Chunk]) -> list[tuple[str, int]]:
    return [(c.log.stream, byte) for c in chunks for byte in c.data]


async def test_the_end_of_a_run_waits_for_the_order_of_its_last_lines(task: Task) -> None:
    state = State()
    state.ended_at = time.time()

    class Events(Observer):
        async def events(self, run: str, after: int = 0) -> list[dict[str, Any]]:
            return []

    observer = Events(None, task.observer._root)  # type: ignore[arg-type]
    task.observer = observer
    task.write("stderr", b"1\n")
    task.write("stdout", b"2\n")
    observer.finish(RUN, LOGS["stdout"], 2)
    observer.finish(RUN, LOGS["stderr"], 2)
    await task.send("stdout")
    await task.send("stderr")
    stream = observer.follow(RUN, state, lambda run: "")
    coming = asyncio.create_task(anext(stream))
    await asyncio.to_thread(lambda: None)
    await task.send(ORDER)
    items = [await coming, *[item async for item in stream]]
    assert [i["log"]["text"] for i in items if "log" in i] == ["1\n", "2\n"]


async def test_who_knows_the_beginning_is_told_the_rest(task: Task) -> None:
    task.write("stdout", b"known\n")
    task.write("stdout", b"new\n")
    for stream in LOGS:
        await task.send(stream)
    reader = task.reader()
    reader.skip("stdout", 6)
    assert said(list(reader.chunks())) == "onew\n"
