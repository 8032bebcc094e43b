# SPDX-License-Identifier: Apache-2.0
"""Which engine runs containers. Real ones run in tests/end_to_end/test_containers.py."""

import json
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedml_agent import containers
from fedml_agent.containers import Engine
from fedml_agent.journal import Entry
from fedml_agent.policy import Policy
from fedml_agent.tending import Ended, LogGrown, StreamSize
from fedml_agent.verdict import may_be_taken_away, result_of
from fedml_protocol.launch import Container, LaunchSpec
from fedml_protocol.tasks import Offer, TaskState

PODMAN = {
    "host": {"security": {"rootless": False}, "cgroupControllers": [], "cgroupVersion": "v2"},
    "version": {"Version": "4.3.1"},
}


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The only folder in which programs are looked for."""
    monkeypatch.setenv("PATH", str(tmp_path))
    containers.found.cache_clear()
    yield tmp_path
    containers.found.cache_clear()


def install(path: Path, name: str, info: object) -> None:
    """An engine that answers whatever it is asked with the same."""
    program = path / name
    program.write_text(f"#!/bin/sh\necho '{json.dumps(info)}'\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


def test_podman_comes_first_unless_the_owner_says_which(path: Path) -> None:
    install(path, "podman", PODMAN)
    install(path, "docker", {"ServerVersion": "20.10"})
    for engine, used in ((None, "podman 4.3.1"), ("docker", "docker 20.10")):
        assert str(containers.here(Policy(containers=True, engine=engine))) == used
    assert "lets none run" in str(containers.here(Policy(engine="docker")))


def test_the_other_engine_is_not_taken_for_the_one_that_the_owner_wants(path: Path) -> None:
    install(path, "podman", PODMAN)
    wanted = Policy(containers=True, engine="docker")
    assert containers.here(wanted) == "docker is not installed, and is what containers.engine says"
    install(path, "docker", {"ServerErrors": ["is the docker daemon running?"]})
    containers.found.cache_clear()
    assert "is the docker daemon running?" in str(containers.here(wanted))


MINE = "fedml-d-t.1"


def event(action: str, name: str = MINE) -> dict[str, Any]:
    return {"Type": "container", "Action": action, "Actor": {"Attributes": {"name": name}}}


def docker(path: Path, said: list[dict[str, Any]] | str) -> Engine:
    """A Docker whose `events` prints these, or fails with these words."""
    if isinstance(said, str):
        answer = f"echo {shlex.quote(said)} >&2; exit 1"
    else:
        lines = "".join(f"{json.dumps(one)}\n" for one in said)
        (path / "events").write_text(lines)
        answer = f'while read -r line; do echo "$line"; done < {path}/events'
    program = path / "docker"
    program.write_text(f'#!/bin/sh\n[ "$1" = events ] || exit 9\n{answer}\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return Engine(name="docker", program=str(program), version="1", rootless=False, limits=True)


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ([event("start"), event("die")], ""),
        ([event("start"), event("oom"), event("die")], ""),
        ([event("start"), event("kill", "anothers"), event("die")], ""),
        ([event("start"), event("kill"), event("die")], "stopped from outside"),
        ([event("start", "anothers")], "was restarted"),
        ([], "was restarted"),
        # It keeps no more: what is not among them may be forgotten.
        ([event("exec_start", "anothers")] * 256, ""),
        ("Cannot connect to the Docker daemon at unix:///x. Is it running?", "is gone"),
        ("permission denied while trying to connect", ""),
    ],
)
async def test_what_docker_remembers_shows_whether_a_container_was_taken_away(
    path: Path, said: list[dict[str, Any]] | str, shown: str
) -> None:
    found = await containers.taken_away(docker(path, said), MINE)
    assert (shown in found) if shown else (found == "")


async def test_podman_has_no_daemon_that_could_go() -> None:
    engine = Engine(name="podman", program="/none", version="1", rootless=True, limits=True)
    assert await containers.taken_away(engine, MINE) == ""


def test_only_ends_that_look_like_an_engines_are_asked_about() -> None:
    spec = LaunchSpec(command="true", container=Container(image="x"))
    entry = Entry(
        offer=Offer(task="t", epoch=1, run="r", spec=spec), counter=1, state=TaskState.LEASED
    )
    nothing = StreamSize(0, 0)

    def end(code: int, reason: str = "exited") -> Ended:
        logs = LogGrown(out=nothing, err=nothing)
        return Ended(
            reason=reason,
            code=code,
            signal=None,
            error="",
            oom="no",
            duration_s=1.0,
            logs=logs,
            record={"limits": {}},
        )

    asked = [code for code in range(256) if may_be_taken_away(entry, end(code))]
    assert asked == [125, 128 + 9, 128 + 15]
    assert not may_be_taken_away(entry, end(137, "stopped"))
    assert result_of(entry, end(137)).state == TaskState.FAILED
    assert result_of(entry, end(137), outside="the engine went").state == TaskState.LOST
