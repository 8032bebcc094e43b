# SPDX-License-Identifier: Apache-2.0
"""MIME and MimeLite: clients follow the server's momentum, held still while they train.

Karimireddy, Jaggi, Kale, Mohri, Reddi, Stich, Suresh, "Breaking the Centralized Barrier for
Cross-Device Federated Learning", NeurIPS 2021, Algorithm 1 with the momentum method. On client i,
from ``y = x``, with ``m`` the server's momentum and ``c`` the mean gradient at ``x``::

    Mime       y <- y - eta [(1 - beta) (g_i(y) - g_i(x) + c) + beta m]
    MimeLite   y <- y - eta [(1 - beta)  g_i(y)               + beta m]

and on the server, from full local gradients at the model that was sent::

    x <- x + server_lr * mean (y_i - x)
    m <- (1 - beta) mean grad F_i(x) + beta m

Mime needs ``c`` of the very clients that then train, so a round has two stages with one cohort:
first gradients, then training. MimeLite needs one.
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
    require_same,
    tagged,
    untagged,
    without_tags,
    zeros,
)
from fedml.federate.fedavg import FedAvg, stepped
from fedml.federate.layout import Layout

_STAGE = "stage::training"  # 1 where the cohort has sent its gradients and now trains


@dataclass(frozen=True, slots=True)
class MimeLite(FedAvg):
    """Clients mimic the centralised momentum method, without variance reduction.

    Attributes:
        server_lr: Step along the mean delta, > 0; the paper has 1.
        beta: Momentum, in [0, 1).
        by_examples: Count clients by their examples; the paper counts each client once.
    """

    name: ClassVar[str] = "mimelite"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.CORRECTION, Need.GRADIENT})
    SPELLINGS: ClassVar[dict[str, str]] = {"server_momentum": "beta", "momentum": "beta"}

    beta: float = 0.9
    by_examples: bool = True

    def __post_init__(self) -> None:
        FedAvg.__post_init__(self)
        number(self.name, "beta", self.beta, at_least=0, below=1)

    def layout(self, model: Arrays) -> Layout:
        """The delta, and the gradient of what is learned."""
        return Layout.of(model) | Layout.of(learned(model)).tagged("gradient")

    def start(self, model: Arrays) -> Arrays:
        """``m = 0``."""
        return tagged("m", zeros(learned(model)))

    def sent(self, model: Arrays, state: Arrays) -> Arrays:
        """``m``."""
        return state

    def client_update(
        self,
        model: Arrays,
        sent: Arrays,
        client_state: Arrays | None,
        local: Local,
        rng: np.random.Generator,
    ) -> Update:
        """Train along the momentum; send the delta and the full gradient at ``x``."""
        gradient, _ = local.gradient(model)
        require_same("the gradient", gradient, learned(model))
        correction = Correction(momentum=untagged("m", sent), beta=self.beta)
        trained = local.train(model, correction, rng=rng)
        return Update(
            arrays=difference(trained.model, model) | tagged("gradient", gradient),
            weight=float(trained.examples) if self.by_examples else 1.0,
            metrics=trained.metrics,
        )

    def server_update(
        self, model: Arrays, state: Arrays, combined: Update, facts: Facts
    ) -> tuple[Arrays, Arrays]:
        """``x + server_lr mean Delta``, and the momentum from the mean gradient."""
        delta = without_tags(combined.arrays, ["gradient"])
        m = self.momentum(untagged("m", state), untagged("gradient", combined.arrays))
        return stepped(model, delta, delta, self.server_lr), tagged("m", m)

    def momentum(self, m: Arrays, gradient: Arrays) -> Arrays:
        """``(1 - beta) mean grad F_i(x) + beta m``, in the dtypes of ``m``."""
        return {
            name: ((1 - self.beta) * gradient[name].astype(np.float64) + self.beta * old).astype(
                old.dtype
            )
            for name, old in m.items()
        }


@dataclass(frozen=True, slots=True)
class Mime(MimeLite):
    """MimeLite with variance-reduced local gradients."""

    name: ClassVar[str] = "mime"
    stages: ClassVar[int] = 2
    needs: ClassVar[frozenset[Need]] = frozenset(
        {Need.CORRECTION, Need.GRADIENT, Need.ANCHOR_GRADIENT}
    )

    def layout(self, model: Arrays) -> Layout:
        """Like the model in both stages: gradients with unmoved statistics, then deltas."""
        return Layout.of(model)

    def start(self, model: Arrays) -> Arrays:
        """``m = c = 0``, gradients first."""
        nothing = zeros(learned(model))
        return tagged("m", nothing) | tagged("c", nothing) | {_STAGE: np.array(0, np.int64)}

    def client_update(
        self,
        model: Arrays,
        sent: Arrays,
        client_state: Arrays | None,
        local: Local,
        rng: np.random.Generator,
    ) -> Update:
        """First stage: the full gradient at ``x``. Second: train, and send the delta."""
        if not sent[_STAGE]:
            gradient, loss = local.gradient(model)
            require_same("the gradient", gradient, learned(model))
            examples, metrics = local.examples, {"loss": loss}
            arrays = zeros(model) | gradient
        else:
            correction = Correction(
                anchor_gradient=True,
                shift=untagged("c", sent),
                momentum=untagged("m", sent),
                beta=self.beta,
            )
            trained = local.train(model, correction, rng=rng)
            examples, metrics = trained.examples, dict(trained.metrics)
            arrays = difference(trained.model, model)
        weight = float(examples) if self.by_examples else 1.0
        return Update(arrays=arrays, weight=weight, metrics=metrics)

    def server_update(
        self, model: Arrays, state: Arrays, combined: Update, facts: Facts
    ) -> tuple[Arrays, Arrays]:
        """First stage: keep ``c``. Second: step, and the momentum from the ``c`` that was kept."""
        if not state[_STAGE]:
            c = learned(combined.arrays)
            return model, state | tagged("c", c) | {_STAGE: np.array(1, np.int64)}
        m = self.momentum(untagged("m", state), untagged("c", state))
        new = stepped(model, combined.arrays, combined.arrays, self.server_lr)
        return new, state | tagged("m", m) | {_STAGE: np.array(0, np.int64)}
