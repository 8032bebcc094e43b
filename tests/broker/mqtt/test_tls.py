# SPDX-License-Identifier: Apache-2.0
"""TLS of the endpoint's own: every byte arrives, however the wire cuts it, and nobody gets in."""

import logging
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress

import mqtt5
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedml_broker.mqtt.endpoint import Endpoint, Limits
from fedml_broker.mqtt.tls import Tls
from tests.broker.mqtt.backends import by_certificate
from tests.broker.mqtt.certificates import Authority
from tests.broker.mqtt.conftest import Connect, Start
from tests.broker.mqtt.fake_clock import FakeClock

TlsStart = Callable[..., Awaitable[Endpoint]]


@pytest.fixture
def start_tls(start: Start, authority: Authority) -> TlsStart:
    async def starting(**changes: object) -> Endpoint:
        context = authority.server_context()
        return await start(ssl_context=context, authenticate=by_certificate, **changes)

    return starting


async def test_the_identity_is_the_certificates(
    start_tls: TlsStart, connect: Connect, authority: Authority
) -> None:
    endpoint = await start_tls()
    peer = await connect(endpoint, "", authority.client_context("acme/d/node-1"))
    assert peer.connack.assigned_client_id == "acme/d/node-1"
    stolen = await connect(endpoint, "acme/d/node-1", authority.client_context("acme/d/thief"))
    assert stolen.connack.reason_code == 0x85
    await peer.silent()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_messages_of_any_size_pass_both_ways(
    start_tls: TlsStart, connect: Connect, authority: Authority, version: ssl.TLSVersion
) -> None:
    endpoint = await start_tls()
    context = authority.client_context("a")
    context.minimum_version = context.maximum_version = version
    peer = await connect(endpoint, "a", context)
    await peer.subscribe("x")
    for size in (0, 1, 16_383, 16_384, 16_385, 131_072):
        payload = bytes(index * 7 % 251 for index in range(size))
        assert await peer.publish("x", payload) == 0
        assert await peer.take(1) == [payload]


async def test_a_close_notify_is_an_end_like_any_other(
    start_tls: TlsStart, connect: Connect, authority: Authority
) -> None:
    endpoint = await start_tls()
    watcher = await connect(endpoint, "w", authority.client_context("w"))
    await watcher.subscribe("presence")
    will = mqtt5.Will("presence", payload=b"gone")
    peer = await connect(endpoint, "a", authority.client_context("a"), will=will)
    await peer.close()  # TLS says goodbye, MQTT does not
    assert (await watcher.message()).payload == b"gone"


@pytest.mark.parametrize(
    "sent", [b"\x10\x0d\x00\x04MQTT\x05", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03"]
)
async def test_what_is_not_tls_is_shown_the_door(
    start_tls: TlsStart, dial: Connect, sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    endpoint = await start_tls()
    caplog.set_level(logging.INFO)
    caplog.clear()
    peer = await dial(endpoint)
    peer.send_bytes(sent)
    if len(sent) == 2:  # the beginning of a handshake: wait for more
        peer.writer.write_eof()
    while await peer.reader.read(1000):
        pass
    assert not [record for record in caplog.records if record.exc_info]


async def test_a_handshake_may_not_take_for_ever(
    start_tls: TlsStart, dial: Connect, connect: Connect, authority: Authority, clock: FakeClock
) -> None:
    endpoint = await start_tls(limits=Limits(connect_timeout_s=10))
    mute = await dial(endpoint)
    await connect(endpoint, "a", authority.client_context("a"))
    clock.advance(10)
    await mute.ended()


@pytest.fixture(scope="module")
def contexts(authority: Authority) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    return authority.server_context(), authority.client_context("a")


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.binary(max_size=70_000) | st.binary(max_size=10), max_size=4),
    st.lists(st.integers(1, 40_000), min_size=1, max_size=5),
)
def test_every_byte_arrives_however_the_wire_cuts_it(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext], messages: list[bytes], cuts: list[int]
) -> None:
    server = Tls(contexts[0])
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = contexts[1].wrap_bio(incoming, outgoing, server_hostname="localhost")
    received = b""
    turn = 0

    def to_server() -> None:
        nonlocal received, turn
        data = outgoing.read()
        while data:
            cut = cuts[turn % len(cuts)]
            turn += 1
            received += server.receive(memoryview(data[:cut]))
            incoming.write(server.pending())
            data = data[cut:]

    for _ in range(3):
        with suppress(ssl.SSLWantReadError):
            client.do_handshake()
        to_server()
    assert server.established
    assert server.certificate is not None
    for message in messages:
        client.write(message)
    to_server()
    assert received == b"".join(messages)
    for message in messages:
        incoming.write(server.send(message))
    echoed = b""
    while len(echoed) < len(received):
        echoed += client.read(65536)
    assert echoed == received
    incoming.write(server.close())
    assert client.read(1) == b""  # said goodbye, not just gone
