# SPDX-License-Identifier: Apache-2.0
"""Robust rules, privacy, compression and groups on agents: the run file asks, machines do it."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save

from fedml.federate.cohort import server_generator
from fedml.federate.hierarchical import assign
from fedml.simulation import simulate
from tests.place import APP, Place, began_round

# The client whose data come from this number turns its update round and makes it huge.
LIAR = APP.replace(
    '    model["seen"] += 1\n',
    '    model["seen"] += 1\n'
    "    rows = np.random.default_rng(2).normal(size=(40, 64))\n"
    "    if (x == rows).all():\n"
    '        model["w"] *= -1e4\n',
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with Place(tmp_path_factory.mktemp("place")) as place:
        for name in ("a", "b", "c"):
            place.agent(name)
        yield place


def _run(place: Place, app: str, treatment: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
    """The rounds of a finished run."""
    run = place.federate(app, treatment=json.dumps(treatment), **more)
    place.finishes(run)
    rounds = place.client.call("GET", f"/v1/runs/{run}")["rounds"]
    events = place.query("SELECT data FROM events WHERE run = :r AND kind = 'round_ends'", r=run)
    for row, event in zip(rounds, events, strict=False):
        row["received"] = json.loads(event.data).get("received_bytes", 0)
    return list(rounds)


def test_a_rule_learns_on_beside_a_liar_who_ruins_the_mean(place: Place) -> None:
    ruined = _run(place, LIAR, {}, rounds=4)
    saved = _run(place, LIAR, {"robust": {"rule": "median"}}, rounds=4)
    first = saved[0]["metrics"]["devices.loss"]
    assert ruined[4]["metrics"]["devices.loss"] > 1e3 * first
    assert saved[4]["metrics"]["devices.loss"] < first


def test_a_rule_that_wants_more_machines_ends_the_run_with_the_number(place: Place) -> None:
    treatment = json.dumps({"robust": {"rule": "krum", "byzantine": 1}})
    end = place.end(place.federate(APP, treatment=treatment, rounds=2))
    assert end["state"] == "FAILED"
    assert "needs at least 5 clients, there are 3" in end["cause"]["message"]
    assert end["cause"]["traceback"] == ""


def test_compressed_updates_are_smaller_and_train_as_well(place: Place) -> None:
    big = APP.replace("64", "4096").replace("size=(40, 4096)", "size=(10, 4096)")
    config = {"rounds": 3}
    plain = _run(place, big, {}, **config)
    packed = _run(place, big, {"compression": {"kind": "int8"}}, **config)
    assert packed[1]["received"] < 0.3 * plain[1]["received"]
    losses = [rows[3]["metrics"]["devices.loss"] for rows in (plain, packed)]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_top_k_keeps_its_memory_on_the_device_across_a_killed_worker(place: Place) -> None:
    big = APP.replace("64", "4096").replace("size=(40, 4096)", "size=(10, 4096)")
    treatment = {"compression": {"kind": "topk", "fraction": 0.05}}
    expected = _run(place, big, treatment, rounds=3)
    run = place.federate(big, treatment=json.dumps(treatment), rounds=3, config={"train_s": 0.3})
    place.until(run, lambda item: began_round(item) == 3)
    place.agents["a"].kill()
    place.agents["a"].start()
    place.finishes(run)
    rounds = place.client.call("GET", f"/v1/runs/{run}")["rounds"]
    assert rounds[3]["model"]["sha256"] == expected[3]["model"]["sha256"]


def test_private_rounds_tell_what_they_have_spent(place: Place) -> None:
    privacy = {"noise_multiplier": 0.8, "clip": 0.1, "delta": 1e-5}
    rounds = _run(place, APP, {"privacy": privacy}, rounds=3)
    spent = [row["metrics"]["privacy.epsilon"] for row in rounds[1:4]]
    assert 0 < spent[0] < spent[1] < spent[2]
    again = _run(place, APP, {"privacy": privacy}, rounds=3)
    # The noise is nobody's to repeat: the same seed gives another model.
    assert again[3]["model"]["sha256"] != rounds[3]["model"]["sha256"]


def test_a_treatment_that_cannot_be_is_said_before_anything_runs(place: Place) -> None:
    both = {"privacy": {"noise_multiplier": 1.0}, "robust": {"rule": "median"}}
    end = place.end(place.federate(APP, treatment=json.dumps(both)))
    assert end["state"] == "FAILED"
    assert "exclude each other" in end["cause"]["message"]
    assert list(place.tasks(end["id"])) == []


def test_groups_add_up_to_the_model_of_the_flat_run_and_tell_of_each(place: Place) -> None:
    flat = _run(place, APP, {}, rounds=3)
    grouped = _run(place, APP, {}, rounds=3, groups=json.dumps({"count": 2}))
    assert [row["model"] for row in grouped] == [row["model"] for row in flat]
    for row in grouped[1:4]:
        there = [row["metrics"][f"groups.{g}.clients"] for g in (0, 1)]
        assert sorted(there) == [1, 2]


def test_groups_that_cannot_be_are_said_before_anything_runs(place: Place) -> None:
    end = place.end(place.federate(APP, groups=json.dumps({"count": 4})))
    assert end["state"] == "FAILED"
    assert "3 clients make no 4 groups" in end["cause"]["message"]
    assert end["cause"]["traceback"] == ""
    assert list(place.tasks(end["id"])) == []


# The client whose data come from this number spoils its update in the second turn of each round.
SPOILER = APP.replace(
    '    model["seen"] += 1\n',
    "    if (x == np.random.default_rng(config['spoiler']).normal(size=(40, 64))).all():\n"
    '        if model["seen"][0] % 2 == 1:\n'
    '            model["w"][3] = np.nan\n'
    '    model["seen"] += 1\n',
)


def _alone_and_together() -> tuple[int, list[int]]:
    """Of three clients in two groups, who is alone in his, and the other two."""
    parts = assign(range(3), 2, server_generator(7, 0))
    return min(parts, key=len)[0], max(parts, key=len)


def test_groups_have_rounds_of_their_own_and_go_on_without_a_member_that_spoils_one(
    place: Place, tmp_path: Path
) -> None:
    _, (_, spoiler) = _alone_and_together()
    groups, config = {"count": 2, "rounds": 2}, {"spoiler": spoiler}
    asked = {"rounds": 2, "seed": 7, "clients": {"count": 3, "minimum": 2}}
    run = place.federate(SPOILER, groups=json.dumps(groups), config=config, **asked)
    place.finishes(run)
    (tmp_path / "app.py").write_text(SPOILER)
    files = {"app": "app.py", "workspace": str(tmp_path), "config": config, "groups": groups}
    result = simulate({**asked, **files}, engine="exact", debug=True)
    assert hashlib.sha256(save(result.model)).hexdigest() == place.model(run)
    rounds = place.client.call("GET", f"/v1/runs/{run}")["rounds"]
    for row, other in zip(rounds[1:], result.history[1:], strict=False):
        for g in (0, 1):
            assert row["metrics"][f"groups.{g}.clients"] == other[f"groups.{g}.clients"] == 1
    failed = place.query(
        "SELECT data FROM events WHERE run = :r AND kind = 'client_failed' ORDER BY id", r=run
    )
    assert [json.loads(row.data)["client"] for row in failed] == [spoiler, spoiler]


def test_a_group_of_which_everybody_spoils_his_update_ends_the_run(place: Place) -> None:
    alone, _ = _alone_and_together()
    groups = json.dumps({"count": 2, "rounds": 2})
    clients = {"count": 3, "minimum": 1}
    config = {"spoiler": alone}
    run = place.federate(SPOILER, groups=groups, config=config, clients=clients, rounds=2)
    end = place.end(run)
    assert end["state"] == "FAILED"
    assert "round 1, turn 2 of 2, group" in end["cause"]["message"]
    assert "'w'" in end["cause"]["message"]
