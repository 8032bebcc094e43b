# SPDX-License-Identifier: Apache-2.0
"""Robust rules, privacy and compression, simulated: what agents and aggregator do, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedml.errors import ConfigError
from fedml.federate.aggregator import Aggregator
from fedml.protect.accountant import Accountant, Sampling
from fedml.runfile import read_federated
from fedml.simulation import Listener, Simulation, simulate
from fedml.simulation.plan import read
from fedml_protocol.federate import OpenRun, PlanRound
from tests.fedml.simulation import apps, deployed
from tests.fedml.simulation.bits import same_bits

# Tensors of fewer than 64 entries are not compressed.
WIDE = apps.OWN_TRAIN.replace("nn.Linear(6, 8)", "nn.Linear(6, 40)").replace(
    "nn.Linear(8, 3)", "nn.Linear(40, 3)"
)
MIXED_KRUM = {"robust": {"rule": "krum", "byzantine": 1, "mixing": "nearest_neighbours"}}
TOP_K = {"compression": {"kind": "topk", "fraction": 0.05}}
PRIVACY = {"privacy": {"noise_multiplier": 0.8, "clip": 0.3, "quantile": 0.5, "delta": 1e-6}}
CASES = {
    "krum": MIXED_KRUM,
    "median": {"robust": {"rule": "median"}},
    "bucketing": {"robust": {"rule": "geometric_median", "mixing": "bucketing"}},
    "centred": {"robust": {"rule": "centred_clipping", "radius": 0.1}},
    "topk": TOP_K,
    "int8": {"compression": {"kind": "int8"}},
    "both": {**MIXED_KRUM, **TOP_K},
}


pytestmark = pytest.mark.usefixtures("one_thread")


def plan(folder: Path, treatment: dict[str, Any], app: str = WIDE, **more: Any) -> dict[str, Any]:
    path = apps.write(folder / "app", app)
    return {
        "app": path.name,
        "workspace": str(path.parent),
        "treatment": treatment,
        "rounds": 4,
        "seed": 11,
        "config": {"lr": 0.2},
        "clients": {"count": 7, "per_round": 6},
        **more,
    }


@pytest.mark.parametrize("case", CASES)
def test_a_treated_run_has_the_bits_of_the_deployed_one(case: str, tmp_path: Path) -> None:
    asked = plan(tmp_path, CASES[case])
    app = tmp_path / "app" / "app.py"
    models = deployed.run(app, tmp_path / "deployed", asked)
    untreated = simulate({**asked, "treatment": {}}, engine="exact", workers=1)
    assert not same_bits(untreated.model, models[-1])
    assert same_bits(simulate(asked, workers=2).model, models[-1])


@pytest.mark.parametrize("part", [CASES["int8"], MIXED_KRUM], ids=["int8", "krum"])
def test_the_order_of_the_names_in_a_model_changes_no_bit(
    part: dict[str, Any], tmp_path: Path
) -> None:
    big = apps.LINEAR.replace("(6, 3)", "(6, 64)").replace("zeros(3,", "zeros(64,")
    asked = plan(tmp_path, part, app=big)
    models = deployed.run(tmp_path / "app" / "app.py", tmp_path / "deployed", asked)
    assert same_bits(simulate(asked, debug=True).model, models[-1])


def test_an_algorithm_with_states_of_its_own_keeps_them_beside_the_treatment(
    tmp_path: Path,
) -> None:
    asked = plan(tmp_path, TOP_K, algorithm="scaffold")
    models = deployed.run(tmp_path / "app" / "app.py", tmp_path / "deployed", asked)
    assert same_bits(simulate(asked, debug=True).model, models[-1])


def test_clients_walk_one_by_one_whatever_engine_was_asked_for(tmp_path: Path) -> None:
    heard: list[str] = []

    class Ears(Listener):
        def say(self, text: str) -> None:
            heard.append(text)

    asked = plan(tmp_path, {"robust": {"rule": "median"}}, app=apps.LINEAR)
    fast = Simulation(read(asked, engine="closed_form"), debug=True, listener=Ears()).run()
    assert fast.engine == "exact"
    assert any("engine exact" in text and "looks at each update" in text for text in heard)
    assert same_bits(fast.model, simulate(asked, engine="exact", debug=True).model)


def test_the_privacy_that_was_spent_is_what_the_accountant_says(tmp_path: Path) -> None:
    result = simulate(plan(tmp_path, PRIVACY), debug=True)
    accountant = Accountant()
    for row in result.history[1:]:
        accountant.add(0.8, 6 / 7, sampling=Sampling.FIXED)
        assert row["privacy.epsilon"] == accountant.epsilon(1e-6)
    # The bound has moved, and each round's was in force on the clients.
    clips = [row["privacy.clip"] for row in result.history[1:]]
    assert clips[0] == 0.3
    assert len(set(clips)) == 4
    assert "train.loss" not in result.metrics  # what one client says of itself is not clipped


def test_noise_is_repeated_with_the_seed_and_differs_without(tmp_path: Path) -> None:
    asked = plan(tmp_path, PRIVACY)
    once = simulate(asked, debug=True)
    assert same_bits(once.model, simulate(asked, workers=2).model)
    other = simulate({**asked, "seed": 12}, debug=True)
    assert not same_bits(once.model, other.model)


@pytest.mark.parametrize(
    "treatment", [TOP_K, PRIVACY, CASES["centred"]], ids=["topk", "privacy", "centred"]
)
def test_a_resumed_run_keeps_what_the_treatment_remembers(
    treatment: dict[str, Any], tmp_path: Path
) -> None:
    asked = plan(tmp_path, treatment)
    whole = simulate(asked, debug=True, rounds=5)
    out = tmp_path / "part"
    simulate(asked, debug=True, rounds=2, out=out)
    rest = simulate(asked, debug=True, rounds=5, out=out, resume=True)
    assert same_bits(whole.model, rest.model)
    epsilon = "privacy.epsilon"
    assert [row.get(epsilon) for row in whole.history] == [row.get(epsilon) for row in rest.history]


def test_bytes_are_those_of_the_compressed_update(tmp_path: Path) -> None:
    size = 4 * (6 * 40 + 40 + 40 * 3 + 3)
    plain = simulate(plan(tmp_path, {}), debug=True, rounds=1).history[1]
    assert plain["bytes_up"] == plain["bytes_down"] == 6 * size
    packed = simulate(plan(tmp_path, TOP_K), debug=True, rounds=1).history[1]
    # A value and its place for one in twenty of 240 and of 120; the biases are small, so whole.
    assert packed["bytes_up"] == 6 * (8 * (12 + 6) + 4 * 43)
    assert packed["bytes_down"] == plain["bytes_down"]
    eighth = simulate(plan(tmp_path, CASES["int8"]), debug=True, rounds=1).history[1]
    assert eighth["bytes_up"] == 6 * (240 + 120 + 2 * 4 + 4 * 43)


def test_compressed_updates_take_less_simulated_time(tmp_path: Path) -> None:
    devices = {"devices": {"megabits_per_s": 0.001, "seconds_per_example": 0}}
    times = [
        simulate(plan(tmp_path, treatment, simulation=devices), debug=True, rounds=1).simulated_s
        for treatment in ({}, TOP_K)
    ]
    assert times[0] is not None
    assert times[1] is not None
    assert times[1] < 0.7 * times[0]


def test_a_buffer_takes_compressed_updates_one_by_one(tmp_path: Path) -> None:
    settings = {"algorithm": "fedbuff", "algorithm_config": {"buffer": 3}, "rounds": 6}
    whole = {"compression": {"kind": "topk", "fraction": 1.0}}
    plain = simulate(plan(tmp_path, {}, **settings), engine="exact", debug=True)
    packed = simulate(plan(tmp_path, whole, **settings), debug=True)
    assert same_bits(plain.model, packed.model)
    lossy = simulate(plan(tmp_path, {"compression": {"kind": "int8"}}, **settings), debug=True)
    for name, array in plain.model.items():
        np.testing.assert_allclose(lossy.model[name], array, atol=0.02)


def test_a_cohort_of_those_who_are_there_is_no_sample_of_all(tmp_path: Path) -> None:
    asked = plan(tmp_path, {"privacy": {"noise_multiplier": 2.0}}, rounds=2)
    asked["clients"] = {"count": 7, "per_round": 3}
    away = "".join(f"{client},9000,9001\n" for client in (1, 3, 6))
    (tmp_path / "app" / "trace.csv").write_text(f"client,start_s,end_s\n{away}")
    asked["simulation"] = {"devices": {"trace": "trace.csv"}}
    accountant = Accountant()
    accountant.add(2.0, 3 / 4, 2, Sampling.FIXED)
    spent = simulate(asked, debug=True).metrics["privacy.epsilon"]
    assert spent == pytest.approx(accountant.epsilon(1e-5), rel=1e-12)


@pytest.mark.parametrize("per_round", [3, 7])
def test_both_stages_of_a_round_are_one_sample_of_clients(per_round: int, tmp_path: Path) -> None:
    asked = plan(tmp_path, {"privacy": {"noise_multiplier": 4.0}}, app=apps.IMAGES, rounds=2)
    asked |= {"algorithm": "mime", "clients": {"count": 7, "per_round": per_round}}
    told: list[dict[str, float]] = []
    deployed.run(tmp_path / "app" / "app.py", tmp_path / "deployed", asked, told)
    result = simulate(asked, debug=True)
    accountant = Accountant()
    sampling = Sampling.FIXED if per_round < 7 else Sampling.POISSON
    for said, row in zip(told[1::2], result.history[1:], strict=True):
        # Two releases of noise 4 are one of 4 / sqrt(2), on the same sample.
        accountant.add(8**0.5, per_round / 7, sampling=sampling)
        spent = pytest.approx(accountant.epsilon(1e-5), rel=1e-12)
        assert said["privacy.epsilon"] == row["privacy.epsilon"] == spent


def test_who_is_asked_under_privacy_hangs_on_no_seed(tmp_path: Path) -> None:
    def asked(treatment: dict[str, Any]) -> list[tuple[int, ...]]:
        aggregator = Aggregator()
        app = apps.write(tmp_path / "app", apps.LINEAR)
        opened = OpenRun(
            algorithm="fedavg",
            seed=0,
            app_dir=str(app.parent),
            app=app.name,
            clients=200,
            treatment=json.dumps(treatment),
        )
        aggregator.answer(opened)
        question = PlanRound(round=1, clients=tuple(range(200)), count=100)
        return [aggregator.answer(question).clients for _ in range(2)]

    first, again = asked({})
    assert first == again
    first, again = asked({"privacy": {"noise_multiplier": 1.0}})
    assert len(first) == len(again) == 100
    assert first != again


MIXED = {"robust": {"rule": "krum", "byzantine": 1, "mixing": {"kind": "bucketing", "size": 2}}}


@pytest.mark.parametrize(
    ("treatment", "clients", "text"),
    [
        (
            {"robust": {"rule": "krum", "byzantine": 2}},
            {"count": 6},
            r"krum with byzantine=2, keep=1 needs at least 7 clients, there are 6 in a round "
            r"\(`clients.count: 6`\)",
        ),
        (
            {"robust": {"rule": "krum", "byzantine": 1, "keep": 5}},
            {"count": 9, "per_round": 5},
            r"needs at least 6 clients, there are 5 in a round \(`clients.per_round: 5`\)",
        ),
        ({"robust": {"rule": "trimmed_mean", "trim": 2}}, {"count": 4}, "needs at least 5 clients"),
        (
            {"robust": {"rule": "mean", "byzantine": 2, "mixing": "nearest_neighbours"}},
            {"count": 4},
            "mean after nearest_neighbours with byzantine=2 needs at least 5 clients",
        ),
        # Five buckets for Krum: four of two, and one more.
        (MIXED, {"count": 8}, "krum .* after bucketing with size=2 needs at least 9 clients"),
        (
            {"robust": {"rule": "krum", "byzantine": 1}},
            {"count": 6, "minimum": 4},
            r"needs at least 5 clients, there are 4 in a round \(`clients.minimum: 4`\)",
        ),
    ],
)
def test_a_rule_that_wants_more_clients_is_refused_before_anything_runs(
    treatment: dict[str, Any], clients: dict[str, int], text: str, tmp_path: Path
) -> None:
    asked = plan(tmp_path, treatment, clients=clients, app="raise SystemExit('it was run')")
    with pytest.raises(ConfigError, match=f"{text}.*Ask more clients, or expect fewer liars"):
        read(asked)
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(asked))
    with pytest.raises(ConfigError, match=text):  # and so does `fedml federate`
        read_federated(file)


def test_a_rule_does_with_as_many_clients_as_it_needs(tmp_path: Path) -> None:
    asked = plan(tmp_path, MIXED, clients={"count": 9}, rounds=1)
    assert simulate(asked, debug=True).history[1]["answered"] == 9


def test_what_cannot_be_clipped_is_refused_before_anything_runs(tmp_path: Path) -> None:
    asked = plan(tmp_path, {"privacy": {"noise_multiplier": 1.0}}, app=apps.IMAGES)
    asked["config"] = {"lr": 0.1, "batch_norm": True}
    with pytest.raises(ConfigError, match="group instead of batch normalisation"):
        simulate(asked, debug=True)


@pytest.mark.parametrize("treatment", [MIXED_KRUM, CASES["int8"], PRIVACY])
def test_an_update_that_is_not_finite_fails_its_client_alone(
    treatment: dict[str, Any], tmp_path: Path
) -> None:
    heard: list[str] = []

    class Ears(Listener):
        def say(self, text: str) -> None:
            heard.append(text)

    diverging = (
        "\nsgd = train\ndef train(model, data, config, rng, correction=None):\n"
        "    found = sgd(model, data, config, rng)\n"
        "    if len(data['x']) == 9:\n"
        "        with torch.no_grad():\n"
        "            model[0].weight[0, 0] = float('nan')\n"
        "    return found\n"
    )
    asked = plan(tmp_path, treatment, app=WIDE + diverging)
    asked["clients"] = {"count": 7, "minimum": 6}
    run = Simulation(read(asked, rounds=1), debug=True, listener=Ears())
    result = run.run()
    assert result.history[1]["answered"] == 6
    assert any("goes on without client 0" in text and "holds NaN" in text for text in heard)
    assert all(np.isfinite(array).all() for array in result.model.values())
