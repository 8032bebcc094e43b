# SPDX-License-Identifier: Apache-2.0
"""What arrives whole is read as sent; what does not is refused, and says whose fault it is."""

import struct
import zlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedml_protocol import wire_pb2
from fedml_protocol.codec import serialise
from fedml_protocol.envelope import MAX_BYTES, SCHEMA, Envelope, pack, unpack
from fedml_protocol.errors import MalformedMessage, UnsupportedMessage
from fedml_protocol.tasks import Progress, TaskState
from tests.fakes.messages import LAW, members, messages, wire_bytes
from tests.protocol.golden.examples import ENVELOPES

BODIES = members(Envelope, "body")
HEAD = 11

each_body = pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
each_example = pytest.mark.parametrize("name", ENVELOPES)


def framed(data: bytes, version: int = 1) -> bytes:
    """A frame that fits, around anything."""
    return struct.pack(">2sBII", b"FM", version, len(data), zlib.crc32(data, version)) + data


def fault_of(data: bytes) -> str | None:
    """Whose fault it is that `data` cannot be read; None when it can."""
    try:
        unpack(data)
    except (MalformedMessage, UnsupportedMessage) as error:
        return error.fault
    return None


@each_body
@LAW
@given(data=st.data())
def test_what_is_packed_is_unpacked(body: type, data: st.DataObject) -> None:
    envelope = replace(data.draw(messages(Envelope)), body=data.draw(messages(body)))
    assert unpack(pack(envelope)) == envelope


@each_body
@LAW
@given(data=st.data())
def test_a_truncated_or_damaged_message_is_the_senders_fault(
    body: type, data: st.DataObject
) -> None:
    packed = pack(replace(data.draw(messages(Envelope)), body=data.draw(messages(body))))
    cut = data.draw(st.integers(0, len(packed) - 1))
    assert fault_of(packed[:cut]) == "sender"
    at, flip = data.draw(st.integers(0, len(packed) - 1)), data.draw(st.integers(1, 255))
    assert fault_of(packed[:at] + bytes([packed[at] ^ flip]) + packed[at + 1 :]) == "sender"


@each_example
def test_every_truncation_is_the_senders_fault(name: str) -> None:
    packed = pack(ENVELOPES[name])
    assert fault_of(packed) is None
    assert {fault_of(packed[:cut]) for cut in range(len(packed))} == {"sender"}


@each_example
def test_every_flipped_bit_is_the_senders_fault(name: str) -> None:
    packed = pack(ENVELOPES[name])
    number, size = int.from_bytes(packed), len(packed)
    flipped = ((number ^ 1 << bit).to_bytes(size) for bit in range(8 * size))
    assert {fault_of(data) for data in flipped} == {"sender"}


@each_example
def test_bytes_after_the_end_are_the_senders_fault(name: str) -> None:
    assert fault_of(pack(ENVELOPES[name]) + b"\0") == "sender"


@LAW
@given(st.binary(max_size=300))
def test_any_bytes_are_refused(data: bytes) -> None:
    assert fault_of(data) == "sender"


@LAW
@given(st.binary(max_size=300) | wire_bytes(Envelope))
def test_a_fitting_frame_around_anything_is_read_or_refused(data: bytes) -> None:
    fault = fault_of(framed(data))
    assert fault in {None, "sender", "version"}
    if fault is None:
        again = pack(unpack(framed(data)))
        assert pack(unpack(again)) == again


def test_a_newer_frame_is_nobodys_fault() -> None:
    data = serialise(ENVELOPES["accept"])
    for version in (0, 2, 7, 255):
        with pytest.raises(UnsupportedMessage, match=f"frame version {version}"):
            unpack(framed(data, version))


def test_a_flipped_version_does_not_pass_for_a_newer_frame() -> None:
    packed = bytearray(pack(ENVELOPES["accept"]))
    packed[2] = 2
    with pytest.raises(MalformedMessage, match="damaged"):
        unpack(bytes(packed))


def test_a_body_of_a_newer_peer_is_nobodys_fault() -> None:
    newer = wire_pb2.Envelope(schema=2, device="d").SerializeToString() + b"\xf2\x03\x02hi"
    assert fault_of(framed(newer)) == "version"


def test_a_newer_schema_is_read_as_long_as_its_body_is_known() -> None:
    newer = replace(ENVELOPES["accept"], schema=SCHEMA + 1)
    assert unpack(pack(newer)) == newer


def test_an_envelope_without_schema_or_device_is_the_senders_fault() -> None:
    body = wire_pb2.Accept(task="t", epoch=1)
    for proto, why in (
        (wire_pb2.Envelope(device="d", accept=body), "schema"),
        (wire_pb2.Envelope(schema=1, accept=body), "device"),
        (wire_pb2.Envelope(schema=1, device="d/e", accept=body), "device"),
    ):
        with pytest.raises(MalformedMessage, match=why):
            unpack(framed(proto.SerializeToString()))


def test_the_messages_of_other_protocols_are_told_apart() -> None:
    for data in (b"", b"FM", b"GET / HTTP/1.1\r\n\r\n", b'{"device": "d", "task": "t"}'):
        assert fault_of(data) == "sender"
    with pytest.raises(MalformedMessage, match="not a message of this protocol"):
        unpack(b"GET / HTTP/1.1\r\n\r\n")


def test_exactly_128_kb_may_travel_and_not_one_byte_more() -> None:
    def noted(length: int) -> Envelope:
        note = "x" * length
        body = Progress(task="t", epoch=1, state=TaskState.RUNNING, note=note)
        return Envelope(device="d", body=body)

    around = len(pack(noted(100_000))) - 100_000
    largest = noted(MAX_BYTES - around)
    assert len(pack(largest)) == MAX_BYTES
    assert unpack(pack(largest)) == largest

    with pytest.raises(MalformedMessage, match="into the package or a blob"):
        pack(noted(MAX_BYTES - around + 1))
    with pytest.raises(MalformedMessage, match="at most 131072"):
        unpack(framed(serialise(noted(MAX_BYTES))))


def test_the_frame_is_magic_version_length_and_checksum() -> None:
    packed = pack(ENVELOPES["accept"])
    data = serialise(ENVELOPES["accept"])
    assert packed == framed(data)
    assert len(packed) == HEAD + len(data)
