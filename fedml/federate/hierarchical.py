# SPDX-License-Identifier: Apache-2.0
"""Two levels: groups of clients train on their own for a while, then the groups are averaged.

Liu, Zhang, Song, Letaief, "Client-Edge-Cloud Hierarchical Federated Learning", ICC 2020: clients
send to their edge after kappa_1 local steps, edges to the cloud after kappa_2 rounds of their own.

Nothing here is an algorithm of its own. A group makes many clients look like one: its "training" is
some rounds of any algorithm among its members. So any algorithm works within groups, one that asks
for no more than training works between them, and groups nest. With one round within and FedAvg on
both levels, the two levels are flat FedAvg.

Groups that only relay (a bridge for phones, a worker process of the simulator) need not even that:
they add their clients up (`GroupedFold`), and the sum of all is the flat sum, bit for bit.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedml.federate.aggregate import combine
from fedml.federate.algorithm import (
    Algorithm,
    BadParameter,
    Correction,
    Kind,
    Local,
    Need,
    NothingToLearn,
    Trained,
    UnknownAlgorithm,
    UnsupportedByTraining,
    Update,
    client_part,
    create,
    number,
    require_support,
)
from fedml.federate.arrays import Arrays, without_tags
from fedml.federate.census import CENSUS, facts_of
from fedml.federate.cohort import choose, generator, server_generator
from fedml.federate.exact_sum import PartialSum
from fedml.federate.fedavg import FedAvg
from fedml.federate.layout import Given, Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """How the clients of a run are grouped: ``groups`` of a run file.

    Attributes:
        count: How many groups, >= 1.
        rounds: That each has among its own members in one round of the whole, >= 1.
        algorithm: Within a group, by name.
        algorithm_config: Its parameters.
    """

    count: int
    rounds: int = 1
    algorithm: str = "fedavg"
    algorithm_config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in (("count", self.count), ("rounds", self.rounds)):
            number("groups", name, value, at_least=1)
            if not isinstance(value, int):
                raise BadParameter(f"groups: {name} must be a whole number, got {value!r}")

    @classmethod
    def parse(cls, text: str) -> Groups | None:
        """From JSON; ``{}`` and an empty text are no groups.

        Raises:
            BadParameter: A key or a value is wrong.
        """
        given = json.loads(text or "{}")
        if not given:
            return None
        unknown = given.keys() - cls.__dataclass_fields__.keys()
        if unknown:
            known = ", ".join(cls.__dataclass_fields__)
            raise BadParameter(f"groups: unknown key {min(unknown)!r}; known are {known}")
        if "count" not in given:
            raise BadParameter("groups: there is no `count`: how many groups")
        return cls(**given)

    def within(self) -> Algorithm:
        """The algorithm within a group.

        Raises:
            BadParameter: It is unknown, or a parameter is wrong.
        """
        try:
            return create(self.algorithm, self.algorithm_config)
        except UnknownAlgorithm as error:
            raise BadParameter(f"groups: {error}") from error

    @property
    def relay(self) -> bool:
        """Whether a group does nothing but add its clients up: one round of plain FedAvg."""
        return self.rounds == 1 and self.within() == FedAvg()

    def check(self, algorithm: Algorithm, clients: int) -> None:
        """Refuse what makes no sense with the algorithm between groups.

        Raises:
            BadParameter: With the way out.
        """
        if self.count > clients:
            raise BadParameter(f"groups: {clients} clients make no {self.count} groups")
        within = self.within()
        for each in (algorithm, within):
            if each.kind is not Kind.SYNCHRONOUS:
                raise BadParameter(
                    f"groups: {each.name} is asynchronous, and groups work in rounds: choose "
                    "another algorithm, e.g. fedavg"
                )
        # What asks for more than training (corrections, gradients) a group cannot serve.
        if not self.relay and type(algorithm).client_update is not FedAvg.client_update:
            raise BadParameter(
                f"groups: {algorithm.name} asks clients for more than to train, which a group "
                f"cannot do for it: use fedavg, fedavgm or a fedopt algorithm as `algorithm`, and "
                f"{algorithm.name} as `groups.algorithm`"
            )

    def assigned(self, clients: int, seed: int) -> list[list[int]]:
        """The clients of each group; the same in every round and everywhere."""
        return assign(range(clients), self.count, server_generator(seed, 0))


class GroupedFold:
    """The weighted mean of one round by way of each group's sum; used like `aggregate.Fold`.

    The sums are exact, so the result has the bits of the flat one.
    """

    def __init__(self, groups: Sequence[Sequence[int]], layout: Layout) -> None:
        """Expect updates of ``layout`` from the clients of ``groups``."""
        self._layout = layout
        self._group = {client: g for g, members in enumerate(groups) for client in members}
        self._sums: dict[int, PartialSum] = {}

    @property
    def clients(self) -> list[int]:
        """Who was added, sorted."""
        return sorted(client for part in self._sums.values() for client in part.clients)

    def add(
        self,
        client: int,
        given: Given,
        weight: float,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Add one client's update to its group's sum; see `PartialSum.add`."""
        part = self._sums.setdefault(self._group[client], PartialSum(self._layout))
        part.add(client, given, weight, metrics)

    def result(self) -> Update:
        """The mean of all groups, each counted by the weight of its clients.

        Raises:
            ValueError: Nothing of weight > 0 was added.
        """
        whole = PartialSum(self._layout)
        for _, part in sorted(self._sums.items()):
            whole.merge(part)
        return whole.result()

    def told(self) -> dict[str, float]:
        """Of each group ``groups.N.clients`` and the means of its clients' metrics."""
        return {
            f"groups.{g}.{name}": value
            for g, part in sorted(self._sums.items())
            for name, value in {"clients": float(len(part.clients)), **part.metrics}.items()
        }


