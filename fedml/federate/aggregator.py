# SPDX-License-Identifier: Apache-2.0
"""The server role: a process of the broker that opens the tensors of one federated run.

    python -m fedml.federate.aggregator        (questions on stdin, answers on stdout)

It keeps nothing that the broker could not tell it again. Updates are read from files, checked
before they are added, and folded so that the result has the same bits in whatever order they come.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from safetensors.numpy import load_file

from fedml.federate import algorithm, blame, cohort
from fedml.federate.application import Application, set_weights
from fedml.federate.group_turns import GroupTurn, starts
from fedml.federate.hierarchical import Groups
from fedml.federate.layout import BadUpdate, SumBroken
from fedml.federate.round import ServerRound, ServerVersion, algorithms_own, check
from fedml.federate.tensor_file import mapped, write
from fedml.federate.treatment import Treatment
from fedml.protect.rules import require
from fedml_protocol.cause import Cause, Fault
from fedml_protocol.codec import parse
from fedml_protocol.federate import (
    AddUpdate,
    AggregatorFrame,
    BeginRound,
    Failed,
    FinishRound,
    GroupFiles,
    MakeModel,
    Members,
    ModelMade,
    OpenRun,
    PlanRound,
    RoundBegun,
    RoundPlan,
    RunOpened,
    UpdateAdded,
)
from fedml_protocol.frames import HEAD_BYTES, frame, frame_length


class Aggregator:
    """One run."""

    def __init__(self) -> None:
        self._opened: OpenRun
        self._algorithm: algorithm.Algorithm
        self._application: Application | None = None
        self._central: Any = None
        self._central_model: Any = None
        # The round that was made last, so that the next one does not read what was just written.
        self._latest: tuple[int, dict[str, Any], dict[str, Any]] | None = None
        self._number = 0
        self._treatment = Treatment()
        self._groups: list[list[int]] = []
        # Within groups that have rounds of their own; None where clients send to the whole.
        self._within: algorithm.Algorithm | None = None
        self._turns = 1  # in a round of the whole
        self._round: ServerRound | ServerVersion | GroupTurn

    def answer(self, question: Any) -> Any:
        """The answer to one question."""
        match question:
            case OpenRun():
                return self._open(question)
            case MakeModel(out_dir=out):
                return self._first(Path(out))
            case PlanRound(round=number, clients=clients, count=count):
                # Rounds count from 1 on the wire; generators, as in the simulator, from 0.
                seed = self._opened.seed
                if self._treatment.privacy is not None:
                    # What a small cohort hides rests on nobody knowing who was in it.
                    seed = secrets.randbits(128)
                chosen = cohort.choose(seed, number - 1, clients, count)
                if self._treatment.rule is not None:  # while nobody has trained for nothing
                    require(self._treatment.rule, self._treatment.mixing, len(chosen))
                return RoundPlan(clients=tuple(chosen))
            case BeginRound():
                return self._begin(question)
            case AddUpdate():
                return self._add(question)
            case FinishRound(out_dir=out):
                return self._finish(Path(out))
        raise TypeError(f"not a question: {type(question).__name__}")

    def _open(self, opened: OpenRun) -> RunOpened:
        self._opened = opened
        self._algorithm = algorithm.create(opened.algorithm, json.loads(opened.algorithm_config))
        self._treatment = Treatment.parse(opened.treatment)
        groups = Groups.parse(opened.groups)
        check(self._algorithm, self._treatment, groups, opened.clients)
        if groups is not None:
            self._groups = groups.assigned(opened.clients, opened.seed)
        config = json.loads(opened.config)
        self._application = Application(Path(opened.app_dir) / opened.app, config)
        if opened.central and self._application.evaluates:
            self._central = self._application.central()
        if self._algorithm.kind is algorithm.Kind.ASYNCHRONOUS:
            buffer = cast(algorithm.Asynchronous, self._algorithm).buffer
            return RunOpened(asynchronous=True, buffer=buffer)
        self._turns = self._algorithm.stages
        if groups is None or groups.relay:
            return RunOpened(stages=self._turns, partial=self._algorithm.partial)
        self._within = groups.within()
        self._turns = groups.rounds * self._within.stages
        return RunOpened(
            stages=self._turns,
            groups=tuple(Members(clients=tuple(members)) for members in self._groups),
            algorithm=groups.algorithm,
            algorithm_config=json.dumps(dict(groups.algorithm_config)),
        )

    def _first(self, out: Path) -> ModelMade:
        if self._application is None:
            raise RuntimeError("the run was not opened")
        model = self._application.first_model(self._opened.seed)
        state = self._treatment.start(self._algorithm.start(model))
        return self._made(out, model, state, {})

    def _begin(self, question: BeginRound) -> RoundBegun:
        self._number = question.round
        if self._latest is not None and self._latest[0] == question.round - 1:
            model, state = self._latest[1:]
        else:
            model = load_file(question.model_path)
            state = load_file(question.state_path) if question.state_path else {}
        if self._algorithm.kind is algorithm.Kind.ASYNCHRONOUS:
            population = self._opened.clients
            self._round = ServerVersion(
                self._algorithm, self._treatment, model, state, population=population
            )
            return RoundBegun()
        if self._within is not None:
            models = {group.group: mapped(group.model_path) for group in question.groups}
            self._round = GroupTurn(
                self._within, self._groups, question.clients, model, state, models
            )
            return RoundBegun()
        self._round = ServerRound(
            self._algorithm,
            self._treatment,
            model,
            state,
            seed=self._opened.seed,
            index=question.round - 1,
            asked=len(question.clients),
            population=self._opened.clients,
            groups=self._groups,
        )
        return RoundBegun()

    def _add(self, question: AddUpdate) -> UpdateAdded:
        client, path, weight = question.client, question.path, question.weight
        metrics, stepped = question.metrics, False
        try:
            if isinstance(self._round, ServerVersion):
                late = question.staleness
                stepped = self._round.add(client, path, weight, metrics, staleness=late)
            else:
                self._round.add(client, path, weight, metrics)
        except (BadUpdate, ValueError, OSError) as error:
            what = error.what if isinstance(error, BadUpdate) else error
            cause = Cause(fault=Fault.TASK, message=f"its update was refused: {what}")
            return UpdateAdded(client=client, refusal=cause)
        return UpdateAdded(client=client, stepped=stepped)

    def _finish(self, out: Path) -> ModelMade:
        # Between the turns of a round there is no new model to be looked at.
        whole = self._number % self._turns == 0
        if isinstance(self._round, GroupTurn):
            if not whole:
                return self._turned(out, self._round)
            made = self._round.finish(self._algorithm, self._turns)
        else:
            made = self._round.finish()
        return self._made(out, made.model, made.state, made.metrics, made.told, evaluate=whole)

    def _turned(self, out: Path, turn: GroupTurn) -> ModelMade:
        """The groups go on from models of their own, the whole stays where it was."""
        found, state = turn.turned()
        self._latest = (self._number, turn.model, state)
        groups = [
            GroupFiles(
                group=g,
                model_path=_written(out / f"model-{g}.safetensors", start.model),
                sent_path=_written(out / f"sent-{g}.safetensors", start.sent),
            )
            for g, start in found.items()
        ]
        path = _written(out / "state.safetensors", state)
        return ModelMade(state_path=path, groups=tuple(groups))

    def _made(
        self,
        out: Path,
        model: dict[str, Any],
        state: dict[str, Any],
        metrics: Mapping[str, float],
        told: Mapping[str, float] | None = None,
        *,
        evaluate: bool = True,
    ) -> ModelMade:
        groups, sent = [], {}
        if self._within is not None:
            for g, own in starts(self._within, model, state, len(self._groups)).items():
                path = _written(out / f"sent-{g}.safetensors", own)
                groups.append(GroupFiles(group=g, sent_path=path))
        else:
            sent = self._algorithm.sent(model, algorithms_own(state))
            sent = self._treatment.sent(sent, state)
        found = {f"train.{name}": value for name, value in metrics.items()}
        found |= told or {}
        central = self._evaluated(model) if evaluate else {}
        found |= {f"central.{name}": value for name, value in central.items()}
        self._latest = (self._number, model, state)
        return ModelMade(
            model_path=_written(out / "model.safetensors", model),
            state_path=_written(out / "state.safetensors", state),
            sent_path=_written(out / "sent.safetensors", sent),
            metrics=found,
            groups=tuple(groups),
        )

    def _evaluated(self, model: dict[str, Any]) -> Mapping[str, float]:
        if self._central is None or self._application is None:
            return {}
        if self._central_model is None:
            self._central_model = self._application.new_model(self._opened.seed)
        set_weights(self._central_model, model)
        return self._application.evaluate(self._central_model, self._central)


def _written(path: Path, arrays: dict[str, Any]) -> str:
    """Where these arrays lie; nowhere, if there are none."""
    if not arrays:
        return ""
    write(path, arrays)
    return str(path)


def _cause(error: Exception) -> Cause:
    from fedml.data.errors import DatasetMissing  # of use here only, and its package is large

    if isinstance(error, DatasetMissing):
        return Cause(fault=Fault.TASK, message=f"on the broker: {error}"[:2000])
    plain = blame.says_all(error)
    text = str(error) if plain else f"{type(error).__name__}: {error}"
    shown = "" if plain else blame.trace(error)
    return Cause(fault=Fault.TASK, message=text[:2000], traceback=shown)


def serve(questions: BinaryIO, answers: BinaryIO) -> None:
    """Answer until the questions end."""
    aggregator = Aggregator()
    while head := questions.read(HEAD_BYTES):
        asked = parse(AggregatorFrame, questions.read(frame_length(head)))
        try:
            body = aggregator.answer(asked.body)
        except SumBroken:
            raise  # half a sum is no good: this process ends, the next one folds the round anew
        except Exception as error:  # the user's code may raise anything, and it is his to read
            traceback.print_exc()
            body = Failed(cause=_cause(error))
        answers.write(frame(AggregatorFrame(call=asked.call, body=body)))
        answers.flush()


def main() -> None:
    """Keep stdout for answers: what user code prints goes to the log."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
