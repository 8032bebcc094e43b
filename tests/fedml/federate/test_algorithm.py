# SPDX-License-Identifier: Apache-2.0
"""Algorithms are found by name, refuse bad settings in words, and all keep the same laws."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest

from fedml.federate import algorithm as algorithms
from fedml.federate.aggregate import combine
from fedml.federate.algorithm import (
    BadParameter,
    Correction,
    Facts,
    Kind,
    Need,
    Trained,
    UnknownAlgorithm,
    UnsupportedByTraining,
    Update,
    create,
    require_support,
)
from fedml.federate.arrays import untagged
from fedml.federate.layout import Layout
from tests.fedml.federate.quadratic import Quadratic, at

MODEL = {
    "scale": np.array(2.0, np.float32),
    "w": np.array([[1.0, -2.0], [0.5, 3.0]], np.float32),
    "bn.running_var": np.array([1.0, 2.0], np.float32),
    "bn.num_batches_tracked": np.array(4, np.int64),
}


class OneRound:
    """A client that moves every weight by one, its variance by 0.5 and its counter by 2."""

    examples = 3
    supports = frozenset(Need)

    def train(self, model, correction=None, *, rng):
        moved = {
            "scale": np.array(model["scale"] + 1),
            "w": model["w"] + 1,
            "bn.running_var": model["bn.running_var"] + np.float32(0.5),
            "bn.num_batches_tracked": np.array(model["bn.num_batches_tracked"] + 2),
        }
        return Trained(model=moved, examples=3, steps=4, lr=0.25)

    def gradient(self, model):
        return {"scale": np.array(1, np.float32), "w": np.full((2, 2), 2, np.float32)}, 1.5


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("name", algorithms.names())
def test_every_algorithm_keeps_the_common_laws(name: str) -> None:
    algorithm = create(name)
    assert algorithm.name == name
    before = {key: array.copy() for key, array in MODEL.items()}
    model, state = MODEL, algorithm.start(MODEL)
    for _ in range(algorithm.stages * 2):
        sent = algorithm.sent(model, state)
        update = algorithm.client_update(model, sent, None, OneRound(), rng())
        # It sends what it said it would, and no client state goes with it.
        algorithm.layout(model).check(0, Layout.of(update.arrays).tensors)
        combined = update if algorithm.kind is Kind.ASYNCHRONOUS else combine([update, update])
        assert combined.client_state is None or algorithm.kind is Kind.ASYNCHRONOUS
        model, state = algorithm.server_update(model, state, combined, Facts(population=1))
        assert Layout.of(model) == Layout.of(MODEL)
        assert all(np.isfinite(array).all() for array in [*model.values(), *state.values()])
        for each in (model, state, sent, update.arrays):
            assert all(isinstance(array, np.ndarray) for array in each.values())
    for key, array in MODEL.items():
        np.testing.assert_array_equal(array, before[key])  # arguments are left as they are


@pytest.mark.parametrize(
    "name", sorted(set(algorithms.names()) - {"fedsgd", "fedbuff", "fedasync"})
)
def test_statistics_take_the_mean_whatever_the_server_does_to_weights(name: str) -> None:
    algorithm = create(name, {"server_lr": 0.125})
    model, state = MODEL, algorithm.start(MODEL)
    for _ in range(algorithm.stages):
        sent = algorithm.sent(model, state)
        update = algorithm.client_update(model, sent, None, OneRound(), rng())
        model, state = algorithm.server_update(model, state, update, Facts())
    np.testing.assert_array_equal(model["bn.running_var"], [1.5, 2.5])
    assert model["bn.num_batches_tracked"] == 6
    assert (model["w"] != MODEL["w"]).all()


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("FedAvg", "fedavg"),
        ("FedAvg_seq", "fedavg"),
        ("FedAvg_robust", "fedavg"),
        ("HierarchicalFL", "fedavg"),
        ("FedProx", "fedprox"),
        ("FedOpt", "fedadam"),
        ("SCAFFOLD", "scaffold"),
        ("Mime", "mime"),
        ("Async_FedAvg", "fedasync"),
        ("fed-yogi", "fedyogi"),
    ],
)
def test_fedmls_spellings_are_understood(spelling: str, name: str) -> None:
    assert create(spelling).name == name


def test_fedopt_chooses_by_its_server_optimizer() -> None:
    settings = {"server_optimizer": "Yogi", "server_lr": 0.5, "beta2": 0.9}
    chosen = create("FedOpt", settings)
    assert (chosen.name, chosen.server_lr, chosen.beta2) == ("fedyogi", 0.5, 0.9)  # type: ignore[attr-defined]
    assert create("FedOpt", {"server_optimizer": "sgd", "server_momentum": 0.5}).momentum == 0.5  # type: ignore[attr-defined]
    with pytest.raises(BadParameter, match="'lamb' is none of sgd, adam"):
        create("FedOpt", {"server_optimizer": "lamb"})


@pytest.mark.parametrize(
    ("name", "settings", "why"),
    [
        ("fedprox", {"mu": -1}, "fedprox: mu must be a number >= 0, got -1"),
        ("fedprox", {"mu": "0.1"}, "got '0.1'"),
        ("fedprox", {"mu": math.nan}, "got nan"),
        ("fedprox", {"mu": True}, "got True"),
        ("fedprox", {"mew": 0.1}, "no parameter 'mew', did you mean 'mu'"),
        ("fedprox", {"mu": 0.1, "fedprox_mu": 0.1}, "are the same parameter"),
        ("fedadam", {"beta1": 1.0}, "beta1 must be a number >= 0 and < 1"),
        ("fedadam", {"sever_lr": 1.0}, "did you mean 'server_lr'"),
        ("fedavgm", {"momentum": 1}, "momentum"),
        ("feddyn", {"alpha": 0}, "alpha must be a number > 0"),
        ("fednova", {"mu": 0.1, "momentum": 0.9}, "no formula"),
        ("fedasync", {"alpha": 1.5}, "<= 1"),
        ("fedasync", {"discount": "exp"}, "constant, polynomial, hinge"),
        ("fedbuff", {"buffer": 2.5}, "whole number"),
        ("qfedavg", {"lipschitz": 0}, "lipschitz"),
    ],
)
def test_a_bad_parameter_is_named_with_its_range(name, settings, why) -> None:
    with pytest.raises(BadParameter, match=why):
        create(name, settings)


def test_an_unknown_algorithm_names_the_nearest() -> None:
    with pytest.raises(
        UnknownAlgorithm, match=r"'fedpox', did you mean 'fedprox'.*there are ditto"
    ):
        create("fedpox")


def test_a_training_that_cannot_is_refused_before_the_first_round() -> None:
    plain = Quadratic(at(0.0), supports=frozenset())
    with pytest.raises(
        UnsupportedByTraining,
        match=r"scaffold changes every local step, and train\(\) in task.py takes no `correction`",
    ):
        require_support(create("scaffold"), plain, "train() in task.py")
    with pytest.raises(UnsupportedByTraining, match="needs a full gradient"):
        require_support(create("fedsgd"), plain)
    some = Quadratic(at(0.0), supports=frozenset({Need.CORRECTION, Need.GRADIENT}))
    with pytest.raises(UnsupportedByTraining, match="each batch's gradient"):
        require_support(create("mime"), some)
    for name in ("fedavg", "fedadam", "fednova", "fedbuff", "fedasync"):
        require_support(create(name), plain)


def test_scaffold_asks_for_the_learning_rate_it_divides_by() -> None:
    silent = Quadratic(at(0.0), reports_lr=False)
    algorithm = create("scaffold")
    sent = algorithm.sent(at(1.0), algorithm.start(at(1.0)))
    with pytest.raises(UnsupportedByTraining, match="did not report one; return `lr=`"):
        algorithm.client_update(at(1.0), sent, None, silent, rng())


def test_a_correction_is_its_formula() -> None:
    g, w, start = at(3.0, 1.0), at(2.0, 5.0), at(1.0, 1.0)
    plain = Correction().direction(g, w, start)
    np.testing.assert_array_equal(plain["w"], g["w"])
    full = Correction(
        pull=0.5, anchor=at(0.0, 1.0), shift=at(10.0, 0.0), momentum=at(1.0, -1.0), beta=0.25
    ).direction(g, w, start)
    np.testing.assert_allclose(full["w"], [0.75 * (3 + 1 + 10) + 0.25, 0.75 * (1 + 2) - 0.25])
    reduced = Correction(anchor_gradient=True).direction(g, w, start, at(1.0, 1.0))
    np.testing.assert_array_equal(reduced["w"], [2, 0])
    with pytest.raises(ValueError, match="at the anchor too"):
        Correction(anchor_gradient=True).direction(g, w, start)
    assert Need.ANCHOR_GRADIENT in Correction(anchor_gradient=True).needs


def test_updates_scale_and_weigh() -> None:
    update = Update(arrays=at(2.0, 4.0), weight=3.0)
    np.testing.assert_array_equal(update.scale(0.5).arrays["w"], [1, 2])
    assert update.weigh(2).weight == 6
    both = update.weigh(3) + update.scale(0).weigh(1)
    np.testing.assert_array_equal(both.arrays["w"], [1.5, 3.0])
    with pytest.raises(ValueError, match="weight must be a finite number"):
        dataclasses.replace(update, weight=math.inf)


def test_facts_must_make_sense() -> None:
    for wrong in ({"clients": 0}, {"clients": 3, "population": 2}, {"staleness": -1}):
        with pytest.raises(ValueError):
            Facts(**wrong)


def test_the_package_and_its_algorithms_import_no_torch() -> None:
    code = (
        "import sys, fedml.federate, fedml.protect; assert 'numpy' not in sys.modules\n"
        "from fedml.federate import algorithm, aggregate, cohort, compress, hierarchical\n"
        "from fedml.protect import robust, attacks, privacy, accountant\n"
        "[algorithm.create(n) for n in algorithm.names()]; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_scaffold_state_travels_under_its_tag() -> None:
    algorithm = create("scaffold")
    assert untagged("control", algorithm.start(MODEL)).keys() == {"scale", "w"}
