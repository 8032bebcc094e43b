# SPDX-License-Identifier: Apache-2.0
"""The MQTT connection: one at a time, for ever tried again, nothing trusted to its memory.

paho-mqtt does the protocol, in the event loop's thread: the loop watches its socket. Each
connection is a new paho client, so that paho's own queue never sends beside our journal. A message
is acknowledged after its handler has returned, in the order of receipt.
"""

import asyncio
import logging
import random
import socket
import ssl
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from fedml_agent.errors import AgentError
from fedml_protocol.devices import RECONNECT_BEATS
from fedml_protocol.topics import Address

log = logging.getLogger(__name__)

Handler = Callable[[str, bytes], Awaitable[None]]

KEEP_ALIVE_S = 60
# The broker keeps what it has for us so long after a cut.
SESSION_S = 24 * 3600
# A short cut is not worth telling everybody.
_WILL_DELAY_S = 5
_RECEIVE_MAXIMUM = 64
_PUBACK_S = 20.0

_FIRST_PAUSE_S = 0.25
_STABLE_S = 60.0
_TAKEN_OVER_PAUSE_S = 300.0
_TAKEN_OVER = 0x8E


class LinkDown(AgentError):
    """There is no connection, or it broke before the broker had confirmed."""


class Link:
    """The connection as the rest of the agent sees it.

    Attributes:
        up: Set while connected.
        trouble: Why it is not connected, for `status`.
        beat_every_s: The interval of heartbeats, which bounds the pause between two attempts.
        confirmed_at: When the last confirmed message was *sent* (monotonic): the broker has heard
            of us at that moment or later.
    """

    def __init__(
        self,
        address: Address,
        where: Callable[[], tuple[str, int, ssl.SSLContext]],
        will: tuple[str, bytes],
        handler: Handler,
        greet: Callable[[], Coroutine[Any, Any, None]],
    ) -> None:
        """
        Args:
            where: Asked before each attempt: certificates and addresses change.
            will: Topic and payload that the broker publishes, retained, when we vanish.
            handler: Called with each message, one after the other.
            greet: Called after each connect: presence and heartbeat.
        """
        self.up = asyncio.Event()
        self.trouble = "not connected yet"
        self.beat_every_s = 10.0
        self.confirmed_at = 0.0
        self._address = address
        self._where = where
        self._will = will
        self._handler = handler
        self._greet = greet
        self._client: paho.Client | None = None
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._gone: asyncio.Future[int] | None = None
        self._inbox: asyncio.Queue[tuple[paho.Client, Any]] = asyncio.Queue()

    async def serve(self) -> None:
        """Be connected, and connect again, until cancelled."""
        loop = asyncio.get_running_loop()
        pause = _FIRST_PAUSE_S
        consumer = loop.create_task(self._consume(), name="link.consume")
        try:
            while True:
                began = loop.time()
                reason = await self._one_connection()
                if reason == _TAKEN_OVER:
                    log.error(
                        "another agent uses this device's identity; this one pauses for %d s. "
                        "If its files were copied: `fedml-agent logout` on one of the two",
                        _TAKEN_OVER_PAUSE_S,
                    )
                    self.trouble = "another agent uses this device's identity"
                    await asyncio.sleep(_TAKEN_OVER_PAUSE_S)
                # Only a stable connection earns a quick retry: else a broker that drops everybody
                # right after the handshake would be hammered.
                if loop.time() - began > _STABLE_S:
                    pause = _FIRST_PAUSE_S
                await asyncio.sleep(random.uniform(pause / 2, pause))  # noqa: S311
                pause = min(pause * 2, RECONNECT_BEATS * self.beat_every_s)
        finally:
            consumer.cancel()
            self._drop(LinkDown("the agent stops"))

    async def publish(
        self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False
    ) -> None:
        """Send one message; with QoS 1, return when the broker has confirmed it.

        Raises:
            LinkDown: It is not known whether the broker has it. Whoever must know sends it again.
        """
        client = self._client
        if client is None or not self.up.is_set():
            raise LinkDown(self.trouble)
        loop = asyncio.get_running_loop()
        sent_at = loop.time()
        info = client.publish(topic, payload, qos=qos, retain=retain)
        if info.rc != paho.MQTT_ERR_SUCCESS:
            raise LinkDown(paho.error_string(info.rc))
        if qos == 0:
            return
        confirmed = self._waiting.setdefault(info.mid, loop.create_future())
        try:
            async with asyncio.timeout(_PUBACK_S):
                await confirmed
        except TimeoutError as error:
            raise LinkDown(f"not confirmed within {_PUBACK_S:g} s") from error
        finally:
            self._waiting.pop(info.mid, None)
        self.confirmed_at = max(self.confirmed_at, sent_at)

    async def goodbye(self, topic: str, payload: bytes) -> None:
        """Say that we leave, then close; without a connection there is nothing to say."""
        try:
            await self.publish(topic, payload, retain=True)
        except LinkDown:
            return
        if self._client is not None:
            self._client.disconnect()

    # ------------------------------------------------------------------ one connection

    async def _one_connection(self) -> int:
        """Connect and stay until it ends; the reason code with which it did, or 0."""
        loop = asyncio.get_running_loop()
        self._gone = loop.create_future()
        try:
            host, port, context = self._where()
            client = self._new_client(context)
            await asyncio.to_thread(client.connect, host, port, KEEP_ALIVE_S, **self._connect())
        except (OSError, ValueError, AgentError) as error:
            self.trouble = f"cannot connect: {error}"
            log.info("%s", self.trouble)
            return 0
        self._client = client
        opened = client.socket()
        if not isinstance(opened, socket.socket):
            return 0
        # Else a small message waits for the broker's delayed ACK of the last one, 40 ms.
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        loop.add_reader(opened, self._readable, client)
        # What paho has queued while it connected in its thread (CONNECT) is not written yet.
        client.loop_write()
        clock = loop.create_task(self._tick(client), name="link.clock")
        try:
            return await self._gone
        finally:
            clock.cancel()
            self._drop(LinkDown("the connection broke"))

    def _new_client(self, context: ssl.SSLContext) -> paho.Client:
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=self._address.client_id,
            protocol=paho.MQTTv5,
            manual_ack=True,
            reconnect_on_failure=False,
        )
        client.tls_set_context(context)
        client.max_inflight_messages_set(_RECEIVE_MAXIMUM)
        will = Properties(PacketTypes.WILLMESSAGE)  # type: ignore[no-untyped-call]
        will.WillDelayInterval = _WILL_DELAY_S
        client.will_set(self._will[0], self._will[1], qos=1, retain=True, properties=will)
        client.on_connect = self._connected
        client.on_disconnect = self._disconnected
        client.on_message = lambda _, __, message: self._inbox.put_nowait((client, message))
        client.on_publish = self._published
        client.on_socket_register_write = self._register_write
        client.on_socket_unregister_write = self._unregister_write
        client.on_socket_close = _forget
        return client

    def _connect(self) -> dict[str, Any]:
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = SESSION_S
        properties.ReceiveMaximum = _RECEIVE_MAXIMUM
        return {"clean_start": False, "properties": properties}

    def _drop(self, why: LinkDown) -> None:
        self.up.clear()
        client, self._client = self._client, None
        if client is not None and (socket := client.socket()) is not None:
            _forget(client, None, socket)
            socket.close()
        for confirmed in self._waiting.values():
            if not confirmed.done():
                confirmed.set_exception(why)

    # ------------------------------------------------------------------ paho calls (in the loop)

    def _readable(self, client: paho.Client) -> None:
        while True:
            client.loop_read()
            socket = client.socket()
            # What TLS has decrypted already does not make the socket readable again.
            if not isinstance(socket, ssl.SSLSocket) or not socket.pending():
                return

    def _register_write(self, client: paho.Client, _: Any, socket: Any) -> None:
        if self._client is client:
            asyncio.get_running_loop().add_writer(socket, client.loop_write)

    def _unregister_write(self, client: paho.Client, _: Any, socket: Any) -> None:
        if self._client is client:
            asyncio.get_running_loop().remove_writer(socket)

    def _connected(
        self, client: paho.Client, _: Any, flags: Any, reason: Any, properties: Any
    ) -> None:
        if reason.is_failure:
            self.trouble = f"the broker refused the connection: {reason}"
            log.warning("%s", self.trouble)
            self._end(int(reason.value))
            return
        client.subscribe(self._address.down, qos=1)
        self.trouble = ""
        self.up.set()
        greeting = asyncio.get_running_loop().create_task(self._greet(), name="link.greet")
        greeting.add_done_callback(_report)

    def _disconnected(
        self, client: paho.Client, _: Any, flags: Any, reason: Any, properties: Any
    ) -> None:
        if self._gone is None or self._gone.done():  # why was said when it was refused
            return
        self.trouble = f"the connection ended: {reason}"
        log.info("%s", self.trouble)
        self._end(int(reason.value))

    def _published(
        self, client: paho.Client, _: Any, mid: int, reason: Any, properties: Any
    ) -> None:
        confirmed = self._waiting.get(mid)
        if confirmed is None or confirmed.done():
            return
        if reason.is_failure:
            confirmed.set_exception(LinkDown(f"the broker did not take it: {reason}"))
        else:
            confirmed.set_result(None)

    def _end(self, reason: int) -> None:
        if self._gone is not None and not self._gone.done():
            self._gone.set_result(reason)

    # ------------------------------------------------------------------ tasks of the link

    async def _tick(self, client: paho.Client) -> None:
        """Keep-alive: paho looks at its clock here."""
        while client.loop_misc() == paho.MQTT_ERR_SUCCESS:  # noqa: ASYNC110 - paho has no event
            await asyncio.sleep(KEEP_ALIVE_S / 6)
        self._end(0)

    async def _consume(self) -> None:
        """Handle messages in order; acknowledge each when its handler has committed it."""
        while True:
            client, message = await self._inbox.get()
            try:
                await self._handler(message.topic, message.payload)
            except Exception:  # not acknowledged: the broker sends it again after a reconnect
                log.exception("a message on %s could not be handled", message.topic)
                continue
            if client is self._client and message.qos:
                client.ack(message.mid, message.qos)


def _forget(client: paho.Client, _: Any, socket: Any) -> None:
    """The loop stops watching a socket before it is closed: its number may be used again."""
    if socket.fileno() >= 0:
        loop = asyncio.get_running_loop()
        loop.remove_reader(socket)
        loop.remove_writer(socket)


def _report(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.info("the greeting did not get through: %s", error)
