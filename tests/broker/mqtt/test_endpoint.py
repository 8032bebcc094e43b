# SPDX-License-Identifier: Apache-2.0
"""The endpoint's protocol: connecting, publishing, subscribing, and everything it refuses."""

import asyncio
import logging
import socket
from pathlib import Path
from typing import cast

import mqtt5
import pytest

from fedml_broker.mqtt import Refused, Unavailable
from fedml_broker.mqtt.endpoint import Endpoint, Limits, Refusal
from tests.broker.mqtt.conftest import Connect, Start, make_endpoint
from tests.broker.mqtt.fake_clock import FakeClock
from tests.broker.mqtt.peer import AT_LEAST_ONCE

TopicFilter = mqtt5.TopicFilter


async def test_connack_says_what_is_offered(start: Start, connect: Connect) -> None:
    endpoint = await start(limits=Limits(receive_maximum=7, max_packet_bytes=5000))
    connack = (await connect(endpoint, "a", keep_alive=30)).connack
    assert connack.reason_code == 0
    assert not connack.session_present
    assert connack.max_qos == 1
    assert connack.receive_max == 7
    assert connack.max_packet_size == 5000
    assert connack.server_keep_alive is None
    assert connack.assigned_client_id is None
    assert connack.session_expiry_interval is None


async def test_an_empty_client_id_is_given_the_identity(start: Start, connect: Connect) -> None:
    endpoint = await start(authenticate=lambda packet, certificate: "acme/d/gpu-1")
    assert (await connect(endpoint, "")).connack.assigned_client_id == "acme/d/gpu-1"


async def test_another_client_id_than_the_own_identity_is_refused(
    start: Start, connect: Connect
) -> None:
    endpoint = await start(authenticate=lambda packet, certificate: "acme/d/gpu-1")
    peer = await connect(endpoint, "acme/d/gpu-2")
    assert peer.connack.reason_code == 0x85
    await peer.ended()


async def test_a_refusal_is_told_with_its_reason(start: Start, connect: Connect) -> None:
    endpoint = await start(authenticate=lambda *_: Refusal(0x8A, "your licence was withdrawn"))
    peer = await connect(endpoint, "a")
    assert (peer.connack.reason_code, peer.connack.reason_str) == (
        0x8A,
        "your licence was withdrawn",
    )
    await peer.ended()
    assert endpoint.counters.refused == 1


async def test_a_broken_authentication_lets_nobody_in(start: Start, connect: Connect) -> None:
    def broken(packet: mqtt5.ConnectPacket, certificate: object) -> str:
        raise KeyError("no such table")

    peer = await connect(await start(authenticate=broken), "a")
    assert peer.connack.reason_code == 0x80


async def test_a_broken_access_check_allows_nothing(start: Start, connect: Connect) -> None:
    def broken(identity: str, topic: str) -> bool:
        raise KeyError("no such table")

    peer = await connect(await start(may_publish=broken, may_subscribe=broken), "a")
    assert await peer.publish("x", b"1") == 0x87
    assert await peer.subscribe("x") == [0x87]


async def test_extended_authentication_is_refused(start: Start, connect: Connect) -> None:
    peer = await connect(await start(), "a", authentication_method="SCRAM")
    assert peer.connack.reason_code == 0x8C


async def test_mqtt_3_is_refused_with_the_code_for_it(start: Start, dial: Connect) -> None:
    peer = await dial(await start())
    peer.send_bytes(b"\x10\x0d\x00\x04MQTT\x04\x02\x00\x3c\x00\x01a")
    assert (await peer.expect(mqtt5.ConnAckPacket)).reason_code == 0x84
    await peer.ended()


