# SPDX-License-Identifier: Apache-2.0
"""The built-in training as a plain function: what algorithms ask of it, and wrong settings."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedml import model as models
from fedml.federate.algorithm import Correction
from fedml.federate.arrays import Arrays
from fedml.federate.local_sgd import BadData, Evaluation, LocalSGD, examples_of
from fedml.model.arrays import to_arrays
from fedml.simulation import ClientFailed, simulate
from tests.fedml.simulation import apps

RNG = np.random.default_rng(4)
X = RNG.standard_normal((23, 5)).astype(np.float32)
Y = RNG.integers(0, 3, 23)


def arrays_of(module: nn.Module) -> Arrays:
    return {name: array.copy() for name, array in to_arrays(module).items()}


def network(seed: int = 2) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def by_hand(module: nn.Module, correction: Correction, lr: float, batch: int) -> Arrays:
    """One epoch in stored order, each step by `Correction.direction`."""
    start = arrays_of(module)

    def gradient(at: Arrays, rows: slice) -> Arrays:
        values = {n: torch.tensor(a, requires_grad=True) for n, a in at.items()}
        z = torch.func.functional_call(module, values, (torch.from_numpy(X[rows]),))
        loss = nn.functional.cross_entropy(z, torch.from_numpy(Y[rows]))
        found = torch.autograd.grad(loss, list(values.values()))
        return {n: g.numpy() for n, g in zip(values, found, strict=True)}

    at = {name: array.copy() for name, array in start.items()}
    for begin in range(0, len(X), batch):
        rows = slice(begin, begin + batch)
        anchor = start if correction.anchor is None else correction.anchor
        there = gradient(anchor, rows) if correction.anchor_gradient else None
        step = correction.direction(gradient(at, rows), at, start, there)
        at = {name: array - lr * step[name] for name, array in at.items()}
    return at


@pytest.mark.parametrize(
    "kind", ["pull", "pull to an anchor", "shift", "momentum", "anchor gradient"]
)
def test_a_correction_changes_each_step_as_its_formula_says(kind: str) -> None:
    module, other = network(), arrays_of(network(9))
    correction = {
        "pull": Correction(pull=0.7),
        "pull to an anchor": Correction(pull=0.7, anchor=other),
        "shift": Correction(shift=other),
        "momentum": Correction(momentum=other, beta=0.6),
        "anchor gradient": Correction(anchor_gradient=True, shift=other, momentum=other, beta=0.3),
    }[kind]
    wanted = by_hand(module, correction, 0.1, 6)
    trainer = LocalSGD(lr=0.1, batch_size=6, shuffle=False)
    found = trainer(module, (X, Y), {}, np.random.default_rng(0), correction=correction)
    assert (found["examples"], found["steps"], found["lr"]) == (23, 4, 0.1)
    for name, array in to_arrays(module).items():
        np.testing.assert_allclose(array, wanted[name], rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", ["pull", "shift", "momentum"])
def test_a_linear_dict_is_corrected_like_the_module(kind: str) -> None:
    module = models.create("linear", inputs=5, outputs=3, seed=1)
    other = arrays_of(models.create("linear", inputs=5, outputs=3, seed=8))

    def turned(arrays: Arrays) -> Arrays:
        return {"w": arrays["linear.weight"].T.copy(), "b": arrays["linear.bias"].copy()}

    def correction(values: Arrays) -> Correction:
        return {
            "pull": Correction(pull=0.7, anchor=values),
            "shift": Correction(shift=values),
            "momentum": Correction(momentum=values, beta=0.6),
        }[kind]

    plain = turned(arrays_of(module))
    trainer = LocalSGD(lr=0.1, batch_size=6, epochs=2, momentum=0.5, weight_decay=0.01)
    a = trainer(module, (X, Y), {}, np.random.default_rng(0), correction(other))
    b = trainer(plain, (X, Y), {}, np.random.default_rng(0), correction(turned(other)))
    assert a == pytest.approx(b, abs=1e-6)
    for name, array in turned(arrays_of(module)).items():
        np.testing.assert_allclose(plain[name], array, rtol=0, atol=1e-6)


def test_the_full_gradient_is_that_of_the_mean_loss_and_moves_nothing() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    module[0].bias.requires_grad_(False)
    before = arrays_of(module)
    found, loss = LocalSGD().gradient(module, (X, Y))
    wanted = nn.functional.cross_entropy(module(torch.from_numpy(X)), torch.from_numpy(Y))
    assert loss == pytest.approx(wanted.item())
    weight = torch.autograd.grad(wanted, [module[2].weight])[0].numpy()
    np.testing.assert_allclose(found["2.weight"], weight, rtol=0, atol=1e-6)
    # Everything that is learned has a gradient, what is frozen a zero one.
    assert set(found) == {n for n in before if "running" not in n and "batches" not in n}
    assert not found["0.bias"].any()
    module.load_state_dict({n: torch.from_numpy(a) for n, a in before.items()})
    LocalSGD().gradient(module, (X, Y))
    assert all(np.array_equal(a, before[n]) for n, a in to_arrays(module).items())


def test_settings_come_from_the_constructor_then_from_config_then_from_here() -> None:
    steps = LocalSGD(lr=0.5).steps({"lr": 0.1, "batch_size": 7, "momentum": 0.9})
    assert (steps.lr, steps.batch_size, steps.momentum, steps.epochs) == (0.5, 7, 0.9, 1)
    assert LocalSGD().steps({"learning_rate": 0.2}).batch_size == 32


@pytest.mark.parametrize(
    "wrong",
    [{"lr": 0}, {"batch_size": 0}, {"epochs": 0}, {"momentum": 1}, {"weight_decay": -1}],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LocalSGD().steps({"lr": 0.1, **wrong})


def test_an_unknown_loss_names_those_there_are() -> None:
    for made in (LocalSGD, Evaluation):
        with pytest.raises(ValueError, match="cross_entropy, logistic, squared"):
            made(loss="hinge")


def test_data_may_come_in_any_of_its_forms() -> None:
    parts = SimpleNamespace(train={"x": X, "y": Y}, test=(X[:3], Y[:3]))
    for data in ((X, Y), [X, Y], {"x": X, "y": Y}, parts):
        np.testing.assert_array_equal(examples_of(data)[1], Y)
    assert len(examples_of(parts, "test")[0]) == 3
    for wrong in ("text", {"x": X}, (X, Y, Y), None):
        with pytest.raises(BadData, match="cannot train on a"):
            examples_of(wrong)


def test_cross_entropy_of_targets_that_are_no_classes_is_refused() -> None:
    for model in (network(), {"w": np.zeros((5, 3), np.float32)}):
        with pytest.raises(BadData, match="needs"):
            LocalSGD(lr=0.1)(model, (X, X[:, 0]), {}, np.random.default_rng(0))


def test_scaffold_with_the_momentum_of_the_built_in_training_learns(tmp_path: Path) -> None:
    # Unaware of it, SCAFFOLD's control variates take the loss to 1e26 in these rounds.
    apps.write(tmp_path, apps.LINEAR)
    found = simulate(
        {
            "app": "app.py",
            "workspace": str(tmp_path),
            "rounds": 60,
            "algorithm": "scaffold",
            "config": {"lr": 0.1, "momentum": 0.9},
            "clients": {"count": 4},
            "evaluate": {"devices": False},
        },
        debug=True,
    )
    assert found.metrics["central.loss"] < 0.4
    assert "train.momentum" not in found.metrics


def test_the_built_in_training_reports_its_momentum() -> None:
    found = LocalSGD(lr=0.1, momentum=0.9)(network(), (X, Y), {}, np.random.default_rng(0))
    assert found["momentum"] == 0.9


@pytest.mark.parametrize("algorithm", ["scaffold", "fednova"])
def test_a_train_that_hides_its_momentum_is_told_what_to_return(
    algorithm: str, tmp_path: Path
) -> None:
    silent = apps.OWN_TRAIN.replace(', "momentum": 0', "")
    file = apps.write(tmp_path, silent)
    asked = {"app": file.name, "workspace": str(tmp_path), "rounds": 1, "clients": {"count": 2}}
    with pytest.raises(ClientFailed, match=r"return `momentum` from it, 0 for plain SGD"):
        simulate({**asked, "algorithm": algorithm, "config": {"lr": 0.1}}, debug=True)
    simulate({**asked, "config": {"lr": 0.1}}, debug=True)
    if algorithm == "fednova":  # said in its place
        own = {"algorithm_config": {"momentum": 0.5}, "config": {"lr": 0.1}}
        simulate({**asked, "algorithm": algorithm, **own}, debug=True)
