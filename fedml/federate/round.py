# SPDX-License-Identifier: Apache-2.0
"""One round at the server: updates come in, the next model goes out.

`ServerRound` for algorithms in rounds, `ServerVersion` for those that step with each update. The
deployed aggregator and the simulator both walk this way, so what is done to updates beside the
algorithm (`federate.treatment`) is done to the same bits in both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedml.federate import cohort
from fedml.federate.aggregate import Fold
from fedml.federate.algorithm import Algorithm, BadParameter, Facts, NobodyLearned, Update
from fedml.federate.arrays import Arrays, without_tags
from fedml.federate.census import CENSUS, facts_of
from fedml.federate.exact_sum import WeightedMetrics
from fedml.federate.hierarchical import GroupedFold, Groups
from fedml.federate.layout import BadUpdate, Given, admit
from fedml.federate.treatment import Treatment, in_memory, without_ours
from fedml.protect.robust import RobustFold
from fedml.protect.rules import Rule, TooFewClients, require

_BARREN = 1000  # updates in a row that count for nothing, after which nothing is hoped for


class Made(NamedTuple):
    """What a round came to.

    Attributes:
        model: The next one.
        state: The server's, the treatment's part of it included.
        metrics: Of the clients' training, combined.
        told: What the treatment has to say, e.g. the privacy that was spent, and each group.
    """

    model: Arrays
    state: Arrays
    metrics: Mapping[str, float]
    told: Mapping[str, float]


def check(
    algorithm: Algorithm,
    treatment: Treatment,
    groups: Groups | None,
    population: int,
    *,
    per_round: int = 0,
    minimum: int = 0,
) -> None:
    """Refuse what cannot go together, before anything runs.

    Args:
        algorithm: Of the whole.
        treatment: What is done to updates beside it.
        groups: How clients are grouped.
        population: How many clients there are.
        per_round: How many answers a round takes; 0 is all.
        minimum: With how many it may close; 0 is `per_round`.

    Raises:
        BadParameter: With the way out.
    """
    treatment.check(algorithm)
    if treatment.rule is not None:
        per_round = per_round or population
        key = "clients.per_round" if per_round < population else "clients.count"
        _require(treatment, treatment.rule, per_round, f"{key}: {per_round}")
        if 0 < minimum < per_round:
            _require(treatment, treatment.rule, minimum, f"clients.minimum: {minimum}")
    if groups is None:
        return
    groups.check(algorithm, population)
    if treatment.rule is not None:
        raise BadParameter(
            "groups and a robust rule exclude each other: a group sends a sum, and the rule must "
            "see each update. Leave one out; `treatment.privacy` bounds what one client can do, too"
        )
    if not groups.relay and treatment != Treatment():
        raise BadParameter(
            "groups with rounds of their own and `treatment` exclude each other: leave one out, or "
            "let groups only add up (`groups.rounds: 1`, fedavg within)"
        )


def _require(treatment: Treatment, rule: Rule, clients: int, said: str) -> None:
    """Refuse a rule that so few clients cannot have, as a key of the run file says."""
    try:
        require(rule, treatment.mixing, clients)
    except TooFewClients as error:
        raise BadParameter(
            f"treatment.robust: {error} in a round (`{said}`). Ask more clients, or expect fewer "
            "liars"
        ) from error


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
        available: int | None = None,
        groups: Sequence[Sequence[int]] = (),
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
            available: From how many of them those who were asked were drawn; None is all.
            groups: That relay, each adding up its clients; without a rule only.
            noise: For the noise of privacy in a simulation, which is to be repeated; None is one
                that nobody can repeat.
        """
        self.layout = algorithm.layout(model)
        self._algorithm, self._treatment = algorithm, treatment
        self._model, self._state = model, state
        self._asked, self._population = asked, population
        self._available = population if available is None else available
        # A cohort is drawn once for all stages of its round, which hit or miss a client together.
        self._releases = algorithm.stages if index % algorithm.stages == 0 else 0
        self._noise = noise
        self._weights: dict[int, float] = {}
        self._fold: Fold | RobustFold | GroupedFold
        if groups:
            self._fold = GroupedFold(groups, treatment.layout(self.layout))
        else:
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
        self._fold.add(client, source, weight, of_training(metrics))
        self._weights[client] = weight

    def finish(self) -> Made:
        """Nobody else comes: the next model.

        Raises:
            NobodyLearned: No update counts for anything.
            TooFewClients: The rule wants more than have answered.
            SumBroken: A file has changed since it was added; begin the round anew.
        """
        clients = len(self._fold.clients)
        rule = self._treatment.rule
        if rule is None and not any(self._weights.values()):
            raise NobodyLearned(clients)
        population = max(self._population, clients)
        combined, own, told = self._treatment.combined(
            self._fold.result(),
            self._state,
            clients=clients,
            rate=min(self._asked / max(self._available, clients), 1.0),
            releases=self._releases,
            noise=self._noise,
        )
        if isinstance(self._fold, GroupedFold):
            told |= self._fold.told()
        # A rule counts everybody, whatever weight is said.
        weights = dict.fromkeys(self._weights, 1.0) if rule is not None else self._weights
        facts, remembered = facts_of(self._state, weights, population)
        model, state = self._algorithm.server_update(
            self._model, algorithms_own(self._state), combined, facts
        )
        return Made(model, {**state, **own, **remembered}, combined.metrics, told)


