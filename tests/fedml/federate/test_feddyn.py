# SPDX-License-Identifier: Apache-2.0
"""FedDyn against its paper's Algorithm 1, solved exactly on quadratics."""

from __future__ import annotations

import numpy as np
import pytest

from fedml.federate.cohort import choose
from fedml.federate.feddyn import FedDyn
from tests.fedml.federate.quadratic import Quadratic, at, run

A, B = (1.0, 3.0), (-1.0, 3.0)  # together least at 2


def two(steps: int) -> dict[int, Quadratic]:
    return {i: Quadratic(at(B[i]), curvature=A[i], lr=0.1, steps=steps) for i in (0, 1)}


@pytest.mark.parametrize("count", [1, 2])
def test_each_round_is_the_papers_with_its_argmin_solved_exactly(count: int) -> None:
    alpha, theta, h, g = 0.5, 0.25, 0.0, [0.0, 0.0]
    for t in range(5):
        solved = []
        for k in choose(0, t, [0, 1], count):
            # a (s - b) - g + alpha (s - theta) = 0
            s = (A[k] * B[k] + g[k] + alpha * theta) / (A[k] + alpha)
            g[k] -= alpha * (s - theta)
            solved.append(s)
        h -= alpha / 2 * sum(s - theta for s in solved)
        theta = sum(solved) / count - h / alpha
    model, kept = run(FedDyn(alpha=alpha), two(400), at(0.25), 5, count=count)
    np.testing.assert_allclose(model["w"], [theta], rtol=1e-9)
    for k, own in kept.items():
        np.testing.assert_allclose(own["w"], [g[k]], rtol=1e-9)


def test_it_converges_to_the_optimum_of_all_clients() -> None:
    model, kept = run(FedDyn(alpha=0.5), two(50), at(0.0), 200)
    np.testing.assert_allclose(model["w"], [2.0], rtol=1e-6)
    # What a client remembers is its own gradient there.
    np.testing.assert_allclose(kept[0]["w"], [3.0], rtol=1e-5)


def test_it_converges_with_half_the_clients_a_round() -> None:
    model, _ = run(FedDyn(alpha=0.5), two(50), at(0.0), 1000, count=1)
    np.testing.assert_allclose(model["w"], [2.0], rtol=1e-5)
