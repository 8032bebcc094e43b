# SPDX-License-Identifier: Apache-2.0
"""FedAvg gives the mean of the clients' models; FedAvgM remembers."""

from __future__ import annotations

import numpy as np

from fedml.federate.algorithm import Facts, Update
from fedml.federate.fedavg import FedAvg, FedAvgM
from fedml.federate.fedprox import FedProx
from fedml.federate.fedsgd import FedSGD
from tests.fedml.federate.quadratic import Quadratic, at, run


def test_the_new_model_is_the_mean_of_the_clients_models_counted_by_examples() -> None:
    clients = {
        3: Quadratic(at(0.0, 4.0), curvature=2.0, lr=0.1, steps=3, examples=30),
        1: Quadratic(at(8.0, 0.0), curvature=1.0, lr=0.2, steps=1, examples=10),
    }
    model, _ = run(FedAvg(), clients, at(1.0, 2.0), 1)
    a = np.array([0.0, 4.0]) + 0.8**3 * (np.array([1.0, 2.0]) - [0.0, 4.0])
    b = np.array([8.0, 0.0]) + 0.8 * (np.array([1.0, 2.0]) - [8.0, 0.0])
    np.testing.assert_allclose(model["w"], (30 * a + 10 * b) / 40, rtol=1e-15)


def test_momentum_goes_on_where_it_was_going() -> None:
    algorithm = FedAvgM(server_lr=0.5, momentum=0.9)
    model, state, v, w = at(1.0), algorithm.start(at(1.0)), 0.0, 1.0
    for delta in (1.0, -0.5, 0.0):
        combined = Update(arrays=at(delta), weight=1)
        model, state = algorithm.server_update(model, state, combined, Facts())
        v = 0.9 * v + delta
        w += 0.5 * v
        assert model["w"][0] == w


def test_without_momentum_fedavgm_is_fedavg() -> None:
    clients = {k: Quadratic(at(float(k))) for k in range(3)}
    a, _ = run(FedAvg(server_lr=0.7), clients, at(9.0), 4)
    b, _ = run(FedAvgM(server_lr=0.7, momentum=0.0), clients, at(9.0), 4)
    np.testing.assert_array_equal(a["w"], b["w"])


def test_fedsgd_is_gradient_descent_on_all_the_data() -> None:
    clients = {k: Quadratic(at(float(k)), curvature=k + 1.0, examples=k + 1) for k in range(4)}
    model, _ = run(FedSGD(lr=0.1), clients, at(5.0), 3)
    w = 5.0
    for _ in range(3):
        w -= 0.1 * sum((k + 1) * (k + 1) * (w - k) for k in range(4)) / 10
    np.testing.assert_allclose(model["w"], [w], rtol=1e-14)


def test_fedprox_solves_the_proximal_problem() -> None:
    # min (w - b)^2 / 2 + mu/2 (w - w0)^2 is at (b + mu w0) / (1 + mu), given steps enough.
    client = Quadratic(at(4.0), lr=0.2, steps=300)
    model, _ = run(FedProx(mu=3.0), {0: client}, at(0.0), 1)
    np.testing.assert_allclose(model["w"], [1.0], rtol=1e-12)


def test_fedprox_without_its_term_is_fedavg() -> None:
    clients = {k: Quadratic(at(float(k))) for k in range(3)}
    a, _ = run(FedAvg(), clients, at(9.0), 4)
    b, _ = run(FedProx(mu=0.0), clients, at(9.0), 4)
    np.testing.assert_array_equal(a["w"], b["w"])
