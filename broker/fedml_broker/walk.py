# SPDX-License-Identifier: Apache-2.0
"""One walker per open workflow carries it from step to step.

`moves` is all of the thinking, and pure: what is to be done now, from the states in the store and
those of the runs. The walker does it, a transaction for each move, and asks again. It holds nothing
that is not in the store: whoever dies in between, the next walker makes the moves that are left.
A step's run has its id before it is submitted, so that it is submitted once.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedml_broker import deploy, runs, steps
from fedml_broker.inputs import Missing
from fedml_broker.outputs import Outputs, of_run
from fedml_broker.problems import Problem
from fedml_broker.steps import Step
from fedml_broker.store import StoreUnavailable
from fedml_protocol.errors import ProtocolError
from fedml_protocol.workflow import Graph, StepState, plan

if TYPE_CHECKING:
    from fedml_broker.workflow import Workflows

log = logging.getLogger(__name__)

# After a full disk, how long until the store is asked again.
_DISK_PAUSE_S = 5.0

# Of the run of a service, beside a run's states: it answers; it has ended and should not have.
ANSWERS, ENDED = "ANSWERS", "ENDED"
_OF_RUN = {
    ANSWERS: StepState.FINISHED,
    ENDED: StepState.FAILED,
    "FINISHED": StepState.FINISHED,
    "FAILED": StepState.FAILED,
    "LOST": StepState.FAILED,
    "STOPPED": StepState.STOPPED,
}


@dataclass(frozen=True, slots=True)
class Begin:
    """Give a step the id of its run."""

    step: str


@dataclass(frozen=True, slots=True)
class Submit:
    """Submit the run of a step."""

    step: str


@dataclass(frozen=True, slots=True)
class Running:
    """The run of a step is there."""

    step: str


@dataclass(frozen=True, slots=True)
class Settle:
    """The run of a step is over."""

    step: str
    state: StepState
    why: str = ""


@dataclass(frozen=True, slots=True)
class Skip:
    """A step will not run."""

    step: str
    why: str


@dataclass(frozen=True, slots=True)
class Stop:
    """Ask for the end of a step's run. It is asked for again each time, which is harmless."""

    step: str


@dataclass(frozen=True, slots=True)
class End:
    """All is over."""

    state: StepState


Move = Begin | Submit | Running | Settle | Skip | Stop | End


def moves(
    graph: Graph,
    states: Mapping[str, StepState],
    found: Mapping[str, str | None],
    *,
    stopping: bool,
) -> list[Move]:
    """What is to be done now.

    Args:
        graph: The steps.
        states: Of each step.
        found: Of the steps that have a run in this try, its state; None: there is no such run.
            Of services also `ANSWERS` and `ENDED`.
        stopping: Whether somebody has stopped the workflow.
    """
    made: list[Move] = []
    for name, state in states.items():
        run = found.get(name)
        if state is StepState.STARTING and run is not None:
            made.append(Running(name))
        elif state is StepState.STARTING:
            stopped = Settle(name, StepState.STOPPED, "it was stopped before it began")
            made.append(stopped if stopping else Submit(name))
        elif state is StepState.RUNNING and run is None:
            made.append(Settle(name, StepState.FAILED, "its run was deleted"))
        elif state is StepState.RUNNING and run in _OF_RUN:
            why = "it ended before it answered" if run == ENDED else ""
            made.append(Settle(name, _OF_RUN[run], why))
    now = plan(graph, states, stopping=stopping)
    settled = {move.step for move in made if isinstance(move, Settle)}
    # What is skipped first: a step that runs because of it begins after that.
    made += [Skip(name, why) for name, why in now.skip.items()]
    made += [Begin(name) for name in now.begin]
    made += [
        Stop(name) for name in now.stop if states[name] is StepState.RUNNING and name not in settled
    ]
    if now.end is not None:
        made.append(End(now.end))
    return made


