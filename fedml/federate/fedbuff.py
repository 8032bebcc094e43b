# SPDX-License-Identifier: Apache-2.0
"""FedBuff: asynchronous clients, and a server step for every K updates.

Nguyen, Malik, Zhan, Yousefpour, Rabbat, Malek, Huba, "Federated Learning with Buffered Asynchronous
Aggregation", AISTATS 2022, Algorithm 1. Each client trains from the newest model it can get; its
delta, tau versions late, is added to a buffer of K::

    Dbar <- Dbar + s(tau) Delta_i          s(tau) = (1 + tau)^-a,  a = 1/2 in the paper
    after K:  w <- w + server_lr * Dbar / K,   Dbar <- 0

One slow client delays nobody, and one fast client gets no more than its place in a buffer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedml.federate.algorithm import BadParameter, Facts, Kind, Local, Update, number
from fedml.federate.arrays import Arrays, difference, tagged, untagged, zeros
from fedml.federate.fedavg import FedAvg, stepped

_COUNT = "buffer::count"


@dataclass(frozen=True, slots=True)
class FedBuff(FedAvg):
    """Buffered asynchronous averaging.

    Attributes:
        server_lr: Step along the buffer's mean, > 0.
        buffer: Updates in a step, the paper's K, >= 1.
        a: How fast a late update fades, >= 0; 0 counts all alike.
    """

    name: ClassVar[str] = "fedbuff"
    kind: ClassVar[Kind] = Kind.ASYNCHRONOUS

    buffer: int = 10
    a: float = 0.5

    def __post_init__(self) -> None:
        FedAvg.__post_init__(self)
        number(self.name, "buffer", self.buffer, at_least=1)
        number(self.name, "a", self.a, at_least=0)
        if not isinstance(self.buffer, int):
            raise BadParameter(f"fedbuff: buffer must be a whole number, got {self.buffer!r}")

    def start(self, model: Arrays) -> Arrays:
        """An empty buffer, float64."""
        return tagged("sum", zeros(model, np.float64)) | {_COUNT: np.array(0, np.int64)}

    def client_update(
        self,
        model: Arrays,
        sent: Arrays,
        client_state: Arrays | None,
        local: Local,
        rng: np.random.Generator,
    ) -> Update:
        """The delta; each client counts once, as in the paper."""
        trained = local.train(model, None, rng=rng)
        return Update(arrays=difference(trained.model, model), weight=1.0, metrics=trained.metrics)

    def server_update(
        self, model: Arrays, state: Arrays, combined: Update, facts: Facts
    ) -> tuple[Arrays, Arrays]:
        """Add ``combined``, one client's delta, to the buffer; step when it is full.

        Returns:
            The very ``model`` given while the buffer fills, a new one when it was emptied.
        """
        fresh = (1 + facts.staleness) ** -self.a
        total = {
            name: old + fresh * combined.arrays[name]
            for name, old in untagged("sum", state).items()
        }
        count = int(state[_COUNT]) + 1
        if count < self.buffer:
            return model, tagged("sum", total) | {_COUNT: np.array(count, np.int64)}
        mean = {name: array / count for name, array in total.items()}
        return stepped(model, mean, mean, self.server_lr), self.start(model)
