# SPDX-License-Identifier: Apache-2.0
"""Clients whose training can be worked out by hand, and the plain loop that runs them.

`Quadratic` is one client with ``F(w) = curvature/2 ||w - centre||^2 + floor``. It takes ``steps``
exact gradient steps of rate ``lr``, so K steps without a correction end at
``centre + (1 - lr * curvature)^K (w - centre)``. It supports every need, counts its calls, and its
arrays are float64 unless told otherwise. `run` is the loop of `algorithm.py`'s docstring.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fedml.federate.aggregate import combine
from fedml.federate.algorithm import Algorithm, Correction, Facts, Local, Need, Trained
from fedml.federate.arrays import Arrays, moved
from fedml.federate.cohort import choose, generator
from fedml.federate.layout import Layout


@dataclass
class Quadratic:
    centre: Arrays
    curvature: float = 1.0
    lr: float = 0.1
    steps: int = 5
    examples: int = 1
    floor: float = 0.0
    reports_lr: bool = True
    momentum: float = 0.0
    supports: frozenset[Need] = frozenset(Need)
    corrections: list[Correction | None] = field(default_factory=list)

    def train(
        self, model: Arrays, correction: Correction | None = None, *, rng: np.random.Generator
    ) -> Trained:
        self.corrections.append(correction)
        w = dict(model)
        velocity = {name: np.zeros_like(values) for name, values in model.items()}
        for _ in range(self.steps):
            direction, _ = self.gradient(w)
            if correction is not None:
                at_anchor, _ = self.gradient(correction.anchor or model)
                direction = correction.direction(direction, w, model, at_anchor)
            velocity = moved(direction, velocity, self.momentum)
            w = moved(w, velocity, -self.lr)
        return Trained(
            model=w,
            examples=self.examples,
            steps=self.steps,
            lr=self.lr if self.reports_lr else None,
            momentum=self.momentum,
            metrics={"loss": self.gradient(w)[1]},
        )

    def gradient(self, model: Arrays) -> tuple[Arrays, float]:
        off = {name: model[name] - centre for name, centre in self.centre.items()}
        loss = self.floor + 0.5 * self.curvature * sum(float((o * o).sum()) for o in off.values())
        return {name: self.curvature * o for name, o in off.items()}, loss


def at(*values: float, dtype: type = np.float64) -> Arrays:
    """A model of one tensor ``w``."""
    return {"w": np.array(values, dtype)}


def run(
    algorithm: Algorithm,
    clients: Mapping[int, Local],
    model: Arrays,
    rounds: int,
    *,
    count: int | None = None,
    seed: int = 0,
) -> tuple[Arrays, dict[int, Arrays | None]]:
    """Run a synchronous algorithm; the last model and what each client keeps."""
    state = algorithm.start(model)
    kept: dict[int, Arrays | None] = {}
    for turn in range(rounds * algorithm.stages):
        cohort = choose(seed, turn // algorithm.stages, [*clients], count or len(clients))
        sent = algorithm.sent(model, state)
        updates = []
        for k in cohort:
            rng = generator(seed, turn, k)
            updates.append(algorithm.client_update(model, sent, kept.get(k), clients[k], rng))
            algorithm.layout(model).check(k, Layout.of(updates[-1].arrays).tensors)
            kept[k] = updates[-1].client_state
        facts = Facts(clients=len(cohort), population=len(clients))
        model, state = algorithm.server_update(model, state, combine(updates), facts)
    return model, kept
