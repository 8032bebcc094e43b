# SPDX-License-Identifier: Apache-2.0
"""FedDyn: each client's objective is bent so that all agree where the global one is flat.

Acar, Zhao, Matas Navarro, Mattina, Whatmough, Saligrama, "Federated Learning Based on Dynamic
Regularization", ICLR 2021, Algorithm 1. With ``g_k`` what client k remembers (0 at first), on the
clients P of m::

    theta_k <- argmin  L_k(theta) - <g_k, theta> + alpha/2 ||theta - theta^{t-1}||^2
    g_k     <- g_k - alpha (theta_k - theta^{t-1})
    h       <- h - alpha / m * sum_{k in P} (theta_k - theta^{t-1})
    theta^t <- mean_{k in P} theta_k - h / alpha

``g_k`` is client k's gradient at its own solution, and ``h`` the mean of all of them; where m turns
out to be smaller, it is multiplied up first. The argmin is as good as the local training is long:
every step's gradient gains ``- g_k + alpha (theta - theta^{t-1})``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedml.federate.algorithm import Correction, Facts, Local, Need, Update, number
from fedml.federate.arrays import (
    Arrays,
    difference,
    learned,
    moved,
    scaled,
    tagged,
    untagged,
    zeros,
)
from fedml.federate.fedavg import FedAvg, recounted, stepped


@dataclass(frozen=True, slots=True)
class FedDyn(FedAvg):
    """Dynamic regularisation.

    Attributes:
        server_lr: Step from the old model to the paper's new one, > 0; the paper has 1.
        alpha: Strength of the regulariser, > 0.
    """

    name: ClassVar[str] = "feddyn"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.CORRECTION})
    SPELLINGS: ClassVar[dict[str, str]] = {"feddyn_alpha": "alpha"}

    alpha: float = 0.01

    def __post_init__(self) -> None:
        FedAvg.__post_init__(self)
        number(self.name, "alpha", self.alpha, above=0)

    def start(self, model: Arrays) -> Arrays:
        """``h = 0``, float64."""
        return tagged("h", zeros(learned(model), np.float64))

    def client_update(
        self,
        model: Arrays,
        sent: Arrays,
        client_state: Arrays | None,
        local: Local,
        rng: np.random.Generator,
    ) -> Update:
        """Train the bent objective; each client counts once, as in the paper."""
        g = zeros(learned(model)) if client_state is None else client_state
        trained = local.train(model, Correction(pull=self.alpha, shift=scaled(g, -1)), rng=rng)
        delta = difference(trained.model, model)
        return Update(
            arrays=delta,
            weight=1.0,
            metrics=trained.metrics,
            client_state=moved(g, delta, -self.alpha),
        )

    def server_update(
        self, model: Arrays, state: Arrays, combined: Update, facts: Facts
    ) -> tuple[Arrays, Arrays]:
        """``h - alpha |P|/m mean Delta``, then ``theta + mean Delta - h / alpha``."""
        delta = combined.arrays
        h = recounted(untagged("h", state), facts)
        h = moved(h, delta, -self.alpha * facts.clients / facts.population)
        step = {name: delta[name] - h[name] / self.alpha for name in h}
        return stepped(model, step, delta, self.server_lr), tagged("h", h)
