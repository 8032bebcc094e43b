# SPDX-License-Identifier: Apache-2.0
"""The journal: what was taken and what is owed survive the process, and damage is set aside."""

from pathlib import Path

import pytest

from fedml_agent.journal import Entry, Journal
from fedml_protocol.blob import Blob
from fedml_protocol.federate import StageKind, StageSpec
from fedml_protocol.launch import LaunchSpec
from fedml_protocol.tasks import Offer, Result, TaskState


def entry(task: str = "t-1", epoch: int = 1, counter: int = 1) -> Entry:
    offer = Offer(task=task, epoch=epoch, run="r-1", spec=LaunchSpec(command="true"))
    return Entry(offer=offer, counter=counter, state=TaskState.LEASED, gpus=("GPU-1",))


def result(task: str = "t-1") -> Result:
    return Result(task=task, epoch=1, state=TaskState.FINISHED, exit_code=0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.db"


def test_what_was_taken_and_what_is_owed_is_there_after_a_restart(path: Path) -> None:
    journal = Journal(path)
    held, owed, done = entry("held"), entry("owed", counter=2), entry("done", counter=3)
    for one in (held, owed, done):
        journal.add(one)
    journal.running(held)
    journal.end(owed, result("owed"))
    journal.end(done, result("done"))
    journal.confirm("done", 1)
    # No close: the process is killed. SQLite's file is what it is.
    again = Journal(path)
    assert [(e.key, e.state, e.gpus) for e in again.held()] == [
        (("held", 1), TaskState.RUNNING, ("GPU-1",))
    ]
    assert [(e.key, e.result) for e in again.owed()] == [(("owed", 1), result("owed"))]
    again.close()
    journal.close()


def test_a_result_is_confirmed_once(path: Path) -> None:
    journal = Journal(path)
    one = entry()
    journal.add(one)
    assert journal.confirm("t-1", 1) is None  # it has no result yet
    journal.end(one, result())
    assert journal.confirm("t-1", 1) is one
    assert journal.confirm("t-1", 1) is None
    assert journal.confirm("unknown", 1) is None
    journal.close()


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda p: p.write_bytes(b"this is no database" * 100), id="other content"),
        pytest.param(
            lambda p: p.write_bytes(p.read_bytes()[:4096] + b"\xff" * 4096), id="a torn page"
        ),
    ],
)
def test_a_damaged_journal_is_set_aside_and_a_new_one_begun(path: Path, damage: object) -> None:
    journal = Journal(path)
    journal.add(entry())
    journal.close()
    before = path.read_bytes()
    damage(path)  # type: ignore[operator]
    damaged = path.read_bytes()
    assert damaged != before

    again = Journal(path)

    assert again.held() == []
    assert again.set_aside is not None
    assert again.set_aside.read_bytes() == damaged
    again.add(entry())
    assert [e.key for e in again.held()] == [("t-1", 1)]
    again.close()


def test_it_knows_which_sessions_it_owes_or_holds(path: Path) -> None:
    journal = Journal(path)
    spec = StageSpec(
        session="r-7",
        kind=StageKind.TRAIN,
        round=1,
        client=0,
        clients=1,
        seed=0,
        app="app.py",
        config="{}",
        algorithm="fedavg",
        algorithm_config="{}",
        model=Blob(sha256="0" * 64, size=1),
    )
    stage = Entry(
        offer=Offer(task="r-7-1-0", epoch=1, run="r-7", spec=spec),
        counter=1,
        state=TaskState.LEASED,
    )
    journal.add(stage)
    assert journal.knows_session("r-7")
    journal.end(stage, Result(task="r-7-1-0", epoch=1, state=TaskState.FINISHED))
    assert journal.knows_session("r-7")
    journal.confirm("r-7-1-0", 1)
    assert not journal.knows_session("r-7")
    journal.close()
