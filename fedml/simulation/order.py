# SPDX-License-Identifier: Apache-2.0
"""What passes between a simulation and the members of its crew.

simulation -> member   Setup once, then an Order a round
member -> simulation   Done for every client of the order
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, NamedTuple

from fedml.federate.layout import Spec
from fedml.simulation.arena import Place
from fedml.simulation.liars import Liars

_NOTHING: Mapping[Any, Any] = {}  # never written to


class Task(Enum):
    """What to do with the clients of an order."""

    SUM = auto()  # train, and add up
    EACH = auto()  # train, and keep each update as a file
    EVALUATE = auto()
    COUNT = auto()  # load, and say how many examples there are


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a member is told once.

    Attributes:
        number: Of the member; no two of a run have the same.
        folder: Of the arena.
        treatment: JSON, what is done to updates that are kept one by one.
        liars: Who learns from false labels, if anybody does.
        paths: Where data sets are, by name.
        states: Where clients keep what they keep between rounds.
        device: Where it trains.
        room: Bytes that its shelf may take.
        memory: Bytes that the process should not exceed.
        model, sent, update: What the boards hold.
    """

    number: int
    config: Mapping[str, Any]
    algorithm: str
    algorithm_config: Mapping[str, Any]
    treatment: str
    liars: Liars | None
    seed: int
    clients: int
    engine: str
    device: str
    folder: str
    paths: Mapping[str, str]
    states: str
    room: int
    memory: int
    model: Mapping[str, Spec]
    sent: Mapping[str, Spec]
    update: Mapping[str, Spec]


class Order(NamedTuple):
    """What a member is told for a round. A tuple, since it is pickled in every one.

    Attributes:
        turn: The round, from 0; of it and the client come the random numbers.
        clients: In this order.
        version: Which model and what is sent with it.
        starts: Another turn than `turn` for some clients, where there are no rounds.
        draw: Seed and turn of the random numbers, where they are not the run's and `turn`.
        evaluate: Evaluate the model on each client before it trains.
        careful: Report client by client: the last member died over these.
        kept: The last turn that a checkpoint holds; states from then on are kept.
        places: Where data of clients lies that this member may not know of.
        epochs: Of clients that have no time for as many as all others.
    """

    task: Task
    turn: int
    clients: tuple[int, ...]
    version: int
    starts: Mapping[int, int] = _NOTHING
    draw: tuple[int, int] | None = None
    evaluate: bool = False
    careful: bool = False
    kept: int = -1
    places: Mapping[int, Place] = _NOTHING
    epochs: Mapping[int, int] = _NOTHING


class Done(NamedTuple):
    """One client is through.

    Attributes:
        examples: How many it holds; -1 where nobody has counted.
        weight: How much its update counts.
        seconds: That it took.
        metrics: Of its training; names that begin with ``eval.`` of the evaluation before.
        place: Where its data now lies, if this member has just put it there.
        cause: Why it failed, and the traceback; None when it did not.
        note: What the member has to say beside.
    """

    client: int
    examples: int = -1
    weight: float = 0.0
    seconds: float = 0.0
    metrics: Mapping[str, float] = _NOTHING
    place: Place | None = None
    cause: tuple[str, str] | None = None
    note: str = ""
