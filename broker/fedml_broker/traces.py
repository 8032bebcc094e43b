# SPDX-License-Identifier: Apache-2.0
"""Spans of the broker: how long tasks waited, who took them when, and what became of the run.

run             from its submission to its end
  queue         of each attempt at a task: until a machine was found
  offer         until the machine has taken it
  (task, …)     on the machine, see fedml_agent/traces.py
  result        from its receipt until it is in the store
"""

import time

import sqlalchemy as sa
from sqlalchemy import Connection

from fedml_broker.tables import runs
from fedml_broker.tasks import Task
from fedml_protocol.tasks import TRACEPARENT, Result, TaskState
from fedml_protocol.tracing import Tracer, in_trace, run_trace, span_id, traceparent

_GOOD = (TaskState.FINISHED, TaskState.STOPPED)


class Traces:
    """Tells spans where a collector is configured; else only hands contexts on."""

    def __init__(self) -> None:
        self._tracer = Tracer.configured("fedml-broker")

    @property
    def on(self) -> bool:
        """Whether anybody is told."""
        return self._tracer is not None

    def context(self, run: str, header: str = "") -> str:
        """What the run's offers carry: the trace of who asked, or one of its own; else nothing."""
        if TRACEPARENT.fullmatch(header):
            return in_trace(header, span_id("run", run))
        return traceparent(run_trace(run), span_id("run", run)) if self.on else ""

    def accepted(self, task: Task) -> None:
        """A machine has taken a task."""
        queued, offered = task.moments.get("queued"), task.moments.get("offered")
        if self._tracer is None or not task.offer.traceparent:
            return
        facts: dict[str, str | int | float | None]
        facts = {"run": task.run, "task": task.id, "epoch": task.epoch, "device": task.device}
        for name, began, ended in (("queue", queued, offered), ("offer", offered, time.time())):
            if began is not None and ended is not None:  # an earlier broker has seen the others
                own = span_id(name, task.id, task.epoch)
                self._tracer.tell(name, own, task.offer.traceparent, began, ended, facts=facts)

    def ended(self, task: Task, result: Result) -> None:
        """A task's result is in the store."""
        if self._tracer is None or not task.offer.traceparent:
            return
        now = time.time()
        self._tracer.tell(
            "result",
            span_id("result", task.id, result.epoch),
            task.offer.traceparent,
            task.moments.get("received", now),
            now,
            error="" if result.state in _GOOD or result.cause is None else result.cause.message,
            facts={
                "run": task.run,
                "task": task.id,
                "epoch": result.epoch,
                "state": result.state.name,
            },
        )

    def run_ended(self, tx: Connection, run: str, state: TaskState) -> None:
        """A run has its final state."""
        if self._tracer is None:
            return
        query = sa.select(runs.c.kind, runs.c.name, runs.c.user, runs.c.spec, runs.c.created_at)
        row = tx.execute(query.where(runs.c.id == run)).one()
        parent = row.spec.get("traceparent", "")
        known = TRACEPARENT.fullmatch(parent) is not None
        self._tracer.tell(
            f"run {row.kind}",
            span_id("run", run),
            parent if known else self.context(run),
            row.created_at,
            time.time(),
            root=not known,
            error="" if state in _GOOD else state.name,
            facts={"run": run, "name": row.name, "user": row.user, "state": state.name},
        )

    def close(self) -> None:
        """Hand over what was told."""
        if self._tracer is not None:
            self._tracer.close()
