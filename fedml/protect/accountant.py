# SPDX-License-Identifier: Apache-2.0
"""How much privacy is spent: (epsilon, delta) of many rounds of sampled Gaussian noise.

Own code for Renyi differential privacy (RDP), which needs nothing but the standard library; and the
tighter privacy-loss distributions (PLD) of Google's `dp-accounting`, where it is installed. A run
whose every round asks all clients needs neither: its Gaussians are one Gaussian, known exactly.

"Noise multiplier" is the standard deviation of the noise over the L2 bound of one contribution.

* Poisson sampling (each client takes part with probability q; neighbours differ by one client):
  Mironov, Talwar, Zhang, "Renyi Differential Privacy of the Sampled Gaussian Mechanism", 2019.
* Fixed-size cohorts, as `cohort.choose` draws them (neighbours differ in one client's data, which
  moves the sum by up to twice the bound): Balle, Barthe, Gaboardi, "Privacy Amplification by
  Subsampling: Tight Analyses via Couplings and Divergences", NeurIPS 2018, for sampling without
  replacement under substitution, here as RDP. This is what runs use where a round asks only some.
  That one client is replaced by one who sends nothing is a case of it; the bound of Poisson
  sampling, and so PLD, is none for such cohorts.
* RDP to (epsilon, delta): Canonne, Kamath, Steinke, "The Discrete Gaussian for Differential
  Privacy", NeurIPS 2020, proposition 12; the conversion of 2016 (Abadi et al., theorem 2) is kept
  to check old numbers.
* One Gaussian, exactly, and so many of them, whose ``1 / s^2`` add up: Balle, Wang, "Improving the
  Gaussian Mechanism for Differential Privacy", ICML 2018, theorem 8.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from itertools import pairwise

# Integers up to 64 for the exact sums, then sparser; and small fractions, for loose budgets.
ORDERS: tuple[float, ...] = (
    *(1 + i / 10 for i in range(1, 100)),
    *(float(i) for i in range(11, 65)),
    *(float(i) for i in (80, 96, 128, 192, 256, 384, 512, 768, 1024)),
)

_CELLS = 300  # intervals of an integral that is bounded from above: within a few thousandths


class Sampling(StrEnum):
    """How a round's clients are drawn, which decides who counts as a neighbour."""

    POISSON = "poisson"
    FIXED = "fixed"


class Conversion(StrEnum):
    """How RDP becomes (epsilon, delta)."""

    CANONNE_2020 = "canonne-2020"
    ABADI_2016 = "abadi-2016"


@dataclass(slots=True)
class Accountant:
    """Adds up what the rounds of one run, or of many, have cost; part of the run's record.

    Attributes:
        orders: The RDP orders tracked, each > 1.
        spent: RDP so far, one number an order; store and restore it with the run.
        precision: Sum of ``1 / noise_multiplier^2`` over rounds that asked everybody; to be stored
            with the rest. NaN once a round asked only some, where it is of no use.
    """

    orders: tuple[float, ...] = ORDERS
    spent: list[float] = field(default_factory=list)
    precision: float = 0.0

    def __post_init__(self) -> None:
        if not self.spent:
            self.spent = [0.0] * len(self.orders)
        if len(self.spent) != len(self.orders) or min(self.orders) <= 1:
            raise ValueError("need one spent RDP per order, and orders above 1")

    def add(
        self,
        noise_multiplier: float,
        sampling_rate: float,
        rounds: int = 1,
        sampling: Sampling = Sampling.POISSON,
    ) -> None:
        """Count ``rounds`` rounds.

        Args:
            noise_multiplier: Standard deviation over the L2 bound of one contribution, > 0.
            sampling_rate: Chance, or share, of a client to take part in a round, in (0, 1].
            rounds: How many such rounds, >= 0.
            sampling: How the clients were drawn.
        """
        if rounds < 0:
            raise ValueError(f"rounds must be >= 0, got {rounds}")
        cost = rdp(noise_multiplier, sampling_rate, self.orders, sampling)
        self.spent = [old + rounds * new for old, new in zip(self.spent, cost, strict=True)]
        if rounds:
            whole = sampling is Sampling.POISSON and sampling_rate == 1
            self.precision += rounds / noise_multiplier**2 if whole else math.nan

    def epsilon(self, delta: float, conversion: Conversion = Conversion.CANONNE_2020) -> float:
        """The epsilon at ``delta`` of everything added so far, >= 0."""
        if conversion is Conversion.CANONNE_2020 and self.precision > 0:
            return gaussian_epsilon(self.precision**-0.5, delta)
        best = epsilon_of(self.orders, self.spent, delta, conversion)
        return best if any(self.spent) else 0.0


