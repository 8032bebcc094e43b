# SPDX-License-Identifier: Apache-2.0
"""The one-string login key, and the signatures under orders.

A login key carries all that a machine needs to find the right broker and nobody else: the URL, the
SHA-256 of the broker's CA certificate, and a secret. `fedml1d_…` enrols devices, `fedml1u_…` is a
user's, `fedml1r_…` a run's own. The checksum is for the person who copied half of it.
"""

import base64
import binascii
import hashlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)

from fedml_protocol.codec import parse, serialise
from fedml_protocol.errors import BadKey, BadSignature
from fedml_protocol.tasks import Order, SignedOrder

_PREFIX = "fedml1"
_CONTEXT = b"fedml order 1\0"
SECRET_BYTES = 24

# Under what a device signs to get a certificate after its old one has expired.
RECOVER_CONTEXT = b"fedml recover 1\0"


class Scope(StrEnum):
    """What a login key is good for."""

    DEVICE = "d"
    USER = "u"
    RUN = "r"


# What a key is called, and where it comes from.
_SOURCE = {
    Scope.DEVICE: ("a login key", "is printed by `fedml-broker keys create`"),
    Scope.USER: ("a user's key", "is printed by `fedml-broker users token NAME`"),
    Scope.RUN: ("a run's key", "is what a job finds in FEDML_RUN_API_KEY"),
}
_NEEDED = {
    Scope.DEVICE: "a machine needs a device key, from `fedml-broker keys create`",
    Scope.USER: "a person's key comes from `fedml-broker users token NAME`",
    Scope.RUN: "a job finds the key of its run in FEDML_RUN_API_KEY",
}
_INSTEAD = {
    Scope.DEVICE: "a device's key, for `fedml-agent login`",
    Scope.USER: "a user's key, for `fedml login`",
    Scope.RUN: "a run's key, for the job itself",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoginKey:
    """What the one string carries.

    Attributes:
        url: The broker's HTTPS address, e.g. ``https://broker.example.org:8443``.
        ca_sha256: 32 bytes, of the broker's CA certificate in DER.
        secret: 24 random bytes. The broker keeps only their hash.
    """

    scope: Scope
    url: str
    ca_sha256: bytes
    secret: bytes

    def __post_init__(self) -> None:
        if len(self.ca_sha256) != 32 or len(self.secret) != SECRET_BYTES:
            raise BadKey(f"a login key holds a SHA-256 of 32 bytes and {SECRET_BYTES} secret ones")

    def __str__(self) -> str:
        body = self.ca_sha256 + self.secret + self.url.encode()
        body += zlib.crc32(self.scope.value.encode() + body).to_bytes(4)
        return f"{_PREFIX}{self.scope}_" + base64.urlsafe_b64encode(body).decode().rstrip("=")

    def __repr__(self) -> str:  # the secret does not belong into logs
        return f"LoginKey(scope={self.scope.name}, url={self.url!r})"


def parse_login_key(text: str, scope: Scope) -> LoginKey:
    """The key in `text`, of the scope that the caller can use.

    Raises:
        BadKey: Not a key, damaged, or of the other scope; the text says what to do.
    """
    head, _, tail = text.strip().partition("_")
    given = next((s for s in Scope if head == f"{_PREFIX}{s}"), None)
    if given is None:
        what, source = _SOURCE[scope]
        raise BadKey(f"this is not {what}: one starts with {_PREFIX}{scope}_ and {source}")
    if given is not scope:
        raise BadKey(f"this is {_INSTEAD[given]}; {_NEEDED[scope]}")
    try:
        # Strict: the lenient decoder skips what is not in the alphabet.
        data = base64.b64decode(tail + "=" * (-len(tail) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadKey("the login key is damaged; copy it again, whole") from error
    body, checksum = data[:-4], data[-4:]
    if len(data) < 32 + SECRET_BYTES + 12 or checksum != zlib.crc32(
        scope.value.encode() + body
    ).to_bytes(4):
        raise BadKey("the login key is damaged; copy it again, whole")
    url = body[32 + SECRET_BYTES :].decode(errors="replace")
    key = LoginKey(scope=scope, url=url, ca_sha256=body[:32], secret=body[32 : 32 + SECRET_BYTES])
    # base64 writes the same bytes in several ways: only one of them was ever printed.
    if str(key) != text.strip():
        raise BadKey("the login key is damaged; copy it again, whole")
    return key


def fingerprint(key: Ed25519PublicKey) -> str:
    """The id of a signing key: the first 16 hex digits of its SHA-256."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:16]


def sign(order: Order, key: Ed25519PrivateKey) -> SignedOrder:
    """The order, signed over the very bytes that travel (RFC 8032)."""
    data = serialise(order)
    return SignedOrder(
        key_id=fingerprint(key.public_key()), order=data, signature=key.sign(_CONTEXT + data)
    )


def verify(signed: SignedOrder, keys: Mapping[str, Ed25519PublicKey], device: str) -> Order:
    """The order, if one of `keys` signed it for this device.

    Raises:
        BadSignature: Unknown key, other bytes, or another device's order.
        MalformedMessage: Signed, yet not an order.
        UnsupportedMessage: Signed, of a kind that this version does not know.
    """
    key = keys.get(signed.key_id)
    if key is None:
        raise BadSignature(f"signed with an unknown key {signed.key_id[:40]!r}")
    try:
        key.verify(signed.signature, _CONTEXT + signed.order)
    except InvalidSignature as error:
        raise BadSignature("the signature does not fit the order: it was changed") from error
    order = parse(Order, signed.order)
    if order.device != device:
        raise BadSignature(f"the order is for device {order.device}, this is {device}")
    return order
