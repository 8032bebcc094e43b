# SPDX-License-Identifier: Apache-2.0
"""Fault rows A to D and K: the broker is killed, is away, or its MQTT forgets everything.

Each run must end FINISHED with the very model that an undisturbed one gives: an update that was
lost or counted twice would change its bits.
"""

import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedml_protocol.tasks import TaskState
from tests.place import APP, Place, began_round, command, ended_round

CONFIG = {"train_s": 0.15}


@pytest.fixture(params=["embedded", "mosquitto"])
def place(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Place]:
    with Place(tmp_path, mosquitto=request.param == "mosquitto") as place:
        for name in ("one", "two", "three"):
            place.agent(name)
        yield place


def _expected(place: Place, **request: Any) -> str:
    """The model of a run that nobody disturbs."""
    run = place.federate(**request)
    place.finishes(run)
    return place.model(run)


def _all_counted_once(place: Place, run: str, rounds: int) -> None:
    """One finished task for each round and client, and one end for each round."""
    rows = [r for r in place.tasks(run) if r.round <= rounds]
    assert {(r.round, r.client) for r in rows} == {
        (n, c) for n in range(1, rounds + 1) for c in range(len(place.agents))
    }
    assert len(rows) == rounds * len(place.agents)
    assert {r.state for r in rows} == {int(TaskState.FINISHED)}
    events = place.query("SELECT data FROM events WHERE run = :r AND kind = 'round_ends'", r=run)
    assert len(events) == rounds + 1


def test_a_killed_broker_goes_on_with_the_round_it_was_in(place: Place) -> None:
    expected = _expected(place, rounds=5)
    run = place.federate(rounds=5, config=CONFIG)
    for number in (1, 3):  # while the clients of this round train
        place.until(run, lambda item, number=number: began_round(item) == number)
        place.broker.kill()
        place.start_broker()
    place.finishes(run)
    assert place.model(run) == expected
    _all_counted_once(place, run, 5)


@pytest.mark.parametrize("place", ["embedded"], indirect=True)
def test_what_dies_in_the_middle_of_the_groups_own_rounds_goes_on_there(place: Place) -> None:
    """Fault A, and the aggregator's death, between two turns of groups that have models."""
    groups = {"count": 2, "rounds": 3, "algorithm": "fedavgm"}
    expected = _expected(place, rounds=2, groups=json.dumps(groups))
    run = place.federate(rounds=2, groups=json.dumps(groups), config={"train_s": 0.5})

    def waits(what: str) -> None:
        place.until(run, lambda item: item.get("waiting", "").startswith(what))

    waits("round 1, turn 2 of 3")
    place.broker.kill()
    place.start_broker()
    waits("round 2, turn 2 of 3")
    _kill_aggregator(place)
    waits("round 2, turn 3 of 3")
    place.broker.kill()
    place.start_broker()
    place.finishes(run)
    assert place.model(run) == expected
    rows = [row for row in place.tasks(run) if row.round <= 6]
    assert {(r.round, r.client) for r in rows} == {(n, c) for n in range(1, 7) for c in range(3)}
    assert len(rows) == 18
    # Of the groups' models, and of updates, nothing is left behind.
    for what in ("stage", "updates"):
        owner = f"run/{run}/{what}/%"
        assert place.query("SELECT owner FROM blob_refs WHERE owner LIKE :o", o=owner) == []


@pytest.mark.parametrize("place", ["embedded"], indirect=True)
def test_an_aggregator_may_die_in_every_round_but_not_for_ever_in_one(place: Place) -> None:
    expected = _expected(place, rounds=6)
    run = place.federate(rounds=6, config=CONFIG)
    for number in range(1, 7):
        place.until(run, lambda item, number=number: began_round(item) == number)
        _kill_aggregator(place)
    place.finishes(run)
    assert place.model(run) == expected

    dies = APP.replace("    return {", "    import os; os._exit(3)\n    return {", 1)
    end = place.end(place.federate(dies, rounds=2))
    assert end["state"] == "FAILED"
    assert end["cause"]["message"].startswith("the aggregator died 5 times: it ended with exit co")


def _kill_aggregator(place: Place) -> None:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if place.is_ours(process) and "fedml.federate.aggregator" in process.cmdline():
                process.kill()


