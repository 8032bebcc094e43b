# SPDX-License-Identifier: Apache-2.0
"""Published privacy numbers, and integrals worked out another way."""

from __future__ import annotations

import math
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedml.protect import accountant
from fedml.protect.accountant import (
    ORDERS,
    Accountant,
    Conversion,
    Sampling,
    epsilon_of,
    gaussian_epsilon,
    noise_multiplier_for,
    pld_epsilon,
    rdp,
    zcdp_epsilon,
)


def abadi() -> Accountant:
    accountant = Accountant()
    accountant.add(noise_multiplier=4, sampling_rate=0.01, rounds=10_000)
    return accountant


def test_abadi_2016_by_its_own_conversion_and_by_the_modern_one() -> None:
    assert abadi().epsilon(1e-5, Conversion.ABADI_2016) == pytest.approx(1.2586, abs=5e-5)
    assert abadi().epsilon(1e-5) == pytest.approx(1.0355, abs=5e-5)


def test_abadi_2016_by_privacy_loss_distributions() -> None:
    pytest.importorskip("dp_accounting", reason="pip install dp-accounting")
    assert pld_epsilon(4, 0.01, 10_000, 1e-5) == pytest.approx(0.9470, abs=5e-5)


def test_without_dp_accounting_the_error_says_what_to_do(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install dp-accounting.*use Accountant"):
        pld_epsilon(4, 0.01, 10, 1e-5)


def test_one_gaussian_is_that_of_balle_and_wang() -> None:
    assert gaussian_epsilon(1.0, 1e-5) == pytest.approx(4.3772, abs=5e-5)


@settings(deadline=None)
@given(st.floats(0.3, 20), st.floats(1e-12, 0.1))
def test_the_exact_epsilon_of_one_gaussian_is_below_every_bound(sigma, delta) -> None:
    exact = gaussian_epsilon(sigma, delta)
    assert exact <= zcdp_epsilon(1 / (2 * sigma**2), delta) + 1e-9
    by_rdp = epsilon_of(ORDERS, rdp(sigma, 1.0, ORDERS), delta)
    assert zcdp_epsilon(1 / (2 * sigma**2), delta) <= by_rdp + 1e-9


@pytest.mark.parametrize("sigma", [0.01, 0.02, 0.05, 0.3, 2.0])
def test_the_exact_epsilon_is_that_of_the_privacy_loss_also_where_little_is_private(sigma) -> None:
    # The loss is N(eta, 2 eta); delta is the mean of (1 - exp(epsilon - loss))+.
    epsilon, eta = gaussian_epsilon(sigma, 1e-5), 1 / (2 * sigma**2)
    z = np.linspace(-12, 12, 200_001)
    over = -np.expm1(np.minimum(epsilon - eta - math.sqrt(2 * eta) * z, 0))
    delta = math.fsum((np.exp(-z * z / 2) * over).tolist()) * (z[1] - z[0])
    assert delta / math.sqrt(2 * math.pi) == pytest.approx(1e-5, rel=1e-3)


def test_rounds_that_ask_everybody_are_one_gaussian_and_one_that_does_not_ends_that() -> None:
    accountant = Accountant()
    accountant.add(4.0, 1.0, rounds=16)
    assert accountant.epsilon(1e-5) == pytest.approx(gaussian_epsilon(1.0, 1e-5), rel=1e-9)
    by_rdp = epsilon_of(ORDERS, accountant.spent, 1e-5)
    assert accountant.epsilon(1e-5) < by_rdp
    again = Accountant(spent=accountant.spent, precision=accountant.precision)
    again.add(4.0, 0.5, sampling=Sampling.FIXED)
    assert again.epsilon(1e-5) > by_rdp
    again.add(4.0, 1.0)
    assert again.epsilon(1e-5) == epsilon_of(ORDERS, again.spent, 1e-5)


def test_zcdp_of_081_is_89() -> None:
    assert zcdp_epsilon(0.81, 1e-10) == pytest.approx(8.9, abs=0.05)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("q", [1e-4, 0.01, 0.5])
@pytest.mark.parametrize("order", [1.1, 1.5, 2.0, 4.7, 8.0, 32.0])
def test_sampled_rdp_is_the_integral_that_defines_it(sigma, q, order) -> None:
    # A fine Riemann sum of the density ratio written out plainly.
    z = np.linspace(-14 * sigma, order + 14 * sigma, 40_001)
    log_ratio = np.logaddexp(math.log1p(-q), math.log(q) + (2 * z - 1) / (2 * sigma**2))
    log_term = order * log_ratio - z**2 / (2 * sigma**2)
    top = log_term.max()
    width = (order + 28 * sigma) / 40_000 / (sigma * math.sqrt(2 * math.pi))
    integral = top + math.log(math.fsum(np.exp(log_term - top).tolist()) * width)
    (got,) = rdp(sigma, q, [order])
    assert got == pytest.approx(integral / (order - 1), rel=1e-6, abs=1e-14 / (order - 1))


@pytest.mark.parametrize(
    ("rate", "order", "published"),
    [  # dp-accounting 0.6.0, SampledWithoutReplacement of a Gaussian of noise 1, replace one
        (0.01, 2, 5.4351e-4),
        (0.01, 3, 8.3487e-4),
        (0.1, 2, 0.052939),
        (0.1, 3, 0.092521),
        (0.1, 32, 13.645),
        (1.0, 16, 8.0),
    ],
)
def test_fixed_cohorts_cost_no_more_than_dp_accounting_says(rate, order, published) -> None:
    # Its noise is per replaced client; ours is per client's bound, half as far. It has theorem 9
    # of Wang et al. 2019, which is up to a few times looser.
    (cost,) = rdp(2.0, rate, [order], Sampling.FIXED)
    assert cost <= published * 1.005
    assert cost > 0.4 * published
    if rate == 1:
        assert cost == pytest.approx(published, rel=1e-12)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("q", [1e-4, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("order", [1.1, 1.5, 2.0, 4.7, 8.0, 32.0])
def test_fixed_cohorts_cost_what_the_worst_neighbours_tell_and_hardly_more(sigma, q, order) -> None:
    # One client of n sends the bound or its opposite, all others that opposite: the sum is N(0) or,
    # where he is in the cohort, N(2), and with the other data always N(0). Both ways round.
    z = np.linspace(-14 * sigma, 2 * order + 14 * sigma, 80_001)
    log_q = -(z**2) / (2 * sigma**2)
    log_ratio = np.logaddexp(math.log1p(-q), math.log(q) + (2 * z - 2) / sigma**2)
    cost = []
    for log_term in (order * log_ratio + log_q, (1 - order) * log_ratio + log_q):
        top = log_term.max()
        width = (z[1] - z[0]) / (sigma * math.sqrt(2 * math.pi))
        total = top + math.log(math.fsum(np.exp(log_term - top).tolist()) * width)
        cost.append(total / (order - 1))
    (got,) = rdp(sigma, q, [order], Sampling.FIXED)
    assert max(cost) * (1 - 1e-9) - 1e-12 <= got
    assert got <= 2.1 * max(cost) + 1e-9


@pytest.mark.parametrize("sigma", [0.02, 0.7, 50.0])
@pytest.mark.parametrize("order", [1.1, 3.0, 512.0])
def test_the_bound_for_fixed_cohorts_is_from_above_however_coarse(
    sigma, order, monkeypatch
) -> None:
    def cost(cells: int) -> float:
        monkeypatch.setattr(accountant, "_CELLS", cells)
        return accountant._rdp_fixed(0.2, sigma, order)

    coarse, usual, fine = cost(30), cost(300), cost(3000)
    assert coarse >= usual >= fine > 0
    assert usual <= 1.05 * fine


@given(st.floats(0.5, 10), st.floats(1e-4, 1), st.sampled_from(list(Sampling)))
@settings(deadline=None, max_examples=40)
def test_rdp_grows_with_the_order_and_sampling_never_hurts(sigma, q, sampling) -> None:
    cost = [c for c in rdp(sigma, q, (1.5, 2, 3, 5, 8, 13), sampling) if math.isfinite(c)]
    whole = rdp(sigma, 1.0, (1.5, 2, 3, 5, 8, 13), sampling)[-len(cost) :]
    assert all(a <= b * (1 + 1e-9) + 1e-12 for a, b in pairwise(cost))
    assert all(a <= b * (1 + 1e-9) for a, b in zip(cost, whole, strict=True))


def test_rounds_add_up_and_survive_a_restart() -> None:
    accountant = Accountant()
    accountant.add(4, 0.01, 4000)
    resumed = Accountant(spent=list(accountant.spent))
    resumed.add(4, 0.01, 6000)
    assert resumed.epsilon(1e-5) == pytest.approx(abadi().epsilon(1e-5), rel=1e-12)
    assert Accountant().epsilon(1e-5) == 0.0


def test_the_noise_for_a_budget_just_meets_it() -> None:
    noise = noise_multiplier_for(1.0355, 1e-5, 0.01, 10_000)
    assert noise == pytest.approx(4.0, abs=1e-3)
    accountant = Accountant()
    accountant.add(noise, 0.01, 10_000)
    assert accountant.epsilon(1e-5) <= 1.0355
    for impossible in ((0.0, 10), (1.0, 0)):
        with pytest.raises(ValueError, match="need epsilon > 0"):
            noise_multiplier_for(impossible[0], 1e-5, 0.01, impossible[1])


def test_a_large_budget_is_not_overstated_by_a_lack_of_small_orders() -> None:
    cost = [10 * one for one in rdp(0.5, 1.0, ORDERS)]
    assert epsilon_of(ORDERS, cost, 1e-5) < epsilon_of((2.0,), (40.0,), 1e-5)
    assert epsilon_of(ORDERS, cost, 1e-5) == pytest.approx(zcdp_epsilon(20.0, 1e-5), rel=1e-3)
    assert min(ORDERS) > 1


@pytest.mark.parametrize(
    "call",
    [
        lambda: rdp(0.0, 0.1, [2]),
        lambda: rdp(1.0, 0.0, [2]),
        lambda: rdp(1.0, 1.1, [2]),
        lambda: Accountant().add(1.0, 0.1, -1),
        lambda: Accountant().epsilon(0.0),
        lambda: Accountant(orders=(1.0,)),
        lambda: Accountant(spent=[1.0]),
        lambda: gaussian_epsilon(1.0, 1.0),
        lambda: zcdp_epsilon(-1.0, 1e-5),
    ],
)
def test_impossible_settings_are_refused(call) -> None:
    with pytest.raises(ValueError):
        call()
