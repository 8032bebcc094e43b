# SPDX-License-Identifier: Apache-2.0
"""Bytes in and out of one socket, as cheaply as asyncio allows.

Incoming bytes are read into one buffer that all connections share (each uses it up before the next
one is read), so an idle connection owns none. Outgoing packets are collected and written once per
turn of the event loop. asyncio sets TCP_NODELAY on every TCP connection.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from typing import Any, Protocol

from fedml_broker.mqtt.tls import Tls

log = logging.getLogger(__name__)


class Pool(Protocol):
    """What connections have in common."""

    buffer: memoryview

    def flush_soon(self, pipe: Pipe) -> None:
        """Call `pipe.flush` at the end of this turn of the event loop."""
        ...


class Pipe(asyncio.BufferedProtocol):
    """One socket, plain without `tls`. A subclass says what the bytes mean.

    Attributes:
        blocked: The peer does not read, and the write buffer is above its mark.
        closing: Nothing more is read or written.
    """

    __slots__ = (
        "_need",
        "_out",
        "_pool",
        "_rest",
        "_tls",
        "_transport",
        "blocked",
        "closing",
        "reading",
    )

    def __init__(self, pool: Pool, tls: Tls | None) -> None:
        self._pool = pool
        self._transport: asyncio.Transport
        self._tls = tls
        self._out: list[bytes] = []
        self._rest: bytes | bytearray = b""
        self._need = 0
        self.blocked = False
        self.closing = False
        self.reading = True

    @property
    def address(self) -> str:
        """Where the peer is, for log lines."""
        address = self._transport.get_extra_info("peername")
        return f"{address[0]}:{address[1]}" if address else "?"

    @property
    def certificate(self) -> dict[str, Any] | None:
        """The peer's verified certificate as `ssl` describes it, None without one."""
        return self._tls.certificate if self._tls is not None else None

    def opened(self) -> None:
        """The socket is there."""
        raise NotImplementedError

    def received(self, data: bytes) -> int:
        """Use up whole packets at the beginning of `data`; how many bytes that was.

        `_need` may say how many bytes, from there, the next packet has at least.
        """
        raise NotImplementedError

    def tls_failed(self, error: ssl.SSLError) -> None:
        """What the peer sent is no TLS, or its certificate is missing or not accepted."""

    def send(self, frame: bytes) -> None:
        """Write a packet at the end of this turn of the event loop."""
        out = self._out
        if not out:
            self._pool.flush_soon(self)
        out.append(frame)

    def send_first(self, frame: bytes) -> None:
        """Write a packet before all that have been collected in this turn."""
        self._out.insert(0, frame)
        self._pool.flush_soon(self)

    def flush(self) -> None:
        """Write what has been collected."""
        out = self._out
        if not out:
            return
        data = b"".join(out) if len(out) > 1 else out[0]
        out.clear()
        if self._tls is None:
            self._transport.write(data)
        elif not self._transport.is_closing():
            try:
                self._transport.write(self._tls.send(data))
            except ssl.SSLError as error:
                log.info("TLS with %s failed: %s", self.address, error.reason or error)
                self.abort()

    def set_reading(self, reading: bool) -> None:
        """Take bytes from the peer, or leave them where they are."""
        if reading == self.reading or self.closing:
            return
        self.reading = reading
        if reading:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()

    def end(self) -> None:
        """Write what has been collected, then close."""
        self.closing = True
        self.flush()
        if self._tls is not None:
            self._transport.write(self._tls.close())
        self._transport.close()

    def abort(self) -> None:
        """Close without a further word."""
        self.closing = True
        self._transport.abort()

    # --- asyncio calls these ------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.opened()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._pool.buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self.closing:
            return
        data = (
            bytes(self._pool.buffer[:nbytes])
            if self._tls is None
            else self._decrypt(self._tls, self._pool.buffer[:nbytes])
        )
        if data:
            self._assemble(data)
        if self._tls is not None and self._tls.ended:
            self._transport.close()

    def _decrypt(self, tls: Tls, data: memoryview) -> bytes:
        """The protocol's bytes; the peer is shown out if it breaks TLS."""
        try:
            return tls.receive(data)
        except ssl.SSLError as error:
            log.info("TLS with %s failed: %s", self.address, error.reason or error)
            self.tls_failed(error)
            self.closing = True
            return b""
        finally:
            answer = tls.pending()
            if answer:
                self._transport.write(answer)
            if self.closing:
                self._transport.close()

    def _assemble(self, data: bytes) -> None:
        if self._rest:
            self._rest += data  # in place, it is a bytearray: a trickled packet costs no more
            if len(self._rest) < self._need:
                return
            data = bytes(self._rest)
        self._need = 0
        done = self.received(data)
        self._rest = bytearray(data[done:]) if done < len(data) else b""

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.closing = True
        self._out.clear()

    def pause_writing(self) -> None:
        self.blocked = True

    def resume_writing(self) -> None:
        self.blocked = False
