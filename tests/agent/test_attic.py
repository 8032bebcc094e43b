# SPDX-License-Identifier: Apache-2.0
"""Logs of tasks that have ended: kept for the owner, sent before anything is removed."""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from fedml_agent.attic import OWED, Attic
from fedml_agent.errors import BrokerUnreachable
from fedml_agent.journal import Journal
from fedml_agent.policy import Policy

DAY = 86400


class Broker:
    """Takes logs as `Https.put_log` does; it can be away."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.logs: dict[tuple[str, int, str], bytes] = {}
        self.away = False
        self.refused = asyncio.Event()

    def put_log(
        self, task: str, epoch: int, stream: str, offset: int, data: bytes, **_: Any
    ) -> int:
        if self.away:
            # Called in a thread.
            self.loop.call_soon_threadsafe(self.refused.set)
            raise BrokerUnreachable("it is away")
        log = self.logs.get((task, epoch, stream), b"")[:offset] + data
        self.logs[task, epoch, stream] = log
        return len(log)


class House:
    """An attic with its policy, journal and broker."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.policy = Policy()
        self.broker = Broker()
        self.journal = Journal(folder / "journal.db")
        (folder / "logs").mkdir()
        self.attic = Attic(
            folder / "logs",
            self.journal,
            lambda: self.broker,  # type: ignore[arg-type,return-value]
            lambda: self.policy,
        )

    def task(self, name: str, out: str = "said\n", *, days_ago: float = 0.0) -> Path:
        """The directory of a task that has ended, as its shim and the task leave it."""
        folder = self.folder / "tasks" / name
        (folder / "work" / "deep").mkdir(parents=True)
        (folder / "work" / "deep" / "checkpoint").write_bytes(bytes(100_000))
        (folder / "work" / "away").symlink_to(self.folder)
        (folder / "spec.json").write_text("{}")
        (folder / "job.sh").write_text("echo said")
        (folder / "out.0").write_text(out)
        sizes = {"out": {"size": len(out), "dropped": 0}, "err": {"size": 0, "dropped": 0}}
        at = {"wall": 0.0, "monotonic": 0.0}
        record = {"reason": "exited", "code": 0, "signal": None, "error": "", "oom": "no"}
        record |= {"started": at, "ended": at, "logs": sizes}
        (folder / "exit.json").write_text(json.dumps(record))
        when = time.time() - days_ago * DAY
        for path in (folder / "exit.json", folder / "out.0", folder / "job.sh"):
            os.utime(path, (when, when))
        return folder

    def names(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "logs").iterdir())


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    house = House(tmp_path)
    yield house
    house.journal.close()


async def test_the_workspace_goes_and_the_log_stays(house: House) -> None:
    house.attic.take_in(house.task("t.1"), "t.1")
    kept = house.folder / "logs" / "t.1"
    assert sorted(path.name for path in kept.iterdir()) == ["exit.json", "job.sh", "out.0"]
    assert not (house.folder / "tasks" / "t.1").exists()
    assert house.folder.exists(), "a link in the workspace was not followed"


async def test_a_task_that_never_ran_leaves_nothing(house: House) -> None:
    folder = house.task("t.1")
    for name in ("exit.json", "out.0"):
        (folder / name).unlink()
    house.attic.take_in(folder, "t.1")
    assert house.names() == []
    assert not folder.exists()


async def test_what_a_task_said_before_its_shim_was_killed_is_sent_too(house: House) -> None:
    folder = house.task("t.1")
    (folder / "exit.json").unlink()
    house.attic.take_in(folder, "t.1", owed=("t", 1))
    await house.attic.send_owed()
    assert house.broker.logs == {("t", 1, "stdout"): b"said\n"}


async def test_logs_go_when_their_days_are_over(house: House) -> None:
    for days in (0, 6.9, 7.1):
        house.attic.take_in(house.task(f"t.{days}", days_ago=days), f"t.{days}")
    assert house.attic.tidy(disk_low=False) == ["t.7.1"]
    house.policy = Policy(log_days=0.0)
    assert sorted(house.attic.tidy(disk_low=False, now=time.time() + 1)) == ["t.0", "t.6.9"]


async def test_the_oldest_logs_go_when_all_of_them_are_too_much(house: House) -> None:
    for days in (1, 2, 3):
        folder = house.task(f"t.{days}", out="x" * 100_000, days_ago=days)
        house.attic.take_in(folder, f"t.{days}")
    house.policy = Policy(log_disk=250_000)
    assert house.attic.tidy(disk_low=False) == ["t.3"]
    assert house.names() == ["t.1", "t.2"]


async def test_all_logs_go_when_the_disk_is_low(house: House) -> None:
    house.attic.take_in(house.task("t.1"), "t.1")
    house.attic.tidy(disk_low=True)
    assert house.names() == []


async def test_what_the_broker_does_not_have_is_sent_first_and_never_removed(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedml_agent.observe._RETRY_S", 0.01)
    house.broker.away = True
    house.attic.take_in(house.task("t.1", days_ago=100), "t.1", owed=("t", 1))
    house.policy = Policy(log_days=0.0, log_disk=0)
    sending = asyncio.create_task(house.attic.send_owed())
    await house.broker.refused.wait()
    assert house.attic.tidy(disk_low=True) == []
    house.broker.away = False
    await sending
    assert house.broker.logs == {("t", 1, "stdout"): b"said\n"}
    assert house.attic.tidy(disk_low=False) == ["t.1"]


async def test_a_new_agent_sends_what_the_one_before_owed(house: House) -> None:
    house.attic.take_in(house.task("run.shim-1"), "run.shim-1", owed=("stage", 3))
    again = Attic(
        house.folder / "logs",
        house.journal,
        lambda: house.broker,  # type: ignore[arg-type,return-value]
        lambda: house.policy,
    )
    again.look()
    await again.send_owed()
    assert not any(one.owed for one in again.kept())
    assert house.broker.logs == {("stage", 3, "stdout"): b"said\n"}


async def test_a_damaged_directory_does_not_stop_the_others(house: House) -> None:
    house.attic.take_in(house.task("a.1"), "a.1", owed=("a", 1))
    house.attic.take_in(house.task("b.1"), "b.1", owed=("b", 1))
    (house.folder / "logs" / "a.1" / OWED).write_text("{")
    await house.attic.send_owed()
    assert ("b", 1, "stdout") in house.broker.logs