class ServerVersion:
    """The updates of an asynchronous run, up to the one that makes the next model."""

    def __init__(
        self,
        algorithm: Algorithm,
        treatment: Treatment,
        model: Arrays,
        state: Arrays,
        *,
        population: int,
    ) -> None:
        """Be ready for updates.

        Args:
            algorithm: Asynchronous.
            treatment: Checked against it.
            model: The newest version.
            state: The server's.
            population: How many clients there are.
        """
        self._algorithm, self._treatment = algorithm, treatment
        self._layout = algorithm.layout(model)
        self._model, self._state = model, state
        self._population = population
        self._metrics = WeightedMetrics()
        self._barren = 0

    def add(
        self,
        client: int,
        given: Arrays | str | Path,
        weight: float,
        metrics: Mapping[str, float],
        *,
        staleness: int,
    ) -> bool:
        """Take one client's update; whether it made a new model.

        Args:
            client: Whose it is.
            given: The file that it sent, or the arrays that such a file stands for.
            weight: How much it counts.
            metrics: Those under ``eval.`` are left out.
            staleness: Versions that were made since the client got its own.

        Raises:
            BadUpdate: It must not be added; all is as it was.
        """
        if not weight:
            self._barren += 1
            if self._barren > _BARREN:
                raise BadUpdate(client, None, "no client at work has an example to learn from")
            return False
        self._barren = 0
        if isinstance(given, dict):
            arrays = given
        else:
            sent = self._treatment.incoming(client, given, self._layout)
            admit(client, sent, weight, self._layout).close()
            arrays = in_memory(sent)
        trained = of_training(metrics)
        update = Update(arrays=arrays, weight=weight, metrics=trained)
        facts = Facts(clients=1, population=self._population, staleness=staleness)
        before = self._model
        self._model, self._state = self._algorithm.server_update(before, self._state, update, facts)
        self._metrics.add(trained, weight)
        return self._model is not before

    def finish(self) -> Made:
        """The newest model, and what its updates came to."""
        return Made(self._model, self._state, self._metrics.means(), {})


def algorithms_own(state: Arrays) -> Arrays:
    """The algorithm's own part of a server's state."""
    return without_tags(without_ours(state), [CENSUS])


def of_training(metrics: Mapping[str, float]) -> dict[str, float]:
    """Without those of the model before the round, and how many epochs there was time for."""
    others = ("eval.", "partial.")
    return {name: value for name, value in metrics.items() if not name.startswith(others)}
