# SPDX-License-Identifier: Apache-2.0
"""One round at the server: updates come in, the next model goes out.

The deployed aggregator and the simulator both walk this way, so what is done to updates beside the
algorithm (`federate.treatment`) is done to the same bits in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedml.federate import cohort
from fedml.federate.algorithm import Algorithm, Facts
from fedml.federate.arrays import Arrays
from fedml.federate.layout import Given
from fedml.federate.treatment import Treatment, without_ours


class Made(NamedTuple):
    """What a round came to.

    Attributes:
        model: The next one.
        state: The server's, the treatment's part of it included.
        metrics: Of the clients' training, combined.
        told: What the treatment has to say, e.g. the privacy that was spent.
    """

    model: Arrays
    state: Arrays
    metrics: Mapping[str, float]
    told: Mapping[str, float]


class ServerRound:
    """One round, from its first update to the next model."""

    def __init__(
        self,
        algorithm: Algorithm,
        treatment: Treatment,
        model: Arrays,
        state: Arrays,
        *,
        seed: int,
        index: int,
        asked: int,
        population: int,
        noise: np.random.Generator | None = None,
    ) -> None:
        """Be ready for updates.

        Args:
            algorithm: Synchronous.
            treatment: Checked against it.
            model: That clients start from.
            state: The server's, the treatment's part of it included.
            seed: The run's.
            index: Which round, from 0.
            asked: How many clients were asked.
            population: How many there are.
            noise: For the noise of privacy in a simulation, which is to be repeated; None is one
                that nobody can repeat.
        """
        self.layout = algorithm.layout(model)
        self._algorithm, self._treatment = algorithm, treatment
        self._model, self._state = model, state
        self._asked, self._population = asked, population
        self._noise = noise
        rng = cohort.server_generator(seed, index)
        self._fold = treatment.fold(self.layout, state, rng)

    def add(
        self,
        client: int,
        given: Arrays | str | Path,
        weight: float,
        metrics: Mapping[str, float],
    ) -> None:
        """Take one client's update, in any order.

        Args:
            client: Whose it is.
            given: The file that it sent, or the arrays that such a file stands for.
            weight: How much it counts.
            metrics: Those under ``eval.`` are of the model before the round and left out.

        Raises:
            BadUpdate: It must not be added; the round is as it was.
        """
        source: Given = given
        if not isinstance(given, dict):
            source = self._treatment.incoming(client, given, self.layout)
        trained = {name: v for name, v in metrics.items() if not name.startswith("eval.")}
        self._fold.add(client, source, weight, trained)

    def finish(self) -> Made:
        """Nobody else comes: the next model.

        Raises:
            ValueError: No update counts for anything.
            TooFewClients: The rule wants more.
            SumBroken: A file has changed since it was added; begin the round anew.
        """
        clients = len(self._fold.clients)
        population = max(self._population, clients)
        combined, own, told = self._treatment.combined(
            self._fold.result(),
            self._state,
            clients=clients,
            rate=min(self._asked / population, 1.0),
            noise=self._noise,
        )
        facts = Facts(clients=clients, population=population)
        model, state = self._algorithm.server_update(
            self._model, without_ours(self._state), combined, facts
        )
        return Made(model, {**state, **own}, combined.metrics, told)
