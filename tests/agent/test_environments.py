# SPDX-License-Identifier: Apache-2.0
"""Environments of jobs, built by real resolvers in real sandboxes from wheels made here."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from fedml_agent import environments as module
from fedml_agent import sandbox, tending
from fedml_agent.environments import CannotBuild, Environments, find_uv
from fedml_agent.home import Home
from fedml_agent.policy import Policy
from fedml_agent.sandbox import Limits
from fedml_protocol.blob import Blob
from fedml_protocol.cause import Fault
from tests.fakes.wheels import wheel


class House:
    """One home with its environments."""

    def __init__(self, root: Path) -> None:
        self.home = Home(root)
        self.home.make()
        self.policy = Policy()
        self.environments = Environments(self.home, lambda: self.policy)
        self.wheels = root / "wheels"
        self.workspace = root / "workspace"
        self.workspace.mkdir()

    async def build(self, *lines: str, task: str = "t/1", deadline_s: float | None = None) -> Path:
        text = "\n".join(("--no-index", f"--find-links {self.wheels}", *lines))
        wanted = self.environments.wanted(text, None, task)
        with self.environments.held(wanted):
            return await self.environments.ready(
                wanted, self.workspace, limits=Limits(), deadline_s=deadline_s
            )


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    house = House(tmp_path)
    yield house
    for folder in house.home.environments.iterdir():
        await module._clear(folder)


@pytest.mark.parametrize("by", ["uv", "pip"])
async def test_either_resolver_installs_or_says_in_its_words_why_not(
    house: House, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by == "pip":
        monkeypatch.setattr(module, "find_uv", lambda: "")
    assert find_uv()
    wheel(house.wheels, "hello", "1.0")
    wheel(house.wheels, "broken_need", "1.0", "nowhere-to-be-found>=3")
    venv = await house.build("hello")
    say = "import hello, sys; print(hello.VERSION, sys.prefix)"
    python = await asyncio.create_subprocess_exec(
        venv / "bin" / "python", "-c", say, stdout=subprocess.PIPE
    )
    assert (await python.communicate())[0].decode().split() == ["1.0", str(venv)]
    assert not (venv.parent / "tmp").exists()

    with pytest.raises(CannotBuild) as caught:
        await house.build("broken-need")
    cause = caught.value.cause
    assert cause.fault is Fault.TASK
    assert "cannot be installed" in cause.message
    assert "nowhere-to-be-found" in cause.message + cause.traceback
    words = {"uv": "No solution found", "pip": "No matching distribution found"}
    assert words[by] in cause.message + cause.traceback
    assert len(list(house.home.environments.glob("*/built"))) == 1


async def test_what_failed_once_is_built_when_it_can_be(house: House) -> None:
    wheel(house.wheels, "other", "1.0")
    with pytest.raises(CannotBuild):
        await house.build("hello")
    wheel(house.wheels, "hello", "1.0")
    assert (await house.build("hello")).exists()


async def test_a_builder_that_takes_too_long_is_ended(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_WITH_UV", "sleep 600\n")
    with pytest.raises(CannotBuild) as caught:
        await house.build("hello", deadline_s=0.1)
    assert "within 0 s" in caught.value.cause.message


async def test_half_an_environment_is_never_taken_for_one(house: House) -> None:
    wheel(house.wheels, "hello", "1.0")
    venv = await house.build("hello")
    folder = venv.parents[1]
    (folder / "built").unlink()
    (venv / "half").touch()
    assert await house.build("hello") == venv
    assert not (venv / "half").exists()
    (folder / "built").unlink()
    await house.environments.take_up()
    assert not folder.exists()


def _key(house: House, text: str, package: str = "ab" * 32, task: str = "t/1") -> str:
    return house.environments.wanted(text, Blob(sha256=package), task).key


@pytest.mark.parametrize(
    ("text", "local"),
    [
        ("numpy==2.0", False),
        ("numpy", False),
        ("a @ https://x/y.whl", False),
        ("--find-links /srv/wheels\na", False),
        ("--index-url https://x/simple/\na", False),
        ("./a", True),
        ("../a[x]", True),
        ("a.whl", True),
        ("wheels/a-1.0-py3-none-any.whl", True),
        ("a @ file:a.whl", True),
        ("-r more.txt", True),
        ("b\n--constraint=c.txt", True),
        ("-f wheels\na", True),
        (".", True),
    ],
)
def test_relative_paths_count_with_their_package(house: House, text: str, local: bool) -> None:
    assert (_key(house, text) != _key(house, text, package="cd" * 32)) is local


def test_comments_do_not_count_and_everything_else_does(house: House) -> None:
    assert _key(house, "a==1\n\n# said\nb # why") == _key(house, "a==1\nb\n")
    assert _key(house, "a==1\nb") != _key(house, "a==1\nc")
    assert _key(house, "a", task="t/1") == _key(house, "a", task="u/1")


def test_where_files_cannot_be_protected_nothing_is_shared(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "cannot", lambda: {sandbox.READ_ONLY: "no"})
    assert _key(house, "a", task="t/1") != _key(house, "a", task="u/1")
    assert not house.environments.wanted("a", None, "t/1").shared


def _built(house: House, name: str, used_at: int, *, size: int = 100, shared: bool = True) -> None:
    folder = house.home.environments / name
    folder.mkdir()
    (folder / "built").write_text(json.dumps({"size": size, "shared": shared}))
    os.utime(folder / "built", (used_at, used_at))


def test_the_least_recently_used_go_and_what_a_task_uses_stays(house: House) -> None:
    house.policy = Policy(environment_disk=250)
    for name, used_at in (("new", 9), ("newer", 10), ("used", 1), ("held", 2), ("old", 3)):
        _built(house, name, used_at)
    _built(house, "alone", 20, shared=False)
    task = house.home.tasks / "t.1"
    task.mkdir()
    venv = house.home.environments / "used" / "work" / "venv"
    (task / "spec.json").write_text(json.dumps({"env": {"VIRTUAL_ENV": str(venv)}}))
    held: Any = module.Wanted("held", "", True)
    with house.environments.held(held):
        house.environments.evict()
        left = sorted(folder.name for folder in house.home.environments.iterdir())
        assert left == ["held", "new", "newer", "used"]
        house.environments.evict(0)
    assert sorted(folder.name for folder in house.home.environments.iterdir()) == ["held", "used"]


async def test_the_builder_goes_the_owners_way_to_an_index_and_gets_nothing_else(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (
        ("PIP_INDEX_URL", "http://127.0.0.1:9/ours"),
        ("https_proxy", "http://proxy"),
        ("AWS_SECRET_ACCESS_KEY", "s"),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("UV_DEFAULT_INDEX", raising=False)
    spec = house.environments._spec(house.workspace, house.workspace, Limits(), 1.0)
    assert spec.env["UV_DEFAULT_INDEX"] == "http://127.0.0.1:9/ours"
    assert spec.env["https_proxy"] == "http://proxy"
    assert "AWS_SECRET_ACCESS_KEY" not in spec.env


def test_a_machine_that_fails_is_told_from_requirements_that_do(tmp_path: Path) -> None:
    for said, fault in (
        ("error: Failed to fetch: `x`\n  Caused by: dns error", Fault.MACHINE),
        ("ERROR: Could not install: [Errno 28] No space left on device", Fault.MACHINE),
        ("  × No solution found when resolving dependencies:", Fault.TASK),
    ):
        folder = tmp_path / fault.name / str(len(said))
        folder.mkdir(parents=True)
        (folder / "err.0").write_text(said)
        end: Any = tending.Ended(
            reason="exited",
            code=1,
            signal=None,
            error="",
            oom="no",
            duration_s=1.0,
            logs=tending.LogGrown(tending.StreamSize(0, 0), tending.StreamSize(len(said), 0)),
            record={},
        )
        assert module._cause(folder, end, 60.0).fault is fault


def test_uv_is_found_beside_this_python() -> None:
    assert Path(find_uv()).parent == Path(sys.executable).parent
