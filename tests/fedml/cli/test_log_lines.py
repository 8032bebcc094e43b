# SPDX-License-Identifier: Apache-2.0
"""Lines of several tasks on one terminal."""

import time
from typing import Any

import pytest

from fedml.cli.log_lines import LinesView, OneTask, moment, rank_of

TASKS = [{"id": "r-1-t0", "device": "d-a"}, {"id": "r-1-t1", "device": None}]


def wrote(rank: int, text: str, stream: str = "stdout", at: float | None = None) -> dict[str, Any]:
    return {"log": {"task": f"r-1-t{rank}", "stream": stream, "text": text, "at": at}}


@pytest.fixture
def view() -> LinesView:
    return LinesView(TASKS, {"d-a": "north"})


def test_lines_of_two_tasks_never_mix(view: LinesView, capsys: pytest.CaptureFixture[str]) -> None:
    for piece in (wrote(0, "epo"), wrote(1, "hel"), wrote(0, "ch 1\nepoch"), wrote(1, "lo\n")):
        view.show(piece)
    assert capsys.readouterr().out == "[0 north] epoch 1\n[1] hello\n"
    view.show(wrote(0, " 2"))
    view.close()
    assert capsys.readouterr().out == "[0 north] epoch 2\n"


def test_stderr_goes_there_and_can_be_told(
    view: LinesView, capsys: pytest.CaptureFixture[str]
) -> None:
    view.show(wrote(1, "half a li"))
    view.show(wrote(1, "oops\n", "stderr"))
    assert capsys.readouterr() == ("", "[1 stderr] oops\n")


def test_a_machine_is_named_once_it_has_started(
    view: LinesView, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"task": "r-1-t1", "name": "south", "epoch": 1}
    view.show({"event": {"kind": "started", "data": data}})
    view.show(wrote(1, "x\n"))
    told = capsys.readouterr()
    assert told.out == "[1 south] x\n"
    assert "runs on south" in told.err


def test_of_a_progress_bar_the_last_state_is_shown(
    view: LinesView, capsys: pytest.CaptureFixture[str]
) -> None:
    view.show(wrote(0, "\r 10%\r 50%\r100%\n"))
    assert capsys.readouterr().out == "[0 north] 100%\n"


def test_one_rank_is_shown_alone_with_what_is_of_all(
    view: LinesView, capsys: pytest.CaptureFixture[str]
) -> None:
    one = OneTask(view, "r-1-t1")
    one.show(wrote(0, "not asked for\n"))
    one.show(wrote(1, "asked for\n"))
    one.show({"waiting": "something"})
    told = capsys.readouterr()
    assert told.out == "[1] asked for\n"
    assert "waiting: something" in told.err


def test_lines_without_prefix_and_with_times(capsys: pytest.CaptureFixture[str]) -> None:
    view = LinesView(TASKS, {}, prefix=False, timestamps=True)
    at = time.mktime((2026, 5, 1, 12, 0, 1, 0, 0, -1)) + 0.25
    view.show(wrote(0, "a\n", at=at))
    view.show(wrote(0, "b\n"))
    assert capsys.readouterr().out == "12:00:01.250 a\n--:--:--.--- b\n"
    assert len(moment(at)) == len(moment(None))


@pytest.mark.parametrize(("task", "rank"), [("r-1-t", 0), ("r-1-t0", 0), ("r-t1-t12", 12)])
def test_a_rank_is_read_off_the_task(task: str, rank: int) -> None:
    assert rank_of(task) == rank
