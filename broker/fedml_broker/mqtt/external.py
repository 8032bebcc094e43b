# SPDX-License-Identifier: Apache-2.0
"""The broker as a client of an external MQTT 5 broker (Mosquitto 2 is the one tested).

`paho-mqtt` does the protocol in a thread of its own, and nothing else: its callbacks only hand over
to the event loop. Each connection gets a fresh paho client, so that no queue of paho's outlives a
connection: what was not acknowledged is the caller's to send again, and an acknowledgement that
comes too late can never go out on the next connection with a number that now means another message.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import ssl
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from paho.mqtt.client import Client, MQTTMessage, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from fedml_broker.mqtt import Handler, Refused, Unavailable
from fedml_broker.mqtt.clock import Clock, SystemClock
from fedml_broker.mqtt.link import Backoff, HandOver, Incoming, Link
from fedml_broker.mqtt.subscriptions import matches, split_filter

__all__ = ["Backoff", "ExternalPost"]

log = logging.getLogger(__name__)

TAKEN_OVER = 0x8E
# PUBACK reasons after which sending the same again can succeed: unspecified, implementation
# specific, quota exceeded.
_TRY_AGAIN = (0x80, 0x83, 0x97)


class ExternalPost:
    """An implementation of `Post` that leaves delivery to another broker.

    Args:
        host, port: Where the broker listens.
        client_id: Its session there; with client certificates, the certificate's name.
        ssl_context: None means plain TCP, which is refused unless the host is this machine.
        session_expiry_s: How long the broker keeps messages for us while we are away.
        receive_maximum: Unacknowledged messages, and so handlers, at one time. QoS 0 messages that
            come while as many are at work are dropped, and counted in `dropped`.
        connect_timeout_s: For TCP, TLS and CONNACK together.

    Raises:
        ValueError: Plain TCP to another machine.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        client_id: str = "broker",
        ssl_context: ssl.SSLContext | None = None,
        session_expiry_s: int = 24 * 3600,
        keep_alive_s: int = 30,
        receive_maximum: int = 256,
        connect_timeout_s: float = 10.0,
        drain_s: float = 5.0,
        backoff: Backoff | None = None,
        clock: Clock | None = None,
    ) -> None:
        if ssl_context is None and host not in ("127.0.0.1", "::1", "localhost"):
            raise ValueError(f"plain MQTT to {host} is refused: give an SSL context")
        self._address = host, port
        self._client_id = client_id
        self._ssl_context = ssl_context
        self._session_expiry_s = session_expiry_s
        self._keep_alive_s = keep_alive_s
        self._receive_maximum = receive_maximum
        self._connect_timeout_s = connect_timeout_s
        self._drain_s = drain_s
        self._backoff = backoff or Backoff()
        self._clock = clock or SystemClock()
        self.dropped = 0
        self._handlers: list[tuple[str, Handler]] = []
        self._handling: set[asyncio.Task[None]] = set()
        self._link: Link | None = None
        self._up = asyncio.Event()
        self._first = True
        self._keeping: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop

    @property
    def connected(self) -> bool:
        """Whether there is a connection with its subscriptions in place."""
        return self._up.is_set()

    async def until_connected(self) -> None:
        """Return as soon as `connected`."""
        await self._up.wait()

    def subscribe(self, topic_filter: str, handler: Handler) -> None:
        """See `Post.subscribe`. The broker's QoS 1 session keeps messages while we are away."""
        if self._keeping is not None:
            raise RuntimeError("subscribe before entering")
        group, _ = split_filter(topic_filter)
        if group:
            raise ValueError(f"{topic_filter!r}: handlers do not share")
        self._handlers.append((topic_filter, handler))

    async def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: int = 1,
        retain: bool = False,
        expiry_s: int | None = None,
    ) -> None:
        """See `Post.publish`. Raises `Unavailable` when the link breaks before the answer."""
        link = self._link
        if link is None or not self._up.is_set():
            raise Unavailable(f"no connection to MQTT broker {self._where}; it is being tried")
        if qos not in (0, 1):
            raise Refused(f"QoS {qos} is not used here: 0 or 1", 0x9B)
        if len(topic) + len(payload) + 64 > link.max_packet_bytes:
            raise Refused(f"{len(payload)} bytes for {topic} are too many for {self._where}")
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        if expiry_s is not None:
            properties.MessageExpiryInterval = expiry_s
        if not qos:
            self._send(link, topic, payload, qos, retain, properties)
            return
        async with link.window:
            mid = self._send(link, topic, payload, qos, retain, properties)
            answer = link.answers[mid] = self._loop.create_future()
            reason = await answer
        if reason in _TRY_AGAIN:
            raise Unavailable(f"{self._where} did not take {topic} now: 0x{reason:02X}")
        if reason >= 0x80:
            raise Refused(f"{self._where} refuses {topic}: 0x{reason:02X}", reason)

    async def disconnect(self, client_id: str, reason: str) -> None:
        """MQTT has no such call. Revocation of the certificate has to keep the device out."""
        log.warning(
            "%s stays connected to %s until its next handshake (%s): an external broker cannot be"
            " told; add the certificate to its revocation list",
            client_id,
            self._where,
            reason,
        )

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._keeping = asyncio.create_task(self._keep_connected(), name="mqtt.link")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        keeping, self._keeping = self._keeping, None
        if keeping is not None:
            if self._handling:
                _, late = await asyncio.wait(self._handling, timeout=self._drain_s)
                for task in late:
                    task.cancel()
            keeping.cancel()
            with suppress(asyncio.CancelledError):
                await keeping

    @property
    def _where(self) -> str:
        return f"{self._address[0]}:{self._address[1]}"

    def _send(
        self, link: Link, topic: str, payload: bytes, qos: int, retain: bool, properties: Properties
    ) -> int:
        """Give one message to paho's thread; its number."""
        if link is not self._link:
            raise Unavailable(f"the link to {self._where} broke before {topic} was sent")
        try:
            sent = link.client.publish(topic, payload, qos, retain, properties)
        except ValueError as error:
            raise Refused(f"{topic!r} cannot be published to: {error}", 0x90) from None
        if sent.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
            raise Unavailable(f"{self._where} is not reachable now: {sent.rc.name}")
        return sent.mid

    # --- the connection -----------------------------------------------------------------------

    async def _keep_connected(self) -> None:
        """Connect, serve, wait, connect again: until cancelled."""
        delay_s = 0.0
        while True:
            began = self._clock.now()
            try:
                reason = await self._one_connection()
            except Exception:  # the one place: whatever paho comes up with, the link is tried again
                log.exception("the link to %s failed by our own fault", self._where)
                reason = 0
            lasted_s = self._clock.now() - began
            delay_s = self._backoff.after(delay_s, lasted_s)
            if reason == TAKEN_OVER:
                log.error("another client uses our identity %r at %s", self._client_id, self._where)
                delay_s = self._backoff.most_s
            await self._pause(delay_s * random.uniform(0.5, 1.0))  # noqa: S311 - spreads load only

    async def _pause(self, delay_s: float) -> None:
        over: asyncio.Future[None] = self._loop.create_future()
        timer = self._clock.call_later(delay_s, _resolve, over, None)
        try:
            await over
        finally:
            timer.cancel()

    async def _one_connection(self) -> int:
        """Connect and stay until the link ends; the reason code, 0 where there was none."""
        client = self._make_client()
        link = Link(client, self._loop.create_future())
        hand_over = HandOver(self._loop, self, link)
        client.on_connect = hand_over.on_connect
        client.on_subscribe = hand_over.on_subscribe
        client.on_publish = hand_over.on_publish
        client.on_message = hand_over.on_message
        client.on_disconnect = hand_over.on_disconnect
        hand_over.timer = self._clock.call_later(
            self._connect_timeout_s, self.link_ended, link, 0, "no answer in time"
        )
        opening = asyncio.ensure_future(asyncio.to_thread(self._open, client))
        try:
            await asyncio.shield(opening)
            return await link.ended
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            log.warning("cannot connect to MQTT broker %s: %s", self._where, error)
            return 0
        finally:
            hand_over.timer.cancel()
            self._down(link)
            with suppress(OSError, ValueError):
                await opening  # a cancelled wait must not leave a socket opening behind our back
            await self._close(client)

    def _make_client(self) -> Client:
        client = Client(
            CallbackAPIVersion.VERSION2,
            self._client_id,
            protocol=MQTTv5,
            manual_ack=True,
            reconnect_on_failure=False,
        )
        client.connect_timeout = self._connect_timeout_s
        # No window of paho's: it cannot be set to what CONNACK says. `Link.window` is the one.
        client.max_inflight_messages_set(0)
        if self._ssl_context is not None:
            client.tls_set_context(self._ssl_context)
        return client

    def _open(self, client: Client) -> None:
        """Connect and start paho's thread. Blocks: runs in a thread of its own."""
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = self._session_expiry_s
        properties.ReceiveMaximum = self._receive_maximum
        host, port = self._address
        client.connect(host, port, self._keep_alive_s, clean_start=False, properties=properties)
        opened = client.socket()
        if isinstance(opened, socket.socket):
            # With Nagle's algorithm a round trip waits for the peer's delayed acknowledgement.
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.loop_start()

    async def _close(self, client: Client) -> None:
        """End paho's thread, politely if the peer still listens."""
        client.disconnect()
        closing = asyncio.ensure_future(asyncio.to_thread(client.loop_stop))
        _, late = await asyncio.wait((closing,), timeout=self._drain_s)
        opened = client.socket()
        if late and isinstance(opened, socket.socket):
            with suppress(OSError):
                opened.shutdown(socket.SHUT_RDWR)
        await closing

    # --- handed over from paho's thread -------------------------------------------------------

    def link_connected(
        self, link: Link, present: bool, reason: int, properties: dict[str, Any]
    ) -> None:
        if reason:
            self.link_ended(link, reason, "it refused us")
            return
        link.max_packet_bytes = properties.get("MaximumPacketSize", link.max_packet_bytes)
        link.window = asyncio.Semaphore(properties.get("ReceiveMaximum", 0xFFFF))
        self._link = link
        if not self._handlers or (present and not self._first):
            self._ready(link)
            return
        # The first time even to a session that is there: the filters may be others than last time.
        options = SubscribeOptions(qos=1, noLocal=True)
        link.client.subscribe([(topic_filter, options) for topic_filter, _ in self._handlers])

    def link_subscribed(self, link: Link, reasons: list[int]) -> None:
        refused = [
            topic_filter
            for (topic_filter, _), reason in zip(self._handlers, reasons, strict=True)
            if reason >= 0x80
        ]
        if refused:
            names = ", ".join(refused)
            self.link_ended(
                link, 0, f"it does not let us subscribe to {names}: see its access list"
            )
        else:
            self._first = False
            self._ready(link)

    def _ready(self, link: Link) -> None:
        if not link.ended.done():
            log.info("connected to MQTT broker %s", self._where)
            self._up.set()

    def link_published(self, link: Link, mid: int, reason: int) -> None:
        answer = link.answers.pop(mid, None)
        if answer is not None and not answer.done():
            answer.set_result(reason)

    def link_received(self, link: Link, message: MQTTMessage) -> None:
        if self._keeping is None:
            return  # leaving: not acknowledged, so it comes again next time
        if not message.qos and len(self._handling) >= self._receive_maximum:
            self.dropped += 1  # nothing else bounds what at-most-once senders can ask of us
            return
        handlers = [
            handler
            for topic_filter, handler in self._handlers
            if matches(topic_filter, message.topic)
        ]
        incoming = Incoming(message.mid, len(handlers))
        if message.qos:
            link.acks.append(incoming)
        for handler in handlers:
            task = asyncio.create_task(
                self._handle(handler, message, link, incoming), name="mqtt.handler"
            )
            self._handling.add(task)
            task.add_done_callback(self._handling.discard)
        if not handlers:  # a subscription of an earlier version of this program
            self._acknowledge(link)

    async def _handle(
        self, handler: Handler, message: MQTTMessage, link: Link, incoming: Incoming
    ) -> None:
        try:
            await handler(message.topic, bytes(message.payload))
        except Exception:  # the one place: a broken handler must not take the link down
            # To the broker 0x83 means the same as success (4.3.2), and paho cannot say it: nobody
            # can be told here. The sender's own outbox still has the message.
            log.exception("the handler of %r failed; the message is dropped", message.topic)
        incoming.running -= 1
        self._acknowledge(link)

    def _acknowledge(self, link: Link) -> None:
        """Acknowledge in order of receipt whatever has been handled."""
        while link.acks and not link.acks[0].running:
            incoming = link.acks.popleft()
            if link is self._link:
                link.client.ack(incoming.mid, 1)

    def link_ended(self, link: Link, reason: int, why: str) -> None:
        if not link.ended.done():
            log.warning("no longer connected to MQTT broker %s: %s", self._where, why)
            link.ended.set_result(reason)
        self._down(link)

    def _down(self, link: Link) -> None:
        if self._link is link:
            self._link = None
            self._up.clear()
        for answer in link.answers.values():
            if not answer.done():
                text = f"the link to {self._where} broke before the answer: send it again"
                answer.set_exception(Unavailable(text))
        link.answers.clear()


def _resolve(future: asyncio.Future[None], value: None) -> None:
    if not future.done():
        future.set_result(value)
