# SPDX-License-Identifier: Apache-2.0
"""Which engine runs containers. Real ones run in tests/end_to_end/test_containers.py."""

import json
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedml_agent import containers
from fedml_agent.policy import Policy

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
