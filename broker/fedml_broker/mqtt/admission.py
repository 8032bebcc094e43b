# SPDX-License-Identifier: Apache-2.0
"""CONNECT: who may come in, under which client id, with which session and will.

The identity comes from the caller's `authenticate` alone. A client id must be that identity (an
empty one is given it), so nobody can take over another's session, queue or will.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import mqtt5

from fedml_broker.mqtt.connection import TAKEN_OVER, Connection
from fedml_broker.mqtt.limits import NEVER, Refusal
from fedml_broker.mqtt.registry import Registry
from fedml_broker.mqtt.router import Router
from fedml_broker.mqtt.sessions import Surroundings
from fedml_broker.mqtt.wills import Will, Wills
from fedml_broker.mqtt.wire import PROTOCOL, Violation, forwarded_properties

log = logging.getLogger(__name__)

Authenticate = Callable[[mqtt5.ConnectPacket, dict[str, Any] | None], "str | Refusal"]

NOT_AUTHORISED, CLIENT_ID_INVALID, BUSY, BAD_METHOD, NO_QOS_2 = 0x87, 0x85, 0x89, 0x8C, 0x9B
UNSPECIFIED = 0x80
_NOT_ITS_FAULT = (BUSY, UNSPECIFIED)
_KEEP_ALIVE_FACTOR = 1.5  # MQTT 5, 3.1.2.10


class Admission:
    """The door. See the module's text."""

    def __init__(
        self,
        share: Surroundings,
        router: Router,
        registry: Registry,
        wills: Wills,
        *,
        authenticate: Authenticate,
        may_publish: Callable[[str, str], bool],
        may_subscribe: Callable[[str, str], bool],
        refused: Callable[[Connection, str], None],
    ) -> None:
        self._share = share
        self._router = router
        self._registry = registry
        self._wills = wills
        self._authenticate = authenticate
        self._may_publish = may_publish
        self._may_subscribe = may_subscribe
        self._refused = refused

    def admit(self, connection: Connection, packet: mqtt5.ConnectPacket) -> bytes:
        """Give a connection its session, or not; the CONNACK.

        Raises:
            Violation: The packet breaks a rule of the protocol.
        """
        if not packet.receive_max or packet.max_packet_size == 0:
            raise Violation(PROTOCOL, "a Receive Maximum or Maximum Packet Size of 0")
        identity = self._identify(connection, packet)
        if isinstance(identity, Refusal):
            return self._refuse(connection, identity)
        connection.identity = identity
        will = self._will(identity, packet.will)
        if isinstance(will, Refusal):
            return self._refuse(connection, will)
        return self._enter(connection, packet, identity, will)

    def _enter(
        self,
        connection: Connection,
        packet: mqtt5.ConnectPacket,
        identity: str,
        will: Will | None,
    ) -> bytes:
        limits = self._share.limits
        before = self._registry.get(identity)
        if before is not None and before.line is not None:
            before.line.close(TAKEN_OVER, "the same client connected again")
        expiry_s = packet.session_expiry_interval
        if limits.max_session_expiry_s != NEVER:
            expiry_s = min(expiry_s, limits.max_session_expiry_s)
        session, present = self._registry.open(
            identity,
            clean_start=packet.clean_start,
            expiry_s=expiry_s,
            may_subscribe=lambda topic_filter: self._may_subscribe(identity, topic_filter),
        )
        self._wills.arm(identity, will)
        keep_alive_s = packet.keep_alive
        if not 0 < keep_alive_s <= limits.max_keep_alive_s:
            keep_alive_s = limits.max_keep_alive_s
        connection.keep_alive_s = keep_alive_s * _KEEP_ALIVE_FACTOR
        connection.receive_maximum = packet.receive_max
        connection.max_packet_bytes = packet.max_packet_size or connection.max_packet_bytes
        connection.session = session
        answer = mqtt5.ConnAckPacket(
            session_present=present,
            session_expiry_interval=(
                expiry_s if expiry_s != packet.session_expiry_interval else None
            ),
            assigned_client_id=None if packet.client_id else identity,
            server_keep_alive=keep_alive_s if keep_alive_s != packet.keep_alive else None,
            receive_max=limits.receive_maximum,
            topic_alias_max=limits.topic_alias_maximum,
            max_qos=mqtt5.QoS.AT_LEAST_ONCE,
            max_packet_size=limits.max_packet_bytes,
        ).write()
        # CONNACK is put in front of what this sends.
        session.go_online(connection)
        self._registry.came(session)
        self._share.counters.connected += 1
        return answer

    def _identify(self, connection: Connection, packet: mqtt5.ConnectPacket) -> str | Refusal:
        if self._share.counters.connections > self._share.limits.max_connections:
            return Refusal(BUSY, "too many connections")
        if packet.authentication_method is not None:
            return Refusal(BAD_METHOD, "no extended authentication is offered")
        try:
            identity = self._authenticate(packet, connection.certificate)
        except Exception:  # the one place: a broken check lets nobody in and takes nothing down
            log.exception("the authentication of %s failed by our own fault", connection.peer)
            return Refusal(UNSPECIFIED, "the broker could not check who you are")
        if isinstance(identity, str) and packet.client_id not in ("", identity):
            return Refusal(CLIENT_ID_INVALID, "the client id must be your own identity")
        return identity

    def _will(self, identity: str, will: mqtt5.Will | None) -> Will | Refusal | None:
        if will is None:
            return None
        if int(will.qos) > 1:
            return Refusal(NO_QOS_2, "wills may have QoS 0 or 1")
        topic = self._router.topic(will.topic.encode())
        if topic.name.startswith("$") or not self._may_publish(identity, topic.name):
            return Refusal(NOT_AUTHORISED, f"no will may be left for {topic.name[:80]!r}")
        return Will(
            topic=topic,
            payload=will.payload or b"",
            qos=int(will.qos),
            retain=will.retain,
            properties=forwarded_properties(will),
            delay_s=will.will_delay_interval,
            expiry_s=will.message_expiry_interval,
        )

    def _refuse(self, connection: Connection, refusal: Refusal) -> bytes:
        self._share.counters.refused += 1
        why = refusal.text or f"0x{refusal.reason:02X}"
        log.info("refused %s: %s", connection.peer, why)
        if refusal.reason not in _NOT_ITS_FAULT:
            self._refused(connection, why)
        return mqtt5.ConnAckPacket(
            reason_code=mqtt5.ConnAckReasonCode(refusal.reason), reason_str=refusal.text or None
        ).write()
