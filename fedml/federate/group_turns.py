# SPDX-License-Identifier: Apache-2.0
"""Groups with rounds of their own, at the server: one turn of all of them, side by side.

In the first turn of a round every group starts from the model of the whole; in each turn its
members' updates make its next model (`hierarchical` says what that is); after the last one the
groups are the clients of the algorithm between them. What a group's server keeps lies in the state
of the whole under `GROUPS`, so that whoever has the state and the groups' models can go on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from fedml.federate.aggregate import Fold, combine
from fedml.federate.algorithm import Algorithm, Facts, NobodyLearned, Trained, Update
from fedml.federate.arrays import Arrays, tagged, untagged, without_tags
from fedml.federate.census import CENSUS, facts_of
from fedml.federate.fedavg import counted
from fedml.federate.round import Made, of_training

GROUPS = "groups"  # the tag of what groups' servers keep, beside the algorithm's state


class Start(NamedTuple):
    """What the members of a group start their next turn from."""

    model: Arrays
    sent: Arrays


class GroupTurn:
    """One turn, from its first update to the groups' next models.

    Attributes:
        model: Of the whole, from which the round began.
    """

    def __init__(
        self,
        within: Algorithm,
        members: Sequence[Sequence[int]],
        clients: Sequence[int],
        model: Arrays,
        state: Arrays,
        models: Mapping[int, Arrays],
    ) -> None:
        """Be ready for updates.

        Args:
            within: The algorithm of each group.
            members: Of each group.
            clients: Who is asked.
            model: See above.
            state: The server's, with what the groups keep.
            models: That groups have made in this round; without one it is ``model``.
        """
        self._within, self._members = within, members
        self.model = model
        self._state, self._models = state, models
        self._group = {client: g for g, whole in enumerate(members) for client in whole}
        there = sorted({self._group[client] for client in clients})
        self._folds = {g: Fold(within.layout(model)) for g in there}
        self._weights: dict[int, dict[int, float]] = {g: {} for g in there}

    def add(
        self, client: int, given: Arrays | str | Path, weight: float, metrics: Mapping[str, float]
    ) -> None:
        """Take one client's update, in any order; see `round.ServerRound.add`."""
        g = self._group[client]
        self._folds[g].add(client, given, weight, of_training(metrics))
        self._weights[g][client] = weight

    def turned(self) -> tuple[dict[int, Start], Arrays]:
        """Nobody else comes, and the groups go on: what from, and the state.

        A group of which nobody has answered is not among them: it sits the rest of the round out.

        Raises:
            SumBroken: A file has changed since it was added; begin the turn anew.
        """
        state, starts = dict(self._state), {}
        for g in self._there():
            model, own, _ = self._step(g)
            state = kept(state, g, own)
            starts[g] = Start(model, self._within.sent(model, without_tags(own, [CENSUS])))
        return starts, state

    def finish(self, algorithm: Algorithm, turns: int) -> Made:
        """Nobody else comes, and the round of the whole ends: its next model.

        Args:
            algorithm: Between the groups.
            turns: That the round has had.

        Raises:
            NobodyLearned: No update counts for anything.
            SumBroken: A file has changed since it was added; begin the turn anew.
        """
        state, updates, answered = dict(self._state), {}, {}
        for g in self._there():
            model, own, combined = self._step(g)
            state = kept(state, g, own)
            if combined is None:
                continue
            trained = Trained(
                model=model,
                examples=round(combined.weight),
                steps=turns,
                metrics=combined.metrics,
            )
            updates[g] = counted(self.model, trained)
            answered[g] = len(self._folds[g].clients)
        if not updates:
            raise NobodyLearned(sum(len(self._folds[g].clients) for g in self._there()))
        return between(algorithm, self.model, state, updates, answered, len(self._members))

    def _there(self) -> list[int]:
        return [g for g, fold in self._folds.items() if fold.clients]

    def _step(self, g: int) -> tuple[Arrays, Arrays, Update | None]:
        """A group's next model, what its server keeps, and its members' updates combined.

        These are None, and the model stays, where none of the members has an example.
        """
        model = self._models.get(g, self.model)
        own = own_state(self._within, self.model, self._state, g)
        if not any(self._weights[g].values()):
            return model, own, None
        combined = self._folds[g].result()
        facts, remembered = facts_of(own, self._weights[g], len(self._members[g]))
        own = without_tags(own, [CENSUS])
        model, own = self._within.server_update(model, own, combined, facts)
        return model, own | remembered, combined


def own_state(within: Algorithm, model: Arrays, state: Arrays, group: int) -> Arrays:
    """What a group's server keeps: from an earlier round, or what ``within`` starts with."""
    return untagged(f"{GROUPS}::{group}", state) or within.start(model)


def kept(state: Arrays, group: int, own: Arrays) -> Arrays:
    """The state of the whole, with what this group's server keeps now."""
    return without_tags(state, [f"{GROUPS}::{group}"]) | tagged(f"{GROUPS}::{group}", own)


def starts(within: Algorithm, model: Arrays, state: Arrays, count: int) -> dict[int, Arrays]:
    """What ``within`` sends to each group's members beside the model, as a round begins."""
    return {
        g: within.sent(model, without_tags(own_state(within, model, state, g), [CENSUS]))
        for g in range(count)
    }


def between(
    algorithm: Algorithm,
    model: Arrays,
    state: Arrays,
    updates: Mapping[int, Update],
    answered: Mapping[int, int],
    count: int,
) -> Made:
    """The end of a round of the whole: the next model, of what the groups have learned.

    Args:
        algorithm: Between the groups.
        model: That the groups began from.
        state: Its state, with what the groups keep.
        updates: Of each group that took part and has learned, one at least.
        answered: How many clients each of these has had to the end.
        count: How many groups there are.
    """
    combined = combine(updates.values())
    facts = Facts(clients=len(updates), population=count)
    groups = untagged(GROUPS, state)
    next_model, own = algorithm.server_update(model, without_tags(state, [GROUPS]), combined, facts)
    told = {
        f"{GROUPS}.{g}.{name}": value
        for g, update in updates.items()
        for name, value in {"clients": float(answered[g]), **update.metrics}.items()
    }
    return Made(next_model, own | tagged(GROUPS, groups), combined.metrics, told)
