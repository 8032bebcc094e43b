# SPDX-License-Identifier: Apache-2.0
"""No client counts for more than the bound, and the noise is as large as it is said to be."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedml.federate.aggregate import combine
from fedml.federate.algorithm import BadParameter, Update
from fedml.federate.arrays import Arrays, squared_norm
from fedml.federate.layout import Layout
from fedml.protect.privacy import GaussianPrivacy, NotPrivate, clip_to, secret_generator


def norm(arrays: Arrays) -> float:
    return math.sqrt(squared_norm(arrays))


@given(
    st.sampled_from([np.float16, np.float32, np.float64]).flatmap(
        lambda d: hnp.arrays(d, st.integers(1, 40), elements=st.floats(-100, 100, width=16))
    ),
    st.floats(0.01, 100),
)
def test_clipping_bounds_the_norm_and_keeps_the_direction(values, bound) -> None:
    arrays = {"a": values, "b": values[:1]}
    clipped, before = clip_to(arrays, bound)
    assert before == pytest.approx(norm(arrays))
    assert norm(clipped) <= bound  # not one rounding more: the privacy proof rests on it
    if before <= bound:
        np.testing.assert_array_equal(clipped["a"], values)
    elif values.dtype == np.float64:
        np.testing.assert_allclose(clipped["a"], values * (bound / before), rtol=1e-9)
    assert clipped["a"].dtype == values.dtype


def test_a_clipped_update_hides_its_examples_and_metrics() -> None:
    update = Update(arrays={"w": np.array([3.0, 4.0])}, weight=600, metrics={"loss": 0.1})
    private = GaussianPrivacy(1.0).clipped(update, 1.0)
    assert (private.weight, private.metrics) == (1.0, {})
    np.testing.assert_allclose(private.arrays["w"], [0.6, 0.8])


def test_integers_cannot_be_protected_and_are_refused() -> None:
    update = Update(arrays={"bn.num_batches_tracked": np.array(7)}, weight=1)
    with pytest.raises(NotPrivate, match=r"'bn.num_batches_tracked'.*group instead of batch"):
        GaussianPrivacy(1.0).clipped(update, 1.0)


@pytest.mark.parametrize("quantile", [None, 0.5])
def test_the_noise_on_the_mean_has_the_deviation_promised(quantile) -> None:
    privacy = GaussianPrivacy(1.5, quantile=quantile, bit_noise=2.0)
    updates = [Update(arrays={"w": np.zeros(200_000, np.float32)}, weight=9)] * 4
    combined = combine(privacy.clipped(update, 3.0) for update in updates)
    noised, _ = privacy.noised(combined, 3.0, 4, np.random.default_rng(0))
    assert noised.arrays.keys() == {"w"}
    z = 1.5 if quantile is None else (1.5**-2 - (2 * 2.0) ** -2) ** -0.5
    assert noised.arrays["w"].std() == pytest.approx(z * 3.0 / 4, rel=0.01)
    assert abs(noised.arrays["w"].mean()) < 5 * z * 3 / 4 / math.sqrt(200_000)


def test_adaptive_noise_costs_what_the_accountant_is_told() -> None:
    # Theorem 1: RDP of both releases together, z_D^-2 + (2 sigma_b)^-2 = z^-2.
    privacy = GaussianPrivacy(1.1, quantile=0.5, bit_noise=5.0)
    assert privacy.sum_noise_multiplier**-2 + (2 * 5.0) ** -2 == pytest.approx(1.1**-2)


def test_the_bound_finds_the_quantile_of_the_norms() -> None:
    privacy = GaussianPrivacy(0.1, quantile=0.5, bit_noise=1.0)
    rng, clip = np.random.default_rng(1), 0.01
    norms = np.linspace(1.0, 5.0, 101)  # median 3
    layout = privacy.layout(Layout.of({"w": np.zeros(2)}))
    for _ in range(150):
        updates = [
            privacy.clipped(Update(arrays={"w": np.array([n, 0.0])}, weight=1), clip) for n in norms
        ]
        layout.check(0, Layout.of(updates[0].arrays).tensors)
        _, clip = privacy.noised(combine(updates), clip, len(norms), rng)
    assert clip == pytest.approx(3.0, rel=0.05)


def test_a_fixed_bound_stays() -> None:
    privacy = GaussianPrivacy(1.0)
    layout = Layout.of({"w": np.zeros(2)})
    assert privacy.layout(layout) is layout
    combined = Update(arrays={"w": np.zeros(2)}, weight=1)
    assert privacy.noised(combined, 2.5, 1, np.random.default_rng(0))[1] == 2.5


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"noise_multiplier": 0}, "noise_multiplier must be a number > 0"),
        ({"noise_multiplier": 1, "clip": 0}, "clip"),
        ({"noise_multiplier": 1, "quantile": 1.0}, "quantile"),
        ({"noise_multiplier": 4, "quantile": 0.5, "bit_noise": 2.0}, "more than noise_multiplier"),
    ],
)
def test_settings_that_promise_nothing_are_refused(settings, why) -> None:
    with pytest.raises(BadParameter, match=why):
        GaussianPrivacy(**settings)


def test_secret_noise_does_not_repeat() -> None:
    assert secret_generator().random() != secret_generator().random()
