# SPDX-License-Identifier: Apache-2.0
"""Central differential privacy as two steps on updates: clients clip, the server adds noise.

One client's whole contribution is bounded: its arrays are clipped to an L2 norm, it counts once
whatever its examples, and its metrics are not sent. The server adds Gaussian noise to the sum,
``noise_multiplier`` times the bound; `accountant` says what that is worth. The bound itself may
follow the norms, privately:

Andrew, Thakkar, McMahan, Ramaswamy, "Differentially Private Learning with Adaptive Clipping",
NeurIPS 2021, Algorithm 1. With ``b_i`` 1 where client i's norm is within the bound C, else 0::

    b~ = (sum b_i + N(0, bit_noise^2)) / n
    C <- C exp(-clip_lr (b~ - quantile))

and the noise on the sum grows to ``z_D = (z^-2 - (2 bit_noise)^-2)^(-1/2)``, so that both
together cost what ``z`` costs alone (theorem 1).

The server sees clipped updates before it adds noise. Noise drawn in floating point leaks in its
lowest bits (Mironov 2012) to whoever sees the exact sum; the result is rounded to float32, which
hides most of it but is no proof. Use `secret_generator` for the noise: whoever knows a seed can
subtract it.
"""

from __future__ import annotations

import dataclasses
import math
import secrets
from dataclasses import dataclass

import numpy as np

from fedml.federate.algorithm import BadParameter, Update, number
from fedml.federate.arrays import Arrays, rounded, scaled, squared_norm
from fedml.federate.layout import Layout, Spec

_INSIDE = "dp::inside"


class NotPrivate(ValueError):
    """The update holds something that clipping and noise cannot protect."""


@dataclass(frozen=True, slots=True)
class GaussianPrivacy:
    """Clipping and noise of one run.

    Attributes:
        noise_multiplier: z, > 0: what the accountant is told.
        clip: The bound C on a client's L2 norm, > 0; the first one, if it adapts.
        quantile: The share of clients whose norm shall be within the bound, in (0, 1); None keeps
            the bound fixed.
        clip_lr: How fast it follows, > 0.
        bit_noise: Standard deviation of the noise on the count of ``b_i``, more than z / 2; the
            paper takes a twentieth of the cohort.
    """

    noise_multiplier: float
    clip: float = 1.0
    quantile: float | None = None
    clip_lr: float = 0.2
    bit_noise: float = 5.0

    def __post_init__(self) -> None:
        number("privacy", "noise_multiplier", self.noise_multiplier, above=0)
        number("privacy", "clip", self.clip, above=0)
        number("privacy", "clip_lr", self.clip_lr, above=0)
        if self.quantile is not None:
            number("privacy", "quantile", self.quantile, above=0, below=1)
            number("privacy", "bit_noise", self.bit_noise, above=0)
            if self.bit_noise <= self.noise_multiplier / 2:
                raise BadParameter(
                    f"privacy: bit_noise must be more than noise_multiplier / 2 = "
                    f"{self.noise_multiplier / 2:g}, got {self.bit_noise:g}"
                )

    @property
    def sum_noise_multiplier(self) -> float:
        """z_D: the noise on the sum, in bounds, that leaves room for the noise on the count."""
        if self.quantile is None:
            return self.noise_multiplier
        # The count is of b_i - 1/2, so one client moves it by 1/2.
        return float((self.noise_multiplier**-2 - (2 * self.bit_noise) ** -2) ** -0.5)

    def layout(self, layout: Layout) -> Layout:
        """What `clipped` makes of updates of ``layout``."""
        if self.quantile is None:
            return layout
        return layout | Layout({_INSIDE: Spec((), np.dtype(np.float64))})

    def clipped(self, update: Update, clip: float) -> Update:
        """One client's update, bounded: norm at most ``clip``, weight 1, no metrics.

        Raises:
            NotPrivate: It holds integers (batch counters): freeze them, or use group
                normalisation instead of batch normalisation.
        """
        for name, array in update.arrays.items():
            if array.dtype.kind != "f":
                raise NotPrivate(
                    f"tensor {name!r} holds {array.dtype}; only floating-point values can be "
                    "clipped and noised: leave it out, or use group instead of batch normalisation"
                )
        arrays, norm = clip_to(update.arrays, clip)
        if self.quantile is not None:
            arrays[_INSIDE] = np.array(float(norm <= clip) - 0.5)
        return dataclasses.replace(update, arrays=arrays, weight=1.0, metrics={})

    def noised(
        self, combined: Update, clip: float, clients: int, rng: np.random.Generator
    ) -> tuple[Update, float]:
        """The mean of clipped updates with noise on it, and the next round's bound.

        Args:
            combined: The plain mean of ``clients`` updates from `clipped`.
            clip: The bound they were clipped to.
            clients: How many; the noise on a mean is that on the sum over this.
            rng: `secret_generator()`, except in simulation.
        """
        if clients < 1:
            raise ValueError(f"no mean of {clients} clients")
        deviation = self.sum_noise_multiplier * clip / clients
        # By name: a model that was read from a file has another order than one that was made.
        arrays = {
            name: rounded(
                array.astype(np.float64) + deviation * rng.standard_normal(array.shape), array.dtype
            )
            for name, array in sorted(combined.arrays.items())
            if name != _INSIDE
        }
        if self.quantile is not None:
            noise = self.bit_noise * float(rng.standard_normal()) / clients
            inside = float(combined.arrays[_INSIDE]) + 0.5 + noise
            clip *= math.exp(-self.clip_lr * (inside - self.quantile))
        return dataclasses.replace(combined, arrays=arrays), clip


def clip_to(arrays: Arrays, bound: float) -> tuple[Arrays, float]:
    """All arrays together scaled down to an L2 norm of at most ``bound``, and the norm they had.

    Returns:
        New arrays of the same dtypes, ``min(1, bound / norm)`` times the old.
    """
    if not bound > 0:
        raise ValueError(f"a norm bound must be > 0, got {bound}")
    norm = math.sqrt(squared_norm(arrays))
    if norm <= bound:
        return dict(arrays), norm
    factor = bound / norm
    out = scaled(arrays, factor)
    # Rounding to float32 can push the norm past the bound by a hair, and the proof has no hairs.
    # In float16 a hair changes nothing: each try takes off twice as much.
    slack = 2.0**-40
    while (over := math.sqrt(squared_norm(out))) > bound:
        factor *= bound / over * (1 - min(slack, 0.5))
        slack *= 2
        out = scaled(arrays, factor)
    return out, norm


def secret_generator() -> np.random.Generator:
    """Random numbers seeded from the operating system, which nobody can repeat."""
    return np.random.Generator(np.random.Philox(secrets.randbits(128)))
