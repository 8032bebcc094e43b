# SPDX-License-Identifier: Apache-2.0
"""The envelope around everything that travels over MQTT.

On the wire: `FM`, one version byte, the length and the CRC-32 of what follows (both big-endian
uint32), then the protobuf `Envelope`. Length and checksum are there so that a truncated or damaged
message is refused as such, and never read as another message that happens to parse.
"""

import struct
import zlib
from dataclasses import dataclass

from fedml_protocol.codec import parse, serialise
from fedml_protocol.devices import Heartbeat, Presence
from fedml_protocol.errors import MalformedMessage, UnsupportedMessage
from fedml_protocol.ids import check_id
from fedml_protocol.tasks import (
    Accept,
    Cancelled,
    Progress,
    Reject,
    Result,
    ResultAck,
    SignedOrder,
)

SCHEMA = 1
OLDEST_SCHEMA = 1
MAX_BYTES = 128 * 1024

_HEAD = struct.Struct(">2sBII")
_MAGIC = b"FM"
_FRAME = 1

Body = (
    Presence | Heartbeat | Accept | Reject | Progress | Result | Cancelled | SignedOrder | ResultAck
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """Who says what, and in which order.

    Attributes:
        device: Who sends, or to whom it is sent.
        boot_n: The agent's boot number; 0 from the broker.
        seq: Counts the messages of one boot.
        msg_id: A UUIDv7, for tracing only.
    """

    device: str
    body: Body
    schema: int = SCHEMA
    msg_id: bytes = b""
    boot_n: int = 0
    seq: int = 0

    def __post_init__(self) -> None:
        check_id(self.device, "device")
        if self.schema < 1:
            raise MalformedMessage("an envelope needs the schema that its sender speaks")


def pack(envelope: Envelope) -> bytes:
    """The bytes that go over MQTT.

    Raises:
        MalformedMessage: Longer than 128 KB: what is larger belongs into a blob. Or a value that
            does not fit its field.
    """
    data = serialise(envelope)
    if len(data) + _HEAD.size > MAX_BYTES:
        raise MalformedMessage(
            f"{type(envelope.body).__name__} takes {len(data)} bytes, at most {MAX_BYTES} may "
            "travel over MQTT; put what is large into the package or a blob"
        )
    return _HEAD.pack(_MAGIC, _FRAME, len(data), zlib.crc32(data, _FRAME)) + data


def unpack(data: bytes) -> Envelope:
    """The envelope in `data`.

    Raises:
        MalformedMessage: Truncated, damaged, or not ours at all.
        UnsupportedMessage: A newer peer's frame, message or enum value. A newer schema alone is
            no reason: it only adds.
    """
    if len(data) > MAX_BYTES:
        raise MalformedMessage(f"{len(data)} bytes, at most {MAX_BYTES} may travel over MQTT")
    if len(data) < _HEAD.size:
        raise MalformedMessage(f"{len(data)} bytes are too few for a message")
    magic, frame, length, checksum = _HEAD.unpack_from(data)
    body = data[_HEAD.size :]
    if magic != _MAGIC:
        raise MalformedMessage("not a message of this protocol")
    if length != len(body):
        raise MalformedMessage(f"truncated: {len(body)} of {length} bytes")
    # Seeded with the version: a flipped version bit must not pass for a newer peer.
    if checksum != zlib.crc32(body, frame):
        raise MalformedMessage("damaged on the way: the checksum does not fit")
    if frame != _FRAME:
        raise UnsupportedMessage(f"frame version {frame}, this side speaks {_FRAME}")
    return parse(Envelope, body)
