# SPDX-License-Identifier: Apache-2.0
"""A client that says exactly what a test wants it to say, over a real socket.

peer = await Peer.connect(port, "acme/d/node-1", clean_start=True)
await peer.subscribe("a/#")
answer = await peer.publish("a/b", b"x")        # QoS 1: the PUBACK
message = await peer.message()                  # the next PUBLISH; not acknowledged
peer.acknowledge(message)
await peer.silent()                             # nothing else has come
peer.drop()                                     # gone without a word
"""

import asyncio
import itertools
import ssl
from contextlib import suppress
from typing import Any, Self, TypeVar

import mqtt5

_Packet = TypeVar("_Packet")
AT_LEAST_ONCE = mqtt5.QoS.AT_LEAST_ONCE


class Peer:
    """One connection. What comes while something else is awaited is kept in order."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.connack: mqtt5.ConnAckPacket
        self._rest = b""
        self._kept: list[mqtt5.Packet] = []
        self._packet_ids = itertools.count(1)

    @classmethod
    async def open(cls, port: int, tls: ssl.SSLContext | None = None) -> Self:
        """A socket, and nothing said yet."""
        name = "localhost" if tls else None
        return cls(*await asyncio.open_connection("127.0.0.1", port, ssl=tls, server_hostname=name))

    async def connect(self, client_id: str, **fields: Any) -> None:
        """Say CONNECT; `connack` is the answer, whatever it says."""
        self.send(mqtt5.ConnectPacket(client_id, **fields))
        self.connack = await self.expect(mqtt5.ConnAckPacket)

    def send(self, *packets: mqtt5.Packet) -> None:
        self.writer.write(b"".join(packet.write() for packet in packets))

    def send_bytes(self, data: bytes) -> None:
        self.writer.write(data)

    async def next(self) -> mqtt5.Packet:
        """The next packet.

        Raises:
            EOFError: The connection was closed instead.
        """
        if self._kept:
            return self._kept.pop(0)
        return await self._read()

    async def expect(self, kind: type[_Packet]) -> _Packet:
        """The next packet, which is of that kind."""
        packet = await self.next()
        assert isinstance(packet, kind), packet
        return packet

    async def answer(self, kind: type[_Packet]) -> _Packet:
        """The next packet of that kind; others before it are kept for later."""
        while True:
            packet = await self._read()
            if isinstance(packet, kind):
                return packet
            self._kept.append(packet)

    async def subscribe(
        self, *filters: str | mqtt5.TopicFilter, ident: int | None = None
    ) -> list[int]:
        """Subscribe with QoS 1; the reason codes."""
        wishes = [
            mqtt5.TopicFilter(f, max_qos=AT_LEAST_ONCE, retain_as_published=False)
            if isinstance(f, str)
            else f
            for f in filters
        ]
        packet_id = next(self._packet_ids)
        self.send(mqtt5.SubscribePacket(packet_id, wishes, subscription_id=ident))
        suback = await self.answer(mqtt5.SubAckPacket)
        assert suback.packet_id == packet_id
        return [int(code) for code in suback.reason_codes]

    async def unsubscribe(self, *filters: str) -> list[int]:
        self.send(mqtt5.UnsubscribePacket(next(self._packet_ids), list(filters)))
        return [int(code) for code in (await self.answer(mqtt5.UnsubAckPacket)).reason_codes]

    def offer(self, topic: str, payload: bytes, **fields: Any) -> int:
        """Send a QoS 1 PUBLISH without waiting; its packet identifier."""
        packet_id = next(self._packet_ids)
        self.send(
            mqtt5.PublishPacket(topic, payload, qos=AT_LEAST_ONCE, packet_id=packet_id, **fields)
        )
        return packet_id

    async def publish(self, topic: str, payload: bytes, **fields: Any) -> int:
        """Publish with QoS 1; the reason code of the PUBACK."""
        packet_id = self.offer(topic, payload, **fields)
        puback = await self.answer(mqtt5.PubAckPacket)
        assert puback.packet_id == packet_id
        return int(puback.reason_code)

    def publish_0(self, topic: str, payload: bytes, **fields: Any) -> None:
        self.send(mqtt5.PublishPacket(topic, payload, **fields))

    async def message(self) -> mqtt5.PublishPacket:
        """The next packet, which is a PUBLISH; it is not acknowledged."""
        return await self.expect(mqtt5.PublishPacket)

    async def take(self, count: int) -> list[bytes]:
        """Payloads of the next messages, acknowledged one by one."""
        payloads = []
        for _ in range(count):
            message = await self.message()
            self.acknowledge(message)
            payloads.append(message.payload)
        return payloads

    def acknowledge(self, message: mqtt5.PublishPacket) -> None:
        if message.packet_id is not None:
            self.send(mqtt5.PubAckPacket(message.packet_id))

    async def silent(self) -> None:
        """Whatever had been sent to us is taken: nothing."""
        self.send(mqtt5.PingReqPacket())
        await self.expect(mqtt5.PingRespPacket)

    async def disconnected(self) -> int:
        """The reason code of the DISCONNECT that comes next, and then the end of the connection."""
        packet = await self.expect(mqtt5.DisconnectPacket)
        await self.ended()
        return int(packet.reason_code)

    async def ended(self) -> None:
        """The connection is closed from the other side, without another packet."""
        try:
            packet = await self.next()
        except EOFError:
            self.drop()
        else:
            raise AssertionError(f"still open: {packet}")

    async def leave(self, **fields: Any) -> None:
        """DISCONNECT, and wait until the other side has closed."""
        self.send(mqtt5.DisconnectPacket(**fields))
        await self.ended()

    def drop(self) -> None:
        """Gone without a word."""
        self.writer.transport.abort()

    async def close(self) -> None:
        """For the end of a test."""
        self.writer.close()
        with suppress(OSError, ssl.SSLError):
            await self.writer.wait_closed()

    async def _read(self) -> mqtt5.Packet:
        while True:
            try:
                packet, size = mqtt5.read(memoryview(self._rest))
            except IndexError:
                try:
                    more = await self.reader.read(65536)
                except OSError:
                    more = b""
                if not more:
                    raise EOFError("the connection was closed") from None
                self._rest += more
            else:
                self._rest = self._rest[size:]
                return packet
