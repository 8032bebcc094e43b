# SPDX-License-Identifier: Apache-2.0
"""Names that travel: ids that are safe in a topic, a path and a URL; content hashes; ports."""

import re

from fedml_protocol.errors import MalformedMessage

_ID = re.compile(r"[a-z0-9-]{1,40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def check_id(value: str, what: str) -> str:
    """`value`, which is one to forty of a-z, 0-9 and '-'.

    Raises:
        MalformedMessage: It is not.
    """
    if not _ID.fullmatch(value):
        raise MalformedMessage(f"{what} must be 1 to 40 of a-z, 0-9 and '-', got {value[:60]!r}")
    return value


def check_sha256(value: str) -> str:
    """`value`, which is 64 lower-case hexadecimal digits.

    Raises:
        MalformedMessage: It is not.
    """
    if not _SHA256.fullmatch(value):
        raise MalformedMessage(f"not a SHA-256 in lower-case hex: {value[:80]!r}")
    return value


def check_port(value: int) -> int:
    """`value`, which is a TCP port, or 0 for none.

    Raises:
        MalformedMessage: It is not.
    """
    if not 0 <= value <= 65535:
        raise MalformedMessage(f"a port is a number from 1 to 65535, not {value}")
    return value


def uuid7(unix_ms: int, entropy: bytes) -> bytes:
    """A UUIDv7 (RFC 9562, section 5.7) of a time in milliseconds and ten random bytes."""
    tail = int.from_bytes(entropy[:10]) & ((1 << 74) - 1)
    value = (unix_ms & ((1 << 48) - 1)) << 80 | 0x7 << 76 | (tail >> 62) << 64
    return (value | 0b10 << 62 | tail & ((1 << 62) - 1)).to_bytes(16)
