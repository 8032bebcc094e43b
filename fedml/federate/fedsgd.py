# SPDX-License-Identifier: Apache-2.0
"""FedSGD: one full gradient from each client, one step by the server.

McMahan, Moore, Ramage, Hampson, Aguera y Arcas, "Communication-Efficient Learning of Deep Networks
from Decentralized Data", AISTATS 2017, section 2. With ``g_k = grad F_k(w)`` over all local data::

    w <- w - lr * sum_k n_k g_k / sum_k n_k

which is gradient descent on all the data at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedml.federate.algorithm import Facts, Kind, Local, Need, Update, number
from fedml.federate.arrays import Arrays, learned, moved, require_same
from fedml.federate.layout import Layout


@dataclass(frozen=True, slots=True)
class FedSGD:
    """Distributed gradient descent.

    Attributes:
        lr: Step size, > 0.
    """

    name: ClassVar[str] = "fedsgd"
    kind: ClassVar[Kind] = Kind.SYNCHRONOUS
    needs: ClassVar[frozenset[Need]] = frozenset({Need.GRADIENT})
    stages: ClassVar[int] = 1
    deltas: ClassVar[bool] = True
    partial: ClassVar[bool] = False
    SPELLINGS: ClassVar[dict[str, str]] = {"learning_rate": "lr", "server_lr": "lr"}

    lr: float = 0.1

    def __post_init__(self) -> None:
        number(self.name, "lr", self.lr, above=0)

    def layout(self, model: Arrays) -> Layout:
        """A gradient: the learned arrays only."""
        return Layout.of(learned(model))

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
        """``g_k``, counted by examples."""
        gradient, loss = local.gradient(model)
        require_same("the gradient", gradient, learned(model))
        return Update(arrays=gradient, weight=float(local.examples), metrics={"loss": loss})

    def server_update(
        self, model: Arrays, state: Arrays, combined: Update, facts: Facts
    ) -> tuple[Arrays, Arrays]:
        """``w - lr * mean g``; statistics stay as they are."""
        return model | moved(learned(model), combined.arrays, -self.lr), state
