# SPDX-License-Identifier: Apache-2.0
"""Runs without rounds: who is slow or away delays nobody, and no update counts twice."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedml_protocol.tasks import TaskState
from tests.end_to_end.test_cohorts import SLOW
from tests.place import APP, Place, ended_round


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with Place(tmp_path) as place:
        for name in ("a", "b", "c"):
            place.agent(name)
        yield place


@pytest.fixture
def calm(tmp_path: Path) -> Iterator[Place]:
    """Where no machine counts as away because this one is busy: who is away is not asked."""
    with Place(tmp_path, heartbeat_s=5.0, lease_s=30.0) as place:
        for name in ("a", "b", "c"):
            place.agent(name)
        yield place


def _asked(place: Place, app: str = APP, **more: Any) -> str:
    said = {"algorithm": "fedbuff", "algorithm_config": json.dumps({"buffer": 2}), "rounds": 4}
    return place.federate(app, **{**said, **more})


def _versions(place: Place, run: str) -> list[dict[str, Any]]:
    """What each version says of itself, the first model left out."""
    rows = place.query(
        "SELECT data FROM events WHERE run = :r AND kind = 'round_ends' ORDER BY id", r=run
    )
    return [json.loads(row.data) for row in rows][1:]


def _require_counted_once(place: Place, run: str, buffer: int) -> None:
    """Every version stands on as many updates as the buffer holds, and each is in one of them."""
    counted = place.query(
        "SELECT counted, count(*) AS n FROM tasks"
        " WHERE run = :r AND counted IS NOT NULL AND state = :done GROUP BY counted",
        r=run,
        done=int(TaskState.FINISHED),
    )
    versions = _versions(place, run)
    assert {row.counted: row.n for row in counted} == {v["round"]: buffer for v in versions}
    assert [v["replies"] for v in versions] == [buffer] * len(versions)
    left = place.query("SELECT owner FROM blob_refs WHERE owner LIKE :o", o=f"run/{run}/updates/%")
    assert left == []


def test_each_version_counts_the_updates_it_is_made_of(place: Place) -> None:
    run = _asked(place)
    place.finishes(run)
    assert [v["round"] for v in _versions(place, run)] == [1, 2, 3, 4]
    _require_counted_once(place, run, 2)
    # The last model was evaluated by all.
    rounds = place.client.call("GET", f"/v1/runs/{run}")["rounds"]
    assert next(r for r in rounds if r["round"] == 4)["metrics"]["devices.examples"] == 120


def test_updates_of_older_models_are_known_to_be_late(calm: Place) -> None:
    # Long enough for all to be at work: on a busy machine the first one is ready much earlier.
    config = {"train_s": 0.2}
    run = _asked(calm, algorithm="fedasync", algorithm_config="{}", rounds=15, config=config)
    calm.finishes(run)
    late = calm.query(
        "SELECT counted - 1 - version AS n FROM tasks WHERE run = :r AND counted IS NOT NULL",
        r=run,
    )
    staleness = [row.n for row in late]
    assert len(staleness) == 15
    assert min(staleness) == 0
    assert max(staleness) > 0


def test_a_client_that_never_ends_delays_nobody(calm: Place) -> None:
    run = _asked(calm, SLOW, config={"slow": 1})
    calm.finishes(run)
    _require_counted_once(calm, run, 2)
    slow = [t for t in calm.tasks(run) if t.client == 1 and t.round <= 3]
    assert [TaskState(t.state) for t in slow] == [TaskState.STOPPED]


def test_a_machine_that_went_away_keeps_no_place(place: Place) -> None:
    # One client at a time, and it is killed with its machine: another one starts.
    run = _asked(place, clients={"count": 3, "per_round": 1}, rounds=3, config={"train_s": 0.5})
    place.until(run, lambda item: item.get("waiting", "").startswith("version 2: 0 have answered"))
    held = next(t for t in place.tasks(run) if TaskState(t.state) not in _ENDED)
    gone = next(a for a in place.agents.values() if a.device == held.device)
    gone.kill()
    for process in psutil.process_iter():
        if place.is_ours(process) and str(gone.home) in " ".join(process.cmdline()):
            os.kill(process.pid, signal.SIGKILL)
    place.until(run, lambda item: ended_round(item) == 3)
    gone.start()
    place.finishes(run)
    _require_counted_once(place, run, 2)


def test_a_broker_that_is_killed_counts_nothing_twice(place: Place) -> None:
    run = _asked(place, rounds=6, config={"train_s": 0.1})
    for number in (2, 4):
        place.until(run, lambda item, number=number: ended_round(item) == number)
        place.broker.kill()
        place.start_broker()
    place.finishes(run)
    assert [v["round"] for v in _versions(place, run)] == [1, 2, 3, 4, 5, 6]
    _require_counted_once(place, run, 2)


def test_an_aggregator_that_is_killed_is_told_again_what_had_come(place: Place) -> None:
    run = _asked(
        place, rounds=3, algorithm_config=json.dumps({"buffer": 4}), config={"train_s": 0.1}
    )
    place.until(run, lambda item: ended_round(item) == 1)
    for process in psutil.process_iter():
        if place.is_ours(process) and "fedml.federate.aggregator" in process.cmdline():
            process.kill()
    place.finishes(run)
    _require_counted_once(place, run, 4)


def test_a_deadline_is_refused_with_the_ways_out(place: Place) -> None:
    run = _asked(place, clients={"count": 3, "deadline_s": 5})
    end = place.end(run)
    assert end["state"] == "FAILED"
    assert "fedbuff has no rounds" in end["cause"]["message"]
    assert "choose fedavg" in end["cause"]["hint"]


def test_a_client_whose_training_fails_is_not_asked_again_in_this_version(calm: Place) -> None:
    failing = APP.replace(
        "def train(model, data, config, rng):",
        "def train(model, data, config, rng):\n"
        "    if (data[0] == np.random.default_rng(2).normal(size=(40, 64))).all():\n"
        "        raise ValueError('no luck')",
    )
    run = _asked(calm, failing, clients={"count": 3, "minimum": 2}, rounds=1000)
    failed: list[int] = []

    def twice(item: dict[str, Any]) -> bool:
        event = item.get("event", {})
        if event.get("kind") == "client_failed":
            failed.append(event["data"]["round"])
        return len(failed) == 2

    calm.until(run, twice)
    calm.client.call("POST", f"/v1/runs/{run}/stop")
    assert calm.end(run)["state"] == "STOPPED"
    assert failed[0] < failed[1]
    assert {v["replies"] for v in _versions(calm, run)} == {2}
    assert {v["refused"] for v in _versions(calm, run)} <= {0, 1}


_ENDED = {TaskState.FINISHED, TaskState.FAILED, TaskState.STOPPED, TaskState.LOST}