async def test_a_message_reaches_its_subscriber(start: Start, connect: Connect) -> None:
    endpoint = await start()
    reader, writer = await connect(endpoint, "reader"), await connect(endpoint, "writer")
    assert await reader.subscribe("a/+/c", "other/#") == [1, 1]
    properties = {
        "content_type": "text/plain",
        "correlation_data": b"\x00\xff",
        "response_topic": "r",
        "payload_format_indicator": 1,
        "user_properties": [("k", "v"), ("k", "ü")],
    }
    assert await writer.publish("a/b/c", b"hello", **properties) == 0
    message = await reader.message()
    assert (message.topic, message.payload, message.qos) == ("a/b/c", b"hello", 1)
    assert not message.retain
    assert not message.duplicate
    assert {name: getattr(message, name) for name in properties} == properties


async def test_a_message_that_nobody_wants_is_answered_so(start: Start, connect: Connect) -> None:
    assert await (await connect(await start(), "a")).publish("x", b"1") == 0x10


@pytest.mark.parametrize(("publish", "subscribe", "get"), [(0, 1, 0), (1, 0, 0), (1, 1, 1)])
async def test_the_lower_qos_of_publisher_and_subscriber_counts(
    start: Start, connect: Connect, publish: int, subscribe: int, get: int
) -> None:
    peer = await connect(await start(), "a")
    wish = TopicFilter("x", max_qos=mqtt5.QoS(subscribe))
    assert await peer.subscribe(wish) == [subscribe]
    if publish:
        await peer.publish("x", b"1")
    else:
        peer.publish_0("x", b"1")
    assert (await peer.message()).qos == get


async def test_qos_2_is_granted_as_1_and_refused_for_publishing(
    start: Start, connect: Connect
) -> None:
    endpoint = await start()
    peer = await connect(endpoint, "a")
    assert await peer.subscribe(TopicFilter("x", max_qos=mqtt5.QoS.EXACTLY_ONCE)) == [1]
    peer.send(mqtt5.PublishPacket("x", b"", qos=mqtt5.QoS.EXACTLY_ONCE, packet_id=1))
    assert await peer.disconnected() == 0x9B
    will = mqtt5.Will("x", qos=mqtt5.QoS.EXACTLY_ONCE)
    assert (await connect(endpoint, "a", will=will)).connack.reason_code == 0x9B


async def test_access_is_checked_for_both_directions_and_wills(
    start: Start, connect: Connect
) -> None:
    endpoint = await start(
        may_publish=lambda identity, topic: topic.startswith(f"{identity}/up/"),
        may_subscribe=lambda identity, topic_filter: topic_filter == f"{identity}/dn/#",
    )
    peer = await connect(endpoint, "a")
    assert await peer.publish("a/up/x", b"") == 0x10
    assert await peer.publish("b/up/x", b"") == 0x87
    peer.publish_0("b/up/x", b"")
    assert await peer.subscribe("a/dn/#", "b/dn/#", "#", "$share/g/b/dn/#") == [1, *[0x87] * 3]
    assert endpoint.counters.not_authorised == 2
    refused = await connect(endpoint, "c", will=mqtt5.Will("a/up/presence"))
    assert refused.connack.reason_code == 0x87


async def test_a_resumed_session_loses_subscriptions_that_are_no_longer_allowed(
    start: Start, connect: Connect
) -> None:
    groups = {"one", "two"}
    endpoint = await start(may_subscribe=lambda identity, topic_filter: topic_filter in groups)
    peer = await connect(endpoint, "a", session_expiry_interval=60)
    assert await peer.subscribe("one", "two") == [1, 1]
    groups.remove("two")
    peer = await connect(endpoint, "a", session_expiry_interval=60)
    await endpoint.publish("two", b"secret")
    await endpoint.publish("one", b"open")
    assert await peer.take(1) == [b"open"]


async def test_topics_of_the_servers_own_kind_are_not_for_clients(
    start: Start, connect: Connect
) -> None:
    endpoint = await start()
    peer = await connect(endpoint, "a")
    await peer.subscribe("#", "+/x", "$SYS/x")
    assert await peer.publish("$SYS/x", b"forged") == 0x87
    await endpoint.publish("$SYS/x", b"1")
    await endpoint.publish("$SYS/y", b"2")
    assert await peer.take(1) == [b"1"]
    await peer.silent()


