# SPDX-License-Identifier: Apache-2.0
"""Ditto: a global model for all, and beside it one personal model for each client.

Li, Hu, Beirami, Smith, "Ditto: Fair and Robust Federated Learning Through Personalization", ICML
2021, Algorithm 1 with FedAvg for the global model. Client k keeps ``v_k`` (at first the global
model) and, beside its part of the global round from ``w^t``, trains::

    min_v  F_k(v) + lambda/2 ||v - w^t||^2

``v_k`` never leaves the client; a Byzantine global model can mislead it only as far as lambda lets
it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedml.federate.algorithm import Correction, Local, Need, Update, number
from fedml.federate.arrays import Arrays, difference
from fedml.federate.fedavg import FedAvg


@dataclass(frozen=True, slots=True)
class Ditto(FedAvg):
    """FedAvg with personal models; a client's state is its personal model.

    Attributes:
        strength: The paper's lambda, >= 0: 0 trains alone, large follows the global model.
    """

    name: ClassVar[str] = "ditto"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.CORRECTION})
    SPELLINGS: ClassVar[dict[str, str]] = {"lambda": "strength", "lamda": "strength"}

    strength: float = 0.1

    def __post_init__(self) -> None:
        FedAvg.__post_init__(self)
        number(self.name, "strength", self.strength, at_least=0)

    def client_update(
        self,
        model: Arrays,
        sent: Arrays,
        client_state: Arrays | None,
        local: Local,
        rng: np.random.Generator,
    ) -> Update:
        """Train both models from the same ``w^t``; send one delta, keep the other model."""
        v = model if client_state is None else client_state
        shared = local.train(model, rng=rng)
        personal = local.train(v, Correction(pull=self.strength, anchor=model), rng=rng)
        return Update(
            arrays=difference(shared.model, model),
            weight=float(shared.examples),
            metrics={
                **shared.metrics,
                **{f"personal_{name}": value for name, value in personal.metrics.items()},
            },
            client_state=personal.model,
        )
