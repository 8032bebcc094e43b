# SPDX-License-Identifier: Apache-2.0
"""From one published message to everybody concerned, and back to one answer for its publisher.

`Router.route` runs once per message and does no I/O. Usually the answer is there at once; when
somebody has to finish first (the disk, a handler) it is a `Receipt` that settles later.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from fedml_broker.mqtt import Handler
from fedml_broker.mqtt.message import Message, Topic
from fedml_broker.mqtt.retained import Retained
from fedml_broker.mqtt.sessions import FULL, GONE, STORED, Session, Surroundings
from fedml_broker.mqtt.subscriptions import Subscription, Subscriptions, target
from fedml_broker.mqtt.wire import Violation, text

log = logging.getLogger(__name__)

SUCCESS, NO_SUBSCRIBERS, FAILED, TOPIC_INVALID, QUOTA = 0x00, 0x10, 0x83, 0x90, 0x97

# Names of topics kept with their matches, about 400 bytes each beside three copies of the name. A
# fleet of 10,000 uses 40,000. Long names are looked up each time: a client chooses its own.
_KEPT_TOPICS, _KEPT_NAME_BYTES = 65_536, 256


class Owner(Protocol):
    """Who waits for a receipt."""

    def settled(self, receipt: Receipt) -> None: ...


class Receipt:
    """The answer to one message, while it is not yet known.

    Attributes:
        packet_id: For the publisher's own use.
        waiting: How many have yet to finish.
        reason: The worst of their answers so far.
    """

    __slots__ = ("owner", "packet_id", "reason", "waiting")

    def __init__(self, reason: int = SUCCESS, waiting: int = 0) -> None:
        self.reason = reason
        self.waiting = waiting
        self.packet_id = 0
        self.owner: Owner | None = None

    def settle(self, reason: int = SUCCESS) -> None:
        """One of those that were waited for has finished."""
        self.reason = max(self.reason, reason) if reason else self.reason
        self.waiting -= 1
        if not self.waiting and self.owner is not None:
            self.owner.settled(self)


class Router:
    """Knows every subscription and every retained message."""

    def __init__(self, share: Surroundings) -> None:
        self.subscriptions = Subscriptions()
        self.retained = Retained()
        self._share = share
        self._topics: dict[bytes, Topic] = {}
        self._handling: set[asyncio.Task[None]] = set()

    def topic(self, encoded: bytes) -> Topic:
        """The topic of that name, checked.

        Raises:
            Violation: It is not a valid topic name (MQTT 5, 4.7.1.1, 4.7.3).
        """
        topic = self._topics.get(encoded)
        if topic is not None:
            return topic
        name = text(encoded)
        if not name or "+" in name or "#" in name or len(encoded) > 0xFFFF:
            raise Violation(TOPIC_INVALID, f"{name[:80]!r} is not a topic that can be published to")
        if name.count("/") >= self._share.limits.max_topic_levels:
            raise Violation(TOPIC_INVALID, f"{name[:80]!r}... has too many levels")
        return self.known(name)

    def known(self, name: str) -> Topic:
        """The topic of a name that was checked before (it comes from the journal)."""
        encoded = name.encode()
        if len(encoded) > _KEPT_NAME_BYTES:
            return Topic(name, encoded)
        if len(self._topics) >= _KEPT_TOPICS:
            self._topics.clear()
        return self._topics.setdefault(encoded, Topic(name, encoded))

    def route(
        self, message: Message, sender: Session | None, *, own: bool = False
    ) -> Receipt | int:
        """Give a message to everyone who wants it.

        Args:
            sender: The publishing session, if there is one.
            own: The broker itself publishes: its own handlers are left out.

        Returns:
            The reason code to answer with, or a receipt for it. QoS 0 needs no answer.
        """
        topic = message.topic
        if topic.version != self.subscriptions.version:
            topic.match = self.subscriptions.match(topic.name)
            topic.version = self.subscriptions.version
        match = topic.match
        handlers = () if own else match.handlers
        stored = taken = full = 0
        for chosen in match.targets:
            session = chosen.session
            if session is sender:
                if chosen.own is None:
                    continue
                chosen = chosen.own
            outcome = session.take(message, chosen)
            if outcome == FULL:
                full += 1
            elif outcome != GONE:
                taken += 1
                stored += outcome == STORED
        for group in match.groups:
            member = group.choose(online=not message.qos)
            if member is not None:
                outcome = member.session.take(message, member)
                full += outcome == FULL
                taken += outcome not in (FULL, GONE)
                stored += outcome == STORED
        reason = SUCCESS
        if message.retain:
            reason = self._keep(message)
            stored += reason == SUCCESS
        if full and not taken and not handlers:
            reason = QUOTA
        elif not (match.targets or match.groups or handlers) and not reason:
            reason = NO_SUBSCRIBERS
            self._share.counters.unmatched += 1
        if not (stored or handlers):
            return reason
        receipt = Receipt(reason, (stored > 0) + len(handlers))
        if stored:
            self._share.journal.after_commit(receipt)
        for handler in handlers:
            self.handle(handler, message, receipt, sender)
        return receipt

    def handle(
        self,
        handler: Handler,
        message: Message,
        receipt: Receipt | None = None,
        sender: Session | None = None,
    ) -> None:
        """Start a handler; tasks begin in the order in which they are made."""
        if sender is not None:
            sender.handling += 1
        task = asyncio.create_task(
            self._handle(handler, message, receipt, sender), name="mqtt.handler"
        )
        self._handling.add(task)
        task.add_done_callback(self._handling.discard)

    async def finish_handling(self, timeout_s: float) -> None:
        """Wait for the running handlers; cancel those that take longer."""
        if self._handling:
            _, late = await asyncio.wait(self._handling, timeout=timeout_s)
            for task in late:
                log.warning("a handler still ran %.0f s after the shutdown began", timeout_s)
                task.cancel()
            if late:
                await asyncio.wait(late)

    def send_retained(self, sub: Subscription) -> None:
        """Give a new subscription what its topics retain."""
        now, old = self._share.clock.now(), []
        for message in self.retained.match(sub.filter):
            if message.expires_at is not None and message.expires_at <= now:
                old.append(message.topic.name)
            else:
                sub.session.take(message, target([sub]), retained=True)
        for name in old:
            self._drop_retained(name)

    def greet(self, topic_filter: str, handler: Handler) -> None:
        """Give a handler what its topics retain, when it begins."""
        now = self._share.clock.now()
        for message in self.retained.match(topic_filter):
            if message.expires_at is None or message.expires_at > now:
                self.handle(handler, message)

    def restore(self, rows: list[tuple[str, bytes, bytes, int, float | None]]) -> None:
        """Take back the retained messages that the journal held."""
        now = self._share.clock.now()
        for name, payload, properties, qos, expires_at in rows:
            if expires_at is not None and expires_at <= now:
                self._share.journal.drop("retained", name)
                continue
            topic = self.known(name)
            message = Message(topic, payload, qos, True, properties, expires_at)
            self.retained.put(name, message)

    async def _handle(
        self,
        handler: Handler,
        message: Message,
        receipt: Receipt | None,
        sender: Session | None,
    ) -> None:
        reason = SUCCESS
        try:
            await handler(message.topic.name, message.payload)
        except Exception:  # the one place: a broken handler must not take the endpoint down
            log.exception("the handler of %r failed; its sender is told", message.topic.name)
            self._share.counters.handler_errors += 1
            reason = FAILED
        if receipt is not None:
            receipt.settle(reason)
        if sender is not None:
            sender.handling -= 1
            if sender.line is not None:
                sender.line.handled()

    def _keep(self, message: Message) -> int:
        """Retain a message, or forget the one before if it is empty; the reason for its sender."""
        name, journal = message.topic.name, self._share.journal
        if journal.failing:
            return QUOTA
        if not message.payload:
            self._drop_retained(name)
            return SUCCESS
        limits, before = self._share.limits, self.retained.get(name)
        if before is None and len(self.retained) >= limits.max_retained:
            return QUOTA
        growth = message.size - (before.size if before else 0)
        if growth > 0 and self.retained.size + growth > limits.max_retained_bytes:
            return QUOTA
        self.retained.put(name, message)
        columns = (message.payload, message.properties, message.qos, message.expires_at)
        journal.put("retained", name, (name, *columns))
        return SUCCESS

    def _drop_retained(self, name: str) -> None:
        if self.retained.drop(name):
            self._share.journal.drop("retained", name)
