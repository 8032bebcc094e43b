# SPDX-License-Identifier: Apache-2.0
"""SCAFFOLD: control variates cancel the drift of clients whose data differ.

Karimireddy, Kale, Mohri, Reddi, Stich, Suresh, "SCAFFOLD: Stochastic Controlled Averaging for
Federated Learning", ICML 2020, Algorithm 1, option II. On client i, with K local steps of rate
eta_l from ``y_i = x``::

    y_i  <- y_i - eta_l (g_i(y_i) + c - c_i)
    c_i+ <- c_i - c + (x - y_i) / (K eta_l)
    send    Delta y_i = y_i - x,   Delta c_i = c_i+ - c_i;   c_i <- c_i+

and on the server, over the clients S of N::

    x <- x + server_lr * mean Delta y_i
    c <- c + |S|/N * mean Delta c_i

So ``c`` is the mean of all ``c_i``; where N turns out to be smaller, it is multiplied up first.

Option II reads the mean local gradient off the path travelled. With plain SGD that path is K
gradients long; with local momentum it is ``||a||_1`` (`algorithm.plain_steps`, which is FedNova's),
up to 1 / (1 - momentum) times as long. Divided by K, ``c_i`` would be as many times too large, and
the control variates grow from round to round. A local Adam makes ``c_i`` something else altogether.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedml.federate.algorithm import Correction, Facts, Local, Need, Update
from fedml.federate.arrays import (
    Arrays,
    difference,
    learned,
    moved,
    rounded,
    tagged,
    untagged,
    without_tags,
    zeros,
)
from fedml.federate.fedavg import FedAvg, recounted, stepped
from fedml.federate.layout import Layout


@dataclass(frozen=True, slots=True)
class Scaffold(FedAvg):
    """Stochastic controlled averaging.

    Attributes:
        server_lr: The paper's eta_g, > 0.
        by_examples: Count clients by their examples; the paper counts each client once.
    """

    name: ClassVar[str] = "scaffold"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.CORRECTION})

    by_examples: bool = False

    def layout(self, model: Arrays) -> Layout:
        """``Delta y`` like the model, and ``Delta c`` like what is learned."""
        return Layout.of(model) | Layout.of(learned(model)).tagged("control")

    def start(self, model: Arrays) -> Arrays:
        """``c = 0``."""
        return tagged("control", zeros(learned(model)))

    def sent(self, model: Arrays, state: Arrays) -> Arrays:
        """``c``."""
        return state

    def client_update(
        self,
        model: Arrays,
        sent: Arrays,
        client_state: Arrays | None,
        local: Local,
        rng: np.random.Generator,
    ) -> Update:
        """Train with ``c - c_i`` added to every gradient; keep ``c_i+``, send both changes."""
        c = untagged("control", sent)
        c_i = zeros(c) if client_state is None else client_state
        trained = local.train(model, Correction(shift=difference(c, c_i)), rng=rng)
        path = trained.travel(self.name)
        c_new = {
            n: rounded(
                c_i[n].astype(np.float64)
                - c[n]
                + (model[n].astype(np.float64) - trained.model[n]) / path,
                c[n].dtype,
            )
            for n in c
        }
        return Update(
            arrays=difference(trained.model, model) | tagged("control", difference(c_new, c_i)),
            weight=float(trained.examples) if self.by_examples else 1.0,
            metrics=trained.metrics,
            client_state=c_new,
        )

    def server_update(
        self, model: Arrays, state: Arrays, combined: Update, facts: Facts
    ) -> tuple[Arrays, Arrays]:
        """``x + server_lr mean Delta y`` and ``c + |S|/N mean Delta c``."""
        delta = without_tags(combined.arrays, ["control"])
        c = moved(
            recounted(untagged("control", state), facts),
            untagged("control", combined.arrays),
            facts.clients / facts.population,
        )
        return stepped(model, delta, delta, self.server_lr), tagged("control", c)
