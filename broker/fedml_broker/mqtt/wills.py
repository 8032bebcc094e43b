# SPDX-License-Identifier: Apache-2.0
"""Last wills: what is said on behalf of a client that went away without saying goodbye.

    CONNECT ──arm──► armed ──connection lost──► due in min(Will Delay, Session Expiry) ──► published
                       │ goodbye                  │ the client is back in time
                       ▼                          ▼
                     gone                       gone

Armed and due wills are rows in the journal: when this process dies, the next one gives each client
a moment to come back before it publishes what the client had left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fedml_broker.mqtt.clock import Timer
from fedml_broker.mqtt.limits import NEVER
from fedml_broker.mqtt.message import Message, Topic
from fedml_broker.mqtt.router import Receipt
from fedml_broker.mqtt.sessions import Surroundings

Row = tuple[int, str, str, bytes, bytes, int, int, float, int | None, float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Will:
    """What a client left with its CONNECT.

    Attributes:
        expiry_s: Message Expiry Interval, counted from the moment of publication.
    """

    topic: Topic
    payload: bytes
    qos: int
    retain: bool
    properties: bytes = b""
    delay_s: float = 0.0
    expiry_s: int | None = None


class Wills:
    """At most one armed and one due will per client id."""

    def __init__(self, share: Surroundings, publish: Callable[[Message], Receipt | int]) -> None:
        self._share = share
        self._publish = publish
        self._armed: dict[str, tuple[int, Will]] = {}
        self._due: dict[str, tuple[int, Will, Timer]] = {}

    def arm(self, client: str, will: Will | None) -> None:
        """The client is back: a will that was due is not, and this one takes its place."""
        due = self._due.pop(client, None)
        if due is not None:
            due[2].cancel()
            self._share.journal.drop("will", due[0])
        self.disarm(client)
        if will is not None:
            row = self._share.journal.next_id()
            self._armed[client] = row, will
            self._save(row, client, will, None)

    def disarm(self, client: str) -> None:
        """The client said goodbye (or leaves no will this time)."""
        armed = self._armed.pop(client, None)
        if armed is not None:
            self._share.journal.drop("will", armed[0])

    def release(self, client: str, session_expiry_s: int) -> None:
        """The connection is lost: the will is due after its delay, or with the session's end."""
        armed = self._armed.pop(client, None)
        if armed is None:
            return
        row, will = armed
        delay_s = will.delay_s
        if session_expiry_s != NEVER:
            delay_s = min(delay_s, session_expiry_s)
        if delay_s > 0:
            self._schedule(row, client, will, self._share.clock.now() + delay_s)
        else:
            self._fire(row, will)

    def session_ended(self, client: str) -> None:
        """A will never waits longer than its session lives (MQTT 5, 3.1.3.2.2)."""
        due = self._due.pop(client, None)
        if due is not None:
            due[2].cancel()
            self._fire(due[0], due[1])

    def restore(self, rows: list[Row], topic: Callable[[str], Topic]) -> None:
        """Take back what the journal held."""
        soon = self._share.clock.now() + self._share.limits.restart_grace_s
        for row, client, name, payload, properties, qos, retain, delay_s, expiry_s, due_at in rows:
            will = Will(
                topic=topic(name),
                payload=payload,
                qos=qos,
                retain=bool(retain),
                properties=properties,
                delay_s=delay_s,
                expiry_s=expiry_s,
            )
            self._schedule(row, client, will, soon + delay_s if due_at is None else due_at)

    def stop(self) -> None:
        """No more timers; what is due stays in the journal."""
        for _, _, timer in self._due.values():
            timer.cancel()
        self._due.clear()

    def _schedule(self, row: int, client: str, will: Will, due_at: float) -> None:
        delay_s = max(0.0, due_at - self._share.clock.now())
        timer = self._share.clock.call_later(delay_s, self.session_ended, client)
        self._due[client] = row, will, timer
        self._save(row, client, will, due_at)

    def _save(self, row: int, client: str, will: Will, due_at: float | None) -> None:
        columns = (will.payload, will.properties, will.qos, will.retain, will.delay_s)
        self._share.journal.put(
            "will", row, (row, client, will.topic.name, *columns, will.expiry_s, due_at)
        )

    def _fire(self, row: int, will: Will) -> None:
        expires_at = None
        if will.expiry_s is not None:
            expires_at = self._share.clock.now() + will.expiry_s
        outcome = self._publish(
            Message(will.topic, will.payload, will.qos, will.retain, will.properties, expires_at)
        )
        if isinstance(outcome, Receipt):
            # Only now is it in other hands; before, this process could die with it.
            outcome.packet_id = row
            outcome.owner = self
        else:
            self._share.journal.drop("will", row)

    def settled(self, receipt: Receipt) -> None:
        """A published will is safe: its row may go."""
        self._share.journal.drop("will", receipt.packet_id)
