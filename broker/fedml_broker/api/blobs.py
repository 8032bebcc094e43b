# SPDX-License-Identifier: Apache-2.0
"""Packages, models and files, by their hash."""

from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web

from fedml_broker.api.call import Call

if TYPE_CHECKING:
    from fedml_broker.app import Broker


class Asked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Blobs, by their hash."""

    blobs: list[str]


class Handlers:
    """Blobs in and out."""

    def __init__(self, broker: "Broker") -> None:
        self._broker = broker

    async def head_blob(self, call: Call) -> Any:
        """Whether a blob is here, or how much of an upload."""
        return await self._broker.blobs.head(call.http, call.part("sha256"), call.owner)

    async def get_blob(self, call: Call) -> Any:
        """A blob, or a range of it."""
        return await self._broker.blobs.get(call.http, call.part("sha256"))

    async def expect_blob(self, request: web.Request) -> None:
        """Called before `put_blob` when the client sends ``Expect: 100-continue``."""
        await self._broker.blobs.expect(request)

    async def put_blob(self, call: Call) -> Any:
        """Upload a blob, whole or in parts."""
        return await self._broker.blobs.put(call.http, call.part("sha256"), call.owner)

    async def missing_blobs(self, call: Call) -> Any:
        """Which of these blobs are not here whole, each with the byte at which to go on.

        The others stay for ten minutes at least: a run is going to refer to them.
        """
        return {"missing": self._broker.blobs.missing(call.body.blobs, call.owner)}
