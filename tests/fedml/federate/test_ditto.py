# SPDX-License-Identifier: Apache-2.0
"""Ditto's global model is FedAvg's; its personal models lie between alone and together."""

from __future__ import annotations

import numpy as np
import pytest

from fedml.federate.ditto import Ditto
from fedml.federate.fedavg import FedAvg
from tests.fedml.federate.quadratic import Quadratic, at, run


def three() -> dict[int, Quadratic]:
    return {k: Quadratic(at(3.0 * k), lr=0.2, steps=20) for k in range(3)}


def test_the_global_model_is_fedavgs() -> None:
    a, _ = run(FedAvg(), three(), at(9.0), 4)
    b, _ = run(Ditto(), three(), at(9.0), 4)
    np.testing.assert_array_equal(a["w"], b["w"])


@pytest.mark.parametrize("strength", [0.0, 0.5, 2.0])
def test_personal_models_solve_their_regularised_problem(strength: float) -> None:
    # min (v - b)^2 / 2 + lambda/2 (v - w)^2 is at (b + lambda w) / (1 + lambda); here w is 3.
    model, kept = run(Ditto(strength=strength), three(), at(9.0), 40)
    np.testing.assert_allclose(model["w"], [3.0], rtol=1e-6)
    for k in range(3):
        expected = (3.0 * k + strength * 3.0) / (1 + strength)
        np.testing.assert_allclose(kept[k]["w"], [expected], atol=1e-6)


def test_the_personal_model_goes_on_from_the_last_round() -> None:
    _, once = run(Ditto(strength=0.0), {0: Quadratic(at(1.0), lr=0.1, steps=1)}, at(0.0), 1)
    _, twice = run(Ditto(strength=0.0), {0: Quadratic(at(1.0), lr=0.1, steps=1)}, at(0.0), 2)
    np.testing.assert_allclose([once[0]["w"][0], twice[0]["w"][0]], [0.1, 0.19])
