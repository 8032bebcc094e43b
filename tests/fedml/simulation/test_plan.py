# SPDX-License-Identifier: Apache-2.0
"""What a simulation is asked, and what is said of what cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedml import runfile
from fedml.errors import ConfigError, RunFailed
from fedml.federate.algorithm import Kind, create, names
from fedml.simulation import ClientFailed, Simulation, simulate
from fedml.simulation.plan import read
from tests.fedml.simulation import apps
from tests.fedml.simulation.bits import same_bits

DATA = "\ndef data(client, config):\n    return {}\n"


def plan(folder: Path, app: str = apps.LINEAR, **more: Any) -> dict[str, Any]:
    return {
        "app": apps.write(folder, app).name,
        "workspace": str(folder),
        "rounds": 1,
        "config": {"lr": 0.1},
        "clients": {"count": 4},
        **more,
    }


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"clients.per_round": 5}, "per_round is 5, there are 4 clients"),
        ({"clients.minimum": 5}, "minimum is 5, 4 take part"),
        ({"clients.count": 0}, "clients.count must be >= 1"),
        ({"rounds": 0}, "rounds must be >= 1"),
        ({"evaluate.every": 0}, "evaluate.every must be >= 1"),
        ({"simulation.engine": "warp"}, "no engine 'warp'; there are auto, exact"),
        ({"simulation.devices": {"dropout": 1.0}}, "dropout must be below 1"),
        ({"simulation.devices": {"offline_s": 5}}, "nobody is online"),
        ({"simulation.devices": {"trace": "no.csv"}}, "cannot be read"),
        ({"clients": 3}, "is a section"),
        ({"nowhere.key": 3}, "no section 'nowhere'"),
        ({"per_round": 2}, "per_round alone is a key of `config`, which has none of this name"),
        ({"clients.per_rund": 3}, "unknown key `clients.per_rund`; did you mean `per_round`"),
        ({"clients.count.x": 3}, "`count` is 4 and has no keys in it"),
        ({"clients.count": "four"}, "`clients.count` must be a whole number"),
        ({"rounds": "many"}, "`rounds` must be a whole number"),
        ({"seed": 1.5}, "`seed` must be a whole number"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(
    changes: dict[str, Any], text: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=text):
        read(plan(tmp_path), changes=changes)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"algorithm": "fedavgg"}, "did you mean 'fedavg'"),
        ({"algorithm_config": {"server_lrr": 1}}, "did you mean 'server_lr'"),
        ({"treatment": {"rule": "median"}}, "treatment: unknown key 'rule'"),
        (
            {"algorithm": "fedbuff", "treatment": {"robust": {"rule": "median"}}},
            "fedbuff takes updates one by one.*such as fedavg",
        ),
        (
            {"algorithm": "fedasync", "clients": {"count": 4, "over_select": 0.5}},
            "no rounds to over-select for",
        ),
        (
            {"algorithm": "fedbuff", "clients": {"count": 4, "deadline_s": 5}},
            "or to close at a deadline",
        ),
    ],
)
def test_an_algorithm_that_cannot_go_with_the_rest_is_refused(
    more: dict[str, Any], text: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=text):
        simulate(plan(tmp_path, **more), debug=True)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"clients": {"count": 4, "per_rond": 2}}, "the run: unknown key `clients.per_rond`; did"),
        ({"sede": 3}, "the run: unknown key `sede`; did you mean `seed`"),
        ({"rounds": "many"}, "the run: `rounds` must be a whole number"),
        ({"simulation": {"devices": {"speed": 1}}}, "unknown key `simulation.devices.speed`"),
    ],
)
def test_a_mapping_is_checked_as_a_file_is(more: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=text):
        read(plan(tmp_path, **more))


def test_a_run_file_for_both_keeps_what_is_of_simulations_from_the_broker(tmp_path: Path) -> None:
    asked = plan(tmp_path, simulation={"engine": "exact", "devices": {"latency_s": 2}})
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(asked))
    assert "simulation" not in runfile.read_federated(file)[0]
    found = read(file)
    assert found.engine == "exact"
    assert found.devices is not None
    assert found.devices.latency_s == 2


def test_an_algorithm_that_needs_more_than_train_gives_names_the_ways_out(tmp_path: Path) -> None:
    app = apps.LINEAR + "\nsgd = train\ndef train(m, d, c, r): return sgd(m, d, c, r)\n"
    with pytest.raises(ConfigError, match=r"takes no `correction` argument.*choose fedavg"):
        simulate(plan(tmp_path, app, algorithm="scaffold"), debug=True)


def test_a_sweep_may_change_any_key_and_bare_names_are_of_config(tmp_path: Path) -> None:
    changes = {"lr": 0.5, "seed": 4, "clients.per_round": 2, "algorithm_config.server_lr": 0.3}
    found = read(plan(tmp_path), changes=changes)
    assert (found.config["lr"], found.seed, found.per_round) == (0.5, 4, 2)
    assert found.algorithm_config == {"server_lr": 0.3}


def test_one_client_alone_is_a_federation(tmp_path: Path) -> None:
    result = simulate(plan(tmp_path, clients={"count": 1}), debug=True)
    assert result.rounds == 1
    assert result.metrics["devices.examples"] == 9


def test_clients_without_data_count_for_nothing_and_all_of_them_end_the_run(
    tmp_path: Path,
) -> None:
    empty = (
        "\nfull = data\ndef data(client, config):\n"
        "    x, y = full(client, config)\n"
        "    n = 0 if client.index in config['empty'] else len(x)\n"
        "    return x[:n], y[:n]\n"
    )
    for engine, groups in (
        ("closed_form", {}),
        ("exact", {}),
        ("exact", {"count": 2, "rounds": 2}),
    ):
        asked = plan(tmp_path, apps.LINEAR + empty, config={"lr": 0.1, "empty": [1, 3]})
        asked["groups"] = groups
        result = simulate(asked, engine=engine, debug=True)
        assert result.metrics["devices.examples"] == 9 + 17
        asked["config"]["empty"] = [0, 1, 2, 3]
        with pytest.raises(RunFailed, match="none of its 4 clients has an example"):
            simulate(asked, engine=engine, debug=True)


IN_ROUNDS = [name for name in names() if create(name).kind is Kind.SYNCHRONOUS]


@pytest.mark.parametrize("algorithm", IN_ROUNDS)
def test_a_client_without_examples_counts_as_one_that_is_not_there(
    algorithm: str, tmp_path: Path
) -> None:
    app = apps.LINEAR + (
        "\nfull = data\ndef data(client, config):\n"
        "    x, y = full(client, config)\n"
        "    return (x, y) if client.index < 3 else (x[:0], y[:0])\n"
    )
    if algorithm == "mime":
        app += "\ndef model(config):\n    from fedml import model as m\n"
        app += "    return m.create('linear', inputs=6, outputs=3)\n"
    asked = plan(
        tmp_path,
        app,
        algorithm=algorithm,
        rounds=3,
        evaluate={"devices": False},
    )
    missing, empty = (
        simulate({**asked, "clients": {"count": count}}, engine="exact", debug=True)
        for count in (3, 4)
    )
    assert same_bits(missing.model, empty.model)


@pytest.mark.parametrize("algorithm", ["fedasync", "fedbuff"])
def test_without_rounds_too_clients_without_examples_count_for_nothing(
    algorithm: str, tmp_path: Path
) -> None:
    app = apps.LINEAR + (
        "\nfull = data\ndef data(client, config):\n"
        "    x, y = full(client, config)\n"
        "    return (x, y) if client.index == config['only'] else (x[:0], y[:0])\n"
    )
    settings = {"buffer": 2} if algorithm == "fedbuff" else {}
    asked = plan(tmp_path, app, algorithm=algorithm, algorithm_config=settings, rounds=2)
    found = simulate({**asked, "config": {"lr": 0.1, "only": 1}}, debug=True)
    # Two versions, all of client 1: whatever the others have sent in between is in neither.
    assert found.metrics["train.loss"] < found.history[1]["train.loss"]
    with pytest.raises(RunFailed, match="no client at work has an example"):
        simulate({**asked, "config": {"lr": 0.1, "only": 9}}, debug=True)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("return np.zeros((3, 6)), np.zeros(2, int)", "x has 3 examples and y has 2"),
        ("return np.zeros((3, 5)), np.zeros(3, int)", "has 5 numbers, the model takes 6"),
        ("return np.zeros((3, 6)), np.array([0, 7, 1])", "class 7, the model has classes 0 to 2"),
        ("return np.zeros((3, 6)), np.array([0, -1, 1])", "class -1"),
        ("return 'something'", "cannot train on a str"),
        ("return np.full((3, 6), np.nan), np.zeros(3, int)", "diverged or the data holds NaN"),
        (
            "from fedml.data import partition\n    partition.iid(3, client.count)",
            "round 1: 3 examples cannot give 4 clients at least 1 each; use at most 3 clients$",
        ),
    ],
)
def test_data_that_does_not_fit_names_the_client_and_what_is_wrong(
    data: str, text: str, tmp_path: Path
) -> None:
    app = apps.LINEAR + f"\ndef data(client, config):\n    {data}\n"
    with pytest.raises(ClientFailed, match=text) as failed:
        simulate(plan(tmp_path, app, evaluate={"devices": False}), engine="closed_form", debug=True)
    assert failed.value.client == 0
    assert failed.value.round == 1
    assert failed.value.traceback == ""  # the text says it all


def test_a_missing_learning_rate_says_where_to_put_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"LocalSGD\(lr=…\), or config: \{lr: …\}"):
        simulate(plan(tmp_path, config={}), debug=True)


def test_what_has_no_effect_is_said(tmp_path: Path) -> None:
    from fedml.simulation import Listener

    heard: list[str] = []

    class Ears(Listener):
        def say(self, text: str) -> None:
            heard.append(text)

    asked = read(plan(tmp_path, clients={"count": 4, "over_select": 0.5}))
    Simulation(asked, debug=True, listener=Ears()).run()
    assert any("over_select" in text and "no effect" in text for text in heard)
    assert any(text.startswith("engine closed_form on 1 process") for text in heard)
