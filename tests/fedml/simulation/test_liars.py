# SPDX-License-Identifier: Apache-2.0
"""Clients that lie: real learning falls to them, robust rules hold, and reports say who it was."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedml import runfile
from fedml.data.dataset import Dataset, Examples
from fedml.errors import ConfigError
from fedml.federate import cohort
from fedml.federate.aggregate import weighted_mean
from fedml.federate.application import Application, Client, UserTraining
from fedml.federate.arrays import scaled
from fedml.federate.fedavg import FedAvg
from fedml.simulation import ClientFailed, Simulation, simulate
from fedml.simulation.plan import read
from tests.fedml.simulation import apps
from tests.fedml.simulation.bits import same_bits

EXAMPLE = Path(__file__).parents[3] / "examples" / "simulate" / "attack.yaml"
NNM = {"mixing": "nearest_neighbours"}
RULES = {
    "median": {"rule": "median", "byzantine": 2, **NNM},
    "trimmed_mean": {"rule": "trimmed_mean", "trim": 2, **NNM},
    "krum": {"rule": "krum", "byzantine": 2, **NNM},
}
ATTACKS = {
    "flip": {"kind": "flip", "scale": 4.0},
    "alie": {"kind": "alie", "z": 10.0},
    "ipm": {"kind": "ipm", "scale": 4.0},
    "random": {"kind": "random", "deviation": 5.0},
}
FLIP = {"kind": "flip", "clients": 2}


def plan(folder: Path, attack: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "app": apps.write(folder, apps.LINEAR).name,
        "workspace": str(folder),
        "rounds": 3,
        "seed": 5,
        "config": {"lr": 0.1},
        "clients": {"count": 7},
        "simulation": {"attack": attack},
        **more,
    }


@pytest.fixture(scope="module")
def digits(
    real: Callable[[str], Dataset[Examples]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """A run of ten clients that learn hand-written digits."""
    found, folder = real("digits"), tmp_path_factory.mktemp("digits")
    np.savez(
        folder / "digits.npz",
        x=found.train.x.reshape(-1, 64),
        y=found.train.y,
        test_x=found.test.x.reshape(-1, 64),
        test_y=found.test.y,
    )
    return {
        "app": apps.write(folder, apps.DIGITS).name,
        "workspace": str(folder),
        "rounds": 10,
        "seed": 3,
        "clients": {"count": 10},
        "evaluate": {"devices": False},
    }


def accuracy(asked: dict[str, Any], attack: Any = None, rule: Any = None) -> float:
    more = {
        "treatment": {"robust": rule} if rule else {},
        "simulation": {"attack": {**attack, "clients": 2}} if attack else {},
    }
    return simulate({**asked, **more}, debug=True).metrics["central.accuracy"]


@pytest.mark.parametrize("attack", ATTACKS)
def test_two_liars_of_ten_ruin_the_mean_and_no_rule(attack: str, digits: dict[str, Any]) -> None:
    honest = accuracy(digits)
    assert honest > 0.92
    assert accuracy(digits, ATTACKS[attack]) < honest - 0.1
    for rule in RULES.values():
        assert accuracy(digits, ATTACKS[attack], rule) > honest - 0.03


def test_false_labels_of_four_in_ten_are_learned_by_the_mean(digits: dict[str, Any]) -> None:
    lie = {"attack": {"kind": "label_flip", "clients": 0.4, "from": 3, "to": 8}}
    result = simulate({**digits, "simulation": lie}, debug=True)
    assert result.metrics["attack.liars"] == 4
    assert result.engine == "closed_form"  # nothing is forged, so nothing is kept one by one
    assert result.metrics["central.accuracy"] < accuracy(digits) - 0.03


def test_the_example_holds_out_and_without_its_rule_it_does_not() -> None:
    held = simulate(EXAMPLE, rounds=4, debug=True)
    assert held.metrics["central.accuracy"] > 0.65
    ruined = simulate(EXAMPLE, rounds=4, debug=True, changes={"treatment.robust": {}})
    assert ruined.metrics["central.accuracy"] < 0.4


def test_a_lie_takes_the_place_of_the_honest_update(tmp_path: Path) -> None:
    asked = plan(tmp_path, {"kind": "flip", "clients": 2, "scale": 3.0}, rounds=1)
    run = Simulation(read(asked), debug=True)
    result = run.run()
    assert run.liars is not None
    app = Application(tmp_path / "app.py", {"lr": 0.1})
    model, updates = app.first_model(5), []
    for k in range(7):
        local = UserTraining(app, app.new_model(5), app.data(Client(index=k, count=7)))
        updates.append(FedAvg().client_update(model, {}, None, local, cohort.generator(5, 0, k)))
    sent = [
        scaled(u.arrays, -3.0) if k in run.liars.clients else u.arrays
        for k, u in enumerate(updates)
    ]
    step = weighted_mean(sent, [u.weight for u in updates])
    for name, array in model.items():
        np.testing.assert_array_equal(result.model[name], array + step[name])


@pytest.mark.parametrize("kind", ["alie", "ipm"])
def test_who_colludes_sees_what_the_honest_send_in_this_round(kind: str, tmp_path: Path) -> None:
    more = {"z": 0.5} if kind == "alie" else {"scale": 2.0}
    asked = plan(tmp_path, {"kind": kind, "clients": 2, **more}, rounds=1)
    run = Simulation(read(asked), debug=True)
    seen: dict[int, Any] = {}
    assert run.liars is not None
    forged = type(run.liars).forged

    def watched(self: Any, turn: int, updates: Any) -> Any:
        lies = forged(self, turn, updates)
        seen.update(lies=lies, updates=updates)
        return lies

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(run.liars), "forged", watched)
        run.run()
    honest = [seen["updates"][k] for k in range(7) if k not in run.liars.clients]
    assert len(honest) == 5
    for name in honest[0]:
        stack = np.stack([arrays[name].astype(np.float64) for arrays in honest])
        if kind == "alie":
            expected = stack.mean(axis=0) - 0.5 * stack.std(axis=0)
        else:
            expected = -2.0 * stack.mean(axis=0)
        for lie in seen["lies"].values():
            np.testing.assert_array_equal(lie[name], expected.astype(np.float32))


@pytest.mark.parametrize("engine", ["closed_form", "exact"])
def test_false_labels_are_what_the_liar_alone_learns_from(engine: str, tmp_path: Path) -> None:
    lie = {"kind": "label_flip", "clients": 2, "from": 0, "to": 2}
    result = simulate(plan(tmp_path / "a", lie), engine=engine, debug=True)
    run = Simulation(read(plan(tmp_path / "b", lie)), debug=True)
    assert run.liars is not None
    # The same by hand.
    by_hand = (
        "\nfull = data\ndef data(client, config):\n"
        "    x, y = full(client, config)\n"
        f"    return x, np.where(y == 0, 2, y) if client.index in {run.liars.clients} else y\n"
    )
    asked = plan(tmp_path / "c", {}, simulation={})
    apps.write(tmp_path / "c", apps.LINEAR + by_hand)
    other = simulate(asked, engine=engine, debug=True)
    assert same_bits(result.model, other.model)
    # Liars are asked about models in the usual way: their evaluation is of their real labels.
    assert result.metrics["devices.loss"] != other.metrics["devices.loss"]


def test_who_lies_is_drawn_once_and_by_the_seed_alone(tmp_path: Path) -> None:
    def who(seed: int, **attack: Any) -> tuple[int, ...]:
        made = read(plan(tmp_path, {**FLIP, **attack}, clients={"count": 50}, seed=seed))
        found = made.create_liars(made.create_algorithm())
        assert found is not None
        return found.clients

    assert who(1) == who(1, kind="zero")
    assert len({who(seed) for seed in range(20)}) > 15
    assert len(who(1, clients=0.1)) == 5
    assert set(who(1)) <= set(who(1, clients=10))  # more liars: the same ones and others
    assert who(1, clients=0) == ()
    # A number of liars that a sweep may begin with.
    nobody = simulate(plan(tmp_path, {**FLIP, "clients": 0}), engine="closed_form", debug=True)
    plain = simulate(plan(tmp_path, {}, simulation={}), engine="closed_form", debug=True)
    assert same_bits(nobody.model, plain.model)


@pytest.mark.parametrize("kind", ["random", "flip"])
def test_lies_are_repeated_with_the_seed(kind: str, tmp_path: Path) -> None:
    asked = plan(tmp_path, {"kind": kind, "clients": 2}, rounds=4)
    whole = simulate(asked, debug=True)
    assert same_bits(whole.model, simulate(asked, workers=2).model)
    out = tmp_path / "out"
    simulate(asked, debug=True, rounds=2, out=out)
    assert same_bits(whole.model, simulate(asked, debug=True, out=out, resume=True).model)
    asked["simulation"]["attack"]["clients"] = 3
    with pytest.raises(ConfigError, match="another configuration"):
        simulate(asked, debug=True, out=out, resume=True)


def test_lies_are_told_under_compression_and_to_a_buffer(tmp_path: Path) -> None:
    attack = {"kind": "zero", "clients": 2}
    packed = {"compression": {"kind": "topk", "fraction": 1.0}}
    for algorithm in ("fedavg", "fedbuff"):
        settings = {"buffer": 3} if algorithm == "fedbuff" else {}
        asked = plan(tmp_path, attack, algorithm=algorithm, algorithm_config=settings)
        lied = simulate(asked, debug=True)
        assert same_bits(lied.model, simulate({**asked, "treatment": packed}, debug=True).model)
        assert not same_bits(lied.model, simulate({**asked, "simulation": {}}, debug=True).model)


def test_reports_say_who_lied(tmp_path: Path) -> None:
    asked = plan(tmp_path, FLIP, clients={"count": 7, "per_round": 4})
    run = Simulation(read(asked), debug=True)
    assert run.liars is not None
    result = simulate(asked, debug=True, out=tmp_path / "out")
    with sqlite3.connect(tmp_path / "out" / "results.sqlite") as file:
        rows = file.execute("select round, client, metrics from clients").fetchall()
        liars = file.execute("select value from run where key = 'liars'").fetchone()[0]
    assert json.loads(liars) == list(run.liars.clients)
    said = {(n, client) for n, client, metrics in rows if "lies" in json.loads(metrics)}
    assert {client for _, client in said} <= set(run.liars.clients)
    for row in result.history[1:]:
        assert row["attack.liars"] == sum(n == row["round"] for n, _ in said)
    assert str(list(run.liars.clients)) in (tmp_path / "out" / "report.html").read_text()


def test_a_lie_that_no_sum_may_hold_is_refused_and_the_round_goes_on(tmp_path: Path) -> None:
    asked = plan(tmp_path, {"kind": "random", "clients": 2, "deviation": 1e200})
    asked["clients"]["minimum"] = 5
    result = simulate(asked, debug=True)
    assert [row["answered"] for row in result.history[1:]] == [5, 5, 5]


@pytest.mark.parametrize(
    ("attack", "more", "text"),
    [
        ({"clients": 2}, {}, "`kind` says how they lie"),
        ({"kind": "fib", "clients": 2}, {}, "no attack is called 'fib'; there are zero, random"),
        ({"kind": "flip"}, {}, "`clients` says how many lie"),
        ({"kind": "flip", "clients": 1.5}, {}, "or a fraction below 1, not 1.5"),
        ({"kind": "flip", "clients": "two"}, {}, "not 'two'"),
        ({"kind": "flip", "clients": 4}, {}, "4 liars of 7 clients are no minority"),
        ({"kind": "alie", "clients": 0.5}, {}, "4 liars of 7 clients are no minority"),
        ({"kind": "flip", "clients": 2, "scale": 0}, {}, "scale"),
        ({"kind": "flip", "clients": 2, "z": 3}, {}, "flip: .*'z'"),
        (
            {"kind": "alie", "clients": 2},
            {"clients": {"count": 10}},
            "formula gives z = 0.*say `z`",
        ),
        ({"kind": "label_flip", "clients": 2}, {}, "takes `from` and `to`"),
        ({"kind": "label_flip", "clients": 2, "from": 1, "to": 1}, {}, "nothing changes"),
        (
            {"kind": "ipm", "clients": 2},
            {"algorithm": "fedasync"},
            "fedasync has no rounds: choose flip, random, zero",
        ),
    ],
)
def test_an_attack_that_cannot_be_is_refused_before_anything_runs(
    attack: dict[str, Any], more: dict[str, Any], text: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=text):
        simulate(plan(tmp_path, attack, **more), debug=True)


def test_labels_that_cannot_be_found_name_the_client(tmp_path: Path) -> None:
    strange = (
        "\ndef train(model, data, config, rng): return {}\ndef data(c, config): return 'abc'\n"
    )
    lie = {"kind": "label_flip", "clients": 1, "from": 0, "to": 1}
    asked = plan(tmp_path, lie, evaluate={"devices": False})
    apps.write(tmp_path, apps.LINEAR + strange)
    with pytest.raises(ClientFailed, match="label_flip finds no labels in a str"):
        simulate(asked, debug=True)


def test_agents_never_hear_of_an_attack(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(plan(tmp_path, FLIP)))
    assert "attack" not in json.dumps(runfile.read_federated(file)[0])
