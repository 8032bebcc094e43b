# SPDX-License-Identifier: Apache-2.0
"""Groups of clients: one round within is the flat run bit for bit, more are the plain loop's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedml import runfile
from fedml.errors import ConfigError
from fedml.federate import cohort
from fedml.federate.aggregate import combine
from fedml.federate.algorithm import Facts, create
from fedml.federate.application import Application, Client, UserTraining
from fedml.federate.hierarchical import Group, assign
from fedml.simulation import ClientFailed, Listener, Round, Simulation, simulate
from fedml.simulation.checkpoint import Checkpoint
from fedml.simulation.plan import read
from tests.fedml.simulation import apps, deployed
from tests.fedml.simulation.bits import same_bits

pytestmark = pytest.mark.usefixtures("one_thread")


# Whose built-in training has a full gradient.
LINEAR_MODEL = (
    apps.LINEAR
    + "\ndef model(config):\n    from fedml import model as m\n"
    + "    return m.create('linear', inputs=6, outputs=3)\n"
)


def plan(
    folder: Path, groups: dict[str, Any], app: str = apps.LINEAR, **more: Any
) -> dict[str, Any]:
    return {
        "app": apps.write(folder, app).name,
        "workspace": str(folder),
        "rounds": 3,
        "seed": 4,
        "config": {"lr": 0.2},
        "clients": {"count": 7},
        "groups": groups,
        **more,
    }


def plain_loop(asked: dict[str, Any]) -> dict[str, Any]:
    """Every client in this process, groups as `hierarchical.Group` has them; the last model."""
    app = Application(Path(asked["workspace"]) / asked["app"], asked["config"])
    model, module = app.first_model(asked["seed"]), app.new_model(asked["seed"])
    count, said = asked["clients"]["count"], asked["groups"]
    local = [
        UserTraining(app, module, app.data(Client(index=k, count=count))) for k in range(count)
    ]
    within = create(said.get("algorithm", "fedavg"), said.get("algorithm_config"))
    parts = assign(range(count), said["count"], cohort.server_generator(asked["seed"], 0))
    groups = [Group({k: local[k] for k in p}, within, rounds=said["rounds"]) for p in parts]
    between = create(asked.get("algorithm", "fedavg"), asked.get("algorithm_config"))
    state = between.start(model)
    for turn in range(asked["rounds"]):
        sent = between.sent(model, state)
        updates = [
            between.client_update(
                model, sent, None, group, cohort.generator(asked["seed"], turn, g)
            )
            for g, group in enumerate(groups)
        ]
        facts = Facts(clients=len(groups), population=len(groups))
        model, state = between.server_update(model, state, combine(updates), facts)
    return model


@pytest.mark.parametrize("algorithm", ["fedavg", "fedadam", "scaffold", "mime"])
def test_groups_that_add_up_have_the_bits_of_the_flat_run(algorithm: str, tmp_path: Path) -> None:
    app = apps.OWN_TRAIN
    if algorithm == "mime":
        app = LINEAR_MODEL
    asked = plan(tmp_path, {}, app, algorithm=algorithm, clients={"count": 7, "per_round": 5})
    flat = simulate(asked, engine="exact", workers=2).model
    for count in (1, 3, 7):
        grouped = simulate({**asked, "groups": {"count": count}}, workers=2)
        assert same_bits(grouped.model, flat)


def test_deployed_groups_add_up_to_the_same_bits_and_tell_the_same(tmp_path: Path) -> None:
    clients = {"count": 7, "per_round": 5}
    asked = plan(tmp_path / "app", {"count": 3}, apps.OWN_TRAIN, clients=clients)
    app, told = tmp_path / "app" / "app.py", []
    grouped = deployed.run(app, tmp_path / "grouped", asked, told)
    flat = deployed.run(app, tmp_path / "flat", {**asked, "groups": {}})
    assert all(same_bits(one, other) for one, other in zip(grouped, flat, strict=True))
    result = simulate(asked, debug=True)
    assert same_bits(result.model, grouped[-1])
    for row, said in zip(result.history[1:], told, strict=True):
        names = [name for name in said if name.startswith("groups.")]
        assert len(names) >= 4
        assert {name: said[name] for name in names} == {name: row[name] for name in names}


@pytest.mark.parametrize(
    ("groups", "more"),
    [
        ({"rounds": 3}, {}),
        # States of clients, and what is sent is of each group.
        ({"algorithm": "scaffold"}, {"clients": {"count": 7, "per_round": 4}}),
        # Two stages within, a server that remembers between.
        ({"algorithm": "mime"}, {"algorithm": "fedadam"}),
        ({"algorithm": "fedavgm", "rounds": 1}, {"clients": {"count": 7, "per_round": 3}}),
    ],
)
def test_deployed_groups_have_rounds_of_their_own_with_the_simulators_bits(
    groups: dict[str, Any], more: dict[str, Any], tmp_path: Path
) -> None:
    groups = {"count": 3, "rounds": 2, **groups}
    app = LINEAR_MODEL if groups.get("algorithm") == "mime" else apps.OWN_TRAIN
    asked = plan(tmp_path / "app", groups, app, **more)
    told: list[dict[str, float]] = []
    models = deployed.run(tmp_path / "app" / "app.py", tmp_path / "deployed", asked, told)
    result = simulate(asked, engine="exact", debug=True)
    assert same_bits(result.model, models[-1])
    assert len(models) == len(told) + 1 == asked["rounds"] + 1
    for row, said in zip(result.history[1:], told, strict=True):
        names = {name for name in row if name.startswith(("groups.", "train.", "central."))}
        assert names == {*said}
        for name in names:
            assert said[name] == pytest.approx(row[name], rel=1e-12)


def test_a_run_file_says_what_groups_run_within(tmp_path: Path) -> None:
    asked = plan(tmp_path, {"count": 3, "rounds": 2, "algorithm_config": {"server_lr": 1.0}})
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(asked))
    assert json.loads(runfile.read_federated(file)[0]["groups"]) == asked["groups"]


@pytest.mark.parametrize("part", ["topk", "privacy"])
def test_sums_of_groups_are_treated_as_the_flat_sum_is(part: str, tmp_path: Path) -> None:
    treatment = {
        "topk": {"compression": {"kind": "topk", "fraction": 0.1}},
        "privacy": {"privacy": {"noise_multiplier": 0.5, "clip": 0.2, "quantile": 0.5}},
    }[part]
    wide = apps.OWN_TRAIN.replace("6, 8", "6, 40").replace("8, 3", "40, 3")
    asked = plan(tmp_path, {"count": 3}, wide, treatment=treatment)
    grouped = simulate(asked, debug=True)
    flat = simulate({**asked, "groups": {}}, debug=True)
    assert same_bits(grouped.model, flat.model)
    assert grouped.metrics.get("privacy.epsilon") == flat.metrics.get("privacy.epsilon")


def test_each_group_that_adds_up_tells_of_itself(tmp_path: Path) -> None:
    asked = plan(tmp_path, {"count": 3}, apps.OWN_TRAIN, rounds=1)
    run = Simulation(read(asked), debug=True)
    result = run.run()
    parts = assign(range(7), 3, cohort.server_generator(4, 0))
    assert run.members == parts
    losses, weights = [], []
    for g, members in enumerate(parts):
        assert result.metrics[f"groups.{g}.clients"] == len(members)
        losses.append(result.metrics[f"groups.{g}.loss"])
        weights.append(sum(9 + 4 * k for k in members))
    assert np.average(losses, weights=weights) == pytest.approx(result.metrics["train.loss"])


CASES: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "momentum within": {"groups": {"algorithm": "fedavgm"}},
    "states of clients": {"groups": {"algorithm": "scaffold"}},
    "adam between": {"algorithm": "fedadam", "algorithm_config": {"server_lr": 0.1}},
    "one round of another": {"groups": {"algorithm": "fednova", "rounds": 1}},
    "a step within": {"groups": {"algorithm_config": {"server_lr": 0.5}, "rounds": 1}},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("app", [apps.LINEAR, apps.OWN_TRAIN], ids=["linear", "torch"])
def test_rounds_within_are_those_of_the_plain_loop(case: str, app: str, tmp_path: Path) -> None:
    more = dict(CASES[case])
    groups = {"count": 3, "rounds": 2, **more.pop("groups", {})}
    asked = plan(tmp_path, groups, app, **more)
    expected = plain_loop(asked)
    assert same_bits(simulate(asked, engine="exact", workers=2).model, expected)
    flat = simulate({**asked, "groups": {}}, engine="exact", debug=True).model
    assert not same_bits(flat, expected)


def test_other_engines_train_the_members_of_groups_to_rounding(tmp_path: Path) -> None:
    asked = plan(tmp_path, {"count": 3, "rounds": 2})
    expected = plain_loop(asked)
    result = simulate(asked, engine="closed_form", debug=True)
    assert result.engine == "closed_form"
    for name, array in expected.items():
        np.testing.assert_allclose(result.model[name], array, rtol=0, atol=1e-6)


@pytest.mark.parametrize("within", ["fedavgm", "scaffold"])
def test_a_resumed_run_keeps_what_groups_and_their_members_keep(
    within: str, tmp_path: Path
) -> None:
    asked = plan(tmp_path, {"count": 2, "rounds": 2, "algorithm": within}, rounds=5)
    whole = simulate(asked, debug=True)
    out = tmp_path / "out"
    simulate(asked, debug=True, rounds=2, out=out)
    rest = simulate(asked, debug=True, out=out, resume=True)
    assert same_bits(whole.model, rest.model)
    asked["groups"]["rounds"] = 3
    with pytest.raises(ConfigError, match="another configuration"):
        simulate(asked, debug=True, out=out, resume=True)


def test_a_run_that_is_killed_twice_goes_on_with_what_members_kept_at_its_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = {"count": 2, "rounds": 2, "algorithm": "scaffold"}
    asked = plan(tmp_path, groups, rounds=9, simulation={"checkpoint_s": 1e9})
    whole = simulate(asked, debug=True)
    out = tmp_path / "out"

    def killed(*, resume: bool, kept: int | None, at: int) -> None:
        class Killed(Listener):
            def ended(self, round_: Round) -> None:
                if round_.number == kept:
                    run.save(force=True)
                if round_.number == at:
                    # What is killed writes no other one.
                    monkeypatch.setattr(Checkpoint, "save", lambda *_: None)
                    raise KeyboardInterrupt

        run = Simulation(read(asked), folder=out, resume=resume, debug=True, listener=Killed())
        with pytest.raises(KeyboardInterrupt):
            run.run()
        monkeypatch.undo()

    killed(resume=False, kept=2, at=5)
    killed(resume=True, kept=None, at=6)
    rest = simulate(asked, debug=True, out=out, resume=True)
    assert rest.history[-1]["round"] == 9
    assert same_bits(whole.model, rest.model)


def test_a_group_of_which_nobody_takes_part_sits_the_round_out(tmp_path: Path) -> None:
    groups = {"count": 4, "rounds": 2, "algorithm": "fedavgm"}
    asked = plan(tmp_path, groups, clients={"count": 7, "per_round": 2}, rounds=6)
    result = simulate(asked, debug=True)
    parts = assign(range(7), 4, cohort.server_generator(4, 0))
    for n, row in enumerate(result.history[1:]):
        chosen = cohort.choose(4, n, range(7), 2)
        for g, members in enumerate(parts):
            there = len(set(chosen) & set(members))
            assert row.get(f"groups.{g}.clients") == (there or None)
    # What it kept before, it has kept: a run stopped in between goes on with it.
    out = tmp_path / "out"
    simulate(asked, debug=True, rounds=3, out=out)
    assert same_bits(result.model, simulate(asked, debug=True, out=out, resume=True).model)


def test_evaluations_bytes_and_time_are_those_of_a_round_of_the_whole(tmp_path: Path) -> None:
    devices = {"devices": {"latency_s": 2.0, "seconds_per_example": 0}}
    asked = plan(tmp_path, {"count": 3, "rounds": 4}, rounds=2, simulation=devices)
    result = simulate(asked, debug=True)
    flat = simulate({**asked, "groups": {}}, debug=True)
    assert [row["round"] for row in result.history] == [0, 1, 2]
    for row, other in zip(result.history, flat.history, strict=True):
        assert row["bytes_up"] == 4 * other["bytes_up"]
        assert row["bytes_down"] == 4 * other["bytes_down"]
        assert row["simulated_s"] == 4 * other["simulated_s"]
    # Devices evaluate the model of the whole.
    assert result.history[0]["devices.accuracy"] == flat.history[0]["devices.accuracy"]
    assert result.metrics["devices.examples"] == sum(9 + 4 * k for k in range(7))


def test_a_round_goes_on_without_a_member_that_fails_in_the_middle_of_it(tmp_path: Path) -> None:
    failing = (
        "\nsgd, calls = train, []\ndef train(model, data, config, rng):\n"
        "    calls.append(len(data[0]))\n"
        "    if len(data[0]) == 9 and calls.count(9) == 2:\n"
        "        raise OSError('the disk is full')\n"
        "    return sgd(model, data, config, rng)\n"
    )
    heard: list[str] = []

    class Ears(Listener):
        def say(self, text: str) -> None:
            heard.append(text)

    asked = plan(tmp_path, {"count": 2, "rounds": 3}, apps.LINEAR + failing, rounds=1)
    with pytest.raises(ClientFailed, match=r"client 0 failed in round 1: OSError"):
        simulate(asked, debug=True)
    asked["clients"]["minimum"] = 6
    result = Simulation(read(asked), debug=True, listener=Ears()).run()
    assert result.history[1]["answered"] == 6
    assert sum("goes on without client 0" in text for text in heard) == 1


def test_false_labels_are_learned_within_groups_too(tmp_path: Path) -> None:
    lie = {"attack": {"kind": "label_flip", "clients": 2, "from": 0, "to": 1}}
    asked = plan(tmp_path, {"count": 2, "rounds": 2})
    honest = simulate(asked, debug=True)
    assert not same_bits(honest.model, simulate({**asked, "simulation": lie}, debug=True).model)


@pytest.mark.parametrize(
    ("groups", "more", "text"),
    [
        ({"count": 8}, {}, "7 clients make no 8 groups"),
        ({"count": 0}, {}, "groups: count .*>= 1, got 0"),
        ({"rounds": 2}, {}, "there is no `count`"),
        ({"count": 2, "rounds": 0}, {}, "groups: rounds .*>= 1, got 0"),
        ({"count": 2, "algorithm": "fedbuff"}, {}, "fedbuff is asynchronous, and groups work"),
        ({"count": 2}, {"algorithm": "fedasync"}, "fedasync is asynchronous, and groups work"),
        ({"count": 2, "algorithm": "fedavgg"}, {}, "groups: .*did you mean 'fedavg'"),
        ({"count": 2, "algorithm_config": {"lr": 1}}, {}, "lr"),
        (
            {"count": 2, "rounds": 2},
            {"algorithm": "scaffold"},
            "scaffold asks clients for more.*scaffold as `groups.algorithm`",
        ),
        ({"count": 2, "rounds": 2}, {"algorithm": "fednova"}, "fednova asks clients for more"),
        (
            {"count": 2},
            {"treatment": {"robust": {"rule": "median"}}},
            "groups and a robust rule exclude each other.*privacy",
        ),
        (
            {"count": 2, "rounds": 2},
            {"treatment": {"compression": {"kind": "int8"}}},
            "rounds of their own and `treatment` exclude each other",
        ),
        (
            {"count": 2, "rounds": 2},
            {"simulation": {"attack": {"kind": "flip", "clients": 1}}},
            "send it none of a client",
        ),
        ({"count": 2, "round": 2}, {}, r"unknown key `groups.round`; did you mean `rounds`"),
    ],
)
def test_groups_that_cannot_be_are_refused_before_anything_runs(
    groups: dict[str, Any], more: dict[str, Any], text: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=text):
        simulate(plan(tmp_path, groups, **more), debug=True)


def test_an_algorithm_within_that_needs_more_than_train_is_refused(tmp_path: Path) -> None:
    app = apps.LINEAR + "\nsgd = train\ndef train(m, d, c, r): return sgd(m, d, c, r)\n"
    asked = plan(tmp_path, {"count": 2, "rounds": 2, "algorithm": "scaffold"}, app)
    with pytest.raises(ConfigError, match="takes no `correction` argument"):
        simulate(asked, debug=True)
