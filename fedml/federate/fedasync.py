# SPDX-License-Identifier: Apache-2.0
"""FedAsync: every update is mixed in as it comes, less the older its model was.

Xie, Koyejo, Gupta, "Asynchronous Federated Optimization", 2019 (OPT 2020), Algorithm 1 and section
5.2. A client that got version tau trains ``F_k(w) + rho/2 ||w - x_tau||^2`` to ``x_new``; at
version t the server sets::

    alpha_t = alpha * s(t - tau)
    x_t     = (1 - alpha_t) x_{t-1} + alpha_t x_new

    s(d) = 1                                       constant
         = (d + 1)^-a                              polynomial
         = 1 if d <= b, else 1 / (a (d - b) + 1)   hinge
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedml.federate.algorithm import (
    BadParameter,
    Correction,
    Facts,
    Kind,
    Local,
    Need,
    Update,
    number,
)
from fedml.federate.arrays import Arrays, difference, moved
from fedml.federate.layout import Layout

_DISCOUNTS = ("constant", "polynomial", "hinge")


@dataclass(frozen=True, slots=True)
class FedAsync:
    """Asynchronous mixing of whole models.

    Attributes:
        alpha: Share of a fresh update, in (0, 1].
        rho: Pull of a client to the model it got, >= 0; 0 works with any training.
        discount: ``constant``, ``polynomial`` or ``hinge``.
        a: Exponent of the polynomial, or slope of the hinge, > 0.
        b: Staleness that the hinge lets pass, >= 0.
    """

    name: ClassVar[str] = "fedasync"
    kind: ClassVar[Kind] = Kind.ASYNCHRONOUS
    stages: ClassVar[int] = 1
    buffer: ClassVar[int] = 1
    deltas: ClassVar[bool] = False
    partial: ClassVar[bool] = False

    alpha: float = 0.6
    rho: float = 0.0
    discount: str = "polynomial"
    a: float = 0.5
    b: float = 4.0

    def __post_init__(self) -> None:
        number(self.name, "alpha", self.alpha, above=0, at_most=1)
        number(self.name, "rho", self.rho, at_least=0)
        number(self.name, "a", self.a, above=0)
        number(self.name, "b", self.b, at_least=0)
        if self.discount not in _DISCOUNTS:
            raise BadParameter(
                f"fedasync: discount is {self.discount!r}, not one of {', '.join(_DISCOUNTS)}"
            )

    @property
    def needs(self) -> frozenset[Need]:
        """A correction, if clients are pulled back."""
        return frozenset({Need.CORRECTION}) if self.rho else frozenset()

    def layout(self, model: Arrays) -> Layout:
        """A whole model."""
        return Layout.of(model)

    def start(self, model: Arrays) -> Arrays:
        """No state."""
        return {}

    def sent(self, model: Arrays, state: Arrays) -> Arrays:
        """Nothing beyond the model."""
        return {}

    def client_update(
        self,
        model: Arrays,
        sent: Arrays,
        client_state: Arrays | None,
        local: Local,
        rng: np.random.Generator,
    ) -> Update:
        """``x_new`` itself: by the time it arrives, a delta would be against a model long gone."""
        trained = local.train(model, Correction(pull=self.rho) if self.rho else None, rng=rng)
        arrays = {name: trained.model[name] for name in model}
        return Update(arrays=arrays, weight=float(trained.examples), metrics=trained.metrics)

    def server_update(
        self, model: Arrays, state: Arrays, combined: Update, facts: Facts
    ) -> tuple[Arrays, Arrays]:
        """Mix ``combined``, one client's model, in by ``alpha_t``."""
        share = self.alpha * self.freshness(facts.staleness)
        return moved(model, difference(combined.arrays, model), share), state

    def freshness(self, staleness: int) -> float:
        """``s(staleness)``, in (0, 1]."""
        if self.discount == "polynomial":
            return float((staleness + 1) ** -self.a)
        if self.discount == "hinge" and staleness > self.b:
            return 1 / (self.a * (staleness - self.b) + 1)
        return 1.0
