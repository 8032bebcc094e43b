# SPDX-License-Identifier: Apache-2.0
"""What is heard of a simulation while it runs, and what it comes to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedml.errors import RunFailed
from fedml.federate.arrays import Arrays


class ClientFailed(RunFailed):
    """A client's part of a round failed, and the round cannot do without it.

    Attributes:
        client: Which.
        round: Counted from 1.
        traceback: Of the user's code; empty where the text says it all.
    """

    def __init__(self, client: int, number: int, text: str, traceback: str) -> None:
        where = f"client {client} failed in round {number}: {text}"
        super().__init__(f"{where}\n\n{traceback}".rstrip())
        self.client, self.round, self.traceback = client, number, traceback


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What a listener hears when a round has ended.

    `follows` says whether what clients find of its model is still to come (`Listener.evaluated`):
    they evaluate it when they are asked in the next round.
    """

    number: int
    rounds: int
    asked: int
    answered: int
    metrics: Mapping[str, float]
    wall_s: float
    simulated_s: float | None
    clients_per_s: float
    follows: bool = False


class Listener:
    """Hears how a simulation goes; this one says nothing."""

    def say(self, text: str) -> None:
        """Something worth knowing: the engine and why, what has no effect, who failed."""

    def begins(self, number: int, clients: int) -> None:
        """A round begins with so many clients."""

    def done(self, clients: int) -> None:
        """So many more clients are through."""

    def ended(self, round_: Round) -> None:
        """A round has ended."""

    def evaluated(self, number: int, metrics: Mapping[str, float]) -> None:
        """What clients found of the model of a round; 0 is the first model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a simulation came to.

    Attributes:
        model: The last one.
        metrics: The latest value of each.
        rounds: How many there are now, those before a resume included.
        engine: That ran it.
        clients_per_s: Over all rounds of this part, evaluation included.
        simulated_s: Where the simulated clock stands; None without devices.
        history: A row for each round, as in the results file.
        folder: Where results file, checkpoint and report are; None without.
    """

    model: Arrays
    metrics: Mapping[str, float]
    rounds: int
    engine: str
    clients_per_s: float
    simulated_s: float | None
    history: Sequence[Mapping[str, Any]] = field(repr=False)
    folder: Path | None = None


def mean_metrics(reports: Sequence[tuple[float, Mapping[str, float]]]) -> dict[str, float]:
    """Each metric's mean over those who reported it, counted by weight.

    Those under ``eval.`` are of the model before the round and counted elsewhere. What is said of
    no examples (weight 0) counts for nothing, also where it is NaN.
    """
    sums: dict[str, float] = {}
    weights: dict[str, float] = {}
    for weight, report in reports:
        if not weight:
            continue
        for name, value in report.items():
            if name.startswith("eval."):
                continue
            sums[name] = sums.get(name, 0.0) + weight * value
            weights[name] = weights.get(name, 0.0) + weight
    return {name: sums[name] / weights[name] for name in sorted(sums)}
