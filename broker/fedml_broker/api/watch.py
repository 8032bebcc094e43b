# SPDX-License-Identifier: Apache-2.0
"""Fleet and runs as they change, in one stream."""

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web

from fedml_broker.api.call import Call, Callers
from fedml_broker.watch import Watcher

if TYPE_CHECKING:
    from fedml_broker.app import Broker

# What changes within it goes into one line.
_GATHER_S = 0.5
# So often a silent stream says that it is there, and asks whether its user still may.
_ALIVE_S = 15.0


class Handlers:
    """For whoever keeps a list on a screen."""

    def __init__(self, broker: "Broker") -> None:
        self._broker = broker
        self._callers = Callers(broker)

    async def watch(self, call: Call) -> Any:
        """Machines and runs as they change: newline-delimited JSON, until the client goes.

        Lines: ``{"hello": true}`` first: what is read after it misses nothing. Then
        ``{"devices": […]}`` (live readings) and ``{"runs": […]}`` (rows as in the list), each with
        what has changed; ``{"gone": […]}``, ids of machines and runs that are no more; and ``{}``
        now and then, when nothing happens.
        Query: `of` (``devices``, ``runs`` or both, with a comma), `stay=0` (only the first line).
        """
        of = call.http.query.get("of", "devices,runs").split(",")
        response = web.StreamResponse(
            headers={"Content-Type": "application/x-ndjson", "Cache-Control": "no-store"}
        )
        response.enable_chunked_encoding()
        with self._broker.watch.watching(call.user.tenant) as watcher:
            await response.prepare(call.http)
            await response.write(b'{"hello":true}\n')
            if call.http.query.get("stay") != "0":
                await self._stream(call, watcher, of, response)
        await response.write_eof()
        return response

    async def _stream(
        self, call: Call, watcher: Watcher, of: list[str], response: web.StreamResponse
    ) -> None:
        fleet, tenant = self._broker.fleet, call.user.tenant
        online = fleet.online_of(tenant)
        asked_at = fleet.clock()
        while True:
            until = fleet.next_silence(online) if "devices" in of else _ALIVE_S
            found = await watcher.changes(min(until, _ALIVE_S))
            line: dict[str, Any] = {}
            gone: list[str] = []
            if "devices" in of:
                now = fleet.online_of(tenant)
                # Silence wakes nobody: it is seen in the clock, when it is due.
                changed, online = found.devices | (online - now), now
                line["devices"], gone = self._devices(changed)
            if "runs" in of:
                if found.runs:
                    line["runs"] = await self._broker.listed(tenant, ids=found.runs)
                gone += sorted(found.removed)
            line = {name: rows for name, rows in {**line, "gone": gone}.items() if rows}
            if fleet.clock() - asked_at >= _ALIVE_S:
                if await self._callers.caller(call.http) != call.caller:
                    return  # another role: the page is to ask anew
                asked_at = fleet.clock()
            await response.write(msgspec.json.encode(line) + b"\n")
            await asyncio.sleep(_GATHER_S)

    def _devices(self, changed: set[str]) -> tuple[list[dict[str, Any]], list[str]]:
        """Live rows of the tenant's machines, and the ids of those that left."""
        rows, gone = [], []
        for device in sorted(changed):
            machine = self._broker.fleet.get(device)
            if machine is None:
                gone.append(device)
            else:
                rows.append(self._broker.devices.live(machine))
        return rows, gone
