# SPDX-License-Identifier: Apache-2.0
"""Completion as bash does it: the printed script, then a word and TAB."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fedml.cli.conftest import Fedml
from tests.place import command


def _complete(line: str) -> list[str]:
    words = line.split(" ")
    script = (
        'eval "$SCRIPT"\n'
        f"COMP_WORDS=({line})\nCOMP_CWORD={len(words) - 1}\n"
        f"_{words[0].replace('-', '_')}_completion {words[0]}\n"
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    printed = subprocess.run(
        command("fedml", "completion", "bash"), check=True, capture_output=True, text=True
    ).stdout
    done = subprocess.run(
        ["bash", "-c", script],
        check=True,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "SCRIPT": printed,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        },
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("fedml la", ["launch"]),
        ("fedml run st", ["status", "stop"]),
        ("fedml launch --det", ["--detach"]),
        ("fedml launch init --he", ["--help"]),
        ("fedml completion z", ["zsh"]),
        ("fedml di", ["diagnosis"]),
        ("fedml device res", ["resources"]),
        ("fedml login --oi", ["--oidc"]),
        ("fedml-agent log", ["login", "logout"]),
        ("fedml-broker keys cr", ["create"]),
    ],
)
def test_bash_completes_all_three_commands(line: str, found: list[str]) -> None:
    assert _complete(line) == found


def test_after_launch_come_files_and_verbs() -> None:
    """Asked as the script asks; bash takes files only from within a real completion."""
    asked = {"_FEDML_COMPLETE": "bash_complete", "COMP_WORDS": "fedml launch in", "COMP_CWORD": "2"}
    done = subprocess.run(
        [Path(sys.executable).parent / "fedml"],
        env=os.environ | asked,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["plain,init", "file,in"]


def test_what_only_the_broker_knows_is_completed_too(fedml: Fedml, tmp_path: Path) -> None:
    run = fedml.place.launch("true")
    fedml.file("train.csv", "1\n")
    fedml("storage", "upload", "train.csv", "seven/train.csv")
    fedml("cluster", "create", "seven", "--device", "two")
    try:
        for line, found in (
            (f"fedml run status {run[:6]}", run),
            (f"fedml logs {run[:6]}", run),
            ("fedml device show tw", "two"),
            ("fedml cluster create x --device tw", "two"),
            ("fedml cluster stop se", "seven"),
            ("fedml launch job.yaml -c se", "seven"),
            ("fedml storage download seven/", "seven/train.csv"),
        ):
            assert found in _asked(line, fedml.env), line
    finally:
        fedml("cluster", "kill", "seven", "-y")
    assert _asked("fedml run status r-", {**os.environ, "FEDML_HOME": str(tmp_path)}) == []


def _asked(line: str, env: dict[str, str]) -> list[str]:
    """What the script is told when it asks, as words."""
    asked = {"_FEDML_COMPLETE": "bash_complete", "COMP_WORDS": line}
    asked["COMP_CWORD"] = str(len(line.split(" ")) - 1)
    done = subprocess.run(
        [Path(sys.executable).parent / "fedml"], env=env | asked, capture_output=True, text=True
    )
    assert done.stderr == ""
    return [found.partition(",")[2] for found in done.stdout.split()]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_a_script_that_names_all_three(shell: str) -> None:
    text = subprocess.run(
        command("fedml", "completion", shell), check=True, capture_output=True, text=True
    ).stdout
    for variable in ("_FEDML_COMPLETE", "_FEDML_AGENT_COMPLETE", "_FEDML_BROKER_COMPLETE"):
        assert variable in text
