# SPDX-License-Identifier: Apache-2.0
"""Runs: started, seen, followed, stopped, deleted."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web

from fedml_broker import audit, deploy, launch, observe, outputs, runs
from fedml_broker.api import logs as logs_api
from fedml_broker.api.call import Call, number
from fedml_broker.problems import Problem
from fedml_protocol.tasks import TaskState

if TYPE_CHECKING:
    from fedml_broker.app import Broker


class PriorityBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The priority that a run is to have."""

    priority: int


class Handlers:
    """For whoever starts runs and looks at them."""

    def __init__(self, broker: "Broker") -> None:
        self._broker = broker

    async def launch(self, call: Call) -> Any:
        """Queue a job."""
        # https://www.w3.org/TR/trace-context/
        traced = call.http.headers.get("traceparent", "")
        return await _run_once(self._broker.launcher.submit(call.user, call.body, traced))

    async def match_launch(self, call: Call) -> Any:
        """Where a job would run, machine by machine. Nothing is started."""
        return self._broker.launcher.look(call.user, call.body)

    async def federate(self, call: Call) -> Any:
        """Start a federated run."""
        return await _run_once(self._broker.federation.submit(call.user, call.body))

    async def match_federate(self, call: Call) -> Any:
        """Which machines would be the clients of a federated run. Nothing is started."""
        return self._broker.federation.look(call.user, call.body)

    async def list_runs(self, call: Call) -> Any:
        """The newest runs. Query: `limit`, and which of them.

        `state` (one or more, with commas), `name` (a part of it, or how the id begins), `user`,
        `before` (the id of the last run of the page before), `ended_before` (seconds since 1970).
        """
        query = call.http.query
        states = [name for name in query.get("state", "").upper().split(",") if name]
        unknown = [name for name in states if name not in TaskState.__members__]
        if unknown:
            known = ", ".join(TaskState.__members__)
            raise Problem(422, "no such state", f"{unknown[0][:40]!r} is none of {known}")
        ended = query.get("ended_before")
        found = await self._broker.listed(
            call.user.tenant,
            limit=min(number(query.get("limit", "50")), 1000),
            ended_before=None if ended is None else float(number(ended)),
            states=states,
            name=query.get("name", ""),
            user=query.get("user", ""),
            before=query.get("before", ""),
        )
        return {"runs": found}

    async def list_queue(self, call: Call) -> Any:
        """The runs that wait for machines, in the order in which they go. Query: `limit`."""
        limit = min(number(call.http.query.get("limit", "100")), 1000)
        return {"queue": await self._broker.queue(call.user.tenant, limit)}

    async def set_priority(self, call: Call) -> Any:
        """Another priority for a run. Members lower that of their own; admins give any."""
        run = await self._broker.runs.of_tenant(call.user.tenant, call.part("run"))
        user, priority = call.user, call.body.priority
        if run["kind"] != "launch":
            raise Problem(422, "only launched jobs have a priority", f"{run['id']} is federated")
        if run["ended_at"] is not None:
            raise Problem(409, "the run has ended", f"it is {run['state']}")
        launch.check_priority(user, priority)
        if not user.may("admin") and run["user"] != user.name:
            raise Problem(
                403,
                "only admins change the runs of others",
                f"{run['id']} is {run['user']}'s",
                hint=f"ask {run['user']}, or an admin",
            )
        facts = {"priority": priority}
        await self._broker.dispatcher.set_priority(
            run["id"],
            priority,
            lambda tx: audit.note(
                tx, user.tenant, audit.user(user.name), "run.priority", run["id"], **facts
            ),
        )
        return {"run": run["id"], **facts}

    async def show_clients(self, call: Call) -> Any:
        """What each client of a federated run has brought, and the bytes that it moved."""
        run = await self._broker.runs.of_tenant(call.user.tenant, call.part("run"))
        return {"clients": await self._broker.runs.contributions(run["id"])}

    async def show_run(self, call: Call) -> Any:
        """One run: its state, its cause, its tasks, and what it waits for."""
        run = await self._broker.runs.of_tenant(call.user.tenant, call.part("run"))
        row = {**run, "tasks": await self._broker.runs.tasks(run["id"])}
        # That a machine has taken or begun a task is known, and not written down.
        now = {task.id: task.state.name for task in self._broker.dispatcher.of_run(run["id"])}
        for task in row["tasks"]:
            task["state"] = now.get(task["id"], task["state"])
        row["waiting"] = self._broker.waiting(run["id"])
        if run["kind"] == "launch":
            row["priority"] = run["spec"].get("priority", 0)
            if row["waiting"]:
                row["priority"] = self._broker.dispatcher.priority(run["id"])
                queued = self._broker.dispatcher.queued(call.user.tenant)
                row["position"] = queued.index(run["id"]) + 1 if run["id"] in queued else None
        if service := run["spec"].get("service"):
            answering = await deploy.endpoints(self._broker.store, [run["id"]])
            row["endpoint"] = answering[run["id"]].shown() if answering else None
        if run["ended_at"] is not None or service:
            store, blobs = self._broker.store, self._broker.blobs
            row["outputs"] = (await outputs.of_run(store, blobs, run)).shown()
        if run["kind"] == "federate":
            row["rounds"] = await self._broker.runs.rounds(run["id"])
            row["clients"] = await self._broker.runs.clients(run["id"])
        return row

    async def stop_run(self, call: Call) -> Any:
        """Stop a run. Asking again is harmless."""
        run = await self._broker.runs.of_tenant(call.user.tenant, call.part("run"))
        itself = call.user.run is not None
        by = "the job itself" if itself else call.user.name
        await self._broker.stop_run(run, by, itself=itself)
        return {"state": (await self._broker.runs.row(run["id"]))["state"]}

    async def remove_run(self, call: Call) -> Any:
        """Delete a run that has ended, with its logs and models."""
        run = await self._broker.runs.of_tenant(call.user.tenant, call.part("run"))
        if run["ended_at"] is None:
            raise Problem(
                409, "the run has not ended", f"it is {run['state']}", hint="stop it first"
            )
        by = call.user.name
        # Logs first: should we die in between, the run is still listed and can be removed again.
        await asyncio.to_thread(self._broker.observer.forget, run["id"])
        idle = await self._broker.store.write(lambda tx: runs.remove(tx, run["id"], by))
        self._broker.watch.removed(run["tenant"], run["id"])
        sizes = [self._broker.blobs.size(sha256) or 0 for sha256 in idle]
        gone = [await self._broker.blobs.discard(sha256) for sha256 in idle]
        freed = sum(size for size, deleted in zip(sizes, gone, strict=True) if deleted)
        return {"run": run["id"], "freed_bytes": freed}

    async def follow_run(self, call: Call) -> Any:
        """Everything of a run as it happens: newline-delimited JSON, until the run has ended.

        Query: `after` (an event's id), `logs=0` (events only), `stay=0` (only what there is now),
        `from` (what is known of logs, as `GET /v1/runs/{run}/logs` gives it in `ends`), `tail` (so
        many bytes of the end of each log, and no more than a reader keeps up with).
        """
        run = await self._broker.runs.of_tenant(call.user.tenant, call.part("run"))
        after = number(call.http.query.get("after", "0"))
        logs = call.http.query.get("logs", "1") != "0"
        stay = call.http.query.get("stay", "1") != "0"
        starts = logs_api.starts(call.http.query.get("from", ""))
        tail = call.http.query.get("tail")
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        response.enable_chunked_encoding()
        await response.prepare(call.http)
        async with self._watching(run["id"], logs):
            async for item in self._broker.observer.follow(
                run["id"],
                self._broker.runs,
                self._broker.waiting,
                progress=self._broker.federation.progress,
                after=after,
                logs=logs,
                stay=stay,
                starts=starts,
                tail=None if tail is None else number(tail),
            ):
                await response.write(observe.line(item))
        await response.write_eof()
        return response

    @asynccontextmanager
    async def _watching(self, run: str, logs: bool) -> AsyncIterator[None]:
        observer, dispatcher = self._broker.observer, self._broker.dispatcher
        if logs and observer.watch(run, +1) == 1:
            dispatcher.tail(run, on=True)
        try:
            yield
        finally:
            if logs and observer.watch(run, -1) == 0:
                dispatcher.tail(run, on=False)


async def _run_once(submission: Awaitable[str]) -> dict[str, str]:
    """The run, also when a repeated request has overtaken this one on its way into the store."""
    try:
        return {"run": await submission}
    except runs.SubmittedBefore as known:
        return {"run": known.run}
