# SPDX-License-Identifier: Apache-2.0
"""The broker itself: whether it serves, who asks, its numbers, its audit."""

import time
from typing import TYPE_CHECKING, Any

from aiohttp import web

from fedml_broker import audit
from fedml_broker.accounts import User
from fedml_broker.api.call import Call, number
from fedml_broker.problems import Problem
from fedml_broker.tables import DEFAULT_TENANT

if TYPE_CHECKING:
    from fedml_broker.app import Broker


class Handlers:
    """What the broker says of itself."""

    def __init__(self, broker: "Broker") -> None:
        self._broker = broker

    async def health(self, call: Call) -> Any:
        """Whether the broker serves."""
        return {"status": "ok", "version": self._broker.version}

    async def ca(self, call: Call) -> Any:
        """The broker's CA certificate. A client compares its hash with the one in its key."""
        return web.Response(
            body=self._broker.identity.ca_pem, content_type="application/x-pem-file"
        )

    async def whoami(self, call: Call) -> Any:
        """The user behind the token; also its `run`, of a job's own key, and its `expires_at`."""
        user = call.user
        whose: dict[str, Any] = {"name": user.name, "tenant": user.tenant, "role": user.role}
        more = {"run": user.run, "expires_at": user.expires_at}
        return whose | {name: value for name, value in more.items() if value is not None}

    async def status(self, call: Call) -> Any:
        """The broker at a glance."""
        broker = self._broker
        known, online = await broker.devices.count(call.user.tenant)
        return {
            "version": broker.version,
            "url": broker.url,
            "mqtt": broker.mqtt_url,
            "mqtt_connected": broker.post.connected,
            "up_s": time.monotonic() - broker.started_at,
            "devices": known,
            "online": online,
            "runs": await broker.runs.counts(call.user.tenant),
            "refused_messages": sum(broker.reports.refused.values()),
            "disk_reserve_bytes": broker.config.disk_reserve_bytes,
        }

    async def metrics(self, call: Call) -> Any:
        """The numbers of this process, as Prometheus scrapes them."""
        if isinstance(call.caller, User) and call.user.tenant != DEFAULT_TENANT:
            raise Problem(
                403,
                "only those who run the broker",
                f"the numbers are of all tenants, and you are of {call.user.tenant!r}",
                f"ask an admin of {DEFAULT_TENANT!r}",
            )
        return self._broker.metrics.page()

    async def list_audit(self, call: Call) -> Any:
        """The audit of the tenant, newest first.

        Query: `user`, `action` (``run.stop``; ``run`` for all that was done to runs), `since`
        (seconds since 1970), `before` (an entry's number), `limit`.
        """
        query = call.http.query
        named = query.get("user")
        since, before = (
            None if (text := query.get(name)) is None else number(text)
            for name in ("since", "before")
        )
        limit = min(number(query.get("limit", "100")), 1000)
        found = await self._broker.store.read(
            lambda tx: audit.entries(
                tx,
                tenant=call.user.tenant,
                actor=None if named is None else audit.user(named),
                action=query.get("action"),
                since=since,
                before=before,
                limit=limit,
            )
        )
        return {"entries": found}
