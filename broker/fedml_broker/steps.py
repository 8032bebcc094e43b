# SPDX-License-Identifier: Apache-2.0
"""The steps of workflows in the store: each function is one move, to be run inside a transaction.

A move names the state that it believes in and changes nothing when that is no longer so.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from fedml_broker import audit
from fedml_broker.observe import add_event
from fedml_broker.outputs import Outputs
from fedml_broker.runs import refer_all, release
from fedml_broker.tables import workflow_steps, workflows
from fedml_protocol.workflow import NEXT, Node, StepState, When

RUNNING = StepState.RUNNING


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step, as it is in the store.

    Attributes:
        definition: What was asked for; see `workflow.StepBody`.
        run: The id of its run in this try; empty: it has none.
    """

    name: str
    definition: Mapping[str, Any]
    state: StepState
    runs: Sequence[str]
    run: str
    cause: str
    outputs: Outputs = field(default_factory=Outputs)
    started_at: float | None
    ended_at: float | None

    @property
    def stays(self) -> bool:
        """Whether its run is a service, which stays when the step is over."""
        return self.definition.get("deploy") is not None

    @property
    def node(self) -> Node:
        """As the graph sees it."""
        return Node(tuple(self.definition["needs"]), When(self.definition["when"]))


def load(tx: Connection, workflow: str) -> list[Step]:
    """The steps of a workflow, in the order of its file."""
    query = (
        sa.select(workflow_steps)
        .where(workflow_steps.c.workflow == workflow)
        .order_by(workflow_steps.c.position)
    )
    return [
        Step(
            name=row.name,
            definition=row.definition,
            state=StepState(row.state),
            runs=row.runs,
            run=row.runs[-1] if row.state not in (StepState.WAITING, StepState.SKIPPED) else "",
            cause=row.cause,
            outputs=Outputs() if row.outputs is None else Outputs.read(row.outputs),
            started_at=row.started_at,
            ended_at=row.ended_at,
        )
        for row in tx.execute(query)
    ]


def insert(
    tx: Connection, workflow: str, position: int, name: str, definition: Mapping[str, Any]
) -> None:
    """A step that waits."""
    row = {
        "workflow": workflow,
        "name": name,
        "position": position,
        "definition": definition,
        "state": StepState.WAITING,
        "runs": [],
        "cause": "",
    }
    tx.execute(workflow_steps.insert(), row)


def begin(tx: Connection, workflow: str, step: Step, run: str) -> None:
    """It is to run under this id; submitted it is afterwards."""
    values: dict[str, Any] = {"runs": [*step.runs, run], "started_at": time.time()}
    _move(tx, workflow, step, StepState.STARTING, run=run, **values)


def running(tx: Connection, workflow: str, step: Step) -> None:
    """Its run has been submitted."""
    _move(tx, workflow, step, StepState.RUNNING, run=step.run)


def skip(tx: Connection, workflow: str, step: Step, why: str) -> None:
    """It will not run in this try."""
    _move(tx, workflow, step, StepState.SKIPPED, cause=why)


def settle(
    tx: Connection, workflow: str, step: Step, state: StepState, cause: str, outputs: Outputs
) -> None:
    """Its run is over; what it left stays as long as the workflow needs it."""
    blobs = [blob.sha256 for blob in outputs.files.values()]
    values: dict[str, Any] = {"outputs": outputs.shown(), "ended_at": time.time()}
    if _move(tx, workflow, step, state, run=step.run, cause=cause, **values):
        refer_all(tx, blobs, owner(workflow, step.name))


def settle_without_run(
    tx: Connection, workflow: str, step: Step, state: StepState, cause: str
) -> None:
    """It is over, and has no run: it could not start, or its run was deleted."""
    values: dict[str, Any] = {"runs": [*step.runs[:-1], ""], "ended_at": time.time()}
    _move(tx, workflow, step, state, cause=cause, **values)


def wait_again(tx: Connection, workflow: str, name: str) -> list[str]:
    """A new try will run it; the blobs that nobody needs now."""
    tx.execute(
        workflow_steps.update()
        .where(workflow_steps.c.workflow == workflow, workflow_steps.c.name == name)
        .values(state=StepState.WAITING, cause="", outputs=None, started_at=None, ended_at=None)
    )
    return release(tx, owner(workflow, name))


def redefine(
    tx: Connection, workflow: str, position: int, name: str, definition: Mapping[str, Any]
) -> None:
    """Another definition of a step, or another place among the others."""
    tx.execute(
        workflow_steps.update()
        .where(workflow_steps.c.workflow == workflow, workflow_steps.c.name == name)
        .values(position=position, definition=definition)
    )


def remove(tx: Connection, workflow: str, name: str) -> list[str]:
    """A step that the new file does not have; the blobs that nobody needs now."""
    tx.execute(
        workflow_steps.delete().where(
            workflow_steps.c.workflow == workflow, workflow_steps.c.name == name
        )
    )
    return release(tx, owner(workflow, name))


def end(tx: Connection, workflow: str, state: StepState) -> bool:
    """The workflow's end; False when it had ended before."""
    changed = tx.execute(
        workflows.update()
        .where(workflows.c.id == workflow, workflows.c.state == RUNNING)
        .values(state=state, ended_at=time.time())
    ).rowcount
    if changed:
        add_event(tx, workflow, "state", {"state": state})
        row = tx.execute(sa.select(workflows).where(workflows.c.id == workflow)).one()
        audit.note(tx, row.tenant, audit.BROKER, "workflow.end", workflow, state=str(state))
    return bool(changed)


def owner(workflow: str, step: str) -> str:
    """Under which name the outputs of a step are kept."""
    return f"workflow/{workflow}/outputs/{step}"


def _move(
    tx: Connection,
    workflow: str,
    step: Step,
    to: StepState,
    *,
    run: str = "",
    cause: str = "",
    **values: Any,
) -> bool:
    if to not in NEXT[step.state]:
        raise ValueError(f"a step that is {step.state} cannot become {to}")
    changed = tx.execute(
        workflow_steps.update()
        .where(
            workflow_steps.c.workflow == workflow,
            workflow_steps.c.name == step.name,
            workflow_steps.c.state == step.state,
        )
        .values(state=to, cause=cause, **values)
    ).rowcount
    if changed:
        data = {"step": step.name, "state": to, "run": run, "cause": cause}
        add_event(tx, workflow, "step", data)
    return bool(changed)
