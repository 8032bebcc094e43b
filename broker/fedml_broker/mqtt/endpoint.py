# SPDX-License-Identifier: Apache-2.0
"""The embedded MQTT 5 endpoint: the broker's own post office, in the broker's own process.

It is not a general-purpose MQTT broker: it serves this system's protocol with QoS 0 and 1, and
keeps one promise that others do not: what was acknowledged is on the disk.

    clients ◄─► Connection ◄─► Session ◄── Router ──► handlers of this process
                    ▲             │ ▲         ▲
                Admission       Journal    publish()

The order in `__aexit__` is the shutdown: no new connections, nothing more is read, handlers end,
what they allow is committed and acknowledged, clients are told, the file is closed.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import ssl
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fedml_broker.mqtt import Handler, Refused, Unavailable
from fedml_broker.mqtt.admission import Admission, Authenticate
from fedml_broker.mqtt.clock import Clock, SystemClock
from fedml_broker.mqtt.connection import Connection
from fedml_broker.mqtt.journal import Journal
from fedml_broker.mqtt.limits import Counters, Limits, Refusal
from fedml_broker.mqtt.message import Message
from fedml_broker.mqtt.pipe import Pipe
from fedml_broker.mqtt.registry import Registry
from fedml_broker.mqtt.router import QUOTA, Receipt, Router
from fedml_broker.mqtt.sessions import Surroundings
from fedml_broker.mqtt.subscriptions import split_filter
from fedml_broker.mqtt.tls import Tls
from fedml_broker.mqtt.wills import Wills
from fedml_broker.mqtt.wire import Violation

__all__ = ["Authenticate", "Counters", "Endpoint", "Limits", "Refusal"]

log = logging.getLogger(__name__)

SHUTTING_DOWN, ADMINISTRATIVE = 0x8B, 0x98
_BUFFER_BYTES = 256 * 1024
_BACKLOG = 1024
# Connections that have not said who they are may exceed the limit by this factor and then some;
# within it they are told why they cannot come in.
_UNKNOWN_FACTOR, _UNKNOWN_EXTRA = 1.1, 64


class Endpoint:
    """An implementation of `Post` that is its own broker.

    Args:
        path: Its SQLite file, made if missing. One process at a time.
        authenticate: Given CONNECT and the verified client certificate (as `ssl` describes it, None
            without one), says who the client is, or a `Refusal`. Called in the event loop: quick.
        may_publish: Whether an identity may publish to a topic.
        may_subscribe: Whether an identity may subscribe to a filter; for a shared subscription it
            is asked about the filter inside. Asked again whenever a session is resumed.
        refused: Is told of who was not let in for a reason of his own: his verified certificate
            (see `authenticate`), why, and the address. Called in the event loop: quick.
        host: Address to listen on. Anything but loopback needs `ssl_context`.
        port: 0 lets the system choose; `.port` tells.
        ssl_context: Decides about certificates, the clients' too.

    Raises:
        ValueError: Listening in the open without TLS.
    """

    def __init__(
        self,
        path: Path,
        *,
        authenticate: Authenticate,
        may_publish: Callable[[str, str], bool],
        may_subscribe: Callable[[str, str], bool],
        refused: Callable[
            [dict[str, Any] | None, str, str], None
        ] = lambda certificate, why, address: None,
        host: str = "127.0.0.1",
        port: int = 0,
        ssl_context: ssl.SSLContext | None = None,
        limits: Limits | None = None,
        clock: Clock | None = None,
    ) -> None:
        if ssl_context is None and not _is_loopback(host):
            raise ValueError(f"listening on {host} needs TLS; give an SSL context or use 127.0.0.1")
        limits, clock = limits or Limits(), clock or SystemClock()
        journal = Journal(path, clock)
        self.share = Surroundings(clock, limits, journal, Counters())
        self.router = Router(self.share)
        self._wills = Wills(self.share, lambda message: self.router.route(message, None))
        self.registry = Registry(self.share, self.router, self._wills.session_ended)
        self.buffer = memoryview(bytearray(_BUFFER_BYTES))
        self.may_publish = _closed_on_error(may_publish)
        self.may_subscribe = _closed_on_error(may_subscribe)
        self._admission = Admission(
            self.share,
            self.router,
            self.registry,
            self._wills,
            authenticate=authenticate,
            may_publish=self.may_publish,
            may_subscribe=self.may_subscribe,
            refused=self.refused,
        )
        self.admit = self._admission.admit
        self._on_refused = refused
        self._address = host, port
        self._ssl_context = ssl_context
        self._server: asyncio.Server | None = None
        self._connections: set[Connection] = set()
        self._emptied = asyncio.Event()
        self._dirty: list[Pipe] = []
        self._loop: asyncio.AbstractEventLoop
        self._handlers: list[tuple[str, Handler]] = []

    @property
    def port(self) -> int:
        """The port it listens on.

        Raises:
            RuntimeError: It does not listen.
        """
        if self._server is None:
            raise RuntimeError("the endpoint is not serving; enter it first")
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    @property
    def connected(self) -> bool:
        """Whether it serves."""
        return self._server is not None

    @property
    def counters(self) -> Counters:
        """What has happened so far."""
        return self.share.counters

    def subscribe(self, topic_filter: str, handler: Handler) -> None:
        """See `Post.subscribe`. What topics retain is given to the handler when serving begins."""
        if self._server is not None:
            raise RuntimeError("subscribe before the endpoint serves")
        group, _ = split_filter(topic_filter, self.share.limits.max_topic_levels)
        if group:
            raise ValueError(f"{topic_filter!r}: handlers do not share")
        self.router.subscriptions.add_handler(topic_filter, handler)
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
        """See `Post.publish`. The topic may be one that clients cannot publish to (`$...`)."""
        if self._server is None:
            raise Unavailable("the endpoint is not serving: nothing was sent")
        if qos not in (0, 1):
            raise Refused(f"QoS {qos} is not served here: use 0 or 1", 0x9B)
        most = self.share.limits.max_packet_bytes
        if len(topic) + len(payload) > most:
            raise Refused(
                f"{len(payload)} bytes for {topic} are more than a message may have ({most}):"
                " send a reference to a blob",
                0x95,
            )
        try:
            known = self.router.topic(topic.encode())
        except Violation as violation:
            raise Refused(str(violation), violation.code) from None
        except UnicodeEncodeError:
            raise Refused(f"{topic!r} is not text", 0x90) from None
        expires_at = None if expiry_s is None else self.share.clock.now() + expiry_s
        message = Message(known, payload, qos, retain, b"", expires_at)
        outcome = self.router.route(message, None, own=True)
        if isinstance(outcome, Receipt):
            if not qos:
                return
            waiting = _Publication(self._loop.create_future())
            outcome.owner = waiting
            outcome = await waiting.reason
        if outcome == QUOTA:
            why = "the disk cannot be written" if self.share.journal.failing else "a queue is full"
            raise Unavailable(f"{topic} was not taken: {why}; try again later")

    async def disconnect(self, client_id: str, reason: str) -> None:
        """See `Post.disconnect`. Its will, if it left one, is published after its delay."""
        session = self.registry.get(client_id)
        if session is not None and session.line is not None:
            session.line.close(ADMINISTRATIVE, reason)

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        stored = await self.share.journal.open()
        try:
            self.router.restore(stored["retained"])
            self.registry.restore(stored)
            self._wills.restore(stored["will"], self.router.known)
            for topic_filter, handler in self._handlers:
                self.router.greet(topic_filter, handler)
            await self.share.journal.drain()
            self._server = await self._loop.create_server(
                lambda: Connection(self), *self._address, backlog=_BACKLOG
            )
        except BaseException:
            self.registry.stop()
            self._wills.stop()
            await self.share.journal.close()
            raise
        log.info("MQTT on %s port %d", self._address[0], self.port)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        server, self._server = self._server, None
        if server is None:
            return
        server.close()
        for connection in list(self._connections):
            connection.stop_reading()
        await self.router.finish_handling(self.share.limits.drain_s)
        await self.share.journal.drain()
        for connection in list(self._connections):
            connection.close(SHUTTING_DOWN, "the broker is shutting down")
        if self._connections:
            self._emptied.clear()
            await self._emptied.wait()
        self.registry.stop()
        self._wills.stop()
        await self.share.journal.close()

    # --- connections call these ---------------------------------------------------------------

    def tls(self) -> Tls | None:
        """The server's side of a new connection; None where they are plain."""
        return None if self._ssl_context is None else Tls(self._ssl_context)

    def opened(self, connection: Connection) -> bool:
        """Count a new connection; False when there are too many to even listen to it."""
        self._connections.add(connection)
        self.counters.connections += 1
        most = self.share.limits.max_connections * _UNKNOWN_FACTOR + _UNKNOWN_EXTRA
        return self._server is not None and self.counters.connections <= most

    def refused(self, connection: Connection, why: str) -> None:
        """Somebody was not let in."""
        self._on_refused(connection.certificate, why, connection.address.rpartition(":")[0])

    def left(self, connection: Connection, *, will: bool, expiry_s: int | None) -> None:
        """A client's connection is over: what becomes of its will and its session."""
        session = connection.session
        if session is None or session.line is not connection:
            return
        if expiry_s is None:
            expiry_s = session.expiry_s
        self.registry.leave(session, expiry_s)
        if not will:
            self._wills.disarm(session.client)
        elif self._server is not None:  # in a shutdown it stays armed, for the next process
            self._wills.release(session.client, expiry_s)

    def closed(self, connection: Connection) -> None:
        """The socket is gone."""
        self._connections.discard(connection)
        self.counters.connections -= 1
        if not self._connections:
            self._emptied.set()

    def flush_soon(self, pipe: Pipe) -> None:
        """Write a connection's packets at the end of this turn of the event loop."""
        if not self._dirty:
            self._loop.call_soon(self._flush)
        self._dirty.append(pipe)

    def _flush(self) -> None:
        dirty, self._dirty = self._dirty, []
        for pipe in dirty:
            pipe.flush()


class _Publication:
    """The broker's own message, waiting for its answer."""

    def __init__(self, reason: asyncio.Future[int]) -> None:
        self.reason = reason

    def settled(self, receipt: Receipt) -> None:
        if not self.reason.done():
            self.reason.set_result(receipt.reason)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _closed_on_error(check: Callable[[str, str], bool]) -> Callable[[str, str], bool]:
    """A check that fails says no."""

    def checked(identity: str, topic: str) -> bool:
        try:
            return check(identity, topic)
        except Exception:  # the one place: a broken check must not take the endpoint down
            log.exception("the access check of %s for %r failed by our own fault", identity, topic)
            return False

    return checked
