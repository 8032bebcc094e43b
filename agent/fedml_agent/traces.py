# SPDX-License-Identifier: Apache-2.0
"""Spans of one task on this machine.

task          from its offer until its result is written down
  unpack      its package, fetched and unpacked
  command     from its exec to its end; the parent of what the job itself tells
"""

import time

from fedml_agent.journal import Entry
from fedml_protocol.tasks import Result, TaskState
from fedml_protocol.tracing import Tracer, in_trace, span_id

_GOOD = (TaskState.FINISHED, TaskState.STOPPED)


class Traces:
    """Tells spans where a collector is configured."""

    def __init__(self) -> None:
        self._tracer = Tracer.configured("fedml-agent")
        self._began: dict[tuple[str, int], float] = {}

    @staticmethod
    def environment(entry: Entry) -> dict[str, str]:
        """What a job is given: it may tell spans of its own, also where this machine tells none."""
        context = entry.offer.traceparent
        return {"TRACEPARENT": in_trace(context, span_id("command", *entry.key))} if context else {}

    def begins(self, entry: Entry) -> None:
        """A task was taken."""
        if self._tells(entry):
            self._began[entry.key] = time.time()

    def unpacked(self, entry: Entry, began: float) -> None:
        """Its package is there."""
        if self._tracer is not None and self._tells(entry):
            self._tell_part(self._tracer, entry, "unpack", began, time.time())

    def ran(self, entry: Entry, began: float, ended: float, code: int | None) -> None:
        """Its command has ended."""
        # Where an earlier agent took it, that is the first that we know of it.
        if self._tracer is not None and self._tells(entry):
            self._began.setdefault(entry.key, began)
            error = f"exit code {code}" if code else ""
            self._tell_part(self._tracer, entry, "command", began, ended, error=error)

    def ended(self, entry: Entry, result: Result) -> None:
        """Its result is written down."""
        began = self._began.pop(entry.key, None)
        if self._tracer is None or not self._tells(entry):
            return
        now = time.time()
        self._tracer.tell(
            "task",
            span_id("task", *entry.key),
            entry.offer.traceparent,
            now if began is None else began,
            now,
            error="" if result.state in _GOOD or result.cause is None else result.cause.message,
            facts={
                "run": entry.offer.run,
                "task": entry.key[0],
                "epoch": entry.key[1],
                "state": result.state.name,
                "gpus": len(entry.gpus),
            },
        )

    def close(self) -> None:
        """Hand over what was told."""
        if self._tracer is not None:
            self._tracer.close()

    def _tells(self, entry: Entry) -> bool:
        return self._tracer is not None and bool(entry.offer.traceparent)

    @staticmethod
    def _tell_part(
        tracer: Tracer, entry: Entry, name: str, began: float, ended: float, error: str = ""
    ) -> None:
        context = in_trace(entry.offer.traceparent, span_id("task", *entry.key))
        own = span_id(name, *entry.key)
        tracer.tell(name, own, context, began, ended, error=error, facts={"task": entry.key[0]})