def test_a_killed_broker_loses_no_job_of_a_loaded_fleet(place: Place) -> None:
    """Fault B: agents under load, jobs queued, running and ending while the broker dies."""
    expected = _expected(place, rounds=4)
    jobs = [place.launch(f"sleep 0.{n}; echo done-{n}", follow=False) for n in range(9)]
    run = place.federate(rounds=4, config=CONFIG)
    place.until(run, lambda item: began_round(item) == 2)
    place.broker.kill()
    place.start_broker()
    for n, job in enumerate(jobs):
        end = place.end(job)
        assert (end["state"], end["exit_code"]) == ("FINISHED", 0), end["cause"]
        assert place.stdout(job) == f"done-{n}\n"
    place.finishes(run)
    assert place.model(run) == expected
    _all_counted_once(place, run, 4)


@pytest.mark.parametrize(
    "away_s",
    [
        pytest.param(5, id="longer than a lease"),
        pytest.param(15, id="15 s", marks=[pytest.mark.long, pytest.mark.timeout(180)]),
        pytest.param(75, id="75 s", marks=[pytest.mark.long, pytest.mark.timeout(300)]),
    ],
)
def test_a_broker_that_was_away_finds_what_was_done_meanwhile(place: Place, away_s: int) -> None:
    """Faults C and D. The stages end while nobody can be told."""
    expected = _expected(place, rounds=3)
    run = place.federate(rounds=3, config=CONFIG)
    place.until(run, lambda item: began_round(item) == 2)
    place.broker.kill()
    place.wait(away_s)
    place.start_broker()
    place.finishes(run)
    assert place.model(run) == expected
    _all_counted_once(place, run, 3)
    # What was trained meanwhile was waiting for the broker: nobody trained it again.
    assert {r.epoch for r in place.tasks(run)} == {1}


def test_agents_resync_with_an_mqtt_that_has_forgotten_everything(place: Place) -> None:
    """Fault K."""
    expected = _expected(place, rounds=5)
    run = place.federate(rounds=5, config=CONFIG)
    for number in (2, 4):
        place.until(run, lambda item, number=number: began_round(item) == number)
        place.replace_mqtt()
    place.finishes(run)
    assert place.model(run) == expected
    _all_counted_once(place, run, 5)


def test_an_offer_that_mqtt_forgot_is_made_again(place: Place) -> None:
    """A job is submitted while no MQTT is there to carry its offer."""
    run = ""

    def submit() -> None:
        nonlocal run
        run = place.launch("echo here", follow=False)

    if place.mosquitto:
        place.replace_mqtt(while_away=submit)
    else:
        submit()
        place.replace_mqtt()
    place.finishes(run)
    assert place.stdout(run) == "here\n"


def test_a_client_who_follows_sees_every_round_once_across_a_restart(place: Place) -> None:
    run = place.federate(rounds=4, config=CONFIG)
    seen = []
    for item in place.follow(run):
        if (number := ended_round(item)) is not None:
            seen.append(number)
            if number == 2:
                place.broker.kill()
                place.start_broker()
    assert seen == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("place", ["embedded"], indirect=True)
def test_machines_work_for_a_broker_that_was_restored_from_a_backup(place: Place) -> None:
    """It has forgotten what came after: orders that it gave, runs, and rounds of one that goes on.

    None of its orders may look like an old one that somebody plays back, and what a machine did
    under the same name is offered again.
    """
    expected = _expected(place, rounds=5)
    run = place.federate(rounds=5, config=CONFIG)
    place.until(run, lambda item: ended_round(item) == 2)
    backup = place.folder / "backup.tar.gz"
    _broker_command(place, "backup", str(backup))
    place.finishes(run)
    one = place.agents["one"]
    place.broker.stop()
    one.stop()
    # As if over a thousand tasks had come and gone, though fewer than milliseconds: the machine
    # knows below which number orders are old, also when it starts again.
    with contextlib.closing(sqlite3.connect(place.home / "broker/broker.db")) as db, db:
        db.execute("UPDATE devices SET counter = counter + 1500")
        (floor,) = db.execute("SELECT max(counter) FROM devices").fetchone()
    journal = one.home / "agent/private/journal.db"
    with contextlib.closing(sqlite3.connect(journal)) as db, db:
        db.execute("INSERT OR REPLACE INTO meta VALUES ('floor', ?)", (str(floor),))
    place.start_broker()
    one.start()
    place.finishes(place.launch("true", labels={}))

    place.broker.stop()
    shutil.rmtree(place.home / "broker")
    subprocess.run(["tar", "-xzf", backup, "-C", place.home], check=True)
    place.start_broker()
    place.finishes(place.launch("true"))
    place.finishes(run)
    assert place.model(run) == expected


def _broker_command(place: Place, *words: str) -> None:
    subprocess.run(
        command("fedml_broker", *words),
        env={**os.environ, "FEDML_HOME": str(place.home)},
        check=True,
        capture_output=True,
    )
