# SPDX-License-Identifier: Apache-2.0
"""A client's session: what is under way to it, what waits for it, and what it has not acknowledged.

    message ──take──► waiting ──pump──► inflight ──acked──► gone
                 └────── room ─────────────▲   └─ connection lost: back to the head of waiting

A session whose expiry interval is not zero is `stored`: each of its QoS 1 deliveries is a row in
the journal from `take` until the client acknowledges it, online or not. A queue that is full
refuses (the publisher is told); it never drops what was promised, except what has expired.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from math import ceil, inf
from typing import Protocol

from fedml_broker.mqtt import wire
from fedml_broker.mqtt.clock import Clock, Timer
from fedml_broker.mqtt.journal import Journal
from fedml_broker.mqtt.limits import Counters, Limits
from fedml_broker.mqtt.message import Delivery, Message
from fedml_broker.mqtt.subscriptions import Group, Subscription, Target

GONE, TAKEN, STORED, FULL = range(4)
"""What became of a message offered to a session: not for it now, in memory, on its way to the disk,
or refused because the queue is full."""


class Line(Protocol):
    """An open connection, as a session sees it."""

    blocked: bool
    receive_maximum: int
    max_packet_bytes: int

    def send(self, frame: bytes) -> None: ...

    def close(self, reason: int, text: str = "") -> None: ...

    def handled(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all parts of one endpoint share."""

    clock: Clock
    limits: Limits
    journal: Journal
    counters: Counters


