# SPDX-License-Identifier: Apache-2.0
"""FedNova takes the side of nobody who merely worked longer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedml.federate.algorithm import Trained, UnsupportedByTraining
from fedml.federate.fedavg import FedAvg
from fedml.federate.fednova import FedNova
from tests.fedml.federate.quadratic import Quadratic, at, run


def uneven(**changes: object) -> dict[int, Quadratic]:
    # Optimum of both together: 5. One client takes 2 steps, the other 20.
    return {
        0: Quadratic(at(0.0), lr=1e-3, steps=2, **changes),
        1: Quadratic(at(10.0), lr=1e-3, steps=20, **changes),
    }


def test_with_2_and_20_local_steps_fedavg_stops_near_9_and_fednova_near_5() -> None:
    averaged, _ = run(FedAvg(), uneven(), at(0.0), 1500)
    assert averaged["w"][0] == pytest.approx(20 * 10 / 22, abs=0.03)  # 9.09
    normalised, _ = run(FedNova(), uneven(), at(0.0), 1500)
    assert normalised["w"][0] == pytest.approx(5.0, abs=0.03)


def test_with_equal_steps_fednova_is_fedavg() -> None:
    clients = {k: Quadratic(at(float(k)), steps=4, examples=k + 1) for k in range(3)}
    a, _ = run(FedAvg(), clients, at(9.0), 5)
    b, _ = run(FedNova(), clients, at(9.0), 5)
    np.testing.assert_allclose(a["w"], b["w"], rtol=1e-12)


def trained(steps: int, lr: float = 0.1) -> Trained:
    return Trained(model={}, examples=1, steps=steps, lr=lr)


@given(st.integers(1, 50), st.floats(0, 0.99))
def test_the_path_norm_of_momentum_counts_every_gradient_as_often_as_it_was_used(tau, rho) -> None:
    # Gradient s enters step s, s+1, ... with rho^0, rho^1, ...: sum all of it.
    expected = sum(rho**j for s in range(tau) for j in range(tau - s))
    assert FedNova(momentum=rho).path_norm(trained(tau)) == pytest.approx(expected, rel=1e-6)


@given(st.integers(1, 50), st.floats(1e-3, 5), st.floats(1e-3, 0.19))
def test_the_path_norm_of_a_proximal_pull_discounts_early_gradients(tau, mu, lr) -> None:
    expected = sum((1 - lr * mu) ** s for s in range(tau))
    assert FedNova(mu=mu).path_norm(trained(tau, lr)) == pytest.approx(expected, rel=1e-6)


def test_a_proximal_pull_is_passed_on_to_the_client() -> None:
    clients = uneven()
    run(FedNova(mu=0.1), clients, at(0.0), 1)
    assert clients[0].corrections[0].pull == 0.1
    run(FedNova(), clients, at(0.0), 1)
    assert clients[0].corrections[1] is None


def test_a_client_that_took_no_step_is_told_so() -> None:
    with pytest.raises(UnsupportedByTraining, match="training took none"):
        FedNova().path_norm(trained(0))


def test_a_momentum_that_the_training_reports_counts() -> None:
    reported = Trained(model={}, examples=1, steps=7, lr=0.1, momentum=0.9)
    expected = FedNova(momentum=0.9).path_norm(trained(7))
    assert FedNova().path_norm(reported) == expected
    with pytest.raises(UnsupportedByTraining, match="no formula for mu and a local momentum"):
        FedNova(mu=0.1).path_norm(reported)