async def test_no_local_and_identifiers(start: Start, connect: Connect) -> None:
    endpoint = await start()
    peer, other = await connect(endpoint, "a"), await connect(endpoint, "b")
    await peer.subscribe(TopicFilter("x/#", max_qos=AT_LEAST_ONCE, no_local=True), ident=300)
    await peer.publish("x/1", b"own")
    await other.publish("x/1", b"theirs")
    message = await peer.message()
    assert (message.payload, message.subscription_ids) == (b"theirs", [300])
    # Overlapping subscriptions cause one delivery, with the identifiers of all.
    await peer.subscribe("x/1", ident=7)
    await other.publish("x/1", b"both")
    message = await peer.message()
    assert (message.payload, sorted(message.subscription_ids)) == (b"both", [7, 300])
    # From itself only the one without No Local counts.
    await peer.publish("x/1", b"own again")
    message = await peer.message()
    assert (message.payload, message.subscription_ids) == (b"own again", [7])
    await peer.silent()


async def test_unsubscribing_ends_deliveries(start: Start, connect: Connect) -> None:
    endpoint = await start()
    peer = await connect(endpoint, "a")
    await peer.subscribe("x")
    assert await peer.unsubscribe("x", "y") == [0, 0x11]
    assert await peer.publish("x", b"1") == 0x10
    await peer.silent()


async def test_retained_messages_and_their_options(start: Start, connect: Connect) -> None:
    endpoint = await start()
    writer = await connect(endpoint, "w")
    await writer.publish("s/1", b"one", retain=True)
    await writer.publish("s/2", b"two", retain=True)
    await writer.publish("s/2", b"", retain=True)  # an empty one clears
    reader = await connect(endpoint, "r")
    await reader.subscribe("s/#")
    message = await reader.message()
    assert (message.topic, message.payload, message.retain) == ("s/1", b"one", True)
    reader.acknowledge(message)

    async def again(handling: int) -> None:
        handling_ = mqtt5.RetainHandling(handling)
        wish = TopicFilter("s/#", max_qos=AT_LEAST_ONCE, retain_handling=handling_)
        await reader.subscribe(wish)

    await again(0)
    assert await reader.take(1) == [b"one"]
    await again(1)
    await again(2)
    await reader.silent()
    await reader.unsubscribe("s/#")
    await again(1)
    assert await reader.take(1) == [b"one"]


@pytest.mark.parametrize("as_published", [True, False])
async def test_retain_as_published(start: Start, connect: Connect, as_published: bool) -> None:
    peer = await connect(await start(), "a")
    wish = TopicFilter("x", max_qos=AT_LEAST_ONCE, retain_as_published=as_published)
    await peer.subscribe(wish)
    await peer.publish("x", b"1", retain=True)
    assert (await peer.message()).retain is as_published


async def test_topic_aliases(start: Start, connect: Connect) -> None:
    endpoint = await start()
    peer = await connect(endpoint, "a")
    await peer.subscribe("long/topic", "other")
    await peer.publish("long/topic", b"1", topic_alias=3)
    await peer.publish("", b"2", topic_alias=3)
    await peer.publish("other", b"3", topic_alias=3)
    await peer.publish("", b"4", topic_alias=3)
    got = [await peer.message() for _ in range(4)]
    assert [m.topic for m in got] == ["long/topic", "long/topic", "other", "other"]
    peer.offer("", b"", topic_alias=4)
    assert await peer.disconnected() == 0x82
    peer = await connect(endpoint, "a")
    peer.offer("x", b"", topic_alias=17)
    assert await peer.disconnected() == 0x94


