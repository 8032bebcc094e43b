# SPDX-License-Identifier: Apache-2.0
"""Stored objects, by name. Their bytes come and go as blobs."""

from typing import TYPE_CHECKING, Any

from fedml_broker.api.call import Call, number

if TYPE_CHECKING:
    from fedml_broker.app import Broker


class Handlers:
    """For whoever keeps files at the broker. A slash in a name is written as %2F."""

    def __init__(self, broker: "Broker") -> None:
        self._broker = broker

    async def list_objects(self, call: Call) -> Any:
        """The tenant's objects by name. Query: `prefix`, `after` (a name), `limit`."""
        asked = call.http.query
        limit = min(number(asked.get("limit", "1000")), 1000)
        prefix, after = asked.get("prefix", ""), asked.get("after", "")
        found = await self._broker.storage.listed(
            call.user.tenant, prefix=prefix, after=after, limit=limit
        )
        return {"objects": found}

    async def show_object(self, call: Call) -> Any:
        """One object: its blob, its size, who stored it when, and its user's metadata."""
        return await self._broker.storage.show(call.user.tenant, call.part("name"))

    async def put_object(self, call: Call) -> Any:
        """Let a name stand for an uploaded blob or package."""
        return await self._broker.storage.put(call.user, call.part("name"), call.body)

    async def remove_object(self, call: Call) -> Any:
        """Delete an object. Its bytes go if nothing else needs them."""
        name = call.part("name")
        freed = await self._broker.storage.remove(call.user, name)
        return {"name": name, "freed_bytes": freed}