def rdp(
    noise_multiplier: float,
    sampling_rate: float,
    orders: Sequence[float],
    sampling: Sampling = Sampling.POISSON,
) -> list[float]:
    """RDP of one round at each order; infinite where no bound is known for that order."""
    if not noise_multiplier > 0:
        raise ValueError(f"the noise multiplier must be > 0, got {noise_multiplier}")
    if not 0 < sampling_rate <= 1:
        raise ValueError(f"the sampling rate must be in (0, 1], got {sampling_rate}")
    return [*_rdp(noise_multiplier, sampling_rate, tuple(orders), sampling)]


@lru_cache(maxsize=64)
def _rdp(
    sigma: float, q: float, orders: tuple[float, ...], sampling: Sampling
) -> tuple[float, ...]:
    """The same as ever in each round of a run."""
    one = _rdp_poisson if sampling is Sampling.POISSON else _rdp_fixed
    return tuple(one(q, sigma, order) for order in orders)


def epsilon_of(
    orders: Sequence[float],
    spent: Sequence[float],
    delta: float,
    conversion: Conversion = Conversion.CANONNE_2020,
) -> float:
    """The smallest epsilon that any order proves."""
    if not 0 < delta < 1:
        raise ValueError(f"delta must be in (0, 1), got {delta}")
    best = math.inf
    for order, cost in zip(orders, spent, strict=True):
        if conversion is Conversion.ABADI_2016:
            bound = cost + math.log(1 / delta) / (order - 1)
        else:
            bound = cost + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)
        best = min(best, bound)
    return max(best, 0.0)


def zcdp_epsilon(rho: float, delta: float) -> float:
    """The epsilon at ``delta`` of rho-zCDP, whose RDP at order a is ``rho * a``.

    The order is optimised over the reals: Canonne et al. 2020, proposition 12 with RDP rho * a.
    """
    if not rho >= 0:
        raise ValueError(f"rho must be >= 0, got {rho}")

    def bound(log_a_minus_1: float) -> float:
        order = 1 + math.exp(log_a_minus_1)
        return rho * order + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)

    return max(bound(_least(bound, -20.0, 20.0)), 0.0)


def gaussian_epsilon(noise_multiplier: float, delta: float) -> float:
    """The exact epsilon at ``delta`` of one Gaussian of this noise multiplier.

    Solves Balle & Wang 2018, theorem 8, for epsilon, with s the noise multiplier::

        delta = Phi(1/(2s) - epsilon s) - e^epsilon Phi(-1/(2s) - epsilon s)
    """
    s = noise_multiplier
    if not s > 0 or not 0 < delta < 1:
        raise ValueError(f"need a noise multiplier > 0 and delta in (0, 1), got {s} and {delta}")

    def excess(epsilon: float) -> float:
        left, right = 1 / (2 * s) - epsilon * s, -1 / (2 * s) - epsilon * s
        return math.exp(_log_phi(left)) - math.exp(epsilon + _log_phi(right)) - delta

    if excess(0.0) <= 0:
        return 0.0
    high = 1.0
    while excess(high) > 0:
        high *= 2
    return _root(excess, 0.0, high)


