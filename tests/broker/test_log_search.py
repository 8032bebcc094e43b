# SPDX-License-Identifier: Apache-2.0
"""Lines that are looked for are found, and nobody can keep the broker busy with it."""

import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from fedml_broker.log_order import ORDER, LogFile
from fedml_broker.log_search import Query, search
from fedml_broker.problems import Problem
from tests.broker.test_log_order import RUN, Task

LINES = (
    ("stdout", b"epoch 1 loss=0.5\n", 10.0),
    ("stderr", b"Warning: slow (a+)\n", 20.0),
    ("stdout", b"epoch 2 loss=0.25\n", 30.0),
    ("stdout", "Zürich ☃\n".encode(), 40.0),
    ("stdout", b"no end of line", 50.0),
)


@pytest.fixture
async def task(tmp_path: Path) -> Task:
    task = Task(tmp_path)
    for stream, text, at in LINES:
        task.write(stream, text, at)
    for stream in ("stdout", "stderr", ORDER):
        await task.send(stream)
    return task


def look(task: Task, *, ended: bool = True, **query: Any) -> dict[str, Any]:
    return search(task.observer, RUN, [("t-1", 1)], Query(**query), ended=ended)


def texts(found: dict[str, Any]) -> Sequence[str]:
    return [line["text"] for line in found["lines"]]


def test_all_lines_of_both_streams_in_order(task: Task) -> None:
    found = look(task)
    assert texts(found) == [text.decode().rstrip("\n") for _, text, _ in LINES]
    assert [line["number"] for line in found["lines"]] == [1, 1, 2, 3, 4]
    assert (found["total"], found["complete"]) == (5, True)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({"text": "loss="}, ["epoch 1 loss=0.5", "epoch 2 loss=0.25"]),
        ({"text": "(a+)"}, ["Warning: slow (a+)"]),  # text, not a pattern
        ({"text": "warning", "ignore_case": True}, ["Warning: slow (a+)"]),
        ({"text": "ÜRICH", "ignore_case": True}, ["Zürich ☃"]),
        ({"text": r"epoch [2-9]", "regex": True}, ["epoch 2 loss=0.25"]),
        ({"text": "^E", "regex": True, "ignore_case": True}, None),
        ({"text": "Z.rich", "regex": True}, ["Zürich ☃"]),
        ({"tail": 2}, ["Zürich ☃", "no end of line"]),
        ({"since": 30.0, "tail": 9}, ["epoch 2 loss=0.25", "Zürich ☃"]),
        ({"skip": 1, "limit": 2}, ["Warning: slow (a+)", "epoch 2 loss=0.25"]),
        ({"streams": ("stderr",)}, ["Warning: slow (a+)"]),
        ({"text": "nowhere"}, []),
    ],
)
def test_what_is_asked_for_is_found(
    task: Task, query: dict[str, Any], expected: list[str] | None
) -> None:
    found = texts(look(task, **query))
    if expected is None:
        assert found == ["epoch 1 loss=0.5", "epoch 2 loss=0.25"]
    elif query.get("since"):
        assert found[:2] == expected  # when the last one came is not noted: it has no end
    else:
        assert found == expected


def test_context_stands_around_each_match_and_no_line_twice(task: Task) -> None:
    found = look(task, text="epoch", context=1)
    assert [(line["text"][:7], line["match"]) for line in found["lines"]] == [
        ("epoch 1", True),
        ("Warning", False),
        ("epoch 2", True),
        ("Zürich ", False),
    ]
    assert found["total"] == 2


def test_a_line_that_is_being_written_is_left_for_who_follows(task: Task) -> None:
    found = look(task, ended=False)
    assert texts(found)[-1] == "Zürich ☃"
    end = sum(len(text) for stream, text, _ in LINES[:-1] if stream == "stdout")
    assert found["ends"] == {"t-1.1.stdout": end, "t-1.1.stderr": len(LINES[1][1])}


def test_a_pattern_that_would_take_for_ever_elsewhere_takes_no_time(task: Task) -> None:
    task.observer.forget(RUN)
    evil = b"a" * 50_000 + b"!\n"
    path = task.observer._path(RUN, LogFile("t-1", 1, "stdout"))
    path.parent.mkdir()
    path.write_bytes(evil)
    began = time.process_time()
    assert look(task, text=r"^(a+)+$", regex=True)["lines"] == []
    assert time.process_time() - began < 2.0


@pytest.mark.parametrize("pattern", ["(", "[z-a]", r"(a)\1", "(?=a)", "a{1000000}", "x" * 2000])
def test_what_is_no_pattern_is_refused_with_the_reason(task: Task, pattern: str) -> None:
    with pytest.raises(Problem) as told:
        look(task, text=pattern, regex=True)
    assert told.value.status == 422


async def test_a_search_ends_in_time_and_says_so(task: Task) -> None:
    ticks = count(step=10)
    found = search(
        task.observer, RUN, [("t-1", 1)], Query(), ended=True, clock=lambda: float(next(ticks))
    )
    assert not found["complete"]
    assert texts(found) == ["epoch 1 loss=0.5"]


async def test_an_answer_has_a_size_that_it_does_not_exceed(tmp_path: Path) -> None:
    task = Task(tmp_path)
    task.write("stdout", (b"x" * 99_999 + b"\n") * 500 + b"the last\n")
    for stream in ("stdout", ORDER):
        await task.send(stream)
    found = look(task)
    assert not found["complete"]
    assert sum(map(len, texts(found))) <= 4 << 20
    assert texts(found)[0].endswith("[and 83615 bytes]")
    assert texts(look(task, tail=3))[-1] == "the last"
    assert look(task, limit=1)["total"] == 501


@pytest.mark.parametrize("count", [1, 2, 3, 700, 5000])
@pytest.mark.parametrize("end", [b"", b"half"])
async def test_the_last_lines_are_found_from_the_end(
    tmp_path: Path, count: int, end: bytes
) -> None:
    task = Task(tmp_path)
    lines = [b"%d %s\n" % (n, b"x" * (n % 200)) for n in range(1000)]
    task.write("stdout", b"".join(lines) + end)
    for stream in ("stdout", ORDER):
        await task.send(stream)
    expected = [line.decode().rstrip("\n") for line in [*lines, *([end] if end else [])]]
    assert texts(look(task, tail=count)) == expected[-count:]
    # Not more of it is read than it takes.
    reads: list[int] = []
    read = task.observer.read

    def counted(run: str, log: LogFile, offset: int, limit: int = 0) -> tuple[int, bytes]:
        begin, data = read(run, log, offset, limit)
        reads.append(len(data) if log.stream == "stdout" else 0)
        return begin, data

    task.observer.read = counted  # type: ignore[method-assign]
    look(task, tail=1)
    assert sum(reads) < 2 * 65536 + 1024
