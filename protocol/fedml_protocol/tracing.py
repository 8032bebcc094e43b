# SPDX-License-Identifier: Apache-2.0
"""Spans of one run, told by three processes that never meet: the command, the broker, the agent.

Ids follow from what is named: whoever knows a run and a task knows the ids of all their spans. So
none has to be kept or sent, a restart changes none, and each process tells a span when it is over.
Only the context of the run travels in its offers, in W3C form.

Nothing happens, and nothing is imported, unless OTEL_EXPORTER_OTLP_ENDPOINT (or its form for traces
alone) is set. The SDK of OpenTelemetry then exports from a thread of its own; that is the one thing
in this package that is not pure, and it is here because all three sides tell spans alike.
"""

import atexit
import hashlib
import os
import threading
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Self

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
# At the end of a process: a collector that is away shall not keep it.
_FLUSH_MS = 2000


def run_trace(run: str) -> str:
    """The trace of a run that is part of no other."""
    return _hash("run", run, size=16)


def span_id(what: str, *whose: str | int) -> str:
    """The id of a span: `submit` and `run` of a run, the others of a task and epoch."""
    return _hash(what, *whose, size=8)


def traceparent(trace: str, span: str) -> str:
    """The context in which that span is the parent."""
    return f"00-{trace}-{span}-01"


def in_trace(context: str, span: str) -> str:
    """The same trace with another parent."""
    return f"{context[:36]}{span}{context[52:]}"


def _hash(*words: str | int, size: int) -> str:
    text = "\0".join(map(str, words)).encode()
    return hashlib.blake2b(text, digest_size=size, person=b"fedml-trace").hexdigest()


class Tracer:
    """Tells spans to a collector."""

    def __init__(self, service: str) -> None:
        """Use `configured`."""
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

        class Ids(RandomIdGenerator):
            """Gives those that the span is to have."""

            trace = span = 0

            def generate_trace_id(self) -> int:
                return self.trace

            def generate_span_id(self) -> int:
                return self.span

        self._ids = Ids()
        self._turn = threading.Lock()
        named = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", service)})
        self._provider: Any = TracerProvider(
            resource=named, id_generator=self._ids, shutdown_on_exit=False
        )
        atexit.register(self.close)  # of our own: it does not wait for a collector that is away
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer(service)

    @classmethod
    def configured(cls, service: str) -> Self | None:
        """One, where an endpoint is named and OpenTelemetry is installed."""
        if not any(os.environ.get(name) for name in _ENDPOINTS):
            return None
        try:
            return cls(service)
        except ModuleNotFoundError as missing:
            text = f"no traces: {missing.name} is not installed; pip install 'fedml-agent[otel]'"
            warnings.warn(text, UserWarning, stacklevel=2)
            return None

    def tell(
        self,
        name: str,
        own: str,
        context: str,
        began: float,
        ended: float,
        *,
        root: bool = False,
        error: str = "",
        facts: Mapping[str, str | int | float | None] = MappingProxyType({}),
    ) -> None:
        """Tell a span that is over.

        Args:
            own: Its id.
            context: The traceparent that it is below; with `root` only its trace counts.
            began, ended: Seconds since 1970.
            error: Why it did not end well.
            facts: Its attributes, behind `fedml.`.
        """
        from opentelemetry import trace
        from opentelemetry.context import Context

        above = trace.SpanContext(
            int(context[3:35], 16), int(context[36:52], 16), True, trace.TraceFlags(1)
        )
        parent = None if root else trace.set_span_in_context(trace.NonRecordingSpan(above))
        with self._turn:
            self._ids.trace, self._ids.span = above.trace_id, int(own, 16)
            span = self._tracer.start_span(
                name,
                context=parent if parent is not None else Context(),
                start_time=int(began * 1e9),
                attributes=_attributes(facts),
            )
        if error:
            span.set_status(trace.StatusCode.ERROR, error)
        span.end(int(max(began, ended) * 1e9))

    def close(self) -> None:
        """Hand over what was told; a collector that is away is not waited for long."""
        atexit.unregister(self.close)
        self._provider.force_flush(_FLUSH_MS)
        self._provider.shutdown()


def _attributes(facts: Mapping[str, str | int | float | None]) -> dict[str, str | int | float]:
    return {f"fedml.{name}": value for name, value in facts.items() if value is not None}
