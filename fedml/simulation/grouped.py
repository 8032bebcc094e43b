# SPDX-License-Identifier: Apache-2.0
"""Groups of clients that have rounds of their own in each round of the whole.

A group is a client of the algorithm between groups (`federate.hierarchical`); its members are
trained by the crew, one group after the other, each round of a group by all processes. Groups that
only add up their clients are no matter of this module: `federate.round` does that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fedml.federate import cohort
from fedml.federate.algorithm import Algorithm, Update, client_part
from fedml.federate.arrays import Arrays, untagged
from fedml.federate.group_turns import GROUPS, between, kept
from fedml.federate.hierarchical import GroupRounds
from fedml.federate.round import Made
from fedml.simulation.order import Done, Order, Task
from fedml.simulation.sums import added_up, barren

if TYPE_CHECKING:
    from fedml.simulation.run import Simulation

_BOARD = 1  # where the model of the group now at work is; 0 is that of the whole


def turn(
    run: Simulation, number: int, clients: Sequence[int], *, least: int, evaluate: bool
) -> tuple[list[Done], Made]:
    """One round of the whole: every group's rounds, then their mean.

    Args:
        run: Its ``nested`` says how many rounds, and its ``within`` of which algorithm.
        number: Of the round, from 1.
        clients: Who takes part; groups of none of them sit out.
        least: With how many of them the round may close.
        evaluate: Evaluate the model of the whole on each client first.

    Returns:
        The clients that were there to the end, and the next model.
    """
    if run.nested is None:
        raise RuntimeError("only groups with rounds of their own are walked here")
    left = _Left(clients, least)
    state = run.state
    sent = run.algorithm.sent(run.model, run.server_state)
    updates: dict[int, Update] = {}
    for g, whole in enumerate(run.members):
        members = sorted(left.clients & set(whole))
        before = untagged(f"{GROUPS}::{g}", run.state)
        if not members:
            continue
        group = _CrewGroup(
            run,
            run.within,
            number,
            members,
            left,
            rounds=run.nested.rounds,
            population=len(whole),
            state=before or None,
            evaluate=evaluate,
        )
        rng = cohort.generator(run.plan.seed, run.turn, g)
        update = client_part(run.algorithm, run.model, sent, None, group, rng)
        state = kept(state, g, group.state or {})
        if update.weight:
            updates[g] = update
    if not updates:
        raise barren(number, len(left.clients))
    there = {g: len(left.clients & set(run.members[g])) for g in updates}
    made = between(run.algorithm, run.model, state, updates, there, len(run.members))
    return left.done(), made


class _Left:
    """Who of a round is still there, and the latest of each."""

    def __init__(self, clients: Sequence[int], least: int) -> None:
        self.clients = set(clients)
        self._least = least
        self._latest: dict[int, Done] = {}

    def least_of(self, members: Sequence[int]) -> int:
        """How many of these the round cannot do without; one, or there is no group."""
        return max(self._least - (len(self.clients) - len(members)), 1)

    def note(self, asked: Sequence[int], good: Sequence[Done]) -> None:
        """What came of those who were asked; the others are asked no more in this round."""
        self.clients -= set(asked) - {one.client for one in good}
        for one in good:
            before = self._latest.get(one.client, one)
            # An evaluation is of the first model, training of the last.
            self._latest[one.client] = one._replace(
                metrics={**before.metrics, **one.metrics},
                seconds=one.seconds + (before.seconds if before is not one else 0.0),
            )

    def done(self) -> list[Done]:
        """Those who are left, in the order of clients."""
        return [one for client, one in sorted(self._latest.items()) if client in self.clients]


class _CrewGroup(GroupRounds):
    """A group whose members the crew trains (`algorithm.Local`)."""

    def __init__(
        self,
        run: Simulation,
        algorithm: Algorithm,
        number: int,
        members: Sequence[int],
        left: _Left,
        *,
        rounds: int,
        population: int,
        state: Arrays | None,
        evaluate: bool,
    ) -> None:
        super().__init__(members, algorithm, rounds=rounds, population=population, state=state)
        self._run, self._number, self._left = run, number, left
        self._evaluate = evaluate

    @property
    def examples(self) -> int:
        """Of its members, as far as anybody has counted."""
        sizes = self._run.crew.sizes()
        return sum(sizes.get(client, 0) for client in self.numbers)

    def ask(
        self, model: Arrays, sent: Arrays, seed: int, turn: int, cohort: Sequence[int]
    ) -> tuple[Update | None, Mapping[int, float]]:
        """See `GroupRounds`."""
        run = self._run
        asked = [client for client in cohort if client in self._left.clients]
        run.publish(_BOARD, model, sent)
        order = Order(
            task=Task.SUM,
            turn=run.turn * run.passes + turn,
            clients=tuple(asked),
            version=_BOARD,
            evaluate=self._evaluate and turn == 0,
            kept=run.kept_turn,
            draw=(seed, turn),
        )
        shares = run.crew.run(order, run.heard)
        done = [one for _, each in shares for one in each]
        good = run.settle(self._number, done, least=self._left.least_of(asked))
        self._left.note(asked, good)
        weights = {one.client: one.weight for one in good}
        if not any(weights.values()):
            return None, weights
        return added_up(run, self._number, [place for place, _ in shares], good), weights
