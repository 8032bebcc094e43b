# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with bytes or keys that reach us, and whose fault it is.

ProtocolError
├── MalformedMessage     the sender's fault: bytes or values that no correct peer sends
├── UnsupportedMessage   nobody's fault: the peer speaks a newer schema than we do
├── IllegalMove          our fault: a task was asked to make a move that its table does not have
├── BadSignature         the sender is not who it says, or the bytes were changed on the way
└── BadKey               the person's fault: a login key that is damaged or of the wrong kind
"""


class ProtocolError(Exception):
    """Base of everything this package raises on purpose."""

    fault = "unknown"


class MalformedMessage(ProtocolError):
    """The sender produced bytes or values that no correct peer sends."""

    fault = "sender"


class UnsupportedMessage(ProtocolError):
    """The message is well-formed, of a kind or schema that this version does not know."""

    fault = "version"


class IllegalMove(ProtocolError):
    """A task state change that the table does not contain."""

    fault = "ours"


class BadSignature(ProtocolError):
    """The signature does not fit the bytes, or the signing key is unknown."""

    fault = "sender"


class BadKey(ProtocolError):
    """A login key that cannot be used; the text says what the person should do."""

    fault = "person"
