# SPDX-License-Identifier: Apache-2.0
"""One connection to an external broker: its state, and what paho's thread has to say about it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from fedml_broker.mqtt.clock import Timer


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """How long to wait before connecting again: doubling, and never all at the same moment.

    Attributes:
        stable_s: Only a connection that lasted this long counts as a success: one that is accepted
            and closed at once must not be tried in a tight loop.
    """

    first_s: float = 0.5
    most_s: float = 60.0
    stable_s: float = 60.0

    def after(self, delay_s: float, lasted_s: float) -> float:
        """The next delay, given the one before (0 for none) and how long the connection held."""
        if lasted_s >= self.stable_s or not delay_s:
            return self.first_s
        return min(2 * delay_s, self.most_s)


@dataclass(eq=False)
class Link:
    """One connection, from its CONNACK to its end. Touched in the event loop only.

    Attributes:
        acks: Messages received and not yet acknowledged, oldest first.
        answers: For the packet identifiers of our own messages, who waits for the PUBACK.
        window: As many of them as the broker wants to see at one time.
    """

    client: Client
    ended: asyncio.Future[int]
    acks: deque[Incoming] = field(default_factory=deque)
    answers: dict[int, asyncio.Future[int]] = field(default_factory=dict)
    window: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))
    max_packet_bytes: int = 0xFFFFFFF


@dataclass(eq=False, slots=True)
class Incoming:
    """One message received: how many handlers still work on it."""

    mid: int
    running: int


class Receiver(Protocol):
    """Who is told, in the event loop."""

    def link_connected(
        self, link: Link, present: bool, reason: int, properties: dict[str, Any]
    ) -> None: ...

    def link_subscribed(self, link: Link, reasons: list[int]) -> None: ...

    def link_published(self, link: Link, mid: int, reason: int) -> None: ...

    def link_received(self, link: Link, message: MQTTMessage) -> None: ...

    def link_ended(self, link: Link, reason: int, why: str) -> None: ...


class HandOver:
    """paho's callbacks: each runs in paho's thread and only passes on to the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, receiver: Receiver, link: Link) -> None:
        self._loop = loop
        self._receiver = receiver
        self._link = link
        self.timer: Timer | None = None

    def on_connect(
        self,
        client: Client,
        userdata: object,
        flags: ConnectFlags,
        reason: ReasonCode,
        properties: Properties | None,
    ) -> None:
        if self.timer is not None:
            self._pass(self.timer.cancel)
        known = {
            name: getattr(properties, name)
            for name in ("MaximumPacketSize", "ReceiveMaximum")
            if hasattr(properties, name)
        }
        code = int(reason.value)
        self._pass(self._receiver.link_connected, self._link, flags.session_present, code, known)

    def on_subscribe(
        self,
        client: Client,
        userdata: object,
        mid: int,
        reasons: list[ReasonCode],
        properties: Properties | None,
    ) -> None:
        codes = [int(reason.value) for reason in reasons]
        self._pass(self._receiver.link_subscribed, self._link, codes)

    def on_publish(
        self,
        client: Client,
        userdata: object,
        mid: int,
        reason: ReasonCode,
        properties: Properties | None,
    ) -> None:
        self._pass(self._receiver.link_published, self._link, mid, int(reason.value))

    def on_message(self, client: Client, userdata: object, message: MQTTMessage) -> None:
        self._pass(self._receiver.link_received, self._link, message)

    def on_disconnect(
        self,
        client: Client,
        userdata: object,
        flags: DisconnectFlags,
        reason: ReasonCode,
        properties: Properties | None,
    ) -> None:
        code = int(reason.value)
        why = str(reason) if flags.is_disconnect_packet_from_server else "the link broke"
        self._pass(self._receiver.link_ended, self._link, code, why)

    def _pass(self, call: Callable[..., object], *args: object) -> None:
        with suppress(RuntimeError):  # the event loop was closed without leaving the post
            self._loop.call_soon_threadsafe(call, *args)
