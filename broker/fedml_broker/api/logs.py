# SPDX-License-Identifier: Apache-2.0
"""Lines of a run's logs: the last ones, a page of them, or those that hold something."""

import asyncio
from typing import TYPE_CHECKING, Any

from fedml_broker.api.call import Call, number
from fedml_broker.log_order import STREAMS, LogFile
from fedml_broker.log_search import MOST_LINES, Query, search
from fedml_broker.problems import Problem

if TYPE_CHECKING:
    from fedml_broker.app import Broker

# They read files and count lines: the loop and the other threads get the rest of the processor.
_AT_ONCE = 2
_MOST_CONTEXT = 100


class Handlers:
    """For whoever reads logs."""

    def __init__(self, broker: "Broker") -> None:
        self._broker = broker
        self._turns = asyncio.Semaphore(_AT_ONCE)

    async def search_logs(self, call: Call) -> Any:
        """Lines of a run's logs, by task in the order in which they were written.

        Query: `search` (text), `regex=1` (it is a pattern of RE2), `case=0` (whatever its case),
        `context`, `since` (seconds since 1970), `tail`, `skip` and `limit`, `stream`, `task`.
        At most 10,000 lines, 4 MiB and 5 s; `complete` tells whether that was all.
        """
        run = await self._broker.runs.of_tenant(call.user.tenant, call.part("run"))
        asked = call.http.query
        query = Query(
            text=asked.get("search", ""),
            regex=asked.get("regex") == "1",
            ignore_case=asked.get("case") == "0",
            context=min(number(asked.get("context", "0")), _MOST_CONTEXT),
            since=_seconds(asked.get("since", "0")),
            tail=number(asked.get("tail", "0")),
            skip=number(asked.get("skip", "0")),
            limit=min(number(asked.get("limit", str(MOST_LINES))), MOST_LINES),
            streams=_streams(asked.get("stream", "")),
        )
        query.test()  # refused at once, not when it is its turn
        attempts = self._broker.observer.attempts(run["id"])
        if task := asked.get("task"):
            attempts = [attempt for attempt in attempts if attempt[0] == task]
        async with self._turns:
            return await asyncio.to_thread(
                search,
                self._broker.observer,
                run["id"],
                attempts,
                query,
                ended=run["ended_at"] is not None,
            )


def starts(text: str) -> dict[LogFile, int]:
    """`TASK.EPOCH.STREAM:OFFSET,…` as `follow` takes it.

    Raises:
        Problem: 422.
    """
    found = {}
    for one in filter(None, text.split(",")):
        name, _, offset = one.rpartition(":")
        task, *rest = name.split(".")
        if len(rest) != 2 or rest[1] not in STREAMS:
            raise Problem(422, "not a place in a log", f"{one[:80]!r}: TASK.EPOCH.STREAM:OFFSET")
        found[LogFile(task, number(rest[0]), rest[1])] = number(offset)
    return found


def _streams(text: str) -> tuple[str, ...]:
    if text and text not in STREAMS:
        raise Problem(422, "no such stream", f"{text!r} is none of {', '.join(STREAMS)}")
    return (text,) if text else STREAMS


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise Problem(422, "not a time", f"{text[:40]!r}: seconds since 1970") from error
