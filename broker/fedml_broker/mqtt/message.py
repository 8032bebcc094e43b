# SPDX-License-Identifier: Apache-2.0
"""A message on its way: its topic, itself, and one of its deliveries."""

from __future__ import annotations

from fedml_broker.mqtt.subscriptions import Group, Match

# What a message costs in memory beside its bytes; keeps a million empty messages from being free.
_OVERHEAD_BYTES = 200


class Topic:
    """A topic name that has been checked once, with what it matches as of `version`."""

    __slots__ = ("match", "name", "version", "wire")

    def __init__(self, name: str, encoded: bytes) -> None:
        self.name = name
        self.wire = len(encoded).to_bytes(2, "big") + encoded
        self.version = 0
        self.match = Match()


class Message:
    """One application message on its way to any number of sessions.

    Attributes:
        properties: Encoded, only those that are passed on unaltered.
        expires_at: On the endpoint's clock; None means never.
        row: Number in the journal, 0 while no stored session has it; `uses` counts those that do.
    """

    __slots__ = (
        "expires_at",
        "payload",
        "properties",
        "qos",
        "retain",
        "row",
        "size",
        "topic",
        "uses",
    )

    def __init__(
        self,
        topic: Topic,
        payload: bytes,
        qos: int,
        retain: bool = False,
        properties: bytes = b"",
        expires_at: float | None = None,
    ) -> None:
        self.topic = topic
        self.payload = payload
        self.qos = qos
        self.retain = retain
        self.properties = properties
        self.expires_at = expires_at
        self.size = len(payload) + len(properties) + _OVERHEAD_BYTES
        self.row = 0
        self.uses = 0


class Delivery:
    """One QoS 1 message for one session.

    Attributes:
        packet_id: 0 until it has been sent on a connection of this process.
        sent: It may have been sent before; the next time it carries DUP.
        row: Number in the journal, 0 when it is not there.
    """

    __slots__ = ("group", "idents", "message", "packet_id", "retain", "row", "sent")

    def __init__(
        self, message: Message, retain: bool, idents: bytes = b"", group: Group | None = None
    ) -> None:
        self.message = message
        self.retain = retain
        self.idents = idents
        self.group = group
        self.packet_id = 0
        self.row = 0
        self.sent = False
