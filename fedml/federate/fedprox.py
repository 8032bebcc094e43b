# SPDX-License-Identifier: Apache-2.0
"""FedProx: FedAvg whose clients are held back to the global model.

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, "Federated Optimization in Heterogeneous Networks",
MLSys 2020, Algorithm 2. Client k approximately minimises, for as many steps as it has time for::

    h_k(w; w^t) = F_k(w) + mu/2 ||w - w^t||^2

and partial work counts like full work: who is too slow for all epochs sends those that he had time
for, instead of being dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedml.federate.algorithm import Correction, Local, Need, Update, number
from fedml.federate.arrays import Arrays
from fedml.federate.fedavg import FedAvg, averaged


@dataclass(frozen=True, slots=True)
class FedProx(FedAvg):
    """FedAvg with a proximal term.

    Attributes:
        mu: Strength of the pull to the global model, >= 0; 0 is FedAvg.
    """

    name: ClassVar[str] = "fedprox"
    partial: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset({Need.CORRECTION})
    SPELLINGS: ClassVar[dict[str, str]] = {"fedprox_mu": "mu"}

    mu: float = 0.01

    def __post_init__(self) -> None:
        FedAvg.__post_init__(self)
        number(self.name, "mu", self.mu, at_least=0)

    def client_update(
        self,
        model: Arrays,
        sent: Arrays,
        client_state: Arrays | None,
        local: Local,
        rng: np.random.Generator,
    ) -> Update:
        """Train ``h_k``: each step's gradient gains ``mu (w - w^t)``."""
        return averaged(model, local, rng, Correction(pull=self.mu))
