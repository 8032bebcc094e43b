# SPDX-License-Identifier: Apache-2.0
"""Workflows: submitted, seen, followed, stopped, resumed, deleted. By id, or the newest by name."""

from typing import TYPE_CHECKING, Any

from aiohttp import web

from fedml_broker import observe
from fedml_broker.api.call import Call, number

if TYPE_CHECKING:
    from fedml_broker.app import Broker


class Handlers:
    """For whoever submits workflows and looks at them."""

    def __init__(self, broker: "Broker") -> None:
        self._broker = broker

    async def list_workflows(self, call: Call) -> Any:
        """The newest workflows, with the states of their steps. Query: `limit`."""
        limit = min(number(call.http.query.get("limit", "50")), 1000)
        return {"workflows": await self._broker.workflows.newest(call.user.tenant, limit)}

    async def submit_workflow(self, call: Call) -> Any:
        """Take a workflow, and begin with it."""
        return {"workflow": await self._broker.workflows.submit(call.user, call.body)}

    async def show_workflow(self, call: Call) -> Any:
        """One workflow: each step with its state, its run, and what it waits for."""
        return await self._broker.workflows.show(call.user.tenant, call.part("workflow"))

    async def resume_workflow(self, call: Call) -> Any:
        """Another try of a workflow that has ended, perhaps with other steps."""
        workflows = self._broker.workflows
        return await workflows.resume(call.user, call.part("workflow"), call.body)

    async def stop_workflow(self, call: Call) -> Any:
        """Stop a workflow and the runs of its steps. Asking again is harmless."""
        return await self._broker.workflows.stop(call.user, call.part("workflow"))

    async def remove_workflow(self, call: Call) -> Any:
        """Delete a workflow that has ended, with what its steps have left. Its runs stay."""
        freed = await self._broker.workflows.remove(call.user, call.part("workflow"))
        return {"workflow": call.part("workflow"), "freed_bytes": freed}

    async def follow_workflow(self, call: Call) -> Any:
        """Every step as it goes: newline-delimited JSON, until the workflow has ended.

        Query: `after` (an event's id), `stay=0` (only what there is now).
        """
        found, _ = await self._broker.workflows.of_tenant(call.user.tenant, call.part("workflow"))
        after = number(call.http.query.get("after", "0"))
        stay = call.http.query.get("stay", "1") != "0"
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        response.enable_chunked_encoding()
        await response.prepare(call.http)
        workflows = self._broker.workflows
        async for item in self._broker.observer.follow(
            found["id"], workflows, workflows.waiting, after=after, logs=False, stay=stay
        ):
            await response.write(observe.line(item))
        await response.write_eof()
        return response
