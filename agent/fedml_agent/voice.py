# SPDX-License-Identifier: Apache-2.0
"""What the agent says: bodies into numbered envelopes, onto the right topic."""

import os
import time

from fedml_agent.link import Link
from fedml_protocol import topics
from fedml_protocol.devices import Heartbeat, Presence
from fedml_protocol.envelope import OLDEST_SCHEMA, SCHEMA, Body, Envelope, pack
from fedml_protocol.ids import uuid7
from fedml_protocol.tasks import Accept, Cancelled, Progress, Reject, Result


class Voice:
    """One per start of the agent: it knows the boot number and counts what is said."""

    def __init__(self, address: topics.Address, boot_n: int, version: str) -> None:
        self.link: Link
        self._address = address
        self._boot_n = boot_n
        self._version = version
        self._seq = 0

    def will(self) -> tuple[str, bytes]:
        """What the broker publishes for us when we vanish."""
        return self._address.topic(topics.UP_PRESENCE), self._pack(self._presence(online=False))

    async def presence(self, *, online: bool) -> None:
        """Tell that we are here; with `online=False`, a goodbye, after which the link closes."""
        topic = self._address.topic(topics.UP_PRESENCE)
        data = self._pack(self._presence(online=online))
        if online:
            await self.link.publish(topic, data, retain=True)
        else:
            await self.link.goodbye(topic, data)

    async def heartbeat(self, beat: Heartbeat, *, qos: int) -> None:
        """One heartbeat."""
        topic = self._address.topic(topics.UP_HEARTBEAT)
        await self.link.publish(topic, self._pack(beat), qos=qos)

    async def task(self, body: Accept | Reject | Progress | Result | Cancelled) -> None:
        """Something about a task.

        Raises:
            LinkDown: The broker may not have it.
        """
        await self.link.publish(self._address.topic(topics.UP_TASK), self._pack(body))

    def _presence(self, *, online: bool) -> Presence:
        return Presence(
            online=online,
            boot_n=self._boot_n,
            oldest_schema=OLDEST_SCHEMA,
            newest_schema=SCHEMA,
            agent_version=self._version,
        )

    def _pack(self, body: Body) -> bytes:
        self._seq += 1
        envelope = Envelope(
            device=self._address.device,
            body=body,
            msg_id=uuid7(time.time_ns() // 1_000_000, os.urandom(10)),
            boot_n=self._boot_n,
            seq=self._seq,
        )
        return pack(envelope)