async def test_messages_expire_and_their_interval_counts_down(
    start: Start, connect: Connect, clock: FakeClock
) -> None:
    endpoint = await start()
    peer = await connect(endpoint, "a", session_expiry_interval=1000)
    await peer.subscribe("x")
    await endpoint.publish("x", b"now", expiry_s=60)
    message = await peer.message()
    assert message.message_expiry_interval == 60
    peer.acknowledge(message)
    await peer.leave()
    writer = await connect(endpoint, "w")
    await writer.publish("x", b"short", message_expiry_interval=10)
    await writer.publish("x", b"long", message_expiry_interval=60)
    await writer.publish("x", b"for ever")
    clock.advance(10)
    peer = await connect(endpoint, "a", session_expiry_interval=1000)
    message = await peer.message()
    assert (message.payload, message.message_expiry_interval) == (b"long", 50)
    assert (await peer.message()).message_expiry_interval is None
    assert endpoint.counters.dropped_expired == 1


async def test_an_expired_retained_message_is_gone(
    start: Start, connect: Connect, clock: FakeClock
) -> None:
    endpoint = await start()
    await endpoint.publish("x", b"1", retain=True, expiry_s=5)
    clock.advance(6)
    peer = await connect(endpoint, "a")
    await peer.subscribe("x")
    await peer.silent()
    assert len(endpoint.router.retained) == 0


async def test_a_message_too_large_for_its_reader_is_dropped_and_counted(
    start: Start, connect: Connect
) -> None:
    endpoint = await start()
    peer = await connect(endpoint, "a", max_packet_size=64)
    await peer.subscribe("x")
    assert await peer.publish("x", b"-" * 100) == 0
    await peer.publish("x", b"small")
    assert await peer.take(1) == [b"small"]
    assert endpoint.counters.dropped_too_large == 1


async def test_the_readers_receive_maximum_is_respected(start: Start, connect: Connect) -> None:
    endpoint = await start()
    peer = await connect(endpoint, "a", receive_max=2)
    await peer.subscribe("x")
    for n in range(4):
        await endpoint.publish("x", b"%d" % n)
    first, second = await peer.message(), await peer.message()
    await peer.silent()
    peer.acknowledge(first)
    third = await peer.message()
    await peer.silent()
    peer.acknowledge(second)
    peer.acknowledge(third)
    fourth = await peer.message()
    assert [m.payload for m in (first, second, third, fourth)] == [b"0", b"1", b"2", b"3"]


