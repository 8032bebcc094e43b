# SPDX-License-Identifier: Apache-2.0
"""One configuration, simulated and deployed: with the engine `exact`, the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedml.federate import cohort
from fedml.federate.algorithm import NobodyLearned
from fedml.federate.hierarchical import assign
from fedml.simulation import simulate
from tests.fedml.simulation import apps, deployed
from tests.fedml.simulation.bits import same_bits

CASES = {
    "fedavg": {},
    "fedadam": {"server_lr": 0.1},
    "scaffold": {"server_lr": 0.9},
    "fednova": {},
    "feddyn": {"alpha": 0.05},
    "ditto": {"strength": 0.5},
}


pytestmark = pytest.mark.usefixtures("one_thread")


def plan(app: Path, algorithm: str, **more: Any) -> dict[str, Any]:
    return {
        "app": app.name,
        "workspace": str(app.parent),
        "algorithm": algorithm,
        "algorithm_config": CASES[algorithm],
        "rounds": 4,
        "seed": 11,
        "config": {"lr": 0.2},
        "clients": {"count": 6, "per_round": 4},
        **more,
    }


@pytest.mark.parametrize("algorithm", CASES)
def test_a_simulated_model_has_the_bits_of_the_deployed_one(algorithm: str, tmp_path: Path) -> None:
    app = apps.write(tmp_path / "app", apps.OWN_TRAIN)
    asked = plan(app, algorithm)
    models = deployed.run(app, tmp_path / "deployed", asked)
    assert not same_bits(models[-1], models[-2])
    result = simulate(asked, engine="exact", workers=2)
    assert same_bits(result.model, models[-1])


def test_partial_sums_of_any_number_of_groups_have_the_bits_of_the_flat_sum(
    tmp_path: Path,
) -> None:
    app = apps.write(tmp_path / "app", apps.OWN_TRAIN)
    asked = plan(app, "fedavg")
    flat = deployed.run(app, tmp_path / "deployed", asked)[-1]
    for groups in (1, 3, 4):
        assert same_bits(simulate(asked, engine="exact", workers=groups).model, flat)


def test_the_built_in_training_is_deployed_with_the_same_bits(tmp_path: Path) -> None:
    app = apps.write(tmp_path / "app", apps.LINEAR)
    for algorithm in ("fedavg", "scaffold"):
        asked = plan(app, algorithm)
        models = deployed.run(app, tmp_path / algorithm, asked)
        assert same_bits(simulate(asked, engine="exact", workers=2).model, models[-1])


@pytest.mark.parametrize("groups", [{}, {"count": 2, "rounds": 2}])
def test_a_deployed_round_of_nobody_with_examples_says_so(
    groups: dict[str, int], tmp_path: Path
) -> None:
    app = apps.OWN_TRAIN + "\ndef train(model, data, config, rng):\n    return {'examples': 0}\n"
    file = apps.write(tmp_path / "app", app)
    with pytest.raises(NobodyLearned, match=r"none of \d clients has an example to learn from"):
        deployed.run(file, tmp_path / "deployed", plan(file, "fedavg", groups=groups))


def test_metrics_are_called_as_in_deployed_runs(tmp_path: Path) -> None:
    app = apps.write(tmp_path / "app", apps.OWN_TRAIN)
    result = simulate(plan(app, "fedavg"), engine="exact", workers=1)
    names = {"train.loss", "central.accuracy", "devices.accuracy", "devices.examples"}
    assert names <= result.metrics.keys()
    assert [row["round"] for row in result.history] == [0, 1, 2, 3, 4]
    # The first model is evaluated on devices in the first round, the last one at the end by all.
    assert all("devices.accuracy" in row for row in result.history)
    assert result.metrics["devices.examples"] == sum(9 + 4 * k for k in range(6))


BARREN = (
    apps.OWN_TRAIN
    + """
trained = train
def train(model, data, config, rng, correction=None):
    if len(data["x"]) in config["barren"]:
        return {"examples": 0}
    return trained(model, data, config, rng, correction)
"""
)


@pytest.mark.parametrize(
    ("more", "barren"),
    [
        ({"algorithm": "scaffold"}, [1, 4]),
        ({"algorithm": "feddyn", "algorithm_config": {"alpha": 0.05}}, [1, 4]),
        # A group with one that has nothing, and one of nobody who has anything.
        ({"groups": {"count": 3, "rounds": 2, "algorithm": "scaffold"}}, [1]),
        ({"groups": {"count": 3, "rounds": 2, "algorithm": "scaffold"}}, "a group"),
        ({"groups": {"count": 3}, "algorithm": "scaffold"}, "a group"),
    ],
)
def test_clients_without_examples_leave_the_same_bits_on_both_sides(
    more: dict[str, Any], barren: list[int] | str, tmp_path: Path
) -> None:
    app = apps.write(tmp_path / "app", BARREN)
    if barren == "a group":
        barren = assign(range(6), 3, cohort.server_generator(11, 0))[1]
    sizes = [9 + 4 * int(client) for client in barren]
    asked = plan(app, "fedavg", config={"lr": 0.2, "barren": sizes}, rounds=5)
    asked |= {"clients": {"count": 6, "per_round": 5}, **more}
    told: list[dict[str, float]] = []
    models = deployed.run(app, tmp_path / "deployed", asked, told)
    result = simulate(asked, engine="exact", workers=2)
    assert same_bits(result.model, models[-1])
    for row, said in zip(result.history[1:], told, strict=True):
        assert {name for name in said if name.startswith("groups.")} == {
            name for name in row if name.startswith("groups.")
        }
    full = {**asked, "config": {"lr": 0.2, "barren": []}}
    assert not same_bits(result.model, simulate(full, engine="exact", workers=2).model)
