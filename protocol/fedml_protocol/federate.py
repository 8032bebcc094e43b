# SPDX-License-Identifier: Apache-2.0
"""One stage of a federated run on one device, and the talk with the two worker processes.

The agent hands a `StageOrder` to the session's warm worker and gets a `StageDone`; the broker
asks its aggregator one question at a time, numbered by `call`. Tensors travel as files.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum

from fedml_protocol.blob import Blob
from fedml_protocol.cause import Cause
from fedml_protocol.errors import MalformedMessage
from fedml_protocol.ids import check_id


class StageKind(IntEnum):
    """What the worker is asked to do."""

    TRAIN = 1
    EVALUATE = 2
    TRAIN_IN_GROUP = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSpec:
    """One client's part of one round.

    Attributes:
        session: All stages of a run on a device share one warm worker.
        round: The turn, from 1: an algorithm of two stages takes two in a round, an asynchronous
            one counts the starts of clients. Seeds hang on it.
        client: The device's place among `clients`, from 0; data and seeds hang on it.
        app: The user's file, relative to the package's root.
        config: JSON, handed to the user's functions.
        treatment: JSON, what is done to updates (`fedml.federate.treatment`); empty is nothing.
        sent: What the algorithm sends beside the model.
        evaluate: A training stage also evaluates the model it was given, before training.
        labels: The device's, so that the user's data function can choose by them.
        group: Of a stage `TRAIN_IN_GROUP`, which group; seeds hang on it. A kind of its own, so
            that an agent which knows no groups refuses the stage and does not train another way.
        turns: Of a stage `TRAIN_IN_GROUP`, how many turns a group has in a round of the whole.
        deadline_s: Where less than all epochs count, seconds until the round closes, from the
            stage's receipt; 0 is as long as it takes. An older agent trains all, and is late.
    """

    session: str
    kind: StageKind
    round: int
    client: int
    clients: int
    seed: int
    app: str
    model: Blob
    config: str = "{}"
    algorithm: str = "fedavg"
    algorithm_config: str = "{}"
    treatment: str = ""
    sent: Blob | None = None
    evaluate: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)
    group: int = 0
    turns: int = 0
    deadline_s: float = 0.0

    def __post_init__(self) -> None:
        check_id(self.session, "session")
        _check_deadline(self.deadline_s)
        if (self.turns > 0) != (self.kind is StageKind.TRAIN_IN_GROUP):
            raise MalformedMessage(f"a stage {self.kind.name} with {self.turns} turns of a group")
        if self.client >= self.clients:
            raise MalformedMessage(f"client {self.client} of {self.clients}")


def _check_deadline(seconds: float) -> None:
    if not 0 <= seconds < math.inf:
        raise MalformedMessage(f"a deadline of {seconds} seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReady:
    """worker -> agent: the first thing said on every connection."""

    session: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOrder:
    """agent -> worker. Repeating one that is done brings the same StageDone, from disk.

    Attributes:
        deadline_s: What is left of the stage's own for training; 0 is as long as it takes.
    """

    task: str
    epoch: int
    spec: StageSpec
    model_path: str
    out_dir: str
    sent_path: str = ""
    deadline_s: float = 0.0

    def __post_init__(self) -> None:
        _check_deadline(self.deadline_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageDone:
    """worker -> agent: `files` lie in the order's `out_dir`."""

    task: str
    epoch: int
    cause: Cause | None = None
    files: tuple[str, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    weight: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCancel:
    """agent -> worker: nobody waits for this stage any more. Its StageDone tells that it ended."""

    task: str
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFrame:
    """One length-delimited frame on the worker's socket."""

    body: WorkerReady | StageOrder | StageDone | StageCancel


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenRun:
    """broker -> aggregator: the first question. `app_dir` empty: no user code on this side.

    Attributes:
        groups: JSON, how clients are grouped (`fedml.federate.hierarchical.Groups`); empty is not.
    """

    algorithm: str
    seed: int
    app_dir: str = ""
    app: str = ""
    config: str = "{}"
    algorithm_config: str = "{}"
    central: bool = False
    clients: int = 1
    treatment: str = ""
    groups: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Members:
    """The clients of one group."""

    clients: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOpened:
    """aggregator -> broker: how the algorithm is to be walked.

    Attributes:
        stages: Turns in a row that one cohort serves, which are one round.
        asynchronous: There are no cohorts: a model may come of each update.
        buffer: Updates that make a model, where the algorithm is asynchronous.
        groups: Those that have rounds of their own, by number; clients run what is within.
        algorithm: Within them.
        algorithm_config: Its parameters, JSON.
        partial: A client that runs out of time sends the epochs that it had time for.
    """

    stages: int = 1
    asynchronous: bool = False
    buffer: int = 0
    groups: tuple[Members, ...] = ()
    algorithm: str = ""
    algorithm_config: str = ""
    partial: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MakeModel:
    """broker -> aggregator: the first model, from the user's code and the seed."""

    out_dir: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupFiles:
    """What the members of a group that has rounds of its own start from.

    Attributes:
        model_path: Empty at the beginning of a round: the model of the whole.
        sent_path: What the algorithm within sends beside it.
    """

    group: int
    model_path: str = ""
    sent_path: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelMade:
    """aggregator -> broker: a global model, the algorithm's state, what it sends, its metrics.

    Attributes:
        model_path: Empty in the middle of a round of groups: it is the one from before.
        groups: Of those that have rounds of their own, what they go on with.
    """

    model_path: str = ""
    state_path: str = ""
    sent_path: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    groups: tuple[GroupFiles, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRound:
    """broker -> aggregator: choose `count` of these clients.

    Attributes:
        round: Of which the choice depends: the round, or the number of the start, from 1.
    """

    round: int
    clients: tuple[int, ...]
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundPlan:
    """aggregator -> broker: the chosen clients, ascending."""

    clients: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BeginRound:
    """broker -> aggregator: updates of this round are measured against this model.

    Attributes:
        round: The turn, from 1; the version to be made, where the algorithm is asynchronous.
        clients: Whose updates may come; ascending is the canonical order of the fold.
        groups: Where the groups are, in the middle of a round of theirs.
    """

    round: int
    model_path: str
    clients: tuple[int, ...]
    state_path: str = ""
    groups: tuple[GroupFiles, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundBegun:
    """aggregator -> broker: ready for updates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AddUpdate:
    """broker -> aggregator: one client's update on disk; folded once its turn has come.

    Attributes:
        staleness: Versions of the model that were made since this client got its own.
    """

    client: int
    path: str
    weight: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    staleness: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateAdded:
    """aggregator -> broker. With a refusal (names, shapes, not finite) nothing was added.

    Attributes:
        stepped: An asynchronous algorithm has made a model of it: time for FinishRound.
    """

    client: int
    refusal: Cause | None = None
    stepped: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishRound:
    """broker -> aggregator: nobody else comes; the answer is ModelMade."""

    out_dir: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """aggregator -> broker: the question could not be answered, and why."""

    cause: Cause


@dataclass(frozen=True, slots=True, kw_only=True)
class AggregatorFrame:
    """One length-delimited frame on the aggregator's standard streams."""

    call: int
    body: (
        OpenRun | MakeModel | PlanRound | BeginRound | AddUpdate | FinishRound
        | RunOpened | ModelMade | RoundPlan | RoundBegun | UpdateAdded | Failed
    )  # fmt: skip
