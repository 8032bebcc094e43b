# SPDX-License-Identifier: Apache-2.0
"""One client's connection: bytes to packets, packets to calls, answers to bytes.

    open ──CONNECT──► serving ──goodbye | violation | silence | takeover | revoked──► closed

Everything a client can do wrong ends here, as a `Violation` with the reason code of the protocol.
"""

from __future__ import annotations

import logging
import ssl
from collections import deque
from typing import Protocol

import mqtt5

from fedml_broker.mqtt import wire
from fedml_broker.mqtt.clock import Timer
from fedml_broker.mqtt.message import Message, Topic
from fedml_broker.mqtt.pipe import Pipe, Pool
from fedml_broker.mqtt.router import Receipt, Router
from fedml_broker.mqtt.sessions import Session
from fedml_broker.mqtt.subscribing import Rights, subscribe, unsubscribe
from fedml_broker.mqtt.tls import Tls
from fedml_broker.mqtt.wire import MALFORMED, PROTOCOL, Violation

log = logging.getLogger(__name__)

NOT_AUTHORISED = 0x87
KEEP_ALIVE_TIMEOUT, TAKEN_OVER, RECEIVE_MAXIMUM = 0x8D, 0x8E, 0x93
ALIAS_INVALID, TOO_LARGE, QOS_UNSUPPORTED, UNSPECIFIED = 0x94, 0x95, 0x9B, 0x80


class Host(Rights, Pool, Protocol):
    """What a connection needs of the endpoint."""

    router: Router

    def tls(self) -> Tls | None: ...

    def may_publish(self, identity: str, topic: str) -> bool: ...

    def opened(self, connection: Connection) -> bool: ...

    def admit(self, connection: Connection, packet: mqtt5.ConnectPacket) -> bytes: ...

    def refused(self, connection: Connection, why: str) -> None: ...

    def left(self, connection: Connection, *, will: bool, expiry_s: int | None) -> None: ...

    def closed(self, connection: Connection) -> None: ...


