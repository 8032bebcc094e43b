# SPDX-License-Identifier: Apache-2.0
"""FedNova: clients that took more steps do not pull harder.

Wang, Liu, Liang, Joshi, Poor, "Tackling the Objective Inconsistency Problem in Heterogeneous
Federated Optimization", NeurIPS 2020, equations 3 and 6. Client i took tau_i local steps; its
delta is a sum of its gradients with coefficients ``a_i``, and is divided by their sum::

    d_i   = (y_i - x) / ||a_i||_1            p_i = n_i / sum_j n_j
    x    <- x + server_lr * (sum_i p_i ||a_i||_1) * (sum_i p_i d_i)

    ||a_i||_1 = tau_i                                                plain SGD
              = [tau_i - rho (1 - rho^tau_i) / (1 - rho)] / (1 - rho)   momentum rho
              = [1 - (1 - eta mu)^tau_i] / (eta mu)                  proximal mu, rate eta

FedAvg is the same with ``a_i`` left out, which converges to a point that favours clients with many
steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedml.federate.algorithm import (
    BadParameter,
    Correction,
    Facts,
    Local,
    Need,
    Trained,
    UnsupportedByTraining,
    Update,
    number,
    plain_steps,
)
from fedml.federate.arrays import Arrays, difference, learned, scaled, without_tags
from fedml.federate.fedavg import FedAvg, stepped
from fedml.federate.layout import Layout, Spec

_STEPS = "effective::steps"


@dataclass(frozen=True, slots=True)
class FedNova(FedAvg):
    """Normalised averaging.

    Attributes:
        momentum: What the local optimiser uses, in [0, 1), if the training does not report it; it
            is not changed by this.
        mu: Proximal pull to the global model, >= 0; not together with momentum.
    """

    name: ClassVar[str] = "fednova"
    partial: ClassVar[bool] = True
    SPELLINGS: ClassVar[dict[str, str]] = {"fedprox_mu": "mu"}

    momentum: float = 0.0
    mu: float = 0.0

    def __post_init__(self) -> None:
        FedAvg.__post_init__(self)
        number(self.name, "momentum", self.momentum, at_least=0, below=1)
        number(self.name, "mu", self.mu, at_least=0)
        if self.momentum and self.mu:
            raise BadParameter("fednova: the paper has no formula for momentum and mu together")

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        """A correction, if there is a proximal pull."""
        return frozenset({Need.CORRECTION}) if self.mu else frozenset()

    def layout(self, model: Arrays) -> Layout:
        """``d_i`` like the model, and ``||a_i||_1``."""
        return Layout.of(model) | Layout({_STEPS: Spec((), np.dtype(np.float64))})

    def client_update(
        self,
        model: Arrays,
        sent: Arrays,
        client_state: Arrays | None,
        local: Local,
        rng: np.random.Generator,
    ) -> Update:
        """``d_i`` and ``||a_i||_1``, counted by examples; statistics are not normalised."""
        trained = local.train(model, Correction(pull=self.mu) if self.mu else None, rng=rng)
        norm = self.path_norm(trained)
        delta = difference(trained.model, model)
        return Update(
            arrays=delta | scaled(learned(delta), 1 / norm) | {_STEPS: np.array(norm)},
            weight=float(trained.examples),
            metrics=trained.metrics,
        )

    def server_update(
        self, model: Arrays, state: Arrays, combined: Update, facts: Facts
    ) -> tuple[Arrays, Arrays]:
        """``x + server_lr * mean ||a_i||_1 * mean d_i``."""
        d = without_tags(combined.arrays, ["effective"])
        return stepped(model, d, d, self.server_lr * float(combined.arrays[_STEPS])), state

    def path_norm(self, trained: Trained) -> float:
        """``||a_i||_1``, the number of plain steps that the local path amounts to."""
        tau = trained.steps
        if tau < 1:
            raise UnsupportedByTraining("fednova divides by the local steps; training took none")
        if self.mu:
            if trained.momentum:
                raise UnsupportedByTraining(
                    "fednova: the paper has no formula for mu and a local momentum together; "
                    "leave out one of the two"
                )
            shrink = trained.rate(self.name) * self.mu
            return float((1 - (1 - shrink) ** tau) / shrink)
        if self.momentum:
            return plain_steps(tau, self.momentum)
        return trained.plain_steps(self.name)
