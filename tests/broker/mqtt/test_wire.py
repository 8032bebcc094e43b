# SPDX-License-Identifier: Apache-2.0
"""Bytes that nobody should send: they end one connection with a reason, and nothing else."""

import asyncio
import logging
from pathlib import Path

import mqtt5
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fedml_broker.mqtt import wire
from fedml_broker.mqtt.endpoint import Endpoint
from tests.broker.mqtt.conftest import make_endpoint
from tests.broker.mqtt.peer import Peer

Q1 = mqtt5.QoS.AT_LEAST_ONCE
WILL = mqtt5.Will(
    "w/ü", payload=b"\xff\x00", message_expiry_interval=3, user_properties=[("a", "b")]
)
VALID: list[mqtt5.Packet] = [
    mqtt5.ConnectPacket(
        "abc", username="u", password=b"\xff", will=WILL, user_properties=[("k", "v")]
    ),
    mqtt5.PublishPacket("a/b", b"x" * 20, qos=Q1, packet_id=7),
    mqtt5.PublishPacket(
        "a", b"\xff", topic_alias=3, user_properties=[("ü", "")], correlation_data=b"\xfe"
    ),
    mqtt5.PublishPacket("a", b"x", message_expiry_interval=9, content_type="t", response_topic="r"),
    mqtt5.PubAckPacket(7, reason_str="why", user_properties=[("k", "v")]),
    mqtt5.SubscribePacket(
        3, [mqtt5.TopicFilter("a/+"), mqtt5.TopicFilter("b")], subscription_id=400
    ),
    mqtt5.UnsubscribePacket(3, ["a", "$share/g/x"], user_properties=[("k", "v")]),
    mqtt5.PingReqPacket(),
    mqtt5.DisconnectPacket(reason_str="bye", user_properties=[("k", "v")]),
    mqtt5.AuthPacket(authentication_method="m", authentication_data=b"\xff"),
]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A valid packet with a few bytes changed, perhaps cut short or followed by more."""
    data = bytearray(draw(st.sampled_from(VALID)).write())
    for _ in range(draw(st.integers(0, 3))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    cut = draw(st.integers(0, len(data)))
    return bytes(data[:cut]) if draw(st.booleans()) else bytes(data) + draw(st.binary(max_size=4))


def _whole_packet(data: bytes) -> tuple[int, int] | None:
    if len(data) < 2:
        return None
    length, body = wire.read_varint(data, 1, len(data))
    return (body, body + length) if body and body + length <= len(data) else None


@pytest.mark.parametrize("packet", VALID, ids=lambda packet: type(packet).__name__)
def test_valid_packets_are_read_as_the_codec_reads_them(packet: mqtt5.Packet) -> None:
    data = packet.write()
    body, stop = _whole_packet(data) or (0, 0)
    assert wire.read(data, 0, body, stop).write() == data


@settings(max_examples=1500, deadline=None)
@given(damaged() | st.binary(max_size=60))
@example(b"\x30\x04\x00\x01\xff\x00")
@example(b"\x10\x0e\x00\x04MQTT\x05\x02\x00\x00\x00\x00\x01\xff")
@example(b"\x82\x07\x00\x01\x00\x00\x01\xff\x01")
@example(b"\xe0\x07\x00\x05\x1f\x00\x02\xff\xffx")
def test_no_bytes_reach_the_codec_that_it_panics_on(data: bytes) -> None:
    # A panic is a BaseException of the codec's own; it would escape here.
    code = 0x81
    try:
        found = _whole_packet(data)
        if found and data[0] >> 4 in (1, 3, 4, 8, 10, 12, 14, 15):
            wire.read(data[: found[1]], 0, *found)
    except wire.Violation as violation:
        code = violation.code
    assert code in (0x81, 0x82, 0x84)


@given(st.binary(max_size=300), st.booleans(), st.integers(1, 0xFFFF), st.text(max_size=40))
def test_the_hand_made_publish_is_what_the_codec_makes(
    payload: bytes, retain: bool, packet_id: int, name: str
) -> None:
    topic = name.replace("+", "").replace("#", "").encode() or b"t"
    prefixed = len(topic).to_bytes(2, "big") + topic
    for qos, flags, ident in ((0, 0, None), (1, 2, packet_id)):
        ours = wire.publish(flags | retain, prefixed, ident or 0, payload)
        theirs = mqtt5.PublishPacket(
            topic.decode(), payload, qos=mqtt5.QoS(qos), retain=retain, packet_id=ident
        )
        assert ours == theirs.write()


@given(st.integers(0, 0xFFFFFFF))
def test_variable_byte_integers_come_back(value: int) -> None:
    data = wire.varint(value)
    assert wire.read_varint(data, 0, len(data)) == (value, len(data))
    assert wire.read_varint(data, 0, len(data) - 1) == (0, 0)


def test_a_puback_is_what_the_codec_makes() -> None:
    assert wire.puback(0x1234) == mqtt5.PubAckPacket(0x1234).write()
    code = mqtt5.PubAckReasonCode.QUOTA_EXCEEDED
    assert wire.puback(7, 0x97) == mqtt5.PubAckPacket(7, reason_code=code).write()


@pytest.mark.parametrize("greeted", [True, False])
def test_garbage_over_a_socket_never_hurts_the_endpoint(
    greeted: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def throw(endpoint: Endpoint, witness: Peer, pieces: list[bytes]) -> None:
        for data in pieces:
            peer = await Peer.open(endpoint.port)
            if greeted:
                await peer.connect("somebody")
            peer.send_bytes(data)
            peer.writer.write_eof()
            while await peer.reader.read(65536):
                pass
            await peer.close()
        await witness.silent()

    # One endpoint for all of it: opened anew for each example, it was most of the time that this
    # takes, and on a busy machine more than a test may.
    with asyncio.Runner() as runner:
        endpoint = make_endpoint(tmp_path / "mqtt.db")
        runner.run(endpoint.__aenter__())
        witness = runner.run(Peer.open(endpoint.port))
        runner.run(witness.connect("witness"))

        @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
        @given(st.lists(damaged() | st.binary(max_size=80), max_size=8))
        def run(pieces: list[bytes]) -> None:
            caplog.clear()
            with caplog.at_level(logging.WARNING, "fedml_broker"):
                runner.run(throw(endpoint, witness, pieces))
            assert not [record for record in caplog.records if record.exc_info]
            assert all("broke the protocol" in record.getMessage() for record in caplog.records)

        try:
            run()
        finally:
            runner.run(witness.close())
            runner.run(endpoint.__aexit__(None, None, None))
