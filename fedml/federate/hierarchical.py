# SPDX-License-Identifier: Apache-2.0
"""Two levels: groups of clients train on their own for a while, then the groups are averaged.

Liu, Zhang, Song, Letaief, "Client-Edge-Cloud Hierarchical Federated Learning", ICC 2020: clients
send to their edge after kappa_1 local steps, edges to the cloud after kappa_2 rounds of their own.

Nothing here is an algorithm of its own. `Group` makes many clients look like one: its "training" is
some rounds of any algorithm among its members. So any algorithm works between groups, another one
within them, and groups nest. With one round within and FedAvg on both levels, the two levels are
flat FedAvg.

Groups that only relay (a bridge for phones, a worker process of the simulator) need not even that:
they add their clients up with `exact_sum.PartialSum`, and the sum of all is the flat sum, bit for
bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fedml.federate.aggregate import combine
from fedml.federate.algorithm import (
    Algorithm,
    Correction,
    Facts,
    Kind,
    Local,
    Need,
    Trained,
    UnsupportedByTraining,
    Update,
    require_support,
)
from fedml.federate.arrays import Arrays
from fedml.federate.cohort import choose, generator


class Group:
    """Clients that take part in a federation as one (`algorithm.Local`).

    What members keep between rounds, and the group's server state, stays in here.
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
        """Form a group.

        Args:
            members: The clients by number, at least one.
            algorithm: What they run among themselves, synchronous.
            rounds: Rounds among themselves in one round of the whole, >= 1 (kappa_2).
            count: Members that take part in each of those; None means all.
            client_states: What the members kept from before, to resume.

        Raises:
            ValueError: There is nobody, no round, or the algorithm is asynchronous.
            UnsupportedByTraining: A member cannot do what the algorithm needs.
        """
        if not members or rounds < 1:
            raise ValueError(f"a group of {len(members)} with {rounds} rounds does nothing")
        if algorithm.kind is not Kind.SYNCHRONOUS:
            raise ValueError(f"{algorithm.name} is asynchronous; a group works in rounds")
        for client, local in members.items():
            require_support(algorithm, local, f"the training of client {client}")
        self.algorithm = algorithm
        self.rounds = rounds
        self.client_states = dict(client_states or {})
        self._members = dict(members)
        self._count = len(members) if count is None else count
        self._state: Arrays | None = None

    @property
    def supports(self) -> frozenset[Need]:
        """A full gradient, if every member gives one."""
        each = (local.supports for local in self._members.values())
        return frozenset({Need.GRADIENT}).intersection(*each)

    @property
    def examples(self) -> int:
        """All examples of all members."""
        return sum(local.examples for local in self._members.values())

    def train(
        self, model: Arrays, correction: Correction | None = None, *, rng: np.random.Generator
    ) -> Trained:
        """Run the group's own rounds from ``model``.

        Raises:
            UnsupportedByTraining: A correction was given; there is no single step to correct.
        """
        if correction is not None:
            raise UnsupportedByTraining(
                "a group trains in rounds, not steps, and takes no correction; use fedavg, fedavgm "
                "or a fedopt algorithm between groups, any other within them"
            )
        if self._state is None:
            self._state = self.algorithm.start(model)
        seed = int(rng.integers(2**63))
        metrics: Mapping[str, float] = {}
        turns = self.rounds * self.algorithm.stages
        for turn in range(turns):
            cohort = choose(seed, turn // self.algorithm.stages, [*self._members], self._count)
            model, metrics = self._round(model, seed, turn, cohort)
        return Trained(model=model, examples=self.examples, steps=turns, metrics=metrics)

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

    def _round(
        self, model: Arrays, seed: int, turn: int, cohort: Sequence[int]
    ) -> tuple[Arrays, Mapping[str, float]]:
        state = self._state if self._state is not None else {}
        sent = self.algorithm.sent(model, state)
        updates = []
        for client in cohort:
            update = self.algorithm.client_update(
                model,
                sent,
                self.client_states.get(client),
                self._members[client],
                generator(seed, turn, client),
            )
            self.client_states[client] = update.client_state
            updates.append(update)
        combined = combine(updates)
        facts = Facts(clients=len(cohort), population=len(self._members))
        model, self._state = self.algorithm.server_update(model, state, combined, facts)
        return model, combined.metrics


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
