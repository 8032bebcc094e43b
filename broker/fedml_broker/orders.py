# SPDX-License-Identifier: Apache-2.0
"""Orders to devices: numbered, signed, published.

Counters are taken from the store in blocks, so that an order costs no commit of its own; after a
crash the rest of a block is skipped, which an agent does not mind: they only have to grow. A store
that was restored from a backup has forgotten how far they were: so they begin, after each start, no
lower than the milliseconds since 1970, which no machine gets orders fast enough to outrun.
"""

import os
import time
from collections.abc import Callable

import sqlalchemy as sa
from sqlalchemy import Connection

from fedml_broker.identity import Identity
from fedml_broker.mqtt import Post
from fedml_broker.prepared import Prepared, given
from fedml_broker.store import Store
from fedml_broker.tables import devices
from fedml_protocol import topics
from fedml_protocol.envelope import Body, Envelope, pack
from fedml_protocol.ids import uuid7
from fedml_protocol.keys import sign
from fedml_protocol.tasks import (
    Cancel,
    CloseSession,
    Drain,
    Offer,
    Order,
    ResultAck,
    Resync,
    Tail,
)

_BLOCK = 1000
# For every machine that gets tasks.
_TAKE = Prepared(
    devices.update()
    .where(devices.c.id == given("id_"))
    .values(
        counter=sa.func.max(devices.c.counter, given("least_")) + sa.literal_column(str(_BLOCK))
    )
    .returning(devices.c.counter)
)


class Orders:
    """Everything that the broker says to devices goes through here."""

    def __init__(self, store: Store, identity: Identity, post: Post) -> None:
        self._store = store
        self._identity = identity
        self._post = post
        # Called after each message that MQTT has taken.
        self.on_sent: Callable[[], None] = lambda: None
        self._next: dict[str, int] = {}
        self._end: dict[str, int] = {}

    async def send(
        self,
        address: topics.Address,
        what: Offer | Cancel | Drain | Tail | Resync | CloseSession,
        *,
        lifetime_s: float = 60.0,
    ) -> None:
        """Sign one order and hand it to MQTT, which forgets it after `lifetime_s`."""
        counter = await self._counter(address.device)
        order = Order(device=address.device, counter=counter, lifetime_s=lifetime_s, what=what)
        channel = topics.DN_TASK if isinstance(what, Offer) else topics.DN_CONTROL
        body = sign(order, self._identity.signing_key)
        await self._publish(address, channel, body, round(lifetime_s) or 1)

    async def last(self, device: str) -> int:
        """The number of the newest order to a device; all up to it have been sent."""
        if device in self._next:
            return self._next[device]
        query = sa.select(devices.c.counter).where(devices.c.id == device)
        return int(await self._store.read(lambda tx: tx.execute(query).scalar()) or 0)

    async def acknowledge(self, address: topics.Address, task: str, epoch: int) -> None:
        """Tell the agent that it need not send this result again."""
        await self._publish(address, topics.DN_ACK, ResultAck(task=task, epoch=epoch), 60)

    async def _publish(
        self, address: topics.Address, channel: str, body: Body, expiry_s: int
    ) -> None:
        msg_id = uuid7(time.time_ns() // 1_000_000, os.urandom(10))
        envelope = Envelope(device=address.device, body=body, msg_id=msg_id)
        await self._post.publish(address.topic(channel), pack(envelope), qos=1, expiry_s=expiry_s)
        self.on_sent()

    async def _counter(self, device: str) -> int:
        # No await between reading and advancing: two orders never get one number.
        if self._next.get(device, 0) >= self._end.get(device, 0):
            least = 0 if device in self._end else time.time_ns() // 1_000_000
            end = await self._store.write(lambda tx: _take_block(tx, device, least))
            if end > self._end.get(device, 0):
                self._next[device], self._end[device] = end - _BLOCK, end
        counter = self._next[device] + 1
        self._next[device] = counter
        return counter


def _take_block(tx: Connection, device: str, at_least: int) -> int:
    row = _TAKE.first(tx, id_=device, least_=at_least)
    # A removed device has no row: nobody will read it.
    return int(row[0]) if row is not None else at_least + _BLOCK
