# SPDX-License-Identifier: Apache-2.0
"""MIME and MimeLite against a scalar transcription of their Algorithm 1."""

from __future__ import annotations

import numpy as np
import pytest

from fedml.federate.fedavg import FedAvg
from fedml.federate.mime import Mime, MimeLite
from tests.fedml.federate.quadratic import Quadratic, at, run

A, B, LR, STEPS, BETA = (1.0, 3.0), (-1.0, 3.0), 0.05, 4, 0.6


def two() -> dict[int, Quadratic]:
    return {i: Quadratic(at(B[i]), curvature=A[i], lr=LR, steps=STEPS) for i in (0, 1)}


@pytest.mark.parametrize("lite", [True, False])
def test_each_round_is_the_papers(lite: bool) -> None:
    x, m = 0.5, 0.0
    for _ in range(6):
        full = [A[i] * (x - B[i]) for i in (0, 1)]
        c = sum(full) / 2
        ends = []
        for i in (0, 1):
            y = x
            for _ in range(STEPS):
                g = A[i] * (y - B[i])
                if not lite:
                    g = g - full[i] + c
                y -= LR * ((1 - BETA) * g + BETA * m)
            ends.append(y)
        x = sum(ends) / 2
        m = (1 - BETA) * c + BETA * m
    model, _ = run(MimeLite(beta=BETA) if lite else Mime(beta=BETA), two(), at(0.5), 6)
    np.testing.assert_allclose(model["w"], [x], rtol=1e-12)


def test_mime_has_no_client_drift_where_fedavg_does() -> None:
    drifting, _ = run(FedAvg(), two(), at(0.0), 400)
    assert abs(drifting["w"][0] - 2) > 0.1
    model, _ = run(Mime(beta=0.9), two(), at(0.0), 1500)
    np.testing.assert_allclose(model["w"], [2.0], rtol=1e-6)


def test_the_same_cohort_gives_gradients_and_then_trains() -> None:
    clients = {k: Quadratic(at(float(k))) for k in range(10)}
    run(Mime(), clients, at(0.0), 1, count=3)
    assert sorted(len(client.corrections) for client in clients.values()) == [0] * 7 + [1] * 3


def test_without_momentum_mimelite_is_fedavg() -> None:
    a, _ = run(FedAvg(), two(), at(0.0), 5)
    b, _ = run(MimeLite(beta=0.0), two(), at(0.0), 5)
    np.testing.assert_allclose(a["w"], b["w"], rtol=1e-12)
