# SPDX-License-Identifier: Apache-2.0
"""MQTT 5 bytes: what the `mqtt5` codec leaves to its user.

The codec reads one whole packet at a time. Three things remain, and live here: where a packet
ends, whether its strings are text (the codec panics on bytes that are not UTF-8, printing a Rust
trace to stderr, so no such packet may reach it), and the two packets that are nearly all traffic,
PUBLISH and PUBACK, which are built by hand because that is several times cheaper.

A `Violation` is always the client's fault; its code is the reason in DISCONNECT (or CONNACK).
"""

from typing import Protocol

import mqtt5

MALFORMED, PROTOCOL, UNSUPPORTED = 0x81, 0x82, 0x84

CONNECT, PUBLISH, PUBACK, SUBSCRIBE, UNSUBSCRIBE = 1, 3, 4, 8, 10
PINGREQ, DISCONNECT, AUTH = 12, 14, 15

PINGRESP = b"\xd0\x00"

# Property identifier -> how many bytes it has, or one of the letters below (MQTT 5, table 2-4).
_TEXT, _BINARY, _PAIR, _VARINT = -1, -2, -3, -4
_PROPERTY = {
    **dict.fromkeys((0x01, 0x17, 0x19, 0x24, 0x25, 0x28, 0x29, 0x2A), 1),
    **dict.fromkeys((0x13, 0x21, 0x22, 0x23), 2),
    **dict.fromkeys((0x02, 0x11, 0x18, 0x27), 4),
    **dict.fromkeys((0x03, 0x08, 0x12, 0x15, 0x1A, 0x1C, 0x1F), _TEXT),
    **dict.fromkeys((0x09, 0x16), _BINARY),
    0x26: _PAIR,
    0x0B: _VARINT,
}


