# SPDX-License-Identifier: Apache-2.0
"""Clients of a simulation that lie: who, drawn once for the run, and how (`protect.attacks`).

    simulation:
      attack: {kind: alie, clients: 2, z: 3.0}

A liar trains as everybody does; then something else is sent in its name. What is forged takes the
place of the update as the server would have it decoded: a liar clips nothing and is as free in
what it sends as any machine on a network. `label_flip` is another thing: honest training on false
labels. Agents know nothing of this; they ignore the section.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedml.federate.algorithm import Algorithm, BadParameter, Kind
from fedml.federate.arrays import Arrays
from fedml.federate.local_sgd import BadData
from fedml.protect import attacks

# Streams apart from those of `federate.cohort` and of `devices`.
_WHO, _LIE = 111, 112
LABEL_FLIP = "label_flip"


@dataclass(frozen=True, slots=True)
class Liars:
    """Who lies in a run, and how.

    Attributes:
        kind: The attack's name.
        clients: Ascending.
        seed: The run's.
        attack: What is sent; None where only labels are false.
        flip: What is learned; None where updates are forged.
    """

    kind: str
    clients: tuple[int, ...]
    seed: int
    attack: attacks.Attack | None = None
    flip: attacks.LabelFlip | None = None

    @classmethod
    def read(
        cls, given: Mapping[str, Any], population: int, seed: int, algorithm: Algorithm
    ) -> Liars:
        """As ``simulation.attack`` of a run file has it.

        Args:
            given: ``kind``, ``clients`` (how many, or a fraction of all below 1), and the attack's
                own parameters.
            population: How many clients there are.
            seed: The run's.
            algorithm: The run's.

        Raises:
            BadParameter: A part is unknown or out of range; liars are no minority; the attack
                looks at a round and the algorithm has none.
        """
        parameters = dict(given)
        kind = parameters.pop("kind", None)
        if not isinstance(kind, str):
            raise BadParameter("`kind` says how they lie, e.g. flip, alie, label_flip")
        count = _count(parameters.pop("clients", None), population)
        words = [2, _WHO, seed]
        keys = np.random.Philox(np.random.SeedSequence(words)).random_raw(population)
        clients = tuple(sorted(np.argsort(keys, kind="stable")[:count].tolist()))
        if kind == LABEL_FLIP:
            return cls(kind, clients, seed, flip=_flip(parameters))
        if kind.lower() == "alie":
            parameters = {"clients": population, "byzantine": max(count, 1), **parameters}
        attack = attacks.create(kind, parameters)
        if isinstance(attack, attacks.LittleIsEnough) and count and attack.deviations == 0:
            raise BadParameter(
                f"alie: with {count} liars of {population} its formula gives z = 0, the honest "
                "mean itself: say `z`, e.g. z: 1.5"
            )
        if attack.colludes and algorithm.kind is Kind.ASYNCHRONOUS:
            raise BadParameter(
                f"{kind} looks at the honest updates of a round, and {algorithm.name} has no "
                "rounds: choose flip, random, zero or label_flip, or an algorithm in rounds"
            )
        return cls(kind, clients, seed, attack=attack)

    @property
    def forges(self) -> bool:
        """Whether anybody sends what he did not learn."""
        return self.attack is not None and bool(self.clients)

    def among(self, clients: Sequence[int]) -> list[int]:
        """Those of ``clients`` that lie."""
        return [client for client in clients if client in self.clients]

    def forged(self, turn: int, updates: Mapping[int, Arrays]) -> dict[int, Arrays]:
        """What the liars of a round send instead.

        Args:
            turn: The round, from 0; random lies hang on it.
            updates: What all of a round would send by client. Where nobody of them is honest,
                liars that look at honest clients look at what they would have sent themselves.
        """
        if self.attack is None:
            return {}
        honest = [arrays for client, arrays in updates.items() if client not in self.clients]
        seen = honest or list(updates.values())
        with np.errstate(over="ignore", invalid="ignore"):  # too much is refused where it arrives
            return {
                client: self.attack.forge(updates[client], seen, self._rng(turn, client))
                for client in self.among(list(updates))
            }

    def learns_from(self, client: int, data: Any) -> Any:
        """A client's training data; with false labels, if that is how this one lies.

        Raises:
            BadData: The data has no labels that could be found.
        """
        if self.flip is None or client not in self.clients:
            return data
        return _relabelled(data, self.flip)

    def _rng(self, turn: int, client: int) -> np.random.Generator:
        words = [4, _LIE, self.seed, turn, client]
        return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


def _count(asked: Any, population: int) -> int:
    good = isinstance(asked, int | float) and not isinstance(asked, bool) and asked >= 0
    count: int
    if good and 0 < asked < 1:
        count = max(round(asked * population), 1)
    elif good and asked == int(asked):
        count = int(asked)
    else:
        raise BadParameter(
            f"`clients` says how many lie, as a number or a fraction below 1, not {asked!r}"
        )
    if 2 * count >= population:
        raise BadParameter(
            f"{count} liars of {population} clients are no minority: no rule could tell who lies"
        )
    return count


def _flip(parameters: Mapping[str, Any]) -> attacks.LabelFlip:
    if parameters.keys() != {"from", "to"}:
        raise BadParameter(
            f"label_flip takes `from` and `to`, two classes, not {', '.join(parameters) or 'none'}"
        )
    return attacks.LabelFlip(source=parameters["from"], target=parameters["to"])


def _relabelled(data: Any, flip: attacks.LabelFlip) -> Any:
    """The same data with other labels; of the forms that `local_sgd.examples_of` reads."""
    if hasattr(data, "train") and hasattr(data, "test"):
        return _with(data, "train", _relabelled(data.train, flip))
    if isinstance(data, Mapping) and "y" in data:
        return {**data, "y": flip.labels(data["y"])}
    if isinstance(data, tuple | list) and len(data) == 2:
        return data[0], flip.labels(data[1])
    if hasattr(data, "y"):
        return _with(data, "y", flip.labels(data.y))
    raise BadData(
        f"label_flip finds no labels in a {type(data).__name__}: let data() return something with "
        "x and y, a pair of arrays, or {'x': …, 'y': …}"
    )


def _with(thing: Any, name: str, value: Any) -> Any:
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        return dataclasses.replace(thing, **{name: value})
    other = copy.copy(thing)
    setattr(other, name, value)
    return other
