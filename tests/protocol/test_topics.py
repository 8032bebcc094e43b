# SPDX-License-Identifier: Apache-2.0
"""Topics are built and taken apart alike, and no device reaches beyond its own."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedml_protocol.errors import MalformedMessage
from fedml_protocol.topics import (
    ALL_UP,
    CHANNELS,
    DN_ACK,
    DN_CONTROL,
    DN_TASK,
    UP_HEARTBEAT,
    UP_PRESENCE,
    UP_TASK,
    Address,
    may_publish,
    may_subscribe,
    parse_client_id,
    parse_topic,
)
from tests.fakes.messages import IDS, LAW

ADDRESSES = st.builds(Address, IDS, IDS)
UP = {UP_PRESENCE, UP_HEARTBEAT, UP_TASK}
DOWN = {DN_TASK, DN_CONTROL, DN_ACK}

ME = Address("clinic", "d-1")

# Pieces of topics, good ones and bad ones, to build wrong topics from.
PARTS = [
    *("fed", "1", "clinic", "d", "d-1", "d-2", "up", "dn", "hb", "presence", "task", "ctl", "ack"),
    *("", "+", "#", "..", "ä"),
]
# ... and a good one with one part replaced, left out or put in.
NEARLY = st.tuples(
    st.integers(0, 7), st.integers(0, 1), st.lists(st.sampled_from(PARTS), max_size=1)
)
TOPICS = st.lists(st.sampled_from(PARTS), max_size=9).map("/".join) | st.text(max_size=60)


@LAW
@given(ADDRESSES, st.sampled_from(sorted(CHANNELS)))
def test_a_topic_is_taken_apart_as_it_was_built(address: Address, channel: str) -> None:
    assert parse_topic(address.topic(channel)) == (address, channel)


@LAW
@given(TOPICS)
def test_whatever_else_is_no_topic(topic: str) -> None:
    try:
        address, channel = parse_topic(topic)
    except MalformedMessage:
        return
    assert address.topic(channel) == topic


@LAW
@given(ADDRESSES)
def test_a_client_id_is_taken_apart_as_it_was_built(address: Address) -> None:
    assert parse_client_id(address.client_id) == address


@LAW
@given(TOPICS)
def test_whatever_else_is_no_devices_client_id(client_id: str) -> None:
    try:
        address = parse_client_id(client_id)
    except MalformedMessage:
        return
    assert address.client_id == client_id


def test_the_layout_of_topics_is_what_external_brokers_are_set_up_for() -> None:
    assert ME.client_id == "clinic/d/d-1"
    assert ME.topic(UP_HEARTBEAT) == "fed/1/clinic/d/d-1/up/hb"
    assert ME.down == "fed/1/clinic/d/d-1/dn/#"
    assert ALL_UP == "fed/1/+/d/+/up/#"
    assert UP | DOWN == CHANNELS


@pytest.mark.parametrize(
    "client_id", ["", "d-1", "clinic/d", "clinic/x/d-1", "clinic/d/d-1/", "/d/d-1", "a/d/b/c"]
)
def test_other_client_ids_are_refused(client_id: str) -> None:
    with pytest.raises(MalformedMessage) as error:
        parse_client_id(client_id)
    assert error.value.fault == "sender"


@LAW
@given(NEARLY)
def test_a_topic_with_one_part_changed_is_another_or_none(
    change: tuple[int, int, list[str]],
) -> None:
    parts = ME.topic(UP_TASK).split("/")
    at, dropped, put = change
    parts[at : at + dropped] = put
    topic = "/".join(parts)
    fits = (
        len(parts) == 7
        and parts[:2] == ["fed", "1"]
        and parts[3] == "d"
        and "/".join(parts[5:]) in CHANNELS
        and not {parts[2], parts[4]} & {"", "+", "#", "..", "ä"}
    )
    if fits:
        assert parse_topic(topic) == (Address(parts[2], parts[4]), "/".join(parts[5:]))
    else:
        with pytest.raises(MalformedMessage):
            parse_topic(topic)


@pytest.mark.parametrize(
    "topic",
    [
        *(
            "",
            "fed/1/clinic/d/d-1/up",
            "fed/1/clinic/d/d-1/up/task/",
            "/fed/1/clinic/d/d-1/up/task",
        ),
        *("fed/2/clinic/d/d-1/up/task", "fed/1/clinic/g/d-1/up/task", "fed/1/clinic/d/d-1/up/log"),
        *("fed/1/clinic/d/d-1/up/task/now", "fed/1/+/d/d-1/up/task", "fed/1/clinic/d//up/task"),
    ],
)
def test_other_topics_are_the_senders_fault(topic: str) -> None:
    with pytest.raises(MalformedMessage) as error:
        parse_topic(topic)
    assert error.value.fault == "sender"


def test_a_channel_that_does_not_exist_has_no_topic() -> None:
    for channel in ("", "up", "up/", "up/#", "up/log", "dn/+", "x/task"):
        with pytest.raises(MalformedMessage, match="no such channel"):
            ME.topic(channel)


@pytest.mark.parametrize("bad", ["", "+", "#", "a/b", "A", "..", "$SYS", "a" * 41])
def test_an_address_has_no_wildcards_slashes_or_empty_parts(bad: str) -> None:
    for parts in ((bad, "d-1"), ("clinic", bad)):
        with pytest.raises(MalformedMessage):
            Address(*parts)


@LAW
@given(ADDRESSES)
def test_a_device_may_use_its_own_channels(address: Address) -> None:
    assert all(may_publish(address.client_id, address.topic(channel)) for channel in UP)
    assert all(may_subscribe(address.client_id, address.topic(channel)) for channel in DOWN)
    assert may_subscribe(address.client_id, address.down)


@LAW
@given(ADDRESSES)
def test_a_device_may_not_speak_as_the_broker_or_listen_to_itself(address: Address) -> None:
    assert not any(may_publish(address.client_id, address.topic(channel)) for channel in DOWN)
    assert not any(may_subscribe(address.client_id, address.topic(channel)) for channel in UP)


@LAW
@given(ADDRESSES, ADDRESSES, st.sampled_from(sorted(CHANNELS)))
def test_a_device_may_nothing_under_another(one: Address, other: Address, channel: str) -> None:
    if one != other:
        assert not may_publish(one.client_id, other.topic(channel))
        assert not may_subscribe(one.client_id, other.topic(channel))
        assert not may_subscribe(one.client_id, other.down)


def test_a_device_whose_name_begins_like_mine_is_another() -> None:
    for other in (Address("clinic", "d-10"), Address("clinic", "d-"), Address("clinic-2", "d-1")):
        assert not may_publish(ME.client_id, other.topic(UP_TASK))
        assert not may_publish(other.client_id, ME.topic(UP_TASK))
        assert not may_subscribe(ME.client_id, other.down)


def test_of_all_topics_a_device_may_publish_three_and_subscribe_four() -> None:
    """Every topic of up to two parts below a root, of every root that looks like the device's."""
    roots = [
        *("", "fed", "fed/1", "fed/1/clinic", "fed/1/clinic/d", "fed/1/clinic/d/d-1"),
        *("fed/1/clinic/d/d-2", "fed/1/clinic/d/+", "fed/1/+/d/d-1", "fed/2/clinic/d/d-1"),
        *("/fed/1/clinic/d/d-1", "fed/1/clinic//d-1", "FED/1/clinic/d/d-1", "$SYS", "#", "+"),
        "$share/coord/fed/1/clinic/d/d-1",
    ]
    pairs = product(PARTS, repeat=2)
    below = ["", *(f"/{part}" for part in PARTS), *(f"/{one}/{two}" for one, two in pairs)]
    topics = [root + rest for root in roots for rest in [*below, *(b + "/" for b in below)]]
    assert len(topics) > 5000
    assert {t for t in topics if may_publish(ME.client_id, t)} == {
        "fed/1/clinic/d/d-1/up/presence",
        "fed/1/clinic/d/d-1/up/hb",
        "fed/1/clinic/d/d-1/up/task",
    }
    assert {t for t in topics if may_subscribe(ME.client_id, t)} == {
        "fed/1/clinic/d/d-1/dn/task",
        "fed/1/clinic/d/d-1/dn/ctl",
        "fed/1/clinic/d/d-1/dn/ack",
        "fed/1/clinic/d/d-1/dn/#",
    }


@LAW
@given(ADDRESSES, st.lists(st.sampled_from(PARTS), max_size=4).map("/".join) | st.text(max_size=9))
def test_below_its_own_root_only_the_channels_are_open(address: Address, rest: str) -> None:
    topic = f"fed/1/{address.client_id}/{rest}"
    assert may_publish(address.client_id, topic) == (rest in UP)
    assert may_subscribe(address.client_id, topic) == (rest in {*DOWN, "dn/#"})


@pytest.mark.parametrize("client_id", ["", "+/d/+", "clinic/d/#", "clinic", "ana", "clinic/d/"])
def test_a_client_that_is_no_device_may_nothing(client_id: str) -> None:
    for rest in [*CHANNELS, "dn/#", "up/#"]:
        topic = f"fed/1/{client_id}/{rest}"
        assert not may_publish(client_id, topic)
        assert not may_subscribe(client_id, topic)
    assert not may_subscribe(client_id, "fed/1/clinic/d/d-1/dn/#")
