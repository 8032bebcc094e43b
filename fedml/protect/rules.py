# SPDX-License-Identifier: Apache-2.0
"""The rules that take the place of the mean, and the mixing steps before them.

Each is a pure function of numbers that `robust.RobustFold` hands it: one coordinate of all clients
(`CoordinateRule`), or the Gram matrix of their updates (`CombinationRule`, `Mixing`), from which
every distance and every iterate of the usual methods follows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import Enum, auto
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from fedml.federate.algorithm import BadParameter, number

Matrix: TypeAlias = npt.NDArray[np.floating[Any]]
Doubles: TypeAlias = npt.NDArray[np.float64]


class Origin(Enum):
    """Where a combination rule measures from."""

    ANYWHERE = auto()  # it looks at differences between updates only
    REFERENCE = auto()  # it starts from a given point, or zero


class TooFewClients(ValueError):
    """The rule promises nothing with this many clients and this many liars."""


@runtime_checkable
class CoordinateRule(Protocol):
    """A rule that looks at one coordinate at a time.

    Attributes:
        least: Clients without whom it promises nothing.
    """

    @property
    def least(self) -> int: ...

    def across(self, columns: Matrix) -> Matrix:
        """One value for each coordinate.

        Args:
            columns: Shape (m, n): n clients' values of m coordinates; may be reordered in place.

        Returns:
            Shape (m,).
        """
        ...


class CombinationRule(Protocol):
    """A rule that gives each client a coefficient.

    Attributes:
        origin: Where it measures from.
        least: Clients without whom it promises nothing.
    """

    @property
    def least(self) -> int: ...
    @property
    def origin(self) -> Origin: ...

    def coefficients(self, gram: Doubles) -> Doubles:
        """Shape (n,) from the Gram matrix, shape (n, n), of the updates as seen from the origin.

        The result of the rule is ``origin + sum_i coefficient_i (update_i - origin)``.
        """
        ...


class Mixing(Protocol):
    """A step before a rule that replaces updates by means of updates."""

    def weights(self, gram: Doubles, rng: np.random.Generator) -> Doubles:
        """Shape (k, n), rows that sum to 1: row j says what the j-th mixed update is made of."""
        ...

    def least(self, left: int) -> int:
        """How many updates it needs, to leave at least ``left`` to what comes after it."""
        ...


@dataclass(frozen=True, slots=True)
class Median:
    """The median of each coordinate (Yin et al., ICML 2018); of an even number, the mid-point."""

    least = 1

    def across(self, columns: Matrix) -> Matrix:
        """See `CoordinateRule`."""
        n = columns.shape[1]
        columns.partition(n // 2, axis=1)
        upper: Matrix = columns[:, n // 2]
        if n % 2:
            return upper
        # One pivot and a maximum: numpy's partition about two pivots is far slower.
        lower: Matrix = columns[:, : n // 2].max(axis=1)
        return lower / 2 + upper / 2


@dataclass(frozen=True, slots=True)
class TrimmedMean:
    """The mean of each coordinate without its extremes (Yin et al., ICML 2018).

    Attributes:
        trim: Values dropped on each side, >= 0; at least the number of liars.
    """

    trim: int

    def __post_init__(self) -> None:
        _count("trimmed_mean", "trim", self.trim)

    @property
    def least(self) -> int:
        """One is left when the extremes are gone."""
        return 2 * self.trim + 1

    def across(self, columns: Matrix) -> Matrix:
        """See `CoordinateRule`."""
        n, b = columns.shape[1], self.trim
        if b:
            columns.partition(b, axis=1)
            columns = columns[:, b:]
            columns.partition(n - 2 * b - 1, axis=1)
            columns = columns[:, : n - 2 * b]
        mean: Matrix = columns.mean(axis=1, dtype=np.float64)
        return mean


@dataclass(frozen=True, slots=True)
class Mean:
    """The plain mean, which one liar can move anywhere: for comparison."""

    origin = Origin.ANYWHERE
    least = 1

    def coefficients(self, gram: Doubles) -> Doubles:
        """See `CombinationRule`."""
        return np.full(len(gram), 1 / len(gram))


@dataclass(frozen=True, slots=True)
class Krum:
    """The updates with the closest company (Blanchard et al., NeurIPS 2017).

    An update's score is the sum of its squared distances to its n - f - 2 nearest others.

    Attributes:
        byzantine: Liars expected, the paper's f, >= 0; needs n >= 2f + 3.
        keep: How many of the best are averaged: 1 is Krum, more is Multi-Krum; needs n >= f + keep.
    """

    origin = Origin.ANYWHERE

    byzantine: int
    keep: int = 1

    def __post_init__(self) -> None:
        _count("krum", "byzantine", self.byzantine)
        _count("krum", "keep", self.keep, least=1)

    @property
    def least(self) -> int:
        """``2f + 3``, and as many honest ones as are kept."""
        return max(2 * self.byzantine + 3, self.byzantine + self.keep)

    def coefficients(self, gram: Doubles) -> Doubles:
        """See `CombinationRule`. Equal scores go to the lower-numbered client."""
        n, f = len(gram), self.byzantine
        distances = squared_distances(gram)
        np.fill_diagonal(distances, np.inf)
        distances.sort(axis=1)
        scores = distances[:, : n - f - 2].sum(axis=1)
        best = np.argsort(scores, kind="stable")[: self.keep]
        out = np.zeros(n)
        out[best] = 1 / self.keep
        return out


@dataclass(frozen=True, slots=True)
class GeometricMedian:
    """The point of least summed distance to all updates (RFA: Pillutla et al., 2022).

    Weiszfeld's iteration, smoothed; all iterates are weighted means of the updates, so it runs on
    the coefficients. Distances are in units of the median distance from the update in their midst.

    Attributes:
        iterations: At most so many, >= 1.
        tolerance: Stop when no coefficient moves by more than this share of 1/n, > 0.
        smoothing: Shorter distances count as this long, > 0.
    """

    origin = Origin.ANYWHERE
    least = 1

    iterations: int = 200
    tolerance: float = 1e-7
    smoothing: float = 1e-6

    def __post_init__(self) -> None:
        _count("geometric_median", "iterations", self.iterations, least=1)
        number("geometric_median", "tolerance", self.tolerance, above=0)
        number("geometric_median", "smoothing", self.smoothing, above=0)

    def coefficients(self, gram: Doubles) -> Doubles:
        """See `CombinationRule`."""
        n = len(gram)
        squared = squared_distances(gram)
        m = medoid(squared)
        far = np.sqrt(squared[m])
        unit = float(np.median(far))
        if unit == 0:  # half of them are one point, which is then the median
            return np.asarray(np.arange(n) == m, dtype=np.float64)
        # An update very far off pulls by its direction alone, so a million units will do; further
        # off, it would drown all other distances in rounding.
        near = np.minimum(1, 1e6 * unit / np.maximum(far, unit))
        seen = gram - gram[m] - gram[:, m, None] + gram[m, m]
        seen = near[:, None] * seen * near
        weights = np.full(n, 1 / n)
        for _ in range(self.iterations):
            away = np.sqrt(_squared_from(seen, weights))
            new = 1 / np.maximum(away, self.smoothing * unit)
            new /= new.sum()
            moved = float(np.abs(new - weights).max())
            weights = new
            if moved <= self.tolerance / n:
                break
        out: Doubles = weights * near
        out[m] += 1 - out.sum()
        return out


@dataclass(frozen=True, slots=True)
class CentredClipping:
    """Clip every update's distance from a running centre (Karimireddy et al., ICML 2021).

    From ``v`` = the reference (the last round's result) or zero::

        v <- v + mean_i (x_i - v) min(1, radius / ||x_i - v||)

    Attributes:
        radius: The paper's tau, > 0.
        iterations: How often, >= 1.
    """

    origin = Origin.REFERENCE
    least = 1

    radius: float
    iterations: int = 3

    def __post_init__(self) -> None:
        number("centred_clipping", "radius", self.radius, above=0)
        _count("centred_clipping", "iterations", self.iterations, least=1)

    def coefficients(self, gram: Doubles) -> Doubles:
        """See `CombinationRule`."""
        n = len(gram)
        weights = np.zeros(n)
        for _ in range(self.iterations):
            share = _clip_shares(_squared_from(gram, weights), self.radius) / n
            weights = weights * (1 - share.sum()) + share
        return weights


@dataclass(frozen=True, slots=True)
class NormClipping:
    """The mean of updates clipped to a norm (Sun et al., "Can You Really Backdoor FL?", 2019).

    Attributes:
        bound: Largest L2 norm that one update may have, > 0.
    """

    origin = Origin.REFERENCE
    least = 1

    bound: float

    def __post_init__(self) -> None:
        number("norm_clipping", "bound", self.bound, above=0)

    def coefficients(self, gram: Doubles) -> Doubles:
        """See `CombinationRule`."""
        return _clip_shares(np.diagonal(gram).copy(), self.bound) / len(gram)


@dataclass(frozen=True, slots=True)
class NearestNeighbours:
    """Replace each update by the mean of itself and its nearest others, n - f in all.

    NNM: Allouah, Farhadkhani, Guerraoui, Gupta, Pinot, Stephan, "Fixing by Mixing", AISTATS 2023.

    Attributes:
        byzantine: Liars expected, f, >= 0; needs n > 2f.
    """

    byzantine: int

    def __post_init__(self) -> None:
        _count("nearest_neighbours", "byzantine", self.byzantine)

    def weights(self, gram: Doubles, rng: np.random.Generator) -> Doubles:
        """See `Mixing`."""
        n, f = len(gram), self.byzantine
        distances = squared_distances(gram)
        np.fill_diagonal(distances, -1.0)  # each is its own nearest neighbour, whatever rounding
        nearest = np.argsort(distances, axis=1, kind="stable")[:, : n - f]
        out = np.zeros((n, n))
        np.put_along_axis(out, nearest, 1 / (n - f), axis=1)
        return out

    def least(self, left: int) -> int:
        """See `Mixing`: as many come out as go in."""
        return max(2 * self.byzantine + 1, left)


@dataclass(frozen=True, slots=True)
class Bucketing:
    """Average random buckets of updates (Karimireddy, He, Jaggi, ICLR 2022).

    Attributes:
        size: Updates in a bucket, the paper's s, >= 1; the last bucket may be smaller.
    """

    size: int = 2

    def __post_init__(self) -> None:
        _count("bucketing", "size", self.size, least=1)

    def weights(self, gram: Doubles, rng: np.random.Generator) -> Doubles:
        """See `Mixing`."""
        n = len(gram)
        order = rng.permutation(n)
        buckets = [order[i : i + self.size] for i in range(0, n, self.size)]
        out = np.zeros((len(buckets), n))
        for row, bucket in zip(out, buckets, strict=True):
            row[bucket] = 1 / len(bucket)
        return out

    def least(self, left: int) -> int:
        """See `Mixing`: all buckets but the last are full."""
        return (left - 1) * self.size + 1


Rule: TypeAlias = CoordinateRule | CombinationRule


def require(rule: Rule, mixing: Sequence[Mixing], clients: int) -> None:
    """Refuse a round of too few clients for a rule and the mixing before it.

    Raises:
        TooFewClients: With how many it takes.
    """
    least = rule.least
    for step in reversed(mixing):
        least = step.least(least)
    if clients < least:
        said = " after ".join(_said(part) for part in (rule, *reversed(mixing)))
        raise TooFewClients(f"{said} needs at least {least} clients, there are {clients}")


def _said(part: Any) -> str:
    """A rule or a mixing as a run file has it."""
    name = re.sub(r"(?<!^)(?=[A-Z])", "_", type(part).__name__).lower()
    numbers = ", ".join(f"{f.name}={getattr(part, f.name)}" for f in fields(part))
    return f"{name} with {numbers}" if numbers else name


def squared_distances(gram: Doubles) -> Doubles:
    """``||x_i - x_j||^2``, shape (n, n), >= 0, from the Gram matrix of the rows."""
    norms = np.diagonal(gram)
    out: Doubles = norms[:, None] + norms - 2 * gram
    np.maximum(out, 0, out=out)
    return out


def medoid(squared: Doubles) -> int:
    """The row of least summed distance to all others, from their squared distances."""
    return int(np.argmin(np.sqrt(squared).sum(axis=1)))


def _count(rule: str, name: str, value: int, least: int = 0) -> None:
    number(rule, name, value, at_least=least)
    if not isinstance(value, int):
        raise BadParameter(f"{rule}: {name} must be a whole number, got {value!r}")


def _squared_from(gram: Doubles, weights: Doubles) -> Doubles:
    """``||x_i - sum_j w_j x_j||^2`` for every i, as seen from the Gram matrix's origin."""
    product = gram @ weights
    out: Doubles = np.diagonal(gram) - 2 * product + weights @ product
    return np.maximum(out, 0)


def _clip_shares(squared: Doubles, radius: float) -> Doubles:
    """``min(1, radius / norm)`` from squared norms."""
    norms = np.sqrt(squared)
    return np.where(norms > radius, radius / np.maximum(norms, radius), 1.0)
