# SPDX-License-Identifier: Apache-2.0
"""The server role: a process of the broker that opens the tensors of one federated run.

    python -m fedml.federate.aggregator        (questions on stdin, answers on stdout)

It keeps nothing that the broker could not tell it again. Updates are read from files, checked
before they are added, and folded so that the result has the same bits in whatever order they come.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from safetensors.numpy import load_file

from fedml.federate import algorithm, cohort
from fedml.federate.application import Application, ApplicationError, set_weights
from fedml.federate.hierarchical import Groups
from fedml.federate.layout import BadUpdate, SumBroken
from fedml.federate.round import ServerRound, ServerVersion, check
from fedml.federate.tensor_file import write
from fedml.federate.treatment import Treatment, without_ours
from fedml.protect.rules import TooFewClients
from fedml_protocol.cause import Cause, Fault
from fedml_protocol.codec import parse
from fedml_protocol.federate import (
    AddUpdate,
    AggregatorFrame,
    BeginRound,
    Failed,
    FinishRound,
    MakeModel,
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
        self._round: ServerRound | ServerVersion

    def answer(self, question: Any) -> Any:
        """The answer to one question."""
        match question:
            case OpenRun():
                return self._open(question)
            case MakeModel(out_dir=out):
                return self._first(Path(out))
            case PlanRound(round=number, clients=clients, count=count):
                # Rounds count from 1 on the wire; generators, as in the simulator, from 0.
                chosen = cohort.choose(self._opened.seed, number - 1, clients, count)
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
            if not groups.relay:
                raise ApplicationError(
                    "groups with rounds or an algorithm of their own are not deployed yet: on "
                    "agents groups only add up (`groups.rounds: 1`, fedavg within); "
                    "`fedml simulate` runs it"
                )
            self._groups = groups.assigned(opened.clients, opened.seed)
        config = json.loads(opened.config)
        self._application = Application(Path(opened.app_dir) / opened.app, config)
        if opened.central and self._application.evaluates:
            self._central = self._application.central()
        if self._algorithm.kind is algorithm.Kind.ASYNCHRONOUS:
            buffer = cast(algorithm.Asynchronous, self._algorithm).buffer
            return RunOpened(asynchronous=True, buffer=buffer)
        return RunOpened(stages=self._algorithm.stages)

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
            cause = Cause(fault=Fault.TASK, message=f"its update was refused: {error}")
            return UpdateAdded(client=client, refusal=cause)
        return UpdateAdded(client=client, stepped=stepped)

    def _finish(self, out: Path) -> ModelMade:
        made = self._round.finish()
        # Between the stages of a round there is no new model to be looked at.
        whole = self._number % self._algorithm.stages == 0
        return self._made(out, made.model, made.state, made.metrics, made.told, evaluate=whole)

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
        paths = {"model": "", "state": "", "sent": ""}
        sent = self._algorithm.sent(model, without_ours(state))
        sent = self._treatment.sent(sent, state)
        for name, arrays in (("model", model), ("state", state), ("sent", sent)):
            if arrays:
                paths[name] = str(out / f"{name}.safetensors")
                write(paths[name], arrays)
        found = {f"train.{name}": value for name, value in metrics.items()}
        found |= told or {}
        central = self._evaluated(model) if evaluate else {}
        found |= {f"central.{name}": value for name, value in central.items()}
        self._latest = (self._number, model, state)
        return ModelMade(
            model_path=paths["model"],
            state_path=paths["state"],
            sent_path=paths["sent"],
            metrics=found,
        )

    def _evaluated(self, model: dict[str, Any]) -> Mapping[str, float]:
        if self._central is None or self._application is None:
            return {}
        if self._central_model is None:
            self._central_model = self._application.new_model(self._opened.seed)
        set_weights(self._central_model, model)
        return self._application.evaluate(self._central_model, self._central)


def _cause(error: Exception) -> Cause:
    from fedml.data.errors import DatasetMissing  # of use here only, and its package is large

    if isinstance(error, DatasetMissing):
        return Cause(fault=Fault.TASK, message=f"on the broker: {error}"[:2000])
    text = f"{type(error).__name__}: {error}"[:2000]
    plain = isinstance(
        error,
        ApplicationError | algorithm.UnknownAlgorithm | algorithm.BadParameter | TooFewClients,
    )
    shown = "" if plain else "".join(traceback.format_exception(error))[-8000:]
    return Cause(fault=Fault.TASK, message=str(error)[:2000] if plain else text, traceback=shown)


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
