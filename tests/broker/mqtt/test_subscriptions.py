# SPDX-License-Identifier: Apache-2.0
"""The tree of filters and the tree of retained messages, against the rule itself."""

from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedml_broker.mqtt.message import Message, Topic
from fedml_broker.mqtt.retained import Retained
from fedml_broker.mqtt.sessions import Session
from fedml_broker.mqtt.subscriptions import Subscription, Subscriptions, matches, split_filter

LEVELS = st.sampled_from(["a", "b", "", "$x", "ü"])
TOPICS = st.lists(LEVELS, min_size=1, max_size=4).map("/".join).filter(bool)
FILTERS = st.builds(
    lambda levels, tail: "/".join(levels + tail),
    st.lists(st.one_of(LEVELS, st.just("+")), min_size=1, max_size=4),
    st.sampled_from([[], ["#"]]),
).filter(bool) | st.just("#")


class _Session:
    """Only a key."""


def _subscription(topic_filter: str) -> Subscription:
    return Subscription(cast(Session, _Session()), topic_filter, 1)


@pytest.mark.parametrize(
    ("topic_filter", "topic", "expected"),
    [  # from MQTT 5, 4.7.1 and 4.7.2
        ("sport/tennis/player1/#", "sport/tennis/player1", True),
        ("sport/tennis/player1/#", "sport/tennis/player1/score/wimbledon", True),
        ("sport/#", "sport", True),
        ("#", "anything/at/all", True),
        ("sport/tennis/+", "sport/tennis/player1", True),
        ("sport/tennis/+", "sport/tennis/player1/ranking", False),
        ("sport/+", "sport", False),
        ("sport/+", "sport/", True),
        ("+/+", "/finance", True),
        ("/+", "/finance", True),
        ("+", "/finance", False),
        ("#", "$SYS/monitor", False),
        ("+/monitor/Clients", "$SYS/monitor/Clients", False),
        ("$SYS/#", "$SYS/monitor", True),
        ("$SYS/monitor/+", "$SYS/monitor/Clients", True),
    ],
)
def test_the_examples_of_the_standard(topic_filter: str, topic: str, expected: bool) -> None:
    assert matches(topic_filter, topic) is expected
    tree = Subscriptions()
    tree.add(topic_filter, "", _subscription(topic_filter))
    assert bool(tree.match(topic)) is expected


@given(st.lists(FILTERS, max_size=8), TOPICS)
def test_the_tree_finds_exactly_what_the_rule_finds(filters: list[str], topic: str) -> None:
    tree = Subscriptions()
    wishes = [_subscription(topic_filter) for topic_filter in filters]
    for wish in wishes:
        tree.add(wish.filter, "", wish)
    found = {target.session for target in tree.match(topic).targets}
    assert found == {wish.session for wish in wishes if matches(wish.filter, topic)}


@given(st.lists(FILTERS, min_size=1, max_size=8), TOPICS, st.data())
def test_what_was_removed_leaves_no_trace(
    filters: list[str], topic: str, data: st.DataObject
) -> None:
    tree = Subscriptions()
    wishes = [_subscription(topic_filter) for topic_filter in filters]
    for wish in wishes:
        tree.add(wish.filter, data.draw(st.sampled_from(["", "g"])), wish)
    for wish in data.draw(st.permutations(wishes)):
        tree.remove(wish)
    assert not tree.match(topic)
    assert tree._root.empty


@given(st.lists(TOPICS, max_size=8), st.lists(TOPICS, max_size=3), FILTERS)
def test_retained_messages_are_found_by_the_same_rule(
    kept: list[str], dropped: list[str], topic_filter: str
) -> None:
    retained = Retained()
    for name in kept:
        retained.put(name, Message(Topic(name, name.encode()), b"1", 1))
    left = set(kept)
    for name in dropped:
        assert retained.drop(name) is (name in left)
        left.discard(name)
    assert len(retained) == len(left)
    found = [message.topic.name for message in retained.match(topic_filter)]
    assert sorted(found) == sorted(name for name in left if matches(topic_filter, name))


def test_a_filter_is_split_from_its_share_group() -> None:
    assert split_filter("a/+/#") == ("", "a/+/#")
    assert split_filter("$share/g/a/+/#") == ("g", "a/+/#")
    assert split_filter("$share/g//a") == ("g", "/a")
