# SPDX-License-Identifier: Apache-2.0
"""q-FedAvg against its paper's Algorithm 2, and the fairness it is for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedml.federate.algorithm import UnsupportedByTraining
from fedml.federate.fedavg import FedAvg
from fedml.federate.qfedavg import QFedAvg
from tests.fedml.federate.quadratic import Quadratic, at, run


def two(**changes: float) -> dict[int, Quadratic]:
    return {
        0: Quadratic(at(0.0, 1.0), steps=3, **changes),
        1: Quadratic(at(10.0, 1.0), curvature=0.5, steps=3, **changes),
    }


@given(st.floats(0, 5), st.floats(0.1, 20))
def test_a_round_is_the_papers(q: float, lipschitz: float) -> None:
    w = np.array([1.0, 3.0])
    deltas, hs = [], []
    for client in two().values():
        f = client.gradient({"w": w})[1]
        a, b = client.curvature, client.centre["w"]
        w_bar = b + (1 - client.lr * a) ** 3 * (w - b)
        dw = lipschitz * (w - w_bar)
        deltas.append(f**q * dw)
        hs.append(q * f ** (q - 1) * (dw @ dw) + lipschitz * f**q)
    expected = w - sum(deltas) / sum(hs)
    model, _ = run(QFedAvg(q=q, lipschitz=lipschitz), two(), {"w": w}, 1)
    np.testing.assert_allclose(model["w"], expected, rtol=1e-9)


def test_at_q_zero_it_is_the_plain_mean() -> None:
    a, _ = run(FedAvg(), two(), at(1.0, 3.0), 3)
    b, _ = run(QFedAvg(q=0), two(), at(1.0, 3.0), 3)
    np.testing.assert_allclose(a["w"], b["w"], rtol=1e-12)


def test_a_higher_q_evens_out_the_losses() -> None:
    def gap(q: float) -> float:
        clients = {
            0: Quadratic(at(0.0), curvature=3.0, lr=0.02),
            1: Quadratic(at(10.0), lr=0.02),
        }
        model, _ = run(QFedAvg(q=q), clients, at(5.0), 2000)
        return abs(clients[0].gradient(model)[1] - clients[1].gradient(model)[1])

    assert gap(5) < gap(1) < gap(0)


def test_a_perfect_client_does_not_divide_by_zero() -> None:
    model, _ = run(QFedAvg(q=0.5), {0: Quadratic(at(1.0))}, at(1.0), 1)
    assert model["w"][0] == 1.0


def test_a_negative_loss_is_refused() -> None:
    with pytest.raises(UnsupportedByTraining, match="to the power q"):
        run(QFedAvg(), {0: Quadratic(at(0.0), floor=-9.0)}, at(1.0), 1)
