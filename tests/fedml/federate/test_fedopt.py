# SPDX-License-Identifier: Apache-2.0
"""Adaptive servers against a scalar transcription of Reddi et al. 2021, Algorithm 2."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedml.federate.algorithm import Facts, Update, create
from tests.fedml.federate.quadratic import at

DELTAS = st.lists(st.floats(-10, 10), min_size=1, max_size=8)


def paper(rule: str, deltas: list[float], lr: float, b1: float, b2: float, tau: float) -> float:
    x, m, v = 1.0, 0.0, tau * tau
    for d in deltas:
        m = b1 * m + (1 - b1) * d
        sq = d * d
        if rule == "fedadagrad":
            v = v + sq
        elif rule == "fedyogi":
            v = v - (1 - b2) * sq * ((v > sq) - (v < sq))
        else:
            v = b2 * v + (1 - b2) * sq
        x = x + lr * m / (math.sqrt(v) + tau)
    return x


@pytest.mark.parametrize("rule", ["fedadagrad", "fedadam", "fedyogi"])
@given(DELTAS, st.floats(0.01, 1), st.floats(0, 0.99), st.floats(0, 0.999), st.floats(1e-3, 1))
def test_every_step_is_the_papers(rule, deltas, lr, b1, b2, tau) -> None:
    settings = {"server_lr": lr, "beta1": b1, "tau": tau}
    if rule != "fedadagrad":
        settings["beta2"] = b2
    algorithm = create(rule, settings)
    model, state = at(1.0), algorithm.start(at(1.0))
    for delta in deltas:
        combined = Update(arrays=at(delta), weight=1)
        model, state = algorithm.server_update(model, state, combined, Facts())
    np.testing.assert_allclose(
        model["w"], [paper(rule, deltas, lr, b1, b2, tau)], rtol=1e-9, atol=1e-9
    )


def test_yogi_forgets_large_gradients_slower_than_adam() -> None:
    moved = {}
    for rule in ("fedadam", "fedyogi"):
        algorithm = create(rule, {"server_lr": 0.1, "beta1": 0.0, "beta2": 0.5})
        model, state = at(0.0), algorithm.start(at(0.0))
        for delta in (10.0, 0.01, 0.01, 0.01, 0.01):
            combined = Update(arrays=at(delta), weight=1)
            model, state = algorithm.server_update(model, state, combined, Facts())
        moved[rule] = model["w"][0]
    assert moved["fedyogi"] < moved["fedadam"]