class Connection(Pipe):
    """See the module's text.

    Attributes:
        session: The client's session once CONNECT was accepted, None before and after.
        identity: Who `authenticate` said it is.
        blocked: The client does not read: its QoS 0 messages are dropped, the others wait, and
            nothing more is read from it.
    """

    __slots__ = (
        "_acks",
        "_aliases",
        "_deaf",
        "_heard_at",
        "_host",
        "_timer",
        "identity",
        "keep_alive_s",
        "max_packet_bytes",
        "receive_maximum",
        "session",
    )

    def __init__(self, host: Host) -> None:
        super().__init__(host, host.tls())
        self._host = host
        self._acks: deque[Receipt] = deque()
        self._aliases: dict[int, Topic] | None = None
        self._deaf = False
        self._heard_at = 0.0
        self._timer: Timer | None = None
        self.session: Session | None = None
        self.identity = ""
        self.keep_alive_s = 0.0
        self.receive_maximum = 0xFFFF
        self.max_packet_bytes = 0xFFFFFFF

    @property
    def peer(self) -> str:
        """Who is at the other end, for log lines."""
        return f"{self.identity} at {self.address}" if self.identity else self.address

    # --- asyncio and the pipe call these ------------------------------------------------------

    def opened(self) -> None:
        limits = self._host.share.limits
        self._transport.set_write_buffer_limits(high=limits.write_high_water_bytes)
        if self._host.opened(self):
            self._timer = self._host.share.clock.call_later(
                limits.connect_timeout_s, self.close, 0, "no CONNECT came"
            )
        else:
            self.abort()

    def received(self, data: bytes) -> int:
        self._heard_at = self._host.share.clock.now()
        try:
            return self._consume(data)
        except Violation as violation:
            self._throw_out(violation)
        except Exception:  # ours, not the client's: it costs this one connection, nothing else
            log.exception("internal error while serving %s; its connection is closed", self.peer)
            self.close(UNSPECIFIED, "internal error")
        return len(data)

    def tls_failed(self, error: ssl.SSLError) -> None:
        if isinstance(error, ssl.SSLCertVerificationError):
            self._host.refused(self, f"its certificate was not accepted: {error.verify_message}")
        elif error.reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
            self._host.refused(self, "it came without a certificate")

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave(will=True)
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()
        self._acks.clear()
        self._host.closed(self)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._choose_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._choose_reading()
        if self.session is not None:
            self.session.pump()

    # --- the session and the router call these ------------------------------------------------

    def settled(self, receipt: Receipt) -> None:
        """An answer is known: send it, and those that had only waited for their turn."""
        if self.closing:
            return
        acks = self._acks
        while acks and acks[0].waiting <= 0:
            first = acks.popleft()
            self.send(wire.puback(first.packet_id, first.reason))
        self.handled()

    def handled(self) -> None:
        """A handler has finished: perhaps there is room for more."""
        if not self.reading:
            self._choose_reading()

    def stop_reading(self) -> None:
        """Take no more packets; what is under way is still answered."""
        self._deaf = True
        self._choose_reading()

    def close(self, reason: int, text: str = "") -> None:
        """End the connection from this side; the client is told, if it is one by now.

        Args:
            reason: Reason code for DISCONNECT; 0 closes without one.
        """
        if self.closing:
            return
        if reason and self.session is not None:
            self.send(_disconnect(reason, text, self.max_packet_bytes))
        log.info("closing the connection of %s: %s", self.peer, text or f"reason 0x{reason:02X}")
        self._leave(will=True)
        self._end()

    # --- packets ------------------------------------------------------------------------------

    def _consume(self, data: bytes) -> int:
        """Serve every whole packet in `data`; how many bytes that was."""
        at, end = 0, len(data)
        largest = self._host.share.limits.max_packet_bytes
        while end - at >= 2:
            first, length, body = data[at], data[at + 1], at + 2
            session = self.session
            if session is None and first >> 4 != wire.CONNECT:
                raise Violation(PROTOCOL, "the first packet is not CONNECT")
            if length > 0x7F:
                length, body = wire.read_varint(data, at + 1, end)
                if not body:
                    self._need = end - at + 1
                    break
            stop = body + length
            if stop - at > largest:
                raise Violation(TOO_LARGE, f"a packet of {stop - at} bytes; {largest} are allowed")
            if stop > end:
                self._need = stop - at
                break
            if session is None:
                self._connect(data, at, body, stop)
            elif first >> 4 == wire.PUBLISH:
                self._publish(session, first, data, at, body, stop)
            elif first == 0x40 and length == 2:
                session.acked(data[body] << 8 | data[body + 1])
            else:
                self._serve(session, data, at, body, stop)
            if self.closing:
                return end
            at = stop
        return at

    def _connect(self, data: bytes, at: int, body: int, stop: int) -> None:
        packet = wire.read(data, at, body, stop)
        assert isinstance(packet, mqtt5.ConnectPacket)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        answer = self._host.admit(self, packet)
        self.send_first(answer)
        if self.session is None:
            self._end()
        elif self.keep_alive_s:
            self._timer = self._host.share.clock.call_later(self.keep_alive_s, self._listen)

    def _publish(
        self, session: Session, first: int, data: bytes, at: int, body: int, stop: int
    ) -> None:
        """The hot path: a PUBLISH without properties is taken apart here, not by the codec."""
        host = self._host
        qos = first >> 1 & 3
        start = body + 2
        end = start + (data[body] << 8 | data[body + 1]) if start < stop else stop
        after = end + 2 if qos else end
        properties, expires_at = b"", None
        if qos > 1:
            raise Violation(MALFORMED if qos == 3 else QOS_UNSUPPORTED, f"a PUBLISH with QoS {qos}")
        if after >= stop:
            raise Violation(MALFORMED, "a PUBLISH that ends too early")
        if not data[after] and end > start:
            topic = host.router.topic(data[start:end])
            payload = data[after + 1 : stop]
        else:
            packet = wire.read(data, at, body, stop)
            assert isinstance(packet, mqtt5.PublishPacket)
            if packet.subscription_ids:
                raise Violation(PROTOCOL, "a client may not send subscription identifiers")
            topic = self._resolve(packet.topic_alias, data[start:end])
            payload = packet.payload
            properties = wire.forwarded_properties(packet)
            if packet.message_expiry_interval is not None:
                expires_at = host.share.clock.now() + packet.message_expiry_interval
        host.share.counters.received += 1
        allowed = topic.name[0] != "$" and host.may_publish(self.identity, topic.name)
        if not qos:
            if allowed:
                message = Message(topic, payload, 0, bool(first & 1), properties, expires_at)
                host.router.route(message, session)
                self._throttle(session)
            else:
                self._count_refused(topic)
            return
        packet_id = data[end] << 8 | data[end + 1]
        if not packet_id:
            raise Violation(PROTOCOL, "a QoS 1 PUBLISH with packet identifier 0")
        acks = self._acks
        if len(acks) >= host.share.limits.receive_maximum:
            raise Violation(RECEIVE_MAXIMUM, "more unacknowledged messages than were allowed")
        outcome: Receipt | int = NOT_AUTHORISED
        if allowed:
            message = Message(topic, payload, 1, bool(first & 1), properties, expires_at)
            outcome = host.router.route(message, session)
        else:
            self._count_refused(topic)
        if isinstance(outcome, int):
            if not acks:
                self.send(wire.puback(packet_id, outcome))
                return
            outcome = Receipt(outcome)
        outcome.packet_id = packet_id
        outcome.owner = self
        acks.append(outcome)
        self._throttle(session)

    def _serve(self, session: Session, data: bytes, at: int, body: int, stop: int) -> None:
        """Everything that is not PUBLISH, a short PUBACK, or the first CONNECT."""
        kind = data[at] >> 4
        if kind not in _SERVED:
            raise Violation(PROTOCOL, f"a client may not send packet type {kind} here")
        packet = wire.read(data, at, body, stop)
        if isinstance(packet, mqtt5.PingReqPacket):
            self.send(wire.PINGRESP)
        elif isinstance(packet, mqtt5.PubAckPacket):
            session.acked(packet.packet_id)
        elif isinstance(packet, mqtt5.SubscribePacket):
            self._answer(session, subscribe(self._host, session, self.identity, packet))
        elif isinstance(packet, mqtt5.UnsubscribePacket):
            self._answer(session, unsubscribe(self._host, session, packet))
        elif isinstance(packet, mqtt5.DisconnectPacket):
            self._goodbye(session, packet)

    def _answer(self, session: Session, frame: bytes) -> None:
        """Send an answer that must not come before what it promises is on the disk."""
        if session.stored:
            receipt = Receipt(waiting=1)
            receipt.owner = _Later(self, frame)
            self._host.share.journal.after_commit(receipt)
        else:
            self.send(frame)

    def _goodbye(self, session: Session, packet: mqtt5.DisconnectPacket) -> None:
        expiry_s = packet.session_expiry_interval
        if expiry_s and not session.expiry_s:
            raise Violation(PROTOCOL, "a session that was to end with its connection cannot stay")
        self._leave(will=int(packet.reason_code) != 0, expiry_s=expiry_s)
        self._end()

    # --- smaller steps ------------------------------------------------------------------------

    def _resolve(self, alias: int | None, name: bytes) -> Topic:
        """The topic of a PUBLISH that may use or set a topic alias (MQTT 5, 3.3.2.3.4)."""
        if alias is None:
            return self._host.router.topic(name)
        if not 0 < alias <= self._host.share.limits.topic_alias_maximum:
            raise Violation(ALIAS_INVALID, f"topic alias {alias} was not offered")
        if self._aliases is None:
            self._aliases = {}
        if name:
            self._aliases[alias] = self._host.router.topic(name)
        elif alias not in self._aliases:
            raise Violation(PROTOCOL, f"topic alias {alias} was never set")
        return self._aliases[alias]

    def _count_refused(self, topic: Topic) -> None:
        self._host.share.counters.not_authorised += 1
        log.debug("%s may not publish to %r", self.peer, topic.name)

    def _throttle(self, session: Session) -> None:
        if session.handling >= self._host.share.limits.max_handling and self.reading:
            self._choose_reading()

    def _choose_reading(self) -> None:
        """Read from the client unless it does not read itself or keeps too many handlers busy."""
        limit = self._host.share.limits.max_handling
        busy = self.session.handling if self.session is not None else 0
        enough = limit if self.reading else limit // 2 or 1
        self.set_reading(not (self.blocked or self._deaf or busy >= enough))

    def _listen(self) -> None:
        """The keep-alive timer: has anything come since it was set?"""
        now = self._host.share.clock.now()
        if not self.reading and not self.blocked:
            self._heard_at = now  # it may well have spoken: it was we who did not listen
        quiet_s = now - self._heard_at
        if quiet_s >= self.keep_alive_s:
            self.close(KEEP_ALIVE_TIMEOUT, f"nothing heard for {quiet_s:.0f} s")
        else:
            self._timer = self._host.share.clock.call_later(
                self.keep_alive_s - quiet_s, self._listen
            )

    def _throw_out(self, violation: Violation) -> None:
        self._host.share.counters.violations += 1
        log.warning("%s broke the protocol: %s", self.peer, violation)
        if self.session is None and violation.code == wire.UNSUPPORTED:
            reason = mqtt5.ConnAckReasonCode.UNSUPPORTED_PROTOCOL_VERSION
            self.send(mqtt5.ConnAckPacket(reason_code=reason).write())
        self.close(violation.code, str(violation))

    def _leave(self, *, will: bool, expiry_s: int | None = None) -> None:
        if self.session is not None:
            self._host.left(self, will=will, expiry_s=expiry_s)
            self.session = None

    def _end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self.end()
        # A peer that does not read would keep the socket open for ever.
        self._timer = self._host.share.clock.call_later(
            self._host.share.limits.linger_s, self.abort
        )


_SERVED = (wire.PUBACK, wire.SUBSCRIBE, wire.UNSUBSCRIBE, wire.PINGREQ, wire.DISCONNECT)


class _Later:
    """A frame to send when a commit has succeeded and the connection is still there."""

    __slots__ = ("_connection", "_frame")

    def __init__(self, connection: Connection, frame: bytes) -> None:
        self._connection = connection
        self._frame = frame

    def settled(self, receipt: Receipt) -> None:
        if not receipt.reason and self._connection.session is not None:
            self._connection.send(self._frame)


def _disconnect(reason: int, text: str, max_bytes: int) -> bytes:
    code = mqtt5.DisconnectReasonCode(reason)
    frame = mqtt5.DisconnectPacket(reason_code=code, reason_str=text or None).write()
    # The reason string is left out when the client could not take it (MQTT 5, 3.14.2.2.3).
    return frame if len(frame) <= max_bytes else mqtt5.DisconnectPacket(reason_code=code).write()