async def test_more_unacknowledged_messages_than_offered_end_the_connection(
    connect: Connect, tmp_path: Path
) -> None:
    never = asyncio.Event()

    async def handler(topic: str, payload: bytes) -> None:
        await never.wait()

    async with make_endpoint(
        tmp_path / "db", limits=Limits(receive_maximum=2, drain_s=0)
    ) as nobody:
        del nobody  # the folder's lock and an unused endpoint: two may run side by side
        endpoint = make_endpoint(tmp_path / "mqtt2.db", limits=Limits(receive_maximum=2, drain_s=0))
        endpoint.subscribe("x", handler)
        async with endpoint:
            peer = await connect(endpoint, "a")
            for _ in range(3):
                peer.offer("x", b"")
            assert await peer.disconnected() == 0x93


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (mqtt5.ConnectPacket("a").write(), 0x82),
        (b"\xd0\x00", 0x82),  # PINGRESP
        (b"\x62\x02\x00\x01", 0x82),  # PUBREL
        (mqtt5.AuthPacket(authentication_method="x").write(), 0x82),
        (b"\x82\x03\x00\x01\x00", 0x82),  # SUBSCRIBE without a filter
        (b"\x82\x08\x00\x00\x00\x00\x02ab\x01", 0x82),  # ... with packet identifier 0
        (b"\xa2\x03\x00\x01\x00", 0x82),  # UNSUBSCRIBE without a filter
        (b"\x80\x07\x00\x01\x00\x00\x01a\x01", 0x81),  # SUBSCRIBE with wrong flags
        (b"\x36\x06\x00\x01a\x00\x01\x00", 0x81),  # QoS 3
        (b"\x32\x06\x00\x01a\x00\x00\x00", 0x82),  # packet identifier 0
        (b"\x30\x04\x00\x01#\x00", 0x90),
        (b"\x30\x04\x00\x01\x00\x00", 0x81),  # a null character
        (b"\x30\x04\x00\x01\xff\x00", 0x81),  # not UTF-8
        (b"\x30\x05\x00\x02\xc3\xff\x00", 0x81),
        (b"\x30\x03\x00\x00\x00", 0x82),  # no topic and no alias
        (b"\x30\x02\x00\x05", 0x81),  # a topic beyond the packet's end
        (b"\x30\x09\x00\x01a\x05\x26\x00\x01k\x00", 0x81),  # properties beyond it
        (b"\x30\x0c\x00\x01a\x08\x26\x00\x01\xff\x00\x01vx", 0x81),  # a property that is not text
        (b"\x30\x06\x00\x01a\x02\x7f\x00", 0x81),  # an unknown property
        (b"\x30\x07\x00\x01a\x02\x0b\x01x", 0x82),  # a subscription identifier from a client
        (b"\x30\xff\xff\xff\xff\x7f", 0x81),  # a length of five bytes
        (b"\x00\x00", 0x82),  # packet type 0
        (b"\x30\xff\xff\x7f", 0x95),
        (
            mqtt5.SubscribePacket(1, [TopicFilter("$share/g/x", no_local=True)]).write(),
            0x82,
        ),
        (mqtt5.DisconnectPacket(session_expiry_interval=9).write(), 0x82),
    ],
)
async def test_each_fault_of_a_client_has_its_reason_code(
    start: Start, connect: Connect, sent: bytes, reason: int, caplog: pytest.LogCaptureFixture
) -> None:
    endpoint = await start()
    peer = await connect(endpoint, "a")
    with caplog.at_level(logging.WARNING):
        peer.send_bytes(sent)
        assert await peer.disconnected() == reason
    (line,) = caplog.records
    assert line.getMessage().startswith("a at 127.0.0.1:")
    assert "broke the protocol" in line.getMessage()
    assert not line.exc_info
    # And nobody else notices.
    assert (await connect(endpoint, "b")).connack.reason_code == 0


@pytest.mark.parametrize(
    "sent",
    [b"\xc0\x00", b"GET / HTTP/1.1\r\n\r\n", b"\x10\xff\xff\xff\xff", b"\x10\x02\x00\x09"],
)
async def test_whoever_does_not_begin_with_connect_is_shown_the_door(
    start: Start, dial: Connect, sent: bytes
) -> None:
    peer = await dial(await start())
    peer.send_bytes(sent)
    await peer.ended()


@pytest.mark.parametrize(
    "pattern",
    [
        "a/#/b",
        "a#",
        "+a",
        "",
        "$share//x",
        "$share/g",
        "$share/g/",
        "$share/+/x",
        "/".join("x" * 33),
    ],
)
async def test_a_malformed_filter_is_refused_alone(
    start: Start, connect: Connect, pattern: str
) -> None:
    peer = await connect(await start(), "a")
    body = b"\x00\x07\x00" + len(pattern).to_bytes(2, "big") + pattern.encode() + b"\x01"
    body += b"\x00\x02ok\x01"
    peer.send_bytes(b"\x82" + bytes((len(body),)) + body)
    suback = await peer.expect(mqtt5.SubAckPacket)
    assert [int(code) for code in suback.reason_codes] == [0x8F, 1]


async def test_subscriptions_connections_and_retained_messages_are_limited(
    start: Start, connect: Connect
) -> None:
    endpoint = await start(limits=Limits(max_subscriptions=1, max_connections=2, max_retained=1))
    peer = await connect(endpoint, "a")
    assert await peer.subscribe("x", "x", "y") == [1, 1, 0x97]
    assert await peer.publish("x", b"1", retain=True) == 0
    assert await peer.publish("x", b"2", retain=True) == 0
    assert await peer.publish("y", b"1", retain=True) == 0x97
    await connect(endpoint, "b")
    assert (await connect(endpoint, "c")).connack.reason_code == 0x89


