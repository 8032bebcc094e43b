# SPDX-License-Identifier: Apache-2.0
"""TLS for one connection, between bytes of the wire and bytes of the protocol; it does no I/O.

asyncio's own TLS keeps a read buffer of 256 KiB for every connection: 10,000 idle devices would
cost the broker 2.9 GB. This one keeps nothing of its own, and feeds OpenSSL one record at a time so
that its buffers stay small as well.
"""

import ssl
from contextlib import suppress
from typing import Any

_RECORD_BYTES = 16 * 1024


class Tls:
    """One side of one TLS session: the client's, if it is told whom it expects; else the server's.

    Attributes:
        established: The handshake is over, and with it the client's certificate is verified.
        ended: The peer has said that it sends no more.
    """

    __slots__ = ("_incoming", "_object", "_outgoing", "ended", "established")

    def __init__(self, context: ssl.SSLContext, expected: str | None = None) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(
            self._incoming,
            self._outgoing,
            server_side=expected is None,
            server_hostname=expected,
        )
        self.established = False
        self.ended = False

    def begin(self) -> bytes:
        """What the client's side says first."""
        with suppress(ssl.SSLWantReadError):
            self._object.do_handshake()
        return self.pending()

    @property
    def certificate(self) -> dict[str, Any] | None:
        """The peer's verified certificate, None without one, or before it is verified."""
        return (self._object.getpeercert() or None) if self.established else None

    def receive(self, data: memoryview) -> bytes:
        """Take what came over the wire; the protocol's bytes in it. See `pending` afterwards.

        Raises:
            ssl.SSLError: The peer broke TLS, or its certificate is missing or not accepted.
        """
        parts: list[bytes] = []
        for start in range(0, len(data), _RECORD_BYTES):
            self._incoming.write(data[start : start + _RECORD_BYTES])
            try:
                if not self.established:
                    self._object.do_handshake()
                    self.established = True
                while self._incoming.pending or self._object.pending():
                    part = self._object.read(_RECORD_BYTES)
                    if not part:
                        self.ended = True
                        break
                    parts.append(part)
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLZeroReturnError:
                self.ended = True
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def send(self, data: bytes) -> bytes:
        """What has to go over the wire so that the peer gets these bytes.

        Raises:
            ssl.SSLError: The session is broken.
        """
        parts: list[bytes] = []
        view = memoryview(data)
        for start in range(0, len(data), _RECORD_BYTES):
            self._object.write(view[start : start + _RECORD_BYTES])
            parts.append(self._outgoing.read())
        return b"".join(parts)

    def pending(self) -> bytes:
        """What TLS itself has to say: handshake, tickets, alerts."""
        return self._outgoing.read() if self._outgoing.pending else b""

    def close(self) -> bytes:
        """Say that nothing more will be sent; the peer's answer is not waited for."""
        if self.established:
            with suppress(ssl.SSLError):  # the answer that is not there yet, or a broken session
                self._object.unwrap()
        return self.pending()