class Walker:
    """Carries one workflow out; `told` is set whenever one of its runs has changed."""

    def __init__(self, all_of: "Workflows", workflow: str) -> None:
        self.told = asyncio.Event()
        self.runs: Mapping[str, str] = {}  # of the steps at work: the run, and its step
        self._all = all_of
        self._workflow = workflow

    async def walk(self) -> None:
        """Until the workflow has ended, whatever it takes."""
        while True:
            self.told.clear()
            try:
                made = await self._turn()
            except (StoreUnavailable, OSError) as error:
                log.warning("%s waits for the disk: %s", self._workflow, error)
                await asyncio.sleep(_DISK_PAUSE_S)
                continue
            except Exception:  # ours: the workflow must not hang for it
                log.exception("the walker of %s broke", self._workflow)
                await self._end(StepState.FAILED)
                return
            if any(isinstance(move, End) for move in made):
                return
            if all(isinstance(move, Stop) for move in made):
                await self.told.wait()

    async def _turn(self) -> Sequence[Move]:
        """Look, and make every move that there is to make."""
        row, its = await self._all.read(self._workflow)
        if row["state"] != StepState.RUNNING:
            return [End(StepState(row["state"]))]
        by_name = {step.name: step for step in its}
        graph = {step.name: step.node for step in its}
        at_work = {s.run: s.name for s in its if s.run and s.ended_at is None}
        self._all.at_work(self._workflow, self, at_work)
        rows = await self._all.runs.named(list(at_work))
        found = {name: rows[run]["state"] if run in rows else None for run, name in at_work.items()}
        services = [s.run for s in its if s.run in at_work and s.stays]
        answering = await deploy.endpoints(self._all.store, services)
        for run in services:
            if run in answering or found[at_work[run]] == "FINISHED":
                found[at_work[run]] = ANSWERS if run in answering else ENDED
        states = {step.name: step.state for step in its}
        made = moves(graph, states, found, stopping=row["stopped_by"] is not None)
        for move in made:
            await self._make(move, by_name, row)
            self._all.observer.ring(self._workflow)
        return made

    async def _make(self, move: Move, its: Mapping[str, Step], row: Mapping[str, str]) -> None:
        workflow, write = self._workflow, self._all.store.write
        step = its[move.step] if not isinstance(move, End) else None
        match move, step:
            case End(state), _:
                await self._end(state)
            case Begin(), Step():
                run = runs.new_id()
                await write(lambda tx: steps.begin(tx, workflow, step, run))
            case Running(), Step():
                await write(lambda tx: steps.running(tx, workflow, step))
            case Skip(why=why), Step():
                await write(lambda tx: steps.skip(tx, workflow, step, why))
            case Stop(), Step():
                await self._all.stop_run(step.run, row["stopped_by"])
            case Submit(), Step():
                await self._submit(step, its, row)
            case Settle(state=state, why=why), Step():
                await self._settle(step, state, why, row)

    async def _end(self, state: StepState) -> None:
        await self._all.store.write(lambda tx: steps.end(tx, self._workflow, state))
        self._all.observer.ring(self._workflow)

    async def _submit(self, step: Step, its: Mapping[str, Step], row: Mapping[str, str]) -> None:
        """Its run; or why there cannot be one."""
        left = {needed: its[needed].outputs for needed in step.node.needs}
        try:
            await self._all.submit_run(row, step, left)
        except StoreUnavailable:
            raise
        except runs.SubmittedBefore:
            log.debug("%s was submitted before", step.run)
        except (Problem, Missing, ProtocolError) as error:
            hint = getattr(error, "hint", "")
            why = f"it could not start: {error}" + (f" ({hint})" if hint else "")
            await self._settle(step, StepState.FAILED, why, row)

    async def _settle(self, step: Step, state: StepState, why: str, row: Mapping[str, str]) -> None:
        workflow, write = self._workflow, self._all.store.write
        run = (await self._all.runs.named([step.run])).get(step.run)
        if run is None:
            await write(lambda tx: steps.settle_without_run(tx, workflow, step, state, why))
            return
        why = why or ("" if state is StepState.FINISHED else _why(run))
        outputs = Outputs()
        if state is StepState.FINISHED:
            outputs = await of_run(self._all.store, self._all.blobs, run)
            if step.stays and not outputs.values:
                return  # it answers no longer: the next turn sees that
            for former in filter(None, step.runs[:-1] if step.stays else ()):
                await self._all.stop_run(former, row["user"])  # the service that this one replaces
        await write(lambda tx: steps.settle(tx, workflow, step, state, why, outputs))


def _why(run: Mapping[str, object]) -> str:
    """Why a run did not finish, in words."""
    cause = run["cause"]
    message = str(cause["message"]) if isinstance(cause, Mapping) else ""
    if run["stopped_by"]:
        return f"stopped by {run['stopped_by']}"
    return message or str(run["state"]).lower()
