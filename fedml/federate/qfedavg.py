# SPDX-License-Identifier: Apache-2.0
"""q-FedAvg: clients with a high loss pull harder, so that accuracy is spread more evenly.

Li, Sanjabi, Beirami, Smith, "Fair Resource Allocation in Federated Learning", ICLR 2020,
Algorithm 2. With ``F_k`` client k's loss at the model sent, ``w_k`` its trained model, and L the
inverse of its learning rate::

    Delta w_k = L (w - w_k)
    Delta_k   = F_k^q Delta w_k
    h_k       = q F_k^(q-1) ||Delta w_k||^2 + L F_k^q
    w        <- w - sum_k Delta_k / sum_k h_k

q = 0 is the plain mean; the larger q, the more the worst-off client decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedml.federate.algorithm import Facts, Local, Need, UnsupportedByTraining, Update, number
from fedml.federate.arrays import Arrays, difference, learned, scaled, squared_norm, without_tags
from fedml.federate.fedavg import FedAvg, stepped
from fedml.federate.layout import Layout, Spec

_H = "h::h"
_LOWEST_LOSS = 1e-10  # keeps F^(q-1) finite for q < 1; the authors' code has the same floor


@dataclass(frozen=True, slots=True)
class QFedAvg(FedAvg):
    """Fair federated averaging.

    Attributes:
        server_lr: Step along the fair mean, > 0; the paper has 1.
        q: Fairness, >= 0.
        lipschitz: The paper's L, > 0; None takes the inverse of the learning rate that the
            training reports.
    """

    name: ClassVar[str] = "qfedavg"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.GRADIENT})

    q: float = 1.0
    lipschitz: float | None = None

    def __post_init__(self) -> None:
        FedAvg.__post_init__(self)
        number(self.name, "q", self.q, at_least=0)
        if self.lipschitz is not None:
            number(self.name, "lipschitz", self.lipschitz, above=0)

    def layout(self, model: Arrays) -> Layout:
        """``-Delta_k`` like the model, and ``h_k``."""
        return Layout.of(model) | Layout({_H: Spec((), np.dtype(np.float64))})

    def client_update(
        self,
        model: Arrays,
        sent: Arrays,
        client_state: Arrays | None,
        local: Local,
        rng: np.random.Generator,
    ) -> Update:
        """``-Delta_k`` and ``h_k``; each client counts once. Statistics are plain deltas."""
        _, loss = local.gradient(model)
        if not loss >= 0:
            raise UnsupportedByTraining(f"qfedavg raises the loss to the power q; it is {loss}")
        trained = local.train(model, rng=rng)
        lipschitz = self.lipschitz
        if lipschitz is None:
            lipschitz = 1 / trained.rate(self.name)
        f = max(loss, _LOWEST_LOSS)
        delta = difference(trained.model, model)
        moving = learned(delta)
        h = lipschitz * f**self.q
        if self.q:
            h += self.q * f ** (self.q - 1) * lipschitz**2 * squared_norm(moving)
        return Update(
            arrays=delta | scaled(moving, lipschitz * f**self.q) | {_H: np.array(h)},
            weight=1.0,
            metrics={**trained.metrics, "loss_before": loss},
        )

    def server_update(
        self, model: Arrays, state: Arrays, combined: Update, facts: Facts
    ) -> tuple[Arrays, Arrays]:
        """``w - sum Delta_k / sum h_k``: of two sums over the same clients, the means will do."""
        step = without_tags(combined.arrays, ["h"])
        h = float(combined.arrays[_H])
        return stepped(model, step, step, self.server_lr / h), state