def noise_multiplier_for(
    epsilon: float,
    delta: float,
    sampling_rate: float,
    rounds: int,
    sampling: Sampling = Sampling.POISSON,
) -> float:
    """The least noise multiplier, to one part in a million, that keeps a run within a budget.

    Raises:
        ValueError: The budget is not positive, or no multiplier below a million meets it.
    """
    if not epsilon > 0 or rounds < 1:
        raise ValueError(f"need epsilon > 0 and rounds >= 1, got {epsilon} and {rounds}")

    def excess(log_noise: float) -> float:
        accountant = Accountant()
        accountant.add(math.exp(log_noise), sampling_rate, rounds, sampling)
        return accountant.epsilon(delta) - epsilon

    low, high = math.log(1e-2), math.log(1e6)
    if excess(high) > 0:
        raise ValueError(f"no noise gives epsilon {epsilon} at delta {delta} in {rounds} rounds")
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return math.exp(high)


def pld_epsilon(noise_multiplier: float, sampling_rate: float, rounds: int, delta: float) -> float:
    """The epsilon at ``delta`` by privacy-loss distributions, Poisson sampling.

    Raises:
        ModuleNotFoundError: `dp-accounting` is not installed.
    """
    try:
        event = importlib.import_module("dp_accounting.dp_event")
        pld = importlib.import_module("dp_accounting.pld")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "PLD accounting needs the package dp-accounting: `pip install dp-accounting`; "
            "without it, use Accountant (RDP), whose epsilon is somewhat larger"
        ) from error
    one = event.PoissonSampledDpEvent(sampling_rate, event.GaussianDpEvent(noise_multiplier))
    accountant = pld.PLDAccountant()
    accountant.compose(event.SelfComposedDpEvent(one, rounds))
    return float(accountant.get_epsilon(delta))


def _rdp_poisson(q: float, sigma: float, order: float) -> float:
    """Mironov et al. 2019, section 3.3: ``log A_a / (a - 1)``."""
    if q == 1:
        return order / (2 * sigma**2)
    log_a = (
        _log_a_integer(q, sigma, int(order))
        if float(order).is_integer()
        else _log_a_fraction(q, sigma, order)
    )
    # Below this, log A is rounding error, and a cost must not be understated.
    return max(log_a, 2e-14) / (order - 1)


def _log_a_integer(q: float, sigma: float, order: int) -> float:
    """``log sum_k C(a, k) (1-q)^(a-k) q^k exp((k^2 - k) / (2 sigma^2))``."""
    terms = [
        _log_choose(order, k)
        + k * math.log(q)
        + (order - k) * math.log1p(-q)
        + (k * k - k) / (2 * sigma**2)
        for k in range(order + 1)
    ]
    return _log_sum(terms)


def _log_a_fraction(q: float, sigma: float, order: float) -> float:
    """``log E_{z ~ N(0, sigma^2)} [(1 - q + q exp((2z - 1) / (2 sigma^2)))^a]``, by trapezoids.

    The integrand is analytic up to ``pi sigma^2`` off the real line, so the error falls as
    ``exp(-2 pi^2 sigma^2 / step)``, below rounding here; the paper's series for fractional orders
    only falls as a power.
    """
    step = min(sigma, sigma**2) / 4
    low, high = -12 * sigma, order + 12 * sigma
    terms = []
    for i in range(math.ceil((high - low) / step) + 1):
        z = low + i * step
        x = (2 * z - 1) / (2 * sigma**2)
        # log(1 - q + q e^x), without overflow for large x.
        mix = x + math.log(q + (1 - q) * math.exp(-x)) if x > 0 else math.log1p(q * math.expm1(x))
        terms.append(order * mix - z * z / (2 * sigma**2))
    return _log_sum(terms) + math.log(step / (sigma * math.sqrt(2 * math.pi)))


