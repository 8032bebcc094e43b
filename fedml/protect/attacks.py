# SPDX-License-Identifier: Apache-2.0
"""What lying clients send, to try rules on in simulation.

Every attack is a pure function of what the liar would have sent honestly and, for those that
collude, of what the honest clients send; one changes what the liar learns from instead
(`LabelFlip`). None is any use against a real system that it is not already part of.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, ClassVar, Protocol

import numpy as np

from fedml.federate.algorithm import BadParameter, number
from fedml.federate.arrays import Arrays, rounded, scaled, zeros


class Attack(Protocol):
    """One way to lie.

    Attributes:
        colludes: Whether it looks at what the honest clients send.
    """

    colludes: ClassVar[bool]

    def forge(self, own: Arrays, honest: Sequence[Arrays], rng: np.random.Generator) -> Arrays:
        """The arrays to send instead of ``own``.

        Args:
            own: What this client would have sent, names and shapes of every update.
            honest: What the honest clients send, at least one for the attacks that look at it.
            rng: The liar's random numbers.
        """
        ...


@dataclass(frozen=True, slots=True)
class Zero:
    """Send nothing but zeros: a free rider."""

    colludes: ClassVar[bool] = False

    def forge(self, own: Arrays, honest: Sequence[Arrays], rng: np.random.Generator) -> Arrays:
        """See `Attack`."""
        return zeros(own)


@dataclass(frozen=True, slots=True)
class Noise:
    """Send Gaussian noise.

    Attributes:
        deviation: Its standard deviation, > 0.
    """

    colludes: ClassVar[bool] = False

    deviation: float = 1.0

    def __post_init__(self) -> None:
        number("random", "deviation", self.deviation, above=0)

    def forge(self, own: Arrays, honest: Sequence[Arrays], rng: np.random.Generator) -> Arrays:
        """See `Attack`. Integers stay honest."""
        return {
            name: rounded(self.deviation * rng.standard_normal(array.shape), array.dtype)
            if array.dtype.kind == "f"
            else array
            for name, array in sorted(own.items())
        }


@dataclass(frozen=True, slots=True)
class SignFlip:
    """Send the honest update backwards.

    Attributes:
        scale: How much larger, > 0.
    """

    colludes: ClassVar[bool] = False

    scale: float = 1.0

    def __post_init__(self) -> None:
        number("flip", "scale", self.scale, above=0)

    def forge(self, own: Arrays, honest: Sequence[Arrays], rng: np.random.Generator) -> Arrays:
        """See `Attack`."""
        return scaled(own, -self.scale)


@dataclass(frozen=True, slots=True)
class LittleIsEnough:
    """Hide in the spread of the honest updates (ALIE: Baruch, Baruch, Goldberg, NeurIPS 2019).

    Every liar sends ``mean - z * deviation`` of the honest clients, coordinate by coordinate, with
    the largest ``z`` at which enough honest clients still look worse::

        s = floor(n/2 + 1) - f,   z = Phi^-1((n - f - s) / (n - f))

    Attributes:
        clients: All clients n, liars included.
        byzantine: Liars f, >= 1 and fewer than half.
        z: Overrides the formula.
    """

    colludes: ClassVar[bool] = True

    clients: int
    byzantine: int
    z: float | None = None

    def __post_init__(self) -> None:
        number("alie", "byzantine", self.byzantine, at_least=1)
        if 2 * self.byzantine >= self.clients:
            raise BadParameter(f"alie: {self.byzantine} liars of {self.clients} are no minority")

    @property
    def deviations(self) -> float:
        """``z``; 0 where the formula leaves no room (few clients, one liar)."""
        if self.z is not None:
            return self.z
        honest = self.clients - self.byzantine
        needed = math.floor(self.clients / 2 + 1) - self.byzantine
        share = (honest - needed) / honest
        return max(NormalDist().inv_cdf(share), 0.0) if 0 < share < 1 else 0.0

    def forge(self, own: Arrays, honest: Sequence[Arrays], rng: np.random.Generator) -> Arrays:
        """See `Attack`."""
        z = self.deviations
        return _of_honest(own, honest, lambda stack: stack.mean(axis=0) - z * stack.std(axis=0))


@dataclass(frozen=True, slots=True)
class InnerProduct:
    """Turn the sum around (IPM: Xie, Koyejo, Gupta, UAI 2019): send ``-scale * mean honest``.

    Attributes:
        scale: The paper's epsilon, > 0; small ones pass distance rules, large ones break the mean.
    """

    colludes: ClassVar[bool] = True

    scale: float = 0.5

    def __post_init__(self) -> None:
        number("ipm", "scale", self.scale, above=0)

    def forge(self, own: Arrays, honest: Sequence[Arrays], rng: np.random.Generator) -> Arrays:
        """See `Attack`."""
        return _of_honest(own, honest, lambda stack: -self.scale * stack.mean(axis=0))


@dataclass(frozen=True, slots=True)
class LabelFlip:
    """Learn that examples of one class are of another (Tolpegin et al., ESORICS 2020).

    Attributes:
        source: The class that is lied about.
        target: What it is said to be.
    """

    source: int
    target: int

    def __post_init__(self) -> None:
        for name, value in (("from", self.source), ("to", self.target)):
            number("label_flip", name, value, at_least=0)
        if self.source == self.target:
            raise BadParameter(f"label_flip: from and to are both {self.source}: nothing changes")

    def labels(self, y: Any) -> Any:
        """The labels that the liar learns from: an array or tensor like ``y``, shape (N, ...)."""
        out = y.clone() if hasattr(y, "clone") else np.array(y)
        out[out == self.source] = self.target
        return out


def create(name: str, parameters: Mapping[str, Any] | None = None) -> Attack:
    """An attack by name; FedML's ``attack_mode`` values are among them.

    Raises:
        BadParameter: The name or a parameter is unknown.
    """
    attacks: Mapping[str, Any] = {
        "zero": Zero,
        "random": Noise,
        "flip": SignFlip,
        "alie": LittleIsEnough,
        "ipm": InnerProduct,
    }
    if name.lower() not in attacks:
        there = ", ".join([*attacks, "label_flip"])
        raise BadParameter(f"no attack is called {name!r}; there are {there}")
    kind, given = attacks[name.lower()], parameters or {}
    known = [field.name for field in dataclasses.fields(kind)]
    for key in given:
        if key not in known:
            raise BadParameter(
                f"{name}: unknown parameter {key!r}; known are {', '.join(known) or 'none'}"
            )
    attack: Attack = kind(**given)
    return attack


def _of_honest(own: Arrays, honest: Sequence[Arrays], forged: Callable[[Any], Any]) -> Arrays:
    if not honest:
        raise ValueError("this attack copies the honest clients, and none was given")
    return {
        name: rounded(forged(np.stack([h[name].astype(np.float64) for h in honest])), array.dtype)
        for name, array in own.items()
    }