async def test_retained_messages_are_limited_in_bytes(start: Start, connect: Connect) -> None:
    endpoint = await start(limits=Limits(max_retained_bytes=5_000))
    peer = await connect(endpoint, "a")
    assert await peer.publish("x", b"-" * 4_000, retain=True) == 0x10
    assert await peer.publish("y", b"-" * 1_000, retain=True) == 0x97
    assert await peer.publish("x", b"-" * 3_000, retain=True) == 0x10
    assert await peer.publish("y", b"-" * 1_000, retain=True) == 0x10
    await peer.publish("x", b"", retain=True)
    await peer.publish("y", b"", retain=True)
    assert endpoint.router.retained.size == 0


async def test_packets_may_come_in_any_pieces(start: Start, dial: Connect) -> None:
    peer = await dial(await start())
    whole = (
        mqtt5.ConnectPacket("a").write()
        + mqtt5.SubscribePacket(1, [TopicFilter("x", max_qos=AT_LEAST_ONCE)]).write()
        + mqtt5.PublishPacket("x", b"-" * 300, qos=AT_LEAST_ONCE, packet_id=9).write()
    )
    for index in range(len(whole)):
        peer.send_bytes(whole[index : index + 1])
        await peer.writer.drain()
        if index % 16 == 0:  # let the endpoint see the pieces
            await asyncio.sleep(0)
    await peer.expect(mqtt5.ConnAckPacket)
    await peer.expect(mqtt5.SubAckPacket)
    kinds = {type(await peer.next()) for _ in range(2)}
    assert kinds == {mqtt5.PublishPacket, mqtt5.PubAckPacket}


async def test_revoked_devices_are_told_why(start: Start, connect: Connect) -> None:
    endpoint = await start()
    peer = await connect(endpoint, "a")
    await endpoint.disconnect("a", "the device was removed")
    packet = await peer.expect(mqtt5.DisconnectPacket)
    assert (packet.reason_code, packet.reason_str) == (0x98, "the device was removed")
    await peer.ended()
    await endpoint.disconnect("a", "again is harmless")


async def test_a_shutdown_is_announced(tmp_path: Path, connect: Connect) -> None:
    async with make_endpoint(tmp_path / "mqtt.db") as endpoint:
        peer = await connect(endpoint, "a")
    assert await peer.disconnected() == 0x8B
    assert not endpoint.connected
    with pytest.raises(Unavailable):
        await endpoint.publish("x", b"")


async def test_what_the_broker_cannot_publish_is_refused_clearly(start: Start) -> None:
    endpoint = await start()
    for topic in ("a/+", "", "a\0b", "\ud800", "a/" * 40):
        with pytest.raises(Refused):
            await endpoint.publish(topic, b"")
    with pytest.raises(Refused, match="blob"):
        await endpoint.publish("x", b"-" * 200_000)
    with pytest.raises(Refused):
        await endpoint.publish("x", b"", qos=2)


def test_listening_in_the_open_needs_tls(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="TLS"):
        make_endpoint(tmp_path / "mqtt.db", host="0.0.0.0")


async def test_nagle_is_off(start: Start, connect: Connect) -> None:
    endpoint = await start()
    await connect(endpoint, "a")
    (connection,) = endpoint._connections
    opened = connection._transport.get_extra_info("socket")
    assert opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_a_reader_that_does_not_read_does_not_fill_the_memory(
    start: Start, connect: Connect
) -> None:
    endpoint = await start(limits=Limits(write_high_water_bytes=20_000, linger_s=0.0))
    peer = await connect(endpoint, "a")
    await peer.subscribe(TopicFilter("x", max_qos=mqtt5.QoS.AT_MOST_ONCE))
    socket_ = cast(asyncio.Transport, peer.writer.transport)
    socket_.pause_reading()
    (connection,) = endpoint._connections
    sent = 0
    while not connection.blocked:
        await endpoint.publish("x", b"-" * 10_000, qos=0)
        await asyncio.sleep(0)
        sent += 1
        assert sent < 5_000
    await endpoint.publish("x", b"dropped", qos=0)
    assert endpoint.counters.dropped_slow_reader == 1
    assert connection._transport.get_write_buffer_size() < 100_000
    socket_.resume_reading()
    for _ in range(sent):
        await peer.message()
    await peer.silent()
    assert not connection.blocked


