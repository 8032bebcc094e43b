# SPDX-License-Identifier: Apache-2.0
"""FedAvg and FedAvgM: train locally, average what came out.

McMahan, Moore, Ramage, Hampson, Aguera y Arcas, "Communication-Efficient Learning of Deep Networks
from Decentralized Data", AISTATS 2017, Algorithm 1; server momentum after Hsu, Qi, Brown,
"Measuring the Effects of Non-Identical Data Distribution", 2019, section 4.3.

With ``n_k`` the examples of client k and ``Delta_k = w_k - w``::

    FedAvg    w <- w + server_lr * sum_k n_k Delta_k / sum_k n_k
    FedAvgM   v <- momentum * v + mean Delta,   w <- w + server_lr * v
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedml.federate.algorithm import Correction, Facts, Kind, Local, Need, Trained, Update, number
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
from fedml.federate.layout import Layout


@dataclass(frozen=True, slots=True)
class FedAvg:
    """Plain federated averaging.

    Attributes:
        server_lr: Step along the mean delta, > 0; 1 gives the mean of the clients' models.
    """

    name: ClassVar[str] = "fedavg"
    kind: ClassVar[Kind] = Kind.SYNCHRONOUS
    needs: ClassVar[frozenset[Need]] = frozenset()
    stages: ClassVar[int] = 1
    deltas: ClassVar[bool] = True
    partial: ClassVar[bool] = False

    server_lr: float = 1.0

    def __post_init__(self) -> None:
        number(self.name, "server_lr", self.server_lr, above=0)

    def layout(self, model: Arrays) -> Layout:
        """The model's own."""
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
        """Train, and send ``w_k - w`` counted by examples."""
        return averaged(model, local, rng)

    def server_update(
        self, model: Arrays, state: Arrays, combined: Update, facts: Facts
    ) -> tuple[Arrays, Arrays]:
        """``w + server_lr * mean Delta``; statistics take the mean itself."""
        return stepped(model, combined.arrays, combined.arrays, self.server_lr), state


@dataclass(frozen=True, slots=True)
class FedAvgM(FedAvg):
    """FedAvg whose server remembers where it was going (Hsu et al. 2019).

    Attributes:
        momentum: How much of the last step is kept, in [0, 1).
    """

    name: ClassVar[str] = "fedavgm"
    SPELLINGS: ClassVar[dict[str, str]] = {"server_momentum": "momentum"}

    momentum: float = 0.9

    def __post_init__(self) -> None:
        FedAvg.__post_init__(self)
        number(self.name, "momentum", self.momentum, at_least=0, below=1)

    def start(self, model: Arrays) -> Arrays:
        """``v = 0``, float64, for every learned array."""
        return tagged("v", zeros(learned(model), np.float64))

    def server_update(
        self, model: Arrays, state: Arrays, combined: Update, facts: Facts
    ) -> tuple[Arrays, Arrays]:
        """``v <- momentum v + mean Delta``, ``w <- w + server_lr v``."""
        delta = combined.arrays
        v = {n: self.momentum * old + delta[n] for n, old in untagged("v", state).items()}
        return stepped(model, v, delta, self.server_lr), tagged("v", v)


def averaged(
    model: Arrays, local: Local, rng: np.random.Generator, correction: Correction | None = None
) -> Update:
    """One client's plain part of a round: its delta, counted by its examples."""
    return counted(model, local.train(model, correction, rng=rng))


def counted(model: Arrays, trained: Trained) -> Update:
    """What training came to, as one client sends it."""
    return Update(
        arrays=difference(trained.model, model),
        weight=float(trained.examples),
        metrics=trained.metrics,
    )


def recounted(mean: Arrays, facts: Facts) -> Arrays:
    """A mean over all clients, for as many as there now turn out to be (see `census`)."""
    if facts.counted in (0, facts.population):
        return mean
    return scaled(mean, facts.counted / facts.population)


def stepped(model: Arrays, step: Arrays, delta: Arrays, scale: float) -> Arrays:
    """``w + scale * step`` for what is learned, ``w + delta`` for statistics."""
    moving = learned(model)
    rest = {name: array for name, array in model.items() if name not in moving}
    return model | moved(moving, step, scale) | moved(rest, delta)
