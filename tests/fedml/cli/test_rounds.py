# SPDX-License-Identifier: Apache-2.0
"""The view of a federated run, fed with what a broker tells."""

import io
import re
from typing import Any

import pytest

from fedml.cli.following import exit_code, users_part
from fedml.cli.rounds import RoundsView


def _event(kind: str, at: float = 0.0, **data: Any) -> dict[str, Any]:
    return {"event": {"id": 1, "at": at, "kind": kind, "data": data}}


def _ends(number: int, at: float, **metrics: float) -> dict[str, Any]:
    more = {"replies": 2, "refused": 0, "model": "", "received_bytes": 2048}
    return _event("round_ends", at, round=number, metrics=metrics, **more)


def _begins(number: int, at: float) -> dict[str, Any]:
    return _event("round_begins", at, round=number, clients=2)


def _waiting(number: int, missing: str) -> dict[str, Any]:
    numbers = {"number": number, "asked": 3, "answered": 1, "received_bytes": 0}
    text = f"round {number}: 1 of 3 have answered; waiting for {missing}"
    return {"waiting": text, "round": numbers}


def test_a_row_is_printed_once_the_devices_have_evaluated_its_model(
    capsys: pytest.CaptureFixture[str],
) -> None:
    view = RoundsView(2)
    for item in (_begins(1, 10.0), _ends(1, 12.5, **{"train.loss": 0.5})):
        view.show(item)
    assert capsys.readouterr().out == ""
    metrics = _event("metrics", round=1, metrics={"devices.accuracy": 0.75})
    for item in (_begins(2, 13.0), metrics, _ends(2, 14.0, **{"train.loss": 0.25})):
        view.show(item)
    head, row = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["round", "devices.accuracy", "train.loss"]
    assert row.split() == ["1", "0.7500", "0.5000", "2.5", "2", "of", "2", "0", "2.0", "kB"]
    view.close()
    assert capsys.readouterr().out.split()[:4] == ["2", "–", "0.2500", "1.0"]


def test_a_metric_that_comes_later_gets_a_column_under_a_new_head(
    capsys: pytest.CaptureFixture[str],
) -> None:
    view = RoundsView(3)
    for number, metrics in ((1, {"a": 1.0}), (2, {"a": 1.0}), (3, {"a": 1.0, "b": 12345.0})):
        view.show(_begins(number, number))
        view.show(_ends(number, number + 0.5, **metrics))
    view.close()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:3] for line in lines] == [
        ["round", "a", "seconds"],
        ["1", "1.0000", "0.5"],
        ["round", "a", "b"],
        ["2", "1.0000", "–"],
        ["3", "1.0000", "1.23e+04"],
    ]


class Terminal(io.StringIO):
    """What a bar takes for a terminal."""

    def isatty(self) -> bool:
        return True


def test_the_bar_of_a_new_round_forgets_what_the_one_before_received(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    view = RoundsView(2)
    waiting = _waiting(1, "two")
    waiting["round"]["received_bytes"] = 2048
    for item in (_begins(1, 1.0), waiting, _begins(2, 2.0)):
        view.show(item)
    view.close()
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert "round 2 of 2" in drawn
    assert "0 of 2 clients 2.0 kB" not in drawn


def test_who_is_away_is_said_once_for_each_round(capsys: pytest.CaptureFixture[str]) -> None:
    view = RoundsView(2)
    for item in (
        _waiting(1, "one, two"),
        _waiting(1, "one, two (offline)"),
        _waiting(1, "two (offline)"),
        _waiting(2, "two (offline), three (draining)"),
    ):
        view.show(item)
    assert capsys.readouterr().err.splitlines() == [
        "round 1 waits for two (offline)",
        "round 2 waits for two (offline), three (draining)",
    ]


def test_the_same_failure_of_many_clients_shows_one_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    view = RoundsView(2)
    for name in ("one", "two"):
        traceback = f'Traceback:\n  File "/h/{name}/work/package/task.py", line 3, in train\nE: x\n'
        cause = {"message": "E: x", "traceback": traceback, "hint": ""}
        view.show(_event("client_failed", round=1, client=0, name=name, cause=cause))
    said = capsys.readouterr().err
    assert "round 1: one failed: E: x" in said
    assert "round 1: two failed: E: x" in said
    assert said.count("Traceback") == 1
    assert view.has_told({"message": "round 1 needs 2 updates and can get 0: E: x"})


def test_a_traceback_begins_where_it_enters_the_users_files() -> None:
    text = (
        "Traceback (most recent call last):\n"
        '  File "/opt/fedml/federate/worker.py", line 1, in _stage\n    x()\n'
        '  File "/h/agent/sessions/r-1/work/package/src/task.py", line 2, in train\n    y()\n'
        '  File "/usr/lib/numpy/core.py", line 3, in dot\n    z()\n'
        "ValueError: shapes\n"
    )
    assert users_part(text) == (
        "Traceback (most recent call last):\n"
        '  File "src/task.py", line 2, in train\n    y()\n'
        '  File "/usr/lib/numpy/core.py", line 3, in dot\n    z()\n'
        "ValueError: shapes\n"
    )
    ours = text.replace("/work/package/", "/elsewhere/")
    assert users_part(ours) == ours


@pytest.mark.parametrize(
    ("state", "own", "code"),
    [
        ("FINISHED", 0, 0),
        ("FAILED", 3, 3),
        ("FAILED", None, 7),
        ("STOPPED", 143, 7),
        ("LOST", None, 7),
    ],
)
def test_exit_codes_follow_the_run(state: str, own: int | None, code: int) -> None:
    assert exit_code({"state": state, "exit_code": own}) == code
