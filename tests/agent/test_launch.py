# SPDX-License-Identifier: Apache-2.0
"""Launched jobs: what the owner's policy makes of their sandbox, and what is left of them."""

import dataclasses
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from fedml_agent.attic import OWED, Attic
from fedml_agent.home import Home, Membership
from fedml_agent.journal import Entry, Journal
from fedml_agent.launch import Jobs, limits_of
from fedml_agent.policy import Policy
from fedml_agent.tending import TaskSpec
from fedml_agent.traces import Traces
from fedml_agent.verdict import out_of_time
from fedml_protocol.cause import Fault
from fedml_protocol.launch import LaunchSpec
from fedml_protocol.tasks import Needs, Offer, Result, TaskState

GB = 10**9


def entry(**more: Any) -> Entry:
    offer = Offer(
        **{"task": "t", "epoch": 1, "run": "r", "spec": LaunchSpec(command="true")} | more
    )
    return Entry(offer=offer, counter=1, state=TaskState.LEASED)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path)
    home.make()
    member = Membership(
        url="https://localhost",
        tenant="acme",
        device="d",
        mqtt_host="localhost",
        mqtt_port=1,
        heartbeat_s=1.0,
        verify_keys={},
    )
    home.remember(member)
    return home


class Yard:
    """Jobs that nobody runs, with what they need."""

    def __init__(self, home: Home) -> None:
        self.policy = Policy()
        self.home = home
        self.journal = Journal(home.private / "journal.db")
        nobody: Any = None
        self.attic = Attic(home.logs, self.journal, nobody, lambda: self.policy)
        self.jobs = Jobs(
            home,
            self.journal,
            nobody,
            nobody,
            nobody,
            nobody,
            lambda: self.policy,
            self.attic,
            Traces(),
        )

    def spec(self, job: Entry, **policy: Any) -> TaskSpec:
        self.policy = Policy(**policy)
        assert isinstance(job.offer.spec, LaunchSpec)
        return self.jobs._spec(job, job.offer.spec, self.home.tasks / job.folder / "work")


@pytest.fixture
async def yard(home: Home) -> AsyncIterator[Yard]:
    yard = Yard(home)
    yield yard
    yard.journal.close()


async def test_hide_is_required_unless_the_owner_says_otherwise(yard: Yard) -> None:
    assert "hide" not in yard.spec(entry()).optional
    assert "read_only" in yard.spec(entry()).optional
    assert "hide" in yard.spec(entry(), require=()).optional
    assert {"hide", "pids"} & set(yard.spec(entry(), require=("hide", "pids")).optional) == set()


async def test_data_sets_are_hidden_from_jobs_as_far_as_they_exist(
    yard: Yard, tmp_path: Path
) -> None:
    (tmp_path / "heart.csv").write_text("1")
    data = {"heart": str(tmp_path / "heart.csv"), "gone": str(tmp_path / "gone.csv")}
    assert yard.spec(entry(), data=data).hide == (yard.home.root, tmp_path / "heart.csv")


async def test_a_job_gets_the_shortest_of_all_times(yard: Yard) -> None:
    assert yard.spec(entry()).deadline_s is None
    assert yard.spec(entry(deadline_s=9.0), run_time_s=5).deadline_s == 5
    assert yard.spec(entry(deadline_s=3.0), run_time_s=5).deadline_s == 3
    left = yard.spec(entry(), hours=((0, 1440),), run_time_s=86400).deadline_s
    assert left == 86400


def test_limits_are_the_jobs_own_or_the_owners() -> None:
    assert limits_of(entry(), Policy()).to_dict() == {"nice": 0, "processes": 4096}
    policy = Policy(memory=4 * GB, cpus=2.5, processes=9)
    assert limits_of(entry(), policy).to_dict() == {
        "nice": 0,
        "memory_bytes": 4 * GB,
        "cpus": 2,
        "processes": 9,
    }
    own = entry(needs=Needs(memory_bytes=GB))
    assert limits_of(own, policy).memory_bytes == GB
    assert limits_of(own, Policy(cpus=0.5)).cpus == 1


def test_the_clock_that_ended_a_job_is_named() -> None:
    assert out_of_time(entry(deadline_s=3.0), 3.1).fault is Fault.TASK
    assert out_of_time(entry(deadline_s=30.0), 3.1).fault is Fault.POLICY
    assert "after 3 s" in out_of_time(entry(), 3.1).message


@pytest.mark.parametrize("known", [True, False])
async def test_a_log_that_a_former_agent_did_not_send_is_still_owed(
    yard: Yard, known: bool
) -> None:
    folder = yard.home.tasks / "t.1"
    (folder / "work").mkdir(parents=True)
    (folder / "out.0").write_text("said\n")
    if known:
        job = entry()
        yard.journal.add(job)
        yard.journal.end(job, Result(task="t", epoch=1, state=TaskState.FINISHED))
        yard.journal.confirm("t", 1)
    await yard.jobs.end_stray(folder)
    kept = yard.home.logs / "t.1"
    assert sorted(path.name for path in kept.iterdir()) == sorted(["out.0"] + [OWED] * known)
    if known:
        assert json.loads((kept / OWED).read_text()) == {"task": "t", "epoch": 1}


def test_every_field_of_a_spec_reaches_the_shim(tmp_path: Path) -> None:
    spec = TaskSpec(argv=("x",), env={}, cwd=tmp_path)
    assert set(json.loads(spec.to_json())) == {
        "version",
        *(one.name for one in dataclasses.fields(TaskSpec)),
    }
