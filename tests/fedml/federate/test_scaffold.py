# SPDX-License-Identifier: Apache-2.0
"""SCAFFOLD finds the optimum that FedAvg, by a bias with a closed form, misses."""

from __future__ import annotations

import numpy as np
import pytest

from fedml.federate.cohort import choose
from fedml.federate.fedavg import FedAvg
from fedml.federate.scaffold import Scaffold
from tests.fedml.federate.quadratic import Quadratic, at, run


def two() -> dict[int, Quadratic]:
    # (w + 1)^2 / 2 and 3 (w - 3)^2 / 2: together least at (-1 + 3 * 3) / 4 = 2.
    return {
        0: Quadratic(at(-1.0), curvature=1.0, lr=0.1, steps=10),
        1: Quadratic(at(3.0), curvature=3.0, lr=0.1, steps=10),
    }


def test_fedavg_stops_where_theory_says_and_scaffold_at_the_optimum() -> None:
    averaged, _ = run(FedAvg(), two(), at(0.0), 300)
    pull = 1 - np.array([0.9, 0.7]) ** 10
    np.testing.assert_allclose(averaged["w"], [pull @ [-1.0, 3.0] / pull.sum()], rtol=1e-9)
    assert abs(averaged["w"][0] - 2) > 0.5
    controlled, _ = run(Scaffold(), two(), at(0.0), 300)
    np.testing.assert_allclose(controlled["w"], [2.0], rtol=1e-9)


def test_control_variates_become_the_gradients_at_the_optimum() -> None:
    _, kept = run(Scaffold(), two(), at(0.0), 300)
    np.testing.assert_allclose(kept[0]["w"], [3.0], rtol=1e-6)
    np.testing.assert_allclose(kept[1]["w"], [-3.0], rtol=1e-6)


def test_the_optimum_is_found_with_one_client_a_round() -> None:
    model, _ = run(Scaffold(), two(), at(0.0), 3000, count=1)
    np.testing.assert_allclose(model["w"], [2.0], rtol=1e-6)


def test_by_examples_the_optimum_is_that_of_all_examples() -> None:
    clients = two()
    clients[0].examples, clients[1].examples = 3, 1
    model, _ = run(Scaffold(by_examples=True), clients, at(0.0), 300)
    np.testing.assert_allclose(model["w"], [(3 * -1 + 3 * 3) / 6], rtol=1e-9)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_the_optimum_is_found_with_local_momentum_too(momentum: float, count: int) -> None:
    # Divided by the mere number of steps, the control variates grow without bound at 0.9.
    clients = {
        0: Quadratic(at(-1.0), curvature=1.0, lr=0.02, steps=10, momentum=momentum),
        1: Quadratic(at(3.0), curvature=3.0, lr=0.02, steps=10, momentum=momentum),
    }
    model, kept = run(Scaffold(), clients, at(0.0), 1500, count=count)
    np.testing.assert_allclose(model["w"], [2.0], rtol=1e-6)
    np.testing.assert_allclose(kept[0]["w"], [3.0], rtol=1e-6)


@pytest.mark.parametrize("count", [1, 2])
def test_each_step_is_the_papers(count: int) -> None:
    # Algorithm 1, option II, transcribed for scalars.
    lr, steps, eta_g = 0.1, 3, 0.5
    a, b = (1.0, 3.0), (-1.0, 3.0)
    x, c, c_i = 0.5, 0.0, [0.0, 0.0]
    for t in range(4):
        sampled = choose(0, t, [0, 1], count)
        dy, dc = [], []
        for i in sampled:
            y = x
            for _ in range(steps):
                y -= lr * (a[i] * (y - b[i]) + c - c_i[i])
            plus = c_i[i] - c + (x - y) / (steps * lr)
            dy.append(y - x)
            dc.append(plus - c_i[i])
            c_i[i] = plus
        x += eta_g * sum(dy) / count
        c += count / 2 * sum(dc) / count
    clients = {i: Quadratic(at(b[i]), curvature=a[i], lr=lr, steps=steps) for i in (0, 1)}
    model, kept = run(Scaffold(server_lr=eta_g), clients, at(0.5), 4, count=count)
    np.testing.assert_allclose(model["w"], [x], rtol=1e-12)
    for i, own in kept.items():
        np.testing.assert_allclose(own["w"], [c_i[i]], rtol=1e-12)
