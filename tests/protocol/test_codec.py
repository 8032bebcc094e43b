# SPDX-License-Identifier: Apache-2.0
"""Dataclasses to protobuf and back: laws for every message, and what a bad peer may try."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedml_protocol import wire_pb2
from fedml_protocol.blob import Blob, NamedBlob
from fedml_protocol.codec import parse, serialise
from fedml_protocol.devices import GpuReading, Heartbeat, Presence
from fedml_protocol.envelope import Envelope
from fedml_protocol.errors import MalformedMessage, ProtocolError, UnsupportedMessage
from fedml_protocol.federate import AggregatorFrame, RoundPlan, StageSpec, WorkerFrame
from fedml_protocol.launch import LaunchSpec
from fedml_protocol.tasks import (
    Accept,
    Cancel,
    Offer,
    Order,
    Progress,
    Reject,
    Result,
    TaskState,
)
from tests.fakes.messages import LAW, MESSAGES, each_message, messages, wire_bytes
from tests.protocol.golden.examples import EXAMPLES, ORDERS

THEIRS = {"sender", "version"}


def read_or_refuse(kind: type[object], data: bytes) -> None:
    """What is read is a message that travels on; what is refused says whose fault it is.

    Compared as bytes: a damaged float may be a NaN, which equals nothing.
    """
    message, refusal = None, None
    try:
        message = parse(kind, data)
    except ProtocolError as error:
        refusal = error
    if refusal is not None:
        assert refusal.fault in THEIRS
        assert str(refusal)
    else:
        again = serialise(message)
        assert serialise(parse(kind, again)) == again


@each_message
@LAW
@given(data=st.data())
def test_a_message_comes_back_as_it_was(kind: type, data: st.DataObject) -> None:
    message = data.draw(messages(kind))
    assert parse(kind, serialise(message)) == message


@each_message
@LAW
@given(data=st.data())
def test_equal_messages_give_equal_bytes(kind: type, data: st.DataObject) -> None:
    message = data.draw(messages(kind))
    other = rebuilt(message)
    assert other == message
    assert serialise(other) == serialise(message)


def rebuilt(value: Any) -> Any:
    """An equal value that shares nothing with `value`, its mappings filled in another order."""
    if type(value) in MESSAGES:
        return type(value)(**{f.name: rebuilt(getattr(value, f.name)) for f in fields(value)})
    if isinstance(value, tuple):
        return tuple(rebuilt(item) for item in value)
    if isinstance(value, Mapping):
        return dict(reversed(list(value.items())))
    return value


@each_message
@LAW
@given(data=st.data())
def test_any_bytes_are_read_or_refused(kind: type, data: st.DataObject) -> None:
    read_or_refuse(kind, data.draw(st.binary(max_size=200)))


@each_message
@LAW
@given(data=st.data())
def test_any_protobuf_is_read_or_refused(kind: type, data: st.DataObject) -> None:
    read_or_refuse(kind, data.draw(wire_bytes(kind)))


@each_message
@LAW
@given(data=st.data())
def test_a_damaged_message_is_read_or_refused(kind: type, data: st.DataObject) -> None:
    whole = serialise(data.draw(messages(kind)))
    cut = data.draw(st.integers(0, len(whole)))
    read_or_refuse(kind, whole[:cut])
    read_or_refuse(kind, whole[cut:])
    if whole:
        at = data.draw(st.integers(0, len(whole) - 1))
        junk = data.draw(st.binary(max_size=4))
        read_or_refuse(kind, whole[:at] + junk + whole[at + 1 :])


@pytest.mark.parametrize("name", ORDERS)
def test_every_truncation_and_bit_flip_of_an_order_is_read_or_refused(name: str) -> None:
    whole = serialise(ORDERS[name])
    for cut in range(len(whole)):
        read_or_refuse(Order, whole[:cut])
    for damaged in bit_flips(whole):
        read_or_refuse(Order, damaged)


@pytest.mark.parametrize("name", [n for n in EXAMPLES if n.startswith(("worker", "aggregator"))])
def test_every_truncation_and_bit_flip_of_a_local_frame_is_read_or_refused(name: str) -> None:
    kind, whole = type(EXAMPLES[name]), serialise(EXAMPLES[name])
    for cut in range(len(whole)):
        read_or_refuse(kind, whole[:cut])
    for damaged in bit_flips(whole):
        read_or_refuse(kind, damaged)


def bit_flips(data: bytes) -> list[bytes]:
    """Every string that differs from `data` in one bit."""
    number = int.from_bytes(data)
    return [(number ^ 1 << bit).to_bytes(len(data)) for bit in range(8 * len(data))]


def test_text_that_is_not_utf8_is_the_senders_fault() -> None:
    names = [
        (kind, field.number)
        for kind in MESSAGES
        for field in getattr(wire_pb2, kind.__name__).DESCRIPTOR.fields
        if field.type == field.TYPE_STRING
    ]
    assert len(names) > 40
    for kind, number in names:
        for junk in (b"\xff", b"\xc3", b"\xed\xa0\x80", b"a\xc0\x80"):
            with pytest.raises(MalformedMessage, match="UTF-8"):
                parse(kind, varint(number << 3 | 2) + varint(len(junk)) + junk)


def test_a_key_of_a_mapping_that_is_not_utf8_is_the_senders_fault() -> None:
    entry = b"\x0a\x01\xff\x12\x01b"
    for kind, number in ((LaunchSpec, 3), (StageSpec, 14)):
        with pytest.raises(MalformedMessage, match="UTF-8"):
            parse(kind, varint(number << 3 | 2) + varint(len(entry)) + entry)


def test_enum_numbers_of_a_newer_peer_are_nobodys_fault_and_zero_is_the_senders() -> None:
    for number in (99, 11, -1, 2**31 - 1, -(2**31)):
        newer = wire_pb2.Reject(task="t", epoch=1)
        newer.reason = number  # type: ignore[assignment]
        with pytest.raises(UnsupportedMessage, match=str(number)):
            parse(Reject, newer.SerializeToString())
    with pytest.raises(MalformedMessage, match=r"Reject\.reason is missing"):
        parse(Reject, wire_pb2.Reject(task="t", epoch=1).SerializeToString())


def test_a_union_without_a_known_member_comes_from_a_newer_peer() -> None:
    for kind, name in (
        (Envelope, "body"),
        (Order, "what"),
        (Offer, "spec"),
        (WorkerFrame, "body"),
        (AggregatorFrame, "body"),
    ):
        proto = getattr(wire_pb2, kind.__name__)()
        if kind is not WorkerFrame and kind is not AggregatorFrame:
            proto.MergeFromString(serialise(example_of(kind)))
            proto.ClearField(proto.WhichOneof(name))
        unknown = varint(1000 << 3 | 2) + b"\x02hi"
        with pytest.raises(UnsupportedMessage, match=f"{kind.__name__}.{name}"):
            parse(kind, proto.SerializeToString() + unknown)


def example_of(kind: type) -> object:
    offer = ORDERS["offer-launch"].what
    return next(message for message in (*EXAMPLES.values(), offer) if type(message) is kind)


def test_fields_that_a_newer_peer_added_are_passed_over() -> None:
    for kind in MESSAGES:
        newer = varint(1000 << 3 | 2) + b"\x02hi" + varint(1001 << 3) + b"\x07"
        if kind.__name__ in {"Resync", "RoundBegun", "Drain", "MakeModel"}:
            assert parse(kind, newer) == parse(kind, b"")
    accept = Accept(task="t", epoch=3)
    assert parse(Accept, serialise(accept) + varint(1000 << 3) + b"\x07") == accept


def test_a_required_part_that_is_absent_is_the_senders_fault() -> None:
    with pytest.raises(MalformedMessage, match=r"NamedBlob\.blob is missing"):
        parse(NamedBlob, wire_pb2.NamedBlob(name="a").SerializeToString())
    launch = wire_pb2.LaunchSpec(command="true")
    offer = wire_pb2.Offer(task="t", epoch=1, run="r", lease_s=1, on_lost="STOP", launch=launch)
    with pytest.raises(MalformedMessage, match=r"Offer\.needs is missing"):
        parse(Offer, offer.SerializeToString())


def test_an_absent_exit_code_differs_from_zero() -> None:
    none = Result(task="t", epoch=1, state=TaskState.LOST)
    zero = replace(none, exit_code=0, signal=0)
    assert parse(Result, serialise(none)) == none
    assert parse(Result, serialise(zero)) == zero
    assert serialise(none) != serialise(zero)


def test_groups_nested_without_end_are_refused() -> None:
    deep = b"\x0b" * 100_000  # field 1, start of a group
    with pytest.raises(MalformedMessage):
        parse(Accept, deep)
    with pytest.raises(MalformedMessage):
        parse(Accept, deep + b"\x0c" * 100_000)


def test_lengths_beyond_the_end_are_refused() -> None:
    for length in (3, 2**31 - 1, 2**31, 2**32, 2**63, 2**64 - 1):
        with pytest.raises(MalformedMessage):
            parse(Accept, b"\x0a" + varint(length) + b"ab")


def test_repeated_fields_may_be_huge() -> None:
    clients = tuple(range(1_000_000, 1_200_000))
    assert parse(RoundPlan, serialise(RoundPlan(clients=clients))).clients == clients

    tasks = b"\x12\x00" * 50_000  # 50,000 tasks that say nothing
    with pytest.raises(MalformedMessage, match=r"TaskBeat\.state is missing"):
        parse(Heartbeat, tasks)

    gpus = b"\x42\x00" * 20_000
    assert parse(Heartbeat, gpus).gpus == (GpuReading(uuid=""),) * 20_000


def test_a_value_that_the_wire_cannot_hold_is_refused_before_it_is_sent() -> None:
    for message in (
        Accept(task="t", epoch=2**64),
        Heartbeat(free_slots=-1),
        Heartbeat(free_slots=2**32),
        Blob(sha256="0" * 64, size=-1),
        NamedBlob(name="\udcff.bin", blob=Blob(sha256="0" * 64)),
        LaunchSpec(command="true", env={"A": "\ud800"}),
    ):
        with pytest.raises(MalformedMessage, match="cannot be sent"):
            serialise(message)


@pytest.mark.parametrize(
    ("refused", "why"),
    [
        (lambda: Accept(task="", epoch=1), "task must be 1 to 40"),
        (lambda: Accept(task="t", epoch=0), "epoch must be >= 1"),
        (lambda: Accept(task="T", epoch=1), "task must be 1 to 40"),
        (lambda: Blob(sha256="A" * 64), "SHA-256"),
        (lambda: Cancel(task="t", epoch=1, grace_s=float("nan")), "grace_s"),
        (lambda: Cancel(task="t", epoch=1, grace_s=-1.0), "grace_s"),
        (lambda: LaunchSpec(command=" \n"), "needs a command"),
        (lambda: LaunchSpec(command="a\0b"), "NUL"),
        (lambda: LaunchSpec(command="a", bootstrap="\0"), "NUL"),
        (lambda: LaunchSpec(command="a", env={"A=B": "c"}), "environment variable"),
        (lambda: LaunchSpec(command="a", env={"": "c"}), "environment variable"),
        (lambda: LaunchSpec(command="a", secrets=("B",)), "a secret that is no variable"),
        (lambda: LaunchSpec(command="a", env={"A": "\0"}), "environment variable"),
        (lambda: NamedBlob(name="", blob=Blob(sha256="0" * 64)), "needs a name"),
        (lambda: Presence(online=True, boot_n=1, oldest_schema=0, newest_schema=1), "range"),
        (lambda: Presence(online=True, boot_n=1, oldest_schema=3, newest_schema=2), "range"),
        (lambda: Progress(task="t", epoch=1, state=TaskState.FINISHED), "RUNNING"),
        (lambda: Result(task="t", epoch=1, state=TaskState.RUNNING), "is final"),
        (lambda: replace(ORDERS["drain"], counter=0), "counter"),
        (lambda: replace(ORDERS["drain"], lifetime_s=0.0), "lifetime"),
        (lambda: replace(ORDERS["drain"], lifetime_s=float("nan")), "lifetime"),
        (lambda: replace(ORDERS["drain"], device="a/b"), "device must be"),
        (lambda: replace(offer(), lease_s=0.0), "lease_s"),
        (lambda: replace(offer(), grace_s=float("nan")), "grace_s"),
        (lambda: replace(offer(), deadline_s=-0.1), "deadline_s"),
        (lambda: replace(stage(), client=10, clients=10), "client 10 of 10"),
        (lambda: replace(stage(), session="../up"), "session must be"),
    ],
)
def test_messages_refuse_values_that_no_correct_peer_sends(refused: Any, why: str) -> None:
    with pytest.raises(MalformedMessage, match=why) as error:
        refused()
    assert error.value.fault == "sender"


def offer() -> Offer:
    what = ORDERS["offer-stage"].what
    assert isinstance(what, Offer)
    return what


def stage() -> StageSpec:
    spec = offer().spec
    assert isinstance(spec, StageSpec)
    return spec


def varint(number: int) -> bytes:
    """A number as protobuf writes it."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])
