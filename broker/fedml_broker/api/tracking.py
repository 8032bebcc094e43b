# SPDX-License-Identifier: Apache-2.0
"""What runs record of themselves, and runs that their own program drives."""

import contextlib
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from fedml_broker import runs
from fedml_broker.api.agents import chunk_of
from fedml_broker.api.call import Call, number
from fedml_broker.experiments import begin
from fedml_broker.problems import Problem
from fedml_protocol.cause import Cause, Fault
from fedml_protocol.tasks import TaskState

if TYPE_CHECKING:
    from fedml_broker.app import Broker

_MOST_POINTS = 100_000


class TrackRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A run that its own program drives. Chooses it the id, it may ask again."""

    name: str = "run"
    run: str = ""
    experiment: str = "Default"


class EndRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a tracked run has ended; `message`: why, if badly."""

    state: Literal["FINISHED", "FAILED"] = "FINISHED"
    message: str = ""


class Handlers:
    """For whoever records, and looks at what was recorded."""

    def __init__(self, broker: "Broker") -> None:
        self._broker = broker

    async def track(self, call: Call) -> Any:
        """Begin a run that its own program drives."""
        request: TrackRequest = call.body
        run = runs.check_new_id(request.run)
        with contextlib.suppress(runs.SubmittedBefore):
            await self._broker.store.write(
                lambda tx: begin(tx, call.user, request.experiment, run, request.name)
            )
        return {"run": run}

    async def put_records(self, call: Call) -> Any:
        """Take records of a tracked run at `offset`; answers up to which byte they are here."""
        run = await self._tracked(call)
        data, offset, _ = await chunk_of(call)
        return {"size": await self._broker.tracker.take(run["id"], run["id"], offset, data)}

    async def end(self, call: Call) -> Any:
        """A tracked run has ended, its program says. Again is harmless."""
        run, request = await self._tracked(call), call.body
        bad = request.state == "FAILED"
        cause = Cause(fault=Fault.TASK, message=request.message or "it failed") if bad else None
        state = TaskState[request.state]
        await self._broker.store.write(lambda tx: runs.end(tx, run["id"], state, cause=cause))
        self._broker.observer.ring(run["id"])
        return {"state": (await self._broker.runs.row(run["id"]))["state"]}

    async def metrics(self, call: Call) -> Any:
        """Series of a run. Query: `name`, `after` (`last` of an answer), `points` (1000)."""
        run = await self._run(call)
        query = call.http.query
        points = number(query.get("points", "1000"))
        if not 2 <= points <= _MOST_POINTS:
            raise Problem(422, "not so many points", f"points: 2 to {_MOST_POINTS}, got {points}")
        return await self._broker.tracker.metrics(
            run["id"],
            name=query.get("name"),
            after=number(query.get("after", "0")),
            points=points,
        )

    async def params(self, call: Call) -> Any:
        """The parameters of a run."""
        run = await self._run(call)
        return {"params": await self._broker.tracker.params(run["id"])}

    async def artifacts(self, call: Call) -> Any:
        """The artifacts of a run; their bytes are blobs."""
        run = await self._run(call)
        return {"artifacts": await self._broker.tracker.artifacts(run["id"])}

    async def _run(self, call: Call) -> dict[str, Any]:
        return await self._broker.runs.of_tenant(call.user.tenant, call.part("run"))

    async def _tracked(self, call: Call) -> dict[str, Any]:
        run = await self._run(call)
        if run["kind"] != runs.TRACKED:
            raise Problem(
                409,
                "this run records by itself",
                f"{run['id']} is a {run['kind']} run: its tasks record, through their agents",
            )
        return run