def _rdp_fixed(q: float, sigma: float, order: float) -> float:
    """From above, of a cohort of a fixed size in which one client's data is replaced.

    That moves the sum by up to ``mu = 2 / sigma`` deviations, so whole cohorts are as far apart as
    two Gaussians, ``H_t = Phi(mu/2 - log(t)/mu) - t Phi(-mu/2 - log(t)/mu)`` in the divergence
    ``H_t(A, B) = integral (A - t B)+``. For a share q of all, Balle et al. 2018 show that::

        h(1 + q (t - 1)) = q H_t,  t >= 1

    bounds both directions between neighbours, and with ``H_b(A, B) = 1 - b + b H_1/b(B, A)``::

        E (A/B)^a = 1 + a (a - 1) integral_0^inf b^(a-2) (H_b(A, B) - (1 - b)+) db
                 <= 1 + a (a - 1) integral_1^inf (b^(a-2) + b^(-a-1)) h(b) db

    h is convex and falls. So on each interval its chord lies above it; times a power of b that
    falls it is convex, and the trapezoid above that; times one that grows, the mean of the chord
    times the integral of the power is (Chebyshev's inequality). What is cut off at the end is less
    than rounding.
    """
    full = 2 * order / sigma**2
    if q == 1:
        return full
    mu = 2 / sigma
    points = [_tilted(q, mu, (mu * order + 12) * mu * i / _CELLS) for i in range(_CELLS + 1)]
    terms = []
    for (b, h), (b_next, h_next) in pairwise(points):
        width = b_next - b
        wide = b + _log_expm1(width)  # log(e^b_next - e^b)
        powers = [-order - 1]
        if order < 2:
            powers.append(order - 2)
        else:
            part = _log_expm1((order - 1) * width) + (order - 1) * b - math.log(order - 1)
            terms.append(part + _log_sum([h, h_next]))
        for power in powers:
            terms += [wide + power * b + h, wide + power * b_next + h_next]
    excess = math.log(order * (order - 1) / 2) + _log_sum(terms)
    return min((math.log1p(math.exp(excess)) if excess < 50 else excess) / (order - 1), full)


def _tilted(q: float, mu: float, log_t: float) -> tuple[float, float]:
    """``log(1 + q (t - 1))`` and ``log h`` there, see `_rdp_fixed`."""
    left, right = _log_phi(mu / 2 - log_t / mu), _log_phi(-mu / 2 - log_t / mu)
    if log_t < 1:
        b = math.log1p(q * math.expm1(log_t))
    else:
        b = log_t + math.log(q + (1 - q) * math.exp(-log_t))
    return b, math.log(q) + left + math.log(-math.expm1(log_t + right - left))


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _log_expm1(x: float) -> float:
    return x + math.log(-math.expm1(-x))


def _log_sum(terms: Sequence[float]) -> float:
    top = max(terms, default=-math.inf)
    if top == -math.inf:
        return top
    return top + math.log(math.fsum(math.exp(term - top) for term in terms))


def _log_phi(x: float) -> float:
    """``log Phi(x)``; far out, where Phi underflows, by its asymptotic series."""
    if x > -25:
        return math.log(0.5 * math.erfc(-x / math.sqrt(2)))
    series = -1 / x**2 + 3 / x**4 - 15 / x**6 + 105 / x**8
    return -x * x / 2 - math.log(-x * math.sqrt(2 * math.pi)) + math.log1p(series)


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > 0 else (low, middle)
    return high


def _least(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a unimodal function is least, by golden section."""
    golden = (math.sqrt(5) - 1) / 2
    a, b = high - golden * (high - low), low + golden * (high - low)
    fa, fb = function(a), function(b)
    for _ in range(200):
        if fa < fb:
            high, b, fb = b, a, fa
            a = high - golden * (high - low)
            fa = function(a)
        else:
            low, a, fa = a, b, fb
            b = low + golden * (high - low)
            fb = function(b)
    return (low + high) / 2
