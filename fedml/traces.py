# SPDX-License-Identifier: Apache-2.0
"""The first span of a run: somebody asks for it. Others hang below it, see docs/traces.md."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from fedml_protocol.tasks import TRACEPARENT
from fedml_protocol.tracing import Tracer, in_trace, run_trace, span_id, traceparent


@contextmanager
def traced(word: str, run: str) -> Iterator[dict[str, str]]:
    """Tell how long asking took; gives the headers that carry the context to the broker.

    A job of CI, say, that has a TRACEPARENT gets the run into its own trace.
    """
    tracer = Tracer.configured("fedml")
    outer = os.environ.get("TRACEPARENT", "") if word == "launch" else ""
    if TRACEPARENT.fullmatch(outer) is None:
        outer = ""
    if tracer is None:
        yield {"traceparent": outer} if outer else {}
        return
    own, began, error = span_id("submit", run), time.time(), ""
    context = outer or traceparent(run_trace(run), own)
    try:
        yield {"traceparent": in_trace(context, own)}
    except Exception as failed:
        error = str(failed)
        raise
    finally:
        now = time.time()
        tracer.tell(
            f"submit {word}",
            own,
            context,
            began,
            now,
            root=not outer,
            error=error,
            facts={"run": run},
        )
