# SPDX-License-Identifier: Apache-2.0
"""FedAsync and FedBuff, update by update."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedml.federate.algorithm import Facts, Update
from fedml.federate.fedasync import FedAsync
from fedml.federate.fedbuff import FedBuff
from tests.fedml.federate.quadratic import Quadratic, at


def sent(value: float) -> Update:
    return Update(arrays=at(value), weight=1)


@given(st.lists(st.tuples(st.floats(-10, 10), st.integers(0, 9)), min_size=1, max_size=9))
def test_fedasync_mixes_every_model_in_by_its_freshness(arrivals) -> None:
    algorithm = FedAsync(alpha=0.6, a=0.5)
    model, state, x = at(1.0), algorithm.start(at(1.0)), 1.0
    for value, late in arrivals:
        model, state = algorithm.server_update(model, state, sent(value), Facts(staleness=late))
        share = 0.6 * (late + 1) ** -0.5
        x = (1 - share) * x + share * value
    np.testing.assert_allclose(model["w"], [x], atol=1e-12)


def test_the_three_discounts_are_the_papers() -> None:
    late = range(8)
    assert {FedAsync(discount="constant").freshness(d) for d in late} == {1.0}
    assert [FedAsync(a=1.0).freshness(d) for d in late] == [1 / (d + 1) for d in late]
    hinge = [FedAsync(discount="hinge", a=10, b=4).freshness(d) for d in late]
    assert hinge == [1, 1, 1, 1, 1, 1 / 11, 1 / 21, 1 / 31]


def test_fedasync_pulls_clients_back_only_when_asked() -> None:
    client = Quadratic(at(4.0), lr=0.2, steps=300)
    rng = np.random.default_rng(0)
    plain = FedAsync().client_update(at(0.0), {}, None, client, rng)
    np.testing.assert_allclose(plain.arrays["w"], [4.0])  # a whole model, not a delta
    pulled = FedAsync(rho=3.0).client_update(at(0.0), {}, None, client, rng)
    np.testing.assert_allclose(pulled.arrays["w"], [1.0])
    assert [c is None for c in client.corrections] == [True, False]


@given(
    st.integers(1, 4),
    st.floats(0, 2),
    st.lists(st.tuples(st.floats(-10, 10), st.integers(0, 9)), min_size=1, max_size=13),
)
def test_fedbuff_steps_once_for_every_full_buffer(k, a, arrivals) -> None:
    algorithm = FedBuff(buffer=k, a=a, server_lr=0.5)
    model, state, w, held = at(1.0), algorithm.start(at(1.0)), 1.0, []
    for value, late in arrivals:
        facts = Facts(staleness=late)
        new, state = algorithm.server_update(model, state, sent(value), facts)
        held.append((1 + late) ** -a * value)
        assert (new is model) == (len(held) < k)  # "no step" is said by identity
        model = new
        if len(held) == k:
            w += 0.5 * sum(held) / k
            held = []
        np.testing.assert_allclose(model["w"], [w], atol=1e-9)


def test_fedbuffs_buffer_is_plain_state_that_can_be_stored_and_resumed() -> None:
    algorithm = FedBuff(buffer=3)
    model, state = at(0.0), algorithm.start(at(0.0))
    for value in (1.0, 2.0):
        model, state = algorithm.server_update(model, state, sent(value), Facts())
    stored = {name: array.copy() for name, array in state.items()}
    model, _ = algorithm.server_update(model, stored, sent(3.0), Facts())
    assert model["w"] == pytest.approx(2.0)