class Violation(Exception):
    """A client broke the protocol: the connection ends with this reason code."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


def varint(value: int) -> bytes:
    """A Variable Byte Integer (MQTT 5, 1.5.5), `value` < 2**28."""
    if value < 0x80:
        return bytes((value,))
    if value < 0x4000:
        return bytes((value & 0x7F | 0x80, value >> 7))
    if value < 0x200000:
        return bytes((value & 0x7F | 0x80, value >> 7 & 0x7F | 0x80, value >> 14))
    return bytes(
        (value & 0x7F | 0x80, value >> 7 & 0x7F | 0x80, value >> 14 & 0x7F | 0x80, value >> 21)
    )


def read_varint(data: bytes, at: int, stop: int) -> tuple[int, int]:
    """The Variable Byte Integer at `at` and the position after it; (0, 0) if it passes `stop`.

    Raises:
        Violation: It has more than four bytes.
    """
    value = 0
    for index in range(4):
        if at + index >= stop:
            return 0, 0
        byte = data[at + index]
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, at + index + 1
    raise Violation(MALFORMED, "a length of more than four bytes")


def read(data: bytes, start: int, body: int, stop: int) -> mqtt5.Packet:
    """Decode the packet `data[start:stop]`, whose fixed header ends at `body`.

    Raises:
        Violation: It is malformed or breaks a rule of the protocol.
    """
    _check_text(data, start, body, stop)
    try:
        packet, size = mqtt5.read(memoryview(data)[start:stop])
    except (ValueError, IndexError) as error:
        text = str(error)
        rule = text.startswith(("Duplicate", "Topic alias"))
        raise Violation(PROTOCOL if rule else MALFORMED, text) from None
    if size != stop - start:
        raise Violation(MALFORMED, "bytes left over after the last field")
    return packet


def text(data: bytes) -> str:
    """A UTF-8 Encoded String's content (MQTT 5, 1.5.4).

    Raises:
        Violation: Not UTF-8, or with a null character in it.
    """
    try:
        decoded = data.decode()
    except UnicodeDecodeError:
        raise Violation(MALFORMED, "a string that is not UTF-8") from None
    if "\0" in decoded:
        raise Violation(MALFORMED, "a string with a null character")
    return decoded


def _check_text(data: bytes, start: int, at: int, stop: int) -> None:
    """Refuse a packet with a string that is not text, or with fields beyond its end."""
    kind = data[start] >> 4
    if kind == CONNECT:
        at = _skip(data, at, stop, _TEXT)
        if at < stop and data[at] != 5:
            raise Violation(UNSUPPORTED, f"protocol version {data[at]}; only MQTT 5 is spoken here")
        flags = data[at + 1] if at + 1 < stop else 0
        at = _check_properties(data, at + 4, stop)
        at = _skip(data, at, stop, _TEXT)
        if flags & 0x04:
            at = _check_properties(data, at, stop)
            at = _skip(data, _skip(data, at, stop, _TEXT), stop, _BINARY)
        if flags & 0x80:
            at = _skip(data, at, stop, _TEXT)
    elif kind == PUBLISH:
        at = _skip(data, at, stop, _TEXT)
        _check_properties(data, at + 2 if data[start] & 0x06 else at, stop)
    elif kind in (SUBSCRIBE, UNSUBSCRIBE):
        at = _check_properties(data, at + 2, stop)
        while at < stop:
            at = _skip(data, at, stop, _TEXT) + (kind == SUBSCRIBE)
    elif kind == PUBACK and stop - at > 3:
        _check_properties(data, at + 3, stop)
    elif kind in (DISCONNECT, AUTH) and stop - at > 1:
        _check_properties(data, at + 1, stop)


def _check_properties(data: bytes, at: int, stop: int) -> int:
    length, at = read_varint(data, at, stop)
    end = at + length
    if not at or end > stop:
        raise Violation(MALFORMED, "properties run over the end of the packet")
    while at < end:
        kind = _PROPERTY.get(data[at])
        if kind is None:
            raise Violation(MALFORMED, f"unknown property 0x{data[at]:02X}")
        at = _skip(data, at + 1, end, kind)
    return end


def _skip(data: bytes, at: int, stop: int, kind: int) -> int:
    """The position after the field of that kind at `at`."""
    if kind == _VARINT:
        _, end = read_varint(data, at, stop)
        end = end or stop + 1
    elif kind > 0:
        end = at + kind
    else:
        end = at + 2 + int.from_bytes(data[at : at + 2], "big")
    if end > stop or (kind < 0 and kind != _VARINT and at + 2 > stop):
        raise Violation(MALFORMED, "a field runs over the end of its packet")
    if kind in (_TEXT, _PAIR):
        text(data[at + 2 : end])
    return _skip(data, end, stop, _TEXT) if kind == _PAIR else end


class Described(Protocol):
    """What PUBLISH and a will have in common beside topic and payload."""

    payload_format_indicator: int
    content_type: str | None
    response_topic: str | None
    correlation_data: bytes | None
    user_properties: list[tuple[str, str]]


def forwarded_properties(packet: Described) -> bytes:
    """The properties that a server passes on unaltered (MQTT 5, 3.3.2.3), encoded, without length.

    Message expiry, topic alias and subscription identifiers are not among them: they belong to one
    hop and are written anew for each delivery.
    """
    frame = mqtt5.PublishPacket(
        "t",
        b"",
        payload_format_indicator=packet.payload_format_indicator,
        content_type=packet.content_type,
        response_topic=packet.response_topic,
        correlation_data=packet.correlation_data,
        user_properties=packet.user_properties,
    ).write()
    _, at = read_varint(frame, 1, len(frame))
    _, at = read_varint(frame, at + 3, len(frame))
    return frame[at:]


def publish(
    flags: int,
    topic: bytes,
    packet_id: int,
    payload: bytes,
    properties: bytes = b"",
) -> bytes:
    """A PUBLISH packet.

    Args:
        flags: Low nibble of the first byte: 8 DUP, 2 QoS 1, 1 RETAIN.
        topic: With its length in front, as it stands on the wire.
        packet_id: 0 for QoS 0.
        properties: Encoded, without their length.
    """
    properties = varint(len(properties)) + properties if properties else b"\x00"
    size = len(topic) + len(properties) + len(payload) + (2 if packet_id else 0)
    if size < 0x80:
        head = bytes((0x30 | flags, size))
    elif size < 0x4000:
        head = bytes((0x30 | flags, size & 0x7F | 0x80, size >> 7))
    else:
        head = bytes((0x30 | flags,)) + varint(size)
    if packet_id:
        ident = packet_id.to_bytes(2, "big")
        return b"".join((head, topic, ident, properties, payload))
    return b"".join((head, topic, properties, payload))


def puback(packet_id: int, reason: int = 0) -> bytes:
    """A PUBACK packet; reason 0 is left out, as the shortest form has it."""
    if reason:
        return bytes((0x40, 3, packet_id >> 8, packet_id & 0xFF, reason))
    return bytes((0x40, 2, packet_id >> 8, packet_id & 0xFF))