class Session:
    """See the module's text. Belongs to one client id for as long as the expiry interval allows.

    Attributes:
        row: Number in the journal.
        stored: Whether deliveries are journalled.
        expiry: The timer that ends the session while nobody is connected.
        line: The open connection, or None.
        handling: Handler calls under way for messages that this client published.
    """

    __slots__ = (
        "_last_packet_id",
        "_purge_at",
        "_share",
        "_window",
        "client",
        "expiry",
        "expiry_s",
        "handling",
        "inflight",
        "line",
        "row",
        "stored",
        "subscriptions",
        "waiting",
        "waiting_bytes",
    )

    def __init__(self, client: str, row: int, expiry_s: int, share: Surroundings) -> None:
        self.client = client
        self.row = row
        self.expiry_s = expiry_s
        self.stored = expiry_s > 0
        self.expiry: Timer | None = None
        self.line: Line | None = None
        self.handling = 0
        self.subscriptions: dict[str, Subscription] = {}
        self.waiting: deque[Delivery] = deque()
        self.waiting_bytes = 0
        self.inflight: dict[int, Delivery] = {}
        self._window = 0
        self._last_packet_id = 0
        self._purge_at = inf
        self._share = share

    @property
    def ready(self) -> bool:
        """Whether a message would leave at once."""
        line = self.line
        return (
            line is not None
            and not line.blocked
            and not self.waiting
            and len(self.inflight) < self._window
        )

    def take(self, message: Message, target: Target, *, retained: bool = False) -> int:
        """Send or queue a message; what became of it (GONE, TAKEN, STORED, FULL).

        Args:
            retained: It is sent because of a new subscription, not because it was just published.
        """
        retain = retained or (message.retain and target.retain_as_published)
        if not (message.qos and target.qos):
            return self._take_at_most_once(message, target, retain)
        share = self._share
        if self.stored and share.journal.failing:
            return FULL
        now = self.ready
        if not now and not self._room_for(message):
            share.counters.dropped_queue_full += 1
            return FULL
        delivery = Delivery(message, retain, target.idents, target.group)
        if self.stored:
            self._record(delivery)
        if now:
            self._send(delivery)
        else:
            self._wait(delivery)
        return STORED if self.stored else TAKEN

    def _take_at_most_once(self, message: Message, target: Target, retain: bool) -> int:
        line = self.line
        if line is None:
            return GONE
        if line.blocked:
            self._share.counters.dropped_slow_reader += 1
            return GONE
        properties = self._properties(message, target.idents)
        if properties is None:
            self._share.counters.dropped_expired += 1
            return GONE
        frame = wire.publish(int(retain), message.topic.wire, 0, message.payload, properties)
        if len(frame) > line.max_packet_bytes:
            self._share.counters.dropped_too_large += 1
            return GONE
        line.send(frame)
        self._share.counters.delivered += 1
        return TAKEN

    def acked(self, packet_id: int) -> None:
        """The client has taken responsibility for one message; an unknown number is ignored."""
        delivery = self.inflight.pop(packet_id, None)
        if delivery is None:
            return
        if delivery.row:
            self._forget(delivery)
        if self.waiting:
            self.pump()

    def pump(self) -> None:
        """Send what waits, as far as the client's window and its reading allow."""
        line, waiting = self.line, self.waiting
        if line is None:
            return
        while waiting and len(self.inflight) < self._window and not line.blocked:
            delivery = waiting.popleft()
            self._weigh(-delivery.message.size)
            self._send(delivery)

    def go_online(self, line: Line) -> None:
        """A connection was opened: what was sent before goes first, with DUP, in its old order."""
        self.line = line
        self._window = min(line.receive_maximum, self._share.limits.max_inflight)
        self.pump()

    def go_offline(self) -> None:
        """The connection is gone: what was not acknowledged goes back to the head of the queue."""
        self.line = None
        for delivery in reversed(self.inflight.values()):
            self.waiting.appendleft(delivery)
            self._weigh(delivery.message.size)
        self.inflight.clear()

    def restore(self, delivery: Delivery) -> None:
        """Put back what the journal held. Nobody knows whether it was sent, so it says DUP."""
        delivery.sent = True
        self._wait(delivery)

    def adopt(self, delivery: Delivery, target: Target) -> None:
        """Take a shared subscription's message over from a member that went away.

        A session that is not stored leaves the row where it is: should this process die before the
        client acknowledges, the member that was promised the message still has it.
        """
        delivery.retain = delivery.message.retain and target.retain_as_published
        delivery.idents = target.idents
        delivery.packet_id = 0
        delivery.sent = False
        if self.stored:
            if delivery.row:
                self._forget(delivery)
            self._record(delivery)
        self._wait(delivery)
        self.pump()

    def give_up(self, delivery: Delivery) -> None:
        """Remove a delivery that was just taken out of `waiting`, from memory and disk."""
        if delivery.row:
            self._forget(delivery)

    def withdraw(self, group: Group | None) -> list[Delivery]:
        """Take out of `waiting` everything that came through a shared subscription."""
        found = [d for d in self.waiting if d.group is not None and group in (None, d.group)]
        if found:
            chosen = set(map(id, found))
            self.waiting = deque(d for d in self.waiting if id(d) not in chosen)
            self._weigh(-sum(d.message.size for d in found))
        return found

    def put_back(self, delivery: Delivery) -> None:
        """Keep a withdrawn delivery after all: no other member of its group can take it now."""
        self._wait(delivery)

    def discard(self) -> None:
        """The session ends: nothing of it stays."""
        self.go_offline()
        self._share.counters.dropped_session_ended += len(self.waiting)
        for delivery in self.waiting:
            self.give_up(delivery)
        self.waiting.clear()
        self._weigh(-self.waiting_bytes)

    def _send(self, delivery: Delivery) -> None:
        line, message = self.line, delivery.message
        assert line is not None
        properties = self._properties(message, delivery.idents)
        if properties is None:
            self._share.counters.dropped_expired += 1
            self.give_up(delivery)
            return
        packet_id = delivery.packet_id
        if not packet_id or packet_id in self.inflight:
            packet_id = self._next_packet_id()
        flags = 2 | delivery.retain | (delivery.sent and 8)
        frame = wire.publish(flags, message.topic.wire, packet_id, message.payload, properties)
        if len(frame) > line.max_packet_bytes:
            self._share.counters.dropped_too_large += 1
            self.give_up(delivery)
            return
        delivery.packet_id = packet_id
        delivery.sent = True
        self.inflight[packet_id] = delivery
        line.send(frame)
        self._share.counters.delivered += 1

    def _properties(self, message: Message, idents: bytes) -> bytes | None:
        """Properties of one delivery, encoded; None when the message has expired."""
        expires_at = message.expires_at
        if expires_at is None:
            return message.properties + idents if idents else message.properties
        left_s = ceil(expires_at - self._share.clock.now())
        if left_s <= 0:
            return None
        return b"\x02" + left_s.to_bytes(4, "big") + message.properties + idents

    def _next_packet_id(self) -> int:
        packet_id = self._last_packet_id
        while True:
            packet_id = packet_id % 0xFFFF + 1
            if packet_id not in self.inflight:
                self._last_packet_id = packet_id
                return packet_id

    def _wait(self, delivery: Delivery) -> None:
        self.waiting.append(delivery)
        self._weigh(delivery.message.size)
        if delivery.message.expires_at is not None:
            self._purge_at = min(self._purge_at, delivery.message.expires_at)

    def _weigh(self, size: int) -> None:
        self.waiting_bytes += size
        self._share.counters.queued_bytes += size

    def _room_for(self, message: Message) -> bool:
        if self._fits(message.size):
            return True
        if self._share.clock.now() < self._purge_at:
            return False
        self._purge()
        return self._fits(message.size)

    def _fits(self, size: int) -> bool:
        limits = self._share.limits
        return (
            len(self.waiting) < limits.max_queued_messages
            and self.waiting_bytes + size <= limits.max_queued_bytes
            and self._share.counters.queued_bytes + size <= limits.max_total_queued_bytes
        )

    def _purge(self) -> None:
        """Throw out what has expired."""
        now, fresh = self._share.clock.now(), deque[Delivery]()
        self._purge_at = inf
        for delivery in self.waiting:
            expires_at = delivery.message.expires_at
            if expires_at is None or expires_at > now:
                fresh.append(delivery)
                self._purge_at = min(self._purge_at, inf if expires_at is None else expires_at)
                continue
            self._share.counters.dropped_expired += 1
            self._weigh(-delivery.message.size)
            self.give_up(delivery)
        self.waiting = fresh

    def _record(self, delivery: Delivery) -> None:
        journal, message = self._share.journal, delivery.message
        if not message.uses:
            message.row = journal.next_id()
            columns = (message.payload, message.properties, message.expires_at, message.retain)
            journal.put("message", message.row, (message.row, message.topic.name, *columns))
        message.uses += 1
        delivery.row = journal.next_id()
        group = delivery.group
        share = f"$share/{group.name}/{group.filter}" if group else None
        journal.put(
            "delivery",
            delivery.row,
            (delivery.row, self.row, message.row, delivery.retain, delivery.idents, share),
        )

    def _forget(self, delivery: Delivery) -> None:
        journal, message = self._share.journal, delivery.message
        journal.forget("delivery", delivery.row)
        delivery.row = 0
        message.uses -= 1
        if not message.uses:
            journal.forget("message", message.row)