class GroupRounds(ABC):
    """Clients that take part in a federation as one, and have rounds of their own in each of its.

    How members are asked is for a subclass to say. `state` is what the group's server keeps,
    `numbers` who can take part.
    """

    def __init__(
        self,
        members: Sequence[int],
        algorithm: Algorithm,
        *,
        rounds: int = 1,
        count: int | None = None,
        population: int | None = None,
        state: Arrays | None = None,
    ) -> None:
        """Form a group.

        Args:
            members: Who can take part, at least one.
            algorithm: What they run among themselves, synchronous.
            rounds: Rounds among themselves in one round of the whole, >= 1 (kappa_2).
            count: Members that take part in each of those; None means all.
            population: How many the group has in all; None means ``members``.
            state: What the group's server kept from before, to resume.

        Raises:
            ValueError: There is nobody, no round, or the algorithm is asynchronous.
        """
        if not members or rounds < 1:
            raise ValueError(f"a group of {len(members)} with {rounds} rounds does nothing")
        if algorithm.kind is not Kind.SYNCHRONOUS:
            raise ValueError(f"{algorithm.name} is asynchronous; a group works in rounds")
        self.algorithm = algorithm
        self.rounds = rounds
        self.state = state
        self.numbers = tuple(members)
        self._count = len(members) if count is None else count
        self._population = population or len(members)

    @property
    def supports(self) -> frozenset[Need]:
        """Nothing beyond training."""
        return frozenset()

    def train(
        self, model: Arrays, correction: Correction | None = None, *, rng: np.random.Generator
    ) -> Trained:
        """Run the group's own rounds from ``model``.

        The group counts as much as its members together: `Trained.examples` is the sum of their
        weights in the last of its rounds.

        Raises:
            NothingToLearn: Nobody had an example in the last of its rounds.
            UnsupportedByTraining: A correction was given; there is no single step to correct.
        """
        if correction is not None:
            raise UnsupportedByTraining(
                "a group trains in rounds, not steps, and takes no correction; use fedavg, fedavgm "
                "or a fedopt algorithm between groups, any other within them"
            )
        if self.state is None:
            self.state = self.algorithm.start(model)
        seed = _seed(rng)
        stages = self.algorithm.stages
        turns = self.rounds * stages
        weight, metrics = 0.0, dict[str, float]()
        for turn in range(turns):
            cohort = choose(seed, turn // stages, self.numbers, self._count)
            own = without_tags(self.state, [CENSUS])
            combined, weights = self.ask(model, self.algorithm.sent(model, own), seed, turn, cohort)
            weight = 0.0
            if combined is None:
                continue
            facts, remembered = facts_of(self.state, weights, self._population)
            model, own = self.algorithm.server_update(model, own, combined, facts)
            self.state = own | remembered
            weight, metrics = combined.weight, dict(combined.metrics)
        if not weight:
            raise NothingToLearn
        return Trained(model=model, examples=round(weight), steps=turns, metrics=metrics)

    def gradient(self, model: Arrays) -> tuple[Arrays, float]:
        """The mean gradient and loss of all members, where the subclass has it.

        Raises:
            UnsupportedByTraining: There is none.
        """
        raise UnsupportedByTraining("this group offers no full gradient; choose fedavg or fedopt")

    @abstractmethod
    def ask(
        self, model: Arrays, sent: Arrays, seed: int, turn: int, cohort: Sequence[int]
    ) -> tuple[Update | None, Mapping[int, float]]:
        """The updates of ``cohort`` combined, None where none of them counts, and their weights.

        Args:
            model: That each starts from.
            sent: What the algorithm sends beside it.
            seed: With ``turn`` and the client, what `cohort.generator` is made of.
            turn: Of the group, from 0 in each round of the whole.
            cohort: Who is asked.
        """


class Group(GroupRounds):
    """A group whose members train in this process (`algorithm.Local`, as itself is one).

    What members keep between rounds stays in here.
    """

    def __init__(
        self,
        members: Mapping[int, Local],
        algorithm: Algorithm,
        *,
        rounds: int = 1,
        count: int | None = None,
        client_states: dict[int, Arrays | None] | None = None,
    ) -> None:
        """Form a group; see `GroupRounds`.

        Args:
            members: The clients by number, at least one.
            algorithm: What they run among themselves, synchronous.
            rounds: Rounds among themselves in one round of the whole, >= 1.
            count: Members that take part in each of those; None means all.
            client_states: What the members kept from before, to resume.

        Raises:
            ValueError: There is nobody, no round, or the algorithm is asynchronous.
            UnsupportedByTraining: A member cannot do what the algorithm needs.
        """
        super().__init__([*members], algorithm, rounds=rounds, count=count)
        for client, local in members.items():
            require_support(algorithm, local, f"the training of client {client}")
        self.client_states = dict(client_states or {})
        self._members = dict(members)

    @property
    def supports(self) -> frozenset[Need]:
        """A full gradient, if every member gives one."""
        each = (local.supports for local in self._members.values())
        return frozenset({Need.GRADIENT}).intersection(*each)

    @property
    def examples(self) -> int:
        """All examples of all members."""
        return sum(local.examples for local in self._members.values())

    def gradient(self, model: Arrays) -> tuple[Arrays, float]:
        """The mean gradient and loss of all members, counted by examples.

        Raises:
            UnsupportedByTraining: A member offers no gradient.
        """
        parts = []
        for local in self._members.values():
            gradient, loss = local.gradient(model)
            parts.append(
                Update(arrays=gradient, weight=float(local.examples), metrics={"loss": loss})
            )
        whole = combine(parts)
        return whole.arrays, whole.metrics["loss"]

    def ask(
        self, model: Arrays, sent: Arrays, seed: int, turn: int, cohort: Sequence[int]
    ) -> tuple[Update | None, Mapping[int, float]]:
        """See `GroupRounds`: one after the other."""
        updates = {}
        for client in cohort:
            before = self.client_states.get(client)
            update = client_part(
                self.algorithm,
                model,
                sent,
                before,
                self._members[client],
                generator(seed, turn, client),
            )
            self.client_states[client] = update.client_state if update.weight else before
            updates[client] = update
        weights = {client: update.weight for client, update in updates.items()}
        return combine(updates.values()) if any(weights.values()) else None, weights


def member_generator(
    seed: int, turn: int, turns: int, group: int, client: int
) -> np.random.Generator:
    """The random numbers of a group's member, where each member trains in a place of its own.

    Args:
        seed: The run's.
        turn: Of the run, from 0.
        turns: That groups have in each round of the whole.
        group: Its number.
        client: The member's.
    """
    index, within = divmod(turn, turns)
    return generator(_seed(generator(seed, index, group)), within, client)


def _seed(rng: np.random.Generator) -> int:
    """Of a group's own rounds, from its generator in a round of the whole."""
    return int(rng.integers(2**63))


def assign(clients: Sequence[int], groups: int, rng: np.random.Generator) -> list[list[int]]:
    """Split clients at random into groups whose sizes differ by one at most.

    Args:
        clients: Distinct; the order they are given in does not matter.
        groups: How many, between 1 and the number of clients.
        rng: Decides; `cohort.server_generator(seed, 0)` makes it the same everywhere.

    Returns:
        ``groups`` sorted lists.
    """
    if not 1 <= groups <= len(clients):
        raise ValueError(f"cannot split {len(clients)} clients into {groups} groups")
    shuffled = rng.permutation(np.array(sorted(clients), np.int64))
    return [sorted(part.tolist()) for part in np.array_split(shuffled, groups)]
