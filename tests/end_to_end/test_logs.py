# SPDX-License-Identifier: Apache-2.0
"""What tasks print, from the machine to the terminal: in order, without secrets, found again."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedml import api
from tests.place import Place, command

PASSWORD = "correct-horse-battery"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with Place(tmp_path_factory.mktemp("place")) as place:
        place.agent("one", policy='logs.hide = ["SITE_*"]\n')
        yield place


def fedml(place: Place, *words: str, code: int = 0) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(
        command("fedml", *words),
        env={**os.environ, "FEDML_HOME": str(place.folder / "me"), "FROM_TERMINAL": PASSWORD},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def ordered(place: Place) -> str:
    """A run that writes on both streams in turns, with a moment between them."""
    text = "for n in 1 2 3; do echo out $n; sleep 0.05; echo err $n >&2; sleep 0.05; done"
    run = place.launch(text)
    place.end(run)
    return run


def test_both_streams_come_in_the_order_in_which_they_were_written(
    place: Place, ordered: str
) -> None:
    expected = [f"{stream} {n}" for n in (1, 2, 3) for stream in ("out", "err")]
    shown = [i["log"]["text"] for i in place.client.follow(ordered) if "log" in i]
    assert "".join(shown).splitlines() == expected
    found = place.client.logs(ordered)
    assert [line["text"] for line in found["lines"]] == expected
    times = [line["at"] for line in found["lines"]]
    assert times == sorted(times)
    assert times[-1] - times[0] > 0.2


def test_lines_are_found_on_the_command_line(place: Place, ordered: str) -> None:
    assert fedml(place, "run", "logs", ordered, "--search", "OUT 2", "-i").stdout == "out 2\n"
    found = fedml(place, "run", "logs", ordered, "--search", "[23]$", "--regex")
    assert (found.stdout, found.stderr) == ("out 2\nout 3\n", "err 2\nerr 3\n")
    near = fedml(place, "run", "logs", ordered, "--search", "out 2", "-C", "1")
    assert near.stderr == "err 1\nerr 2\n"
    assert fedml(place, "logs", "--tail", "2").stdout == "out 3\n"
    assert fedml(place, "run", "logs", ordered, "--since", "2020-01-01").stdout.count("out") == 3
    (line,) = fedml(place, "run", "logs", ordered, "--search", "out 1", "--json").stdout.split(
        "\n"
    )[:1]
    assert json.loads(line)["line"]["number"] == 1
    stamped = fedml(place, "run", "logs", ordered, "--timestamps").stdout.splitlines()
    assert [len(line) for line in stamped] == [len("12:00:00.000 out 1")] * 3
    wrong = fedml(place, "run", "logs", ordered, "--search", "(", "--regex", code=6)
    assert "not a pattern" in wrong.stderr
    assert "no rank 7" in fedml(place, "run", "logs", ordered, "--rank", "7", code=2).stderr


def test_the_last_lines_and_what_follows_come_once(place: Place, ordered: str) -> None:
    done = fedml(place, "run", "logs", "-f", "--tail", "1", ordered)
    assert (done.stdout, done.stderr.splitlines()[0]) == ("", "err 3")
    assert "out" not in done.stderr.partition("FINISHED")[0]


def test_pages_of_lines_are_those_of_fedml(place: Place, ordered: str) -> None:
    home = place.folder / "me"
    page = api.run_logs(ordered, 2, 4, home=home)
    assert (page.run_status, page.total_log_lines, page.total_log_pages) == ("FINISHED", 6, 2)
    assert page.log_line_list == ["out 3", "err 3"]
    assert len(api.run_logs(ordered, need_all_logs=True, home=home).log_line_list) == 6


def test_secrets_reach_neither_the_terminal_nor_any_disk(place: Place, tmp_path: Path) -> None:
    (tmp_path / "print.py").write_text(
        "import os, sys, time\n"
        "for part in (os.environ['FROM_TERMINAL'][:7], os.environ['FROM_TERMINAL'][7:] + '\\n'):\n"
        "    sys.stdout.write(part); sys.stdout.flush(); time.sleep(0.1)\n"
        "raise ValueError(os.environ['WANDB_API_KEY'] + os.environ['SITE_LOGIN'])\n"
    )
    (tmp_path / "job.yaml").write_text(
        "workspace: .\n"
        "job: |\n"
        "  echo user:$PIN | base64\n"
        "  python3 print.py\n"
        "environment_variables: {WANDB_API_KEY: 0123456789abcdef, SITE_LOGIN: ana-at-north}\n"
        "secrets:\n  PIN: 'p-1234567890-n'\n  FROM_TERMINAL:\n"
    )
    done = fedml(place, "launch", str(tmp_path / "job.yaml"), code=1)
    assert "***FROM_TERMINAL***\n" in done.stdout
    assert "***PIN***" in done.stdout
    assert "ValueError: ***WANDB_API_KEY******SITE_LOGIN***" in done.stderr
    run = json.loads(fedml(place, "run", "list", "--json").stdout)[0]["id"]
    shown = fedml(place, "run", "show", run, "--json").stdout
    assert "***PIN***" in shown
    logs = [*place.home.glob("broker/logs/**/*.log"), *place.folder.glob("one/agent/logs/**/*.0")]
    written = b"".join(path.read_bytes() for path in logs).decode(errors="replace")
    assert "***PIN***" in written
    for value in (PASSWORD, "p-1234567890-n", "0123456789abcdef"):
        assert value not in written + done.stdout + done.stderr + shown
    # That it is one, only the machine's owner says: the broker was given it, and no log shows it.
    assert "ana-at-north" not in written + done.stdout + done.stderr


def test_a_command_that_floods_the_log_ends_well_and_its_end_is_kept(place: Place) -> None:
    run = place.launch(
        "head -c 30000000 /dev/zero | tr '\\0' 'x' | fold -w 99; echo; echo the end; echo done >&2"
    )
    assert place.end(run)["state"] == "FINISHED"
    task = place.tasks(run)[0].id
    list(place.client.follow(run))  # until all of its log has arrived
    found = place.client.logs(run, tail=1, stream="stdout", task=task)
    assert [line["text"] for line in found["lines"]] == ["the end"]
    assert fedml(place, "run", "logs", run, "--search", "done").stderr == "done\n"
    # Others are served meanwhile and afterwards.
    assert place.end(place.launch("echo next"))["state"] == "FINISHED"
