# SPDX-License-Identifier: Apache-2.0
"""What the broker may rely on, whoever carries its messages: one suite, both backends, real TLS."""

import asyncio
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mqtt5
import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from fedml_broker.mqtt import Post, Refused, Unavailable
from tests.broker.mqtt.backends import Embedded, External
from tests.broker.mqtt.certificates import Authority
from tests.broker.mqtt.peer import Peer

NODE, OTHER = "acme/d/node-1", "acme/d/node-2"
UP, DOWN = f"fed/1/{NODE}/up", f"fed/1/{NODE}/dn"
ALL_UP = "fed/1/+/d/+/up/#"

Backend = Embedded | External


class Seen:
    """A handler that remembers."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()

    async def __call__(self, topic: str, payload: bytes) -> None:
        self.queue.put_nowait((topic, payload))

    async def next(self) -> tuple[str, bytes]:
        return await self.queue.get()


@pytest.fixture(params=[Embedded, External])
def backend(request: pytest.FixtureRequest, authority: Authority, tmp_path: Path) -> Backend:
    kind: Callable[[Authority, Path], Backend] = request.param
    return kind(authority, tmp_path)


async def test_what_a_device_says_reaches_the_handler(backend: Backend) -> None:
    seen = Seen()
    backend.post.subscribe(ALL_UP, seen)
    async with backend:
        assert backend.post.connected
        device = await backend.device(NODE)
        assert await device.publish(f"{UP}/task", b"\x00\xff result") == 0
        device.publish_0(f"{UP}/met", b"loss 0.1")
        assert {await seen.next(), await seen.next()} == {
            (f"{UP}/task", b"\x00\xff result"),
            (f"{UP}/met", b"loss 0.1"),
        }


async def test_handlers_start_in_the_order_of_receipt_and_may_overlap(backend: Backend) -> None:
    started: list[bytes] = []
    all_started, go = asyncio.Event(), asyncio.Event()

    async def handler(topic: str, payload: bytes) -> None:
        started.append(payload)
        if len(started) == 10:
            all_started.set()
        await go.wait()

    backend.post.subscribe(ALL_UP, handler)
    async with backend:
        device = await backend.device(NODE)
        for n in range(10):
            device.offer(f"{UP}/task", b"%d" % n)
        await all_started.wait()
        assert started == [b"%d" % n for n in range(10)]
        go.set()
        for _ in range(10):
            assert (await device.answer(mqtt5.PubAckPacket)).reason_code == 0


async def test_a_handler_that_fails_does_not_end_anything(backend: Backend) -> None:
    seen = Seen()

    async def handler(topic: str, payload: bytes) -> None:
        if payload == b"bad":
            raise ValueError("cannot read this")
        await seen(topic, payload)

    backend.post.subscribe(ALL_UP, handler)
    async with backend:
        device = await backend.device(NODE)
        device.offer(f"{UP}/task", b"bad")
        device.offer(f"{UP}/task", b"good")
        assert await seen.next() == (f"{UP}/task", b"good")
        await device.answer(mqtt5.PubAckPacket)
        await device.answer(mqtt5.PubAckPacket)
        await device.silent()
        assert backend.post.connected


async def test_what_the_broker_says_reaches_the_device(backend: Backend) -> None:
    async with backend:
        device = await backend.device(NODE)
        await device.subscribe(f"{DOWN}/#")
        await backend.post.publish(f"{DOWN}/task", b"offer", expiry_s=30)
        message = await device.message()
        assert (message.topic, message.payload, message.qos) == (f"{DOWN}/task", b"offer", 1)
        assert 29 <= (message.message_expiry_interval or 0) <= 30
        await backend.post.publish(f"{DOWN}/ctl", b"tail", qos=0)
        assert (await device.message()).qos == 0


async def test_a_device_that_is_away_gets_its_messages_when_it_is_back(backend: Backend) -> None:
    async with backend:
        device = await backend.device(NODE, session_expiry_interval=600)
        await device.subscribe(f"{DOWN}/#")
        await device.leave()
        for n in range(100):
            await backend.post.publish(f"{DOWN}/task", b"%d" % n)
        device = await backend.device(NODE, session_expiry_interval=600)
        assert device.connack.session_present
        assert await device.take(100) == [b"%d" % n for n in range(100)]


async def test_unacknowledged_messages_come_again_with_dup(backend: Backend) -> None:
    async with backend:
        device = await backend.device(NODE, session_expiry_interval=600)
        await device.subscribe(f"{DOWN}/#")
        await backend.post.publish(f"{DOWN}/task", b"1")
        first = await device.message()
        device.drop()
        device = await backend.device(NODE, session_expiry_interval=600)
        again = await device.message()
        assert (again.payload, again.duplicate, again.packet_id) == (b"1", True, first.packet_id)


async def test_a_second_connection_of_a_device_takes_over(backend: Backend) -> None:
    async with backend:
        old = await backend.device(NODE)
        new = await backend.device(NODE)
        try:
            assert await old.disconnected() == 0x8E
        except EOFError:  # Mosquitto says so from 2.0.15 on; before, it just closes (issue 2607)
            assert isinstance(backend, External)
        await new.silent()


async def test_a_lost_device_is_announced_by_its_will(backend: Backend) -> None:
    seen = Seen()
    backend.post.subscribe(ALL_UP, seen)
    async with backend:
        will = mqtt5.Will(f"{UP}/presence", payload=b"offline", qos=mqtt5.QoS.AT_LEAST_ONCE)
        device = await backend.device(NODE, will=will)
        device.drop()
        assert await seen.next() == (f"{UP}/presence", b"offline")


async def test_a_device_cannot_speak_or_listen_for_another(backend: Backend) -> None:
    seen = Seen()
    backend.post.subscribe(ALL_UP, seen)
    async with backend:
        thief, victim = await backend.device(NODE), await backend.device(OTHER)
        await victim.subscribe(f"fed/1/{OTHER}/dn/#")
        await thief.subscribe(f"fed/1/{OTHER}/dn/#", "fed/#", "#")
        assert await thief.publish(f"fed/1/{OTHER}/up/task", b"forged") == 0x87
        assert await thief.publish(f"fed/1/{OTHER}/dn/task", b"forged") == 0x87
        await backend.post.publish(f"fed/1/{OTHER}/dn/task", b"secret")
        assert await victim.take(1) == [b"secret"]
        await thief.silent()
        await thief.publish(f"{UP}/task", b"own")
        assert await seen.next() == (f"{UP}/task", b"own")


async def test_without_a_certificate_nobody_comes_in(
    backend: Backend, authority: Authority
) -> None:
    async with backend:
        # With TLS 1.3 the client learns of its refusal only when it reads.
        peer = await Peer.open(backend.port, authority.client_context(None))
        backend.stack.push_async_callback(peer.close)
        with pytest.raises((OSError, EOFError)):
            await peer.connect(NODE)
        with pytest.raises(OSError):  # an SSLError is one: this client trusts other authorities
            await Peer.open(backend.port, ssl.create_default_context())


async def test_retained_presence_is_told_to_the_broker_when_it_starts(
    backend: Backend, authority: Authority, tmp_path: Path
) -> None:
    async with backend:
        device = await backend.device(NODE)
        await device.publish(f"{UP}/presence", b"online", retain=True)
        if isinstance(backend, Embedded):
            await backend.stack.aclose()
            again: Backend = Embedded(authority, tmp_path)
        else:  # the broker starts again, Mosquitto goes on
            again = backend
            await backend.post.__aexit__(None, None, None)
            backend.post = External(authority, tmp_path).post
            backend.post._address = ("localhost", backend.port)
        seen = Seen()
        again.post.subscribe(ALL_UP, seen)
        async with again.post:
            assert await seen.next() == (f"{UP}/presence", b"online")


async def test_the_broker_does_not_hear_itself(backend: Backend) -> None:
    seen = Seen()
    backend.post.subscribe(ALL_UP, seen)
    async with backend:
        device = await backend.device(NODE)
        await backend.post.publish(f"{UP}/presence", b"", retain=True)
        await device.publish(f"{UP}/task", b"1")
        assert await seen.next() == (f"{UP}/task", b"1")


async def test_what_cannot_be_sent_is_refused_and_harms_nobody(backend: Backend) -> None:
    async with backend:
        with pytest.raises(Refused):
            await backend.post.publish(f"{DOWN}/task", b"-" * 200_000)
        with pytest.raises(Refused):
            await backend.post.publish(f"{DOWN}/+", b"")
        with pytest.raises(Refused):
            await backend.post.publish(f"{DOWN}/task", b"", qos=2)
        await backend.post.publish(f"{DOWN}/task", b"fine")
    with pytest.raises(Unavailable):
        await backend.post.publish(f"{DOWN}/task", b"too late")


async def test_a_filter_that_is_none_is_refused_at_once(backend: Backend) -> None:
    for wrong in ("a/#/b", "", "$share/g/x"):
        with pytest.raises(ValueError):
            backend.post.subscribe(wrong, Seen())


async def test_both_are_posts(backend: Backend) -> None:
    post: Post = backend.post
    assert not post.connected
    await post.disconnect("acme/d/nobody", "an unknown device is no error")


async def test_pahos_client_gets_along_with_it(backend: Backend, authority: Authority) -> None:
    """The client that agents use: MQTT 5, manual acknowledgement, TLS, in a thread."""
    seen = Seen()
    backend.post.subscribe(ALL_UP, seen)
    loop = asyncio.get_running_loop()
    subscribed, gone = asyncio.Event(), asyncio.Event()
    got: asyncio.Queue[paho.MQTTMessage] = asyncio.Queue()
    client: Any = paho.Client(
        CallbackAPIVersion.VERSION2, NODE, protocol=paho.MQTTv5, manual_ack=True
    )
    client.tls_set_context(authority.client_context(NODE))
    client.on_connect = lambda *_: client.subscribe(f"{DOWN}/#", qos=1)
    client.on_subscribe = lambda *_: loop.call_soon_threadsafe(subscribed.set)
    client.on_message = lambda _, __, message: loop.call_soon_threadsafe(got.put_nowait, message)
    client.on_disconnect = lambda *_: loop.call_soon_threadsafe(gone.set)
    async with backend:
        await asyncio.to_thread(client.connect, "localhost", backend.port, clean_start=True)
        client.loop_start()
        await subscribed.wait()
        info = client.publish(f"{UP}/task", b"accept", qos=1)
        assert await seen.next() == (f"{UP}/task", b"accept")
        await asyncio.to_thread(info.wait_for_publish, 5)
        for n in range(50):
            await backend.post.publish(f"{DOWN}/task", b"%d" % n)
        for n in range(50):
            message = await got.get()
            assert message.payload == b"%d" % n
            client.ack(message.mid, message.qos)
        client.disconnect()
        await gone.wait()
        await asyncio.to_thread(client.loop_stop)