async def test_pubacks_follow_the_handlers_and_keep_the_order_of_receipt(
    tmp_path: Path, connect: Connect
) -> None:
    started: list[bytes] = []
    may_end = {name: asyncio.Event() for name in (b"1", b"2", b"3")}

    async def handler(topic: str, payload: bytes) -> None:
        started.append(payload)
        await may_end[payload].wait()
        if payload == b"2":
            raise RuntimeError("this one fails")

    endpoint = make_endpoint(tmp_path / "mqtt.db")
    endpoint.subscribe("a/up/#", handler)
    async with endpoint:
        peer = await connect(endpoint, "a")
        ids = [peer.offer("a/up/x", payload) for payload in may_end]
        peer.offer("nobody/wants/this", b"")
        await peer.silent()
        assert started == [b"1", b"2", b"3"]  # all run at once
        may_end[b"3"].set()
        may_end[b"2"].set()
        await peer.silent()
        may_end[b"1"].set()
        answers = [await peer.expect(mqtt5.PubAckPacket) for _ in range(4)]
        assert [answer.packet_id for answer in answers[:3]] == ids
        assert [int(answer.reason_code) for answer in answers] == [0, 0x83, 0, 0x10]
        assert endpoint.counters.handler_errors == 1


async def test_a_busy_handler_slows_its_sender_down_and_nobody_else(
    tmp_path: Path, connect: Connect
) -> None:
    running = 0
    full, go = asyncio.Event(), asyncio.Event()

    async def handler(topic: str, payload: bytes) -> None:
        nonlocal running
        running += 1
        if running == 4:
            full.set()
        await go.wait()

    endpoint = make_endpoint(tmp_path / "mqtt.db", limits=Limits(max_handling=4))
    endpoint.subscribe("x", handler)
    async with endpoint:
        peer = await connect(endpoint, "a")
        for _ in range(4):
            peer.publish_0("x", b"")
        await full.wait()
        peer.publish_0("x", b"")
        other = await connect(endpoint, "b")
        await other.silent()
        assert running == 4
        go.set()
        await peer.silent()
        assert running == 5


async def test_the_brokers_own_messages_are_not_for_its_own_handlers(
    tmp_path: Path, connect: Connect
) -> None:
    seen: asyncio.Queue[bytes] = asyncio.Queue()

    async def handler(topic: str, payload: bytes) -> None:
        seen.put_nowait(payload)

    endpoint = make_endpoint(tmp_path / "mqtt.db")
    endpoint.subscribe("x", handler)
    async with endpoint:
        with pytest.raises(RuntimeError):
            endpoint.subscribe("y", handler)
        await endpoint.publish("x", b"own")
        await (await connect(endpoint, "a")).publish("x", b"theirs")
    assert seen.get_nowait() == b"theirs"
    assert seen.empty()


async def test_handlers_are_told_what_is_retained_when_serving_begins(tmp_path: Path) -> None:
    seen: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()

    async def handler(topic: str, payload: bytes) -> None:
        seen.put_nowait((topic, payload))

    async with make_endpoint(tmp_path / "mqtt.db") as endpoint:
        await endpoint.publish("a/presence", b"online", retain=True)
    again: Endpoint = make_endpoint(tmp_path / "mqtt.db")
    again.subscribe("+/presence", handler)
    async with again:
        assert await seen.get() == ("a/presence", b"online")
