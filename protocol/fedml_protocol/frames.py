# SPDX-License-Identifier: Apache-2.0
"""Messages on a byte stream between two processes of one machine: a length, then the message.

Four bytes, big-endian, then as many bytes of protobuf. Tensors never travel here, so that a frame
of more than a few megabytes is a mistake and not a message.
"""

from fedml_protocol.codec import serialise
from fedml_protocol.errors import MalformedMessage

MAX_FRAME_BYTES = 16 * 1024 * 1024
HEAD_BYTES = 4


def frame(message: object) -> bytes:
    """The bytes of one message on the stream."""
    data = serialise(message)
    return len(data).to_bytes(HEAD_BYTES) + data


def frame_length(head: bytes) -> int:
    """How many bytes follow this head.

    Raises:
        MalformedMessage: More than any message of ours has.
    """
    length = int.from_bytes(head)
    if length > MAX_FRAME_BYTES:
        raise MalformedMessage(f"a frame of {length} bytes: the stream is out of step")
    return length
