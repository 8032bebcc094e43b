# SPDX-License-Identifier: Apache-2.0
"""Runs as they are listed: found, page by page, and shown without doing anything to who looks."""

import json

import pytest

from fedml.cli.run import _took
from tests.fedml.cli.conftest import Fedml
from tests.place import Place


@pytest.fixture(scope="module")
def three(place: Place) -> list[str]:
    """Runs called `list a`, `list b` and `list c`, the newest last; the middle one has failed."""
    runs = []
    for name, text in (("list a", "true"), ("list b", "false"), ("list c", "true")):
        runs.append(place.launch(text, name=name))
        place.end(runs[-1])
    return runs


def _listed(fedml: Fedml, *words: str) -> list[str]:
    return [run["id"] for run in json.loads(fedml("run", "list", "--json", *words).stdout)]


def test_runs_are_found_by_name_state_and_user_and_page_by_page(
    fedml: Fedml, three: list[str]
) -> None:
    first, second, third = three
    assert _listed(fedml, "--name", "list") == [third, second, first]
    assert _listed(fedml, "--name", "list", "--state", "failed") == [second]
    both = _listed(fedml, "-n", "list", "--state", "FAILED", "--state", "FINISHED")
    assert both == [third, second, first]
    assert _listed(fedml, "--name", "list", "--user", "nobody") == []
    page = fedml("run", "list", "--name", "list", "--limit", "2")
    assert page.stdout.splitlines()[-1].startswith(second)
    assert page.stderr == f"older ones: --before {second}\n"
    last = fedml("run", "list", "--name", "list", "--limit", "2", "--before", second)
    assert last.stdout.splitlines()[-1].startswith(first)
    assert last.stderr == ""
    assert _listed(fedml, "-r", first) == [first]  # as FedML has it
    assert fedml("run", "list", "--name", "no such").stderr == "no such runs\n"


def test_what_a_run_took_is_without_the_time_that_it_waited() -> None:
    told = {"started_at": 1100.0, "ended_at": 1130.0, "created_at": 1000.0}
    assert _took(told) == "30 s"
    assert _took({**told, "started_at": None}) == "–"  # stopped while it waited


def test_a_run_is_named_by_what_it_is_called_too(fedml: Fedml, three: list[str]) -> None:
    assert fedml("run", "status", "-n", "list b").stdout == "FAILED\n"
    assert "no run is called 'list'" in fedml("run", "status", "-n", "list", code=6).stderr


def test_several_runs_are_stopped_at_once(fedml: Fedml) -> None:
    one, two = (fedml.place.launch("exec sleep 600") for _ in range(2))
    done = fedml("run", "stop", one, "r-0000000000", "-r", two, "--wait", code=6)
    assert f"{one} STOPPED\n{two} STOPPED\n" in done.stderr
    assert "no such run" in done.stderr
    assert "Missing argument 'RUN...'" in fedml("run", "stop", code=2).stderr


def test_a_name_moves_no_cursor_and_renames_no_window(fedml: Fedml) -> None:
    run = fedml.place.launch("true", name="red\x1b[31m\x1b]0;owned\x07\x9b2J\nand more")
    fedml.place.end(run)
    shown = "red^[[31m^[]0;owned^G\N{REPLACEMENT CHARACTER}2J"
    terminal = fedml.on_terminal("run", "list", "--limit", "1")
    assert terminal.end() == 0
    assert "\x1b]0" not in terminal.text
    for words in (("run", "list", "--limit", "1"), ("run", "show", run)):
        text = fedml(*words).stdout
        assert shown in text
        assert not {c for c in text if ord(c) < 32 or 126 < ord(c) < 160} - {"\n"}


def test_a_task_that_runs_is_said_to_run(fedml: Fedml) -> None:
    run = fedml.place.launch("echo up; exec sleep 600")
    fedml.place.until(run, lambda item: "up" in item.get("log", {}).get("text", ""), logs=True)
    assert f"{run}-t: RUNNING on " in fedml("run", "show", run).stdout
    fedml("run", "stop", run, "--wait")
    assert f"{run}-t: STOPPED on " in fedml("run", "show", run).stdout
