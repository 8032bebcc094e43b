# SPDX-License-Identifier: Apache-2.0
"""Who takes part in a round, and when it closes: over-selection, deadlines, minimum answers."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedml_protocol.tasks import TaskState
from tests.place import APP, Place, began_round, ended_round

# The client of this number never ends its training.
SLOW = APP.replace(
    "def train(model, data, config, rng):",
    "def train(model, data, config, rng):\n"
    "    rows = np.random.default_rng(config['slow']).normal(size=(40, 64))\n"
    "    if (data[0] == rows).all():\n"
    "        time.sleep(3600)",
)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with Place(tmp_path) as place:
        for name in ("a", "b", "c"):
            place.agent(name)
        yield place


def _rounds(place: Place, run: str) -> list[dict[str, Any]]:
    """What each finished round says of itself, the first model left out."""
    rows = place.query(
        "SELECT data FROM events WHERE run = :r AND kind = 'round_ends' ORDER BY id", r=run
    )
    return [json.loads(row.data) for row in rows][1:]


def test_a_round_closes_at_its_deadline_with_the_minimum(place: Place) -> None:
    clients = {"count": 3, "minimum": 2, "deadline_s": 1.5}
    run = place.federate(SLOW, rounds=2, clients=clients, config={"slow": 1})
    place.finishes(run)
    assert [r["replies"] for r in _rounds(place, run)] == [2, 2]
    states = {(r.round, r.client): TaskState(r.state) for r in place.tasks(run) if r.round <= 2}
    # Whom nobody waits for any more is told so; the others have finished.
    assert {key for key, s in states.items() if s is not TaskState.FINISHED} == {(1, 1), (2, 1)}
    assert states[1, 1] is TaskState.STOPPED


# The client of this number takes 0.2 s for an epoch, and looks at the clock in between.
PARTIAL = APP.replace(
    "def train(model, data, config, rng):",
    "def train(model, data, config, rng, correction=None):\n"
    "    rows = np.random.default_rng(config['slow']).normal(size=(40, 64))\n"
    "    for epoch in range(1, config['epochs'] + 1 if (data[0] == rows).all() else 1):\n"
    "        time.sleep(0.2)\n"
    "        if time.monotonic() + 0.2 > config['deadline']:\n"
    "            return {'examples': len(data[0]), 'epochs': epoch}",
)


def test_who_is_too_slow_for_all_epochs_sends_those_it_had_time_for(place: Place) -> None:
    clients = {"count": 3, "minimum": 2, "deadline_s": 5.0}
    run = place.federate(
        PARTIAL,
        rounds=1,
        clients=clients,
        config={"slow": 1, "epochs": 1000},
        algorithm="fedprox",
        algorithm_config='{"mu": 0.01}',
    )
    place.finishes(run)
    found = _rounds(place, run)
    assert [r["replies"] for r in found] == [3]
    assert [r["metrics"]["partial.clients"] for r in found] == [1.0]
    assert "train.epochs" not in found[0]["metrics"]


def test_over_selection_takes_the_first_answers_and_stops_the_rest(place: Place) -> None:
    clients = {"count": 3, "per_round": 2, "over_select": 0.5}
    run = place.federate(SLOW, rounds=2, clients=clients, config={"slow": 2})
    place.finishes(run)
    assert [r["replies"] for r in _rounds(place, run)] == [2, 2]


def test_fewer_answers_than_the_minimum_are_waited_for_past_the_deadline(place: Place) -> None:
    clients = {"count": 3, "minimum": 3, "deadline_s": 1.0}
    frozen = place.agents["c"]
    run = place.federate(rounds=1, clients=clients, config={"train_s": 0.5})
    place.until(run, lambda item: began_round(item) == 1)
    frozen.freeze()
    item = place.until(run, lambda item: "past its deadline" in item.get("waiting", ""))
    assert "it needs 3" in item["waiting"]
    assert "c" in item["waiting"]
    frozen.wake()
    place.finishes(run)
    assert [r["replies"] for r in _rounds(place, run)] == [3]


def test_each_round_asks_the_same_cohort_whenever_it_is_run(place: Place) -> None:
    def cohorts() -> list[set[int]]:
        run = place.federate(rounds=4, clients={"count": 3, "per_round": 1}, seed=5)
        place.finishes(run)
        rows = [r for r in place.tasks(run) if r.round <= 4]
        return [{r.client for r in rows if r.round == n} for n in range(1, 5)]

    first = cohorts()
    assert [len(c) for c in first] == [1, 1, 1, 1]
    assert first == cohorts()
    assert len(set.union(*first)) > 1


def test_a_run_waits_for_machines_and_says_for_which(place: Place) -> None:
    place.finishes(place.launch("true"))
    stopped = place.agents["c"]
    stopped.stop()
    run = place.federate(rounds=1, clients={"count": 3})
    item = place.until(run, lambda item: "2 of 3 machines are ready" in item.get("waiting", ""))
    assert "c: offline" in item["waiting"]
    stopped.start()
    place.finishes(run)


def test_metrics_of_devices_and_of_the_whole_are_kept_with_each_round(place: Place) -> None:
    central = APP + "\ndef central(config):\n    return data(type('C', (), {'index': 9}), config)\n"
    run = place.federate(central, rounds=2)
    seen = [n for item in place.follow(run) if (n := ended_round(item)) is not None]
    assert seen == [0, 1, 2]
    rounds = place.client.call("GET", f"/v1/runs/{run}")["rounds"]
    for row in rounds[:3]:
        assert {"central.loss", "devices.loss"} <= set(row["metrics"])
    losses = [row["metrics"]["devices.loss"] for row in rounds[:3]]
    assert losses == sorted(losses, reverse=True)
