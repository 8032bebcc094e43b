# SPDX-License-Identifier: Apache-2.0
"""SUBSCRIBE and UNSUBSCRIBE: which wishes are granted, and the answer to each."""

import logging
from typing import Protocol

import mqtt5

from fedml_broker.mqtt.registry import Registry
from fedml_broker.mqtt.sessions import Session, Surroundings
from fedml_broker.mqtt.subscriptions import split_filter
from fedml_broker.mqtt.wire import PROTOCOL, Violation

log = logging.getLogger(__name__)

NO_SUBSCRIPTION, NOT_AUTHORISED, FILTER_INVALID, QUOTA = 0x11, 0x87, 0x8F, 0x97


class Rights(Protocol):
    """What is asked of the endpoint here."""

    share: Surroundings
    registry: Registry

    def may_subscribe(self, identity: str, topic_filter: str) -> bool: ...


def subscribe(
    host: Rights, session: Session, identity: str, packet: mqtt5.SubscribePacket
) -> bytes:
    """Add what is allowed, refuse the rest; the SUBACK.

    Raises:
        Violation: The packet asks for something that the protocol rules out.
    """
    if not packet.topic_filters or not packet.packet_id:
        raise Violation(PROTOCOL, "a SUBSCRIBE without a filter or a packet identifier")
    if packet.subscription_id == 0:
        raise Violation(PROTOCOL, "a subscription identifier of 0")
    codes: list[int] = []
    for wish in packet.topic_filters:
        if wish.no_local and wish.pattern.startswith("$share/"):
            raise Violation(PROTOCOL, "No Local on a shared subscription")
        qos = min(int(wish.max_qos), 1)
        reason = _refusal(host, session, identity, wish.pattern)
        if not reason:
            host.registry.subscribe(
                session,
                wish.pattern,
                qos=qos,
                no_local=wish.no_local,
                retain_as_published=wish.retain_as_published,
                retain_handling=int(wish.retain_handling),
                ident=packet.subscription_id or 0,
            )
        codes.append(reason or qos)
    reasons = [mqtt5.SubAckReasonCode(code) for code in codes]
    return mqtt5.SubAckPacket(packet.packet_id, reasons).write()


def unsubscribe(host: Rights, session: Session, packet: mqtt5.UnsubscribePacket) -> bytes:
    """Remove subscriptions; the UNSUBACK.

    Raises:
        Violation: The packet names no filter or has no number.
    """
    if not packet.patterns or not packet.packet_id:
        raise Violation(PROTOCOL, "an UNSUBSCRIBE without a filter or a packet identifier")
    reasons = [
        mqtt5.UnsubAckReasonCode(0 if host.registry.unsubscribe(session, one) else NO_SUBSCRIPTION)
        for one in packet.patterns
    ]
    return mqtt5.UnsubAckPacket(packet.packet_id, reasons).write()


def _refusal(host: Rights, session: Session, identity: str, pattern: str) -> int:
    """The reason code against a filter, 0 if there is none."""
    limits = host.share.limits
    try:
        _, topic_filter = split_filter(pattern, limits.max_topic_levels)
    except ValueError as error:
        log.info("%s subscribes in vain: %s", identity, error)
        return FILTER_INVALID
    if not host.may_subscribe(identity, topic_filter):
        log.info("%s may not subscribe to %r", identity, topic_filter)
        return NOT_AUTHORISED
    room = len(session.subscriptions) < limits.max_subscriptions
    return 0 if room or pattern in session.subscriptions else QUOTA
