# SPDX-License-Identifier: Apache-2.0
"""Sessions: resumed, taken over, expired, full, shared; wills and keep-alive on a clock by hand."""

import mqtt5
import pytest

from fedml_broker.mqtt import Unavailable
from fedml_broker.mqtt.endpoint import Limits
from fedml_broker.mqtt.limits import NEVER
from tests.broker.mqtt.conftest import Connect, Start, until_only
from tests.broker.mqtt.fake_clock import FakeClock

DAY = 24 * 3600


async def test_a_session_is_there_again_exactly_when_it_was_kept(
    start: Start, connect: Connect, clock: FakeClock
) -> None:
    endpoint = await start()
    peer = await connect(endpoint, "a")  # no expiry interval: ends with the connection
    await peer.subscribe("x")
    await peer.leave()
    peer = await connect(endpoint, "a", session_expiry_interval=100)
    assert not peer.connack.session_present
    await peer.subscribe("x")
    await peer.leave()
    clock.advance(99)
    peer = await connect(endpoint, "a", session_expiry_interval=100)
    assert peer.connack.session_present
    await endpoint.publish("x", b"still subscribed")
    assert await peer.take(1) == [b"still subscribed"]
    await peer.leave()
    clock.advance(100)
    peer = await connect(endpoint, "a", session_expiry_interval=100)
    assert not peer.connack.session_present
    await peer.leave()
    peer = await connect(endpoint, "a", clean_start=True, session_expiry_interval=100)
    assert not peer.connack.session_present
    await peer.leave(session_expiry_interval=5)  # a goodbye may change how long it stays
    clock.advance(5)
    assert len(endpoint.registry) == 0


async def test_session_expiry_is_cut_to_the_limit_and_said_so(
    start: Start, connect: Connect, clock: FakeClock
) -> None:
    endpoint = await start(limits=Limits(max_session_expiry_s=DAY))
    peer = await connect(endpoint, "a", session_expiry_interval=NEVER)
    assert peer.connack.session_expiry_interval == DAY
    await peer.leave()
    clock.advance(DAY)
    assert len(endpoint.registry) == 0


async def test_a_session_can_be_kept_for_ever_where_that_is_allowed(
    start: Start, connect: Connect, clock: FakeClock
) -> None:
    endpoint = await start(limits=Limits(max_session_expiry_s=NEVER))
    await (await connect(endpoint, "a", session_expiry_interval=NEVER)).leave()
    clock.advance(1000 * DAY)
    assert (await connect(endpoint, "a")).connack.session_present


async def test_a_second_connection_takes_the_session_over(start: Start, connect: Connect) -> None:
    endpoint = await start()
    old = await connect(endpoint, "a", session_expiry_interval=60)
    await old.subscribe("x")
    await endpoint.publish("x", b"1")
    first = await old.message()  # and never acknowledges it
    new = await connect(endpoint, "a", session_expiry_interval=60)
    assert await old.disconnected() == 0x8E
    assert new.connack.session_present
    again = await new.message()
    assert (again.payload, again.duplicate, again.packet_id) == (b"1", True, first.packet_id)


async def test_a_session_without_expiry_does_not_survive_a_takeover(
    start: Start, connect: Connect
) -> None:
    endpoint = await start()
    await connect(endpoint, "a")
    assert not (await connect(endpoint, "a")).connack.session_present


async def test_what_is_unacknowledged_comes_again_on_reconnect_first_and_marked(
    start: Start, connect: Connect
) -> None:
    endpoint = await start()
    peer = await connect(endpoint, "a", session_expiry_interval=60, receive_max=3)
    await peer.subscribe("x")
    for n in range(5):
        await endpoint.publish("x", b"%d" % n)
    sent = [await peer.message() for _ in range(3)]
    assert not any(message.duplicate for message in sent)
    peer.acknowledge(sent[1])  # out of order is allowed
    sent.append(await peer.message())
    await peer.silent()  # ... and nothing is repeated on a connection that lives
    peer.drop()
    await endpoint.publish("x", b"5")
    peer = await connect(endpoint, "a", session_expiry_interval=60)
    came = [await peer.message() for _ in range(5)]
    assert [(m.payload, m.duplicate) for m in came] == [
        (b"0", True),
        (b"2", True),
        (b"3", True),
        (b"4", False),
        (b"5", False),
    ]
    assert [m.packet_id for m in came[:3]] == [
        sent[0].packet_id,
        sent[2].packet_id,
        sent[3].packet_id,
    ]
    assert len({m.packet_id for m in came}) == 5


async def test_qos_0_is_not_kept_for_absent_clients(start: Start, connect: Connect) -> None:
    endpoint = await start()
    peer = await connect(endpoint, "a", session_expiry_interval=60)
    await peer.subscribe("x")
    await peer.leave()
    await endpoint.publish("x", b"0", qos=0)
    await endpoint.publish("x", b"1")
    peer = await connect(endpoint, "a", session_expiry_interval=60)
    assert await peer.take(1) == [b"1"]


async def test_a_full_queue_refuses_and_keeps_what_it_promised(
    start: Start, connect: Connect
) -> None:
    endpoint = await start(limits=Limits(max_queued_messages=2))
    peer = await connect(endpoint, "a", session_expiry_interval=60)
    await peer.subscribe("x", "group")
    await peer.leave()
    writer = await connect(endpoint, "w")
    assert [await writer.publish("x", b"%d" % n) for n in range(3)] == [0, 0, 0x97]
    with pytest.raises(Unavailable, match="queue is full"):
        await endpoint.publish("x", b"3")
    # One full queue does not keep a message from the others.
    other = await connect(endpoint, "b")
    await other.subscribe("group")
    await endpoint.publish("group", b"to all")
    assert await other.take(1) == [b"to all"]
    assert endpoint.counters.dropped_queue_full == 3
    peer = await connect(endpoint, "a", session_expiry_interval=60)
    assert await peer.take(2) == [b"0", b"1"]
    await peer.silent()
    assert endpoint.counters.queued_bytes == 0


async def test_what_has_expired_makes_room(
    start: Start, connect: Connect, clock: FakeClock
) -> None:
    endpoint = await start(limits=Limits(max_queued_messages=2))
    peer = await connect(endpoint, "a", session_expiry_interval=600)
    await peer.subscribe("x")
    await peer.leave()
    await endpoint.publish("x", b"stays")
    await endpoint.publish("x", b"goes", expiry_s=10)
    clock.advance(10)
    await endpoint.publish("x", b"fits")
    with pytest.raises(Unavailable):
        await endpoint.publish("x", b"does not")
    peer = await connect(endpoint, "a", session_expiry_interval=600)
    assert await peer.take(2) == [b"stays", b"fits"]


@pytest.mark.parametrize("bound", ["max_queued_bytes", "max_total_queued_bytes"])
async def test_queues_are_bounded_in_bytes(start: Start, connect: Connect, bound: str) -> None:
    endpoint = await start(limits=Limits(**{bound: 25_000}))
    peer = await connect(endpoint, "a", session_expiry_interval=60)
    await peer.subscribe("x")
    await peer.leave()
    await endpoint.publish("x", b"-" * 10_000)
    await endpoint.publish("x", b"-" * 10_000)
    with pytest.raises(Unavailable):
        await endpoint.publish("x", b"-" * 10_000)


async def test_silence_ends_the_connection_after_one_and_a_half_keep_alives(
    start: Start, connect: Connect, clock: FakeClock
) -> None:
    endpoint = await start()
    peer = await connect(endpoint, "a", keep_alive=20)
    clock.advance(29)
    await peer.silent()  # a PINGREQ: it lives
    clock.advance(29.9)
    await peer.silent()
    clock.advance(30)
    assert await peer.disconnected() == 0x8D


@pytest.mark.parametrize("wish", [0, 601])
async def test_the_server_sets_the_keep_alive_of_those_who_want_none_or_too_long(
    start: Start, connect: Connect, clock: FakeClock, wish: int
) -> None:
    endpoint = await start(limits=Limits(max_keep_alive_s=600))
    peer = await connect(endpoint, "a", keep_alive=wish)
    assert peer.connack.server_keep_alive == 600
    clock.advance(900)
    assert await peer.disconnected() == 0x8D


async def test_whoever_never_says_connect_is_not_kept(
    start: Start, dial: Connect, clock: FakeClock
) -> None:
    endpoint = await start(limits=Limits(connect_timeout_s=10))
    peer = await dial(endpoint)
    other = await dial(endpoint)
    await other.connect("other")  # by now the first is known to the endpoint
    clock.advance(10)
    await peer.ended()
    await other.silent()


async def test_a_will_is_published_when_the_connection_is_lost(
    start: Start, connect: Connect
) -> None:
    endpoint = await start()
    watcher = await connect(endpoint, "w")
    await watcher.subscribe("+/presence")
    will = mqtt5.Will(
        "a/presence",
        payload=b"offline",
        qos=mqtt5.QoS.AT_LEAST_ONCE,
        retain=True,
        content_type="text/plain",
        message_expiry_interval=30,
    )
    peer = await connect(endpoint, "a", will=will)
    peer.drop()
    message = await watcher.message()
    assert (message.topic, message.payload, message.qos) == ("a/presence", b"offline", 1)
    assert (message.content_type, message.message_expiry_interval) == ("text/plain", 30)
    late = await connect(endpoint, "late")
    await late.subscribe("a/presence")
    assert (await late.message()).retain


@pytest.mark.parametrize(
    "how", ["goodbye", "goodbye with will", "violation", "takeover", "revoked"]
)
async def test_which_ends_of_a_connection_publish_the_will(
    start: Start, connect: Connect, how: str
) -> None:
    endpoint = await start()
    watcher = await connect(endpoint, "w")
    await watcher.subscribe("presence")
    peer = await connect(endpoint, "a", will=mqtt5.Will("presence", payload=b"gone"))
    if how == "goodbye":
        await peer.leave()
        await watcher.silent()
        return
    if how == "goodbye with will":
        await peer.leave(reason_code=mqtt5.DisconnectReasonCode.DISCONNECT_WITH_WILL_MESSAGE)
    elif how == "violation":
        peer.send_bytes(b"\x00\x00")
    elif how == "takeover":
        await connect(endpoint, "a")
    else:
        await endpoint.disconnect("a", "enough")
    assert (await watcher.message()).payload == b"gone"
    await watcher.silent()


async def test_a_delayed_will_waits_and_is_cancelled_by_a_reconnect(
    start: Start, connect: Connect, clock: FakeClock
) -> None:
    endpoint = await start()
    watcher = await connect(endpoint, "w", keep_alive=600)
    await watcher.subscribe("presence")
    will = mqtt5.Will("presence", payload=b"gone", will_delay_interval=30)
    kept = {"will": will, "session_expiry_interval": 600}
    (await connect(endpoint, "a", **kept)).drop()
    await until_only(endpoint, watcher, 1)
    clock.advance(10)
    peer = await connect(endpoint, "a", **kept)
    clock.advance(10)
    peer.drop()
    await until_only(endpoint, watcher, 1)
    clock.advance(29)  # past the first will's moment, short of the second's
    await watcher.silent()
    clock.advance(1)
    assert (await watcher.message()).payload == b"gone"
    await watcher.silent()


async def test_a_delayed_will_does_not_outwait_its_session(
    start: Start, connect: Connect, clock: FakeClock
) -> None:
    endpoint = await start()
    watcher = await connect(endpoint, "w", keep_alive=600)
    await watcher.subscribe("presence")
    will = mqtt5.Will("presence", payload=b"gone", will_delay_interval=300)
    (await connect(endpoint, "a", will=will, session_expiry_interval=20)).drop()
    await until_only(endpoint, watcher, 1)
    clock.advance(20)
    assert (await watcher.message()).payload == b"gone"
    # Nor a session that ends at once.
    (await connect(endpoint, "c", will=will)).drop()
    assert (await watcher.message()).payload == b"gone"
    # A clean start ends the old session, and so its will's waiting.
    (await connect(endpoint, "b", will=will, session_expiry_interval=600)).drop()
    await until_only(endpoint, watcher, 1)
    await watcher.silent()
    await connect(endpoint, "b", clean_start=True)
    assert (await watcher.message()).payload == b"gone"


async def test_shared_subscriptions_take_turns(start: Start, connect: Connect) -> None:
    endpoint = await start()
    members = [await connect(endpoint, name) for name in "abc"]
    for member in members:
        await member.subscribe("$share/coord/x")
    for n in range(6):
        await endpoint.publish("x", b"%d" % n)
    got = [payload for member in members for payload in await member.take(2)]
    assert sorted(got) == [b"0", b"1", b"2", b"3", b"4", b"5"]
    for member in members:
        await member.silent()
    assert await members[0].unsubscribe("$share/coord/x") == [0]
    for n in range(4):
        await endpoint.publish("x", b"%d" % n)
    await members[0].silent()


async def test_a_shared_message_goes_past_members_that_are_away_or_full(
    start: Start, connect: Connect
) -> None:
    endpoint = await start()
    away = await connect(endpoint, "away", session_expiry_interval=600)
    await away.subscribe("$share/coord/x")
    await away.leave()
    full = await connect(endpoint, "full", receive_max=1)
    await full.subscribe("$share/coord/x")
    free = await connect(endpoint, "free")
    await free.subscribe("$share/coord/x")
    for n in range(10):
        await endpoint.publish("x", b"%d" % n)
    assert len(await free.take(9)) == 9
    await full.message()
    await full.silent()


@pytest.mark.parametrize("kept", [0, 600])
async def test_what_a_member_left_unacknowledged_goes_to_another(
    start: Start, connect: Connect, kept: int
) -> None:
    endpoint = await start()
    goes = await connect(endpoint, "goes", session_expiry_interval=kept)
    await goes.subscribe("$share/coord/x", "own")
    await endpoint.publish("x", b"1")
    await endpoint.publish("own", b"private")
    await goes.message()
    await goes.message()
    stays = await connect(endpoint, "stays")
    await stays.subscribe("$share/coord/x")
    await stays.silent()
    goes.drop()
    message = await stays.message()
    assert (message.payload, message.duplicate) == (b"1", False)
    stays.acknowledge(message)
    await stays.silent()
    if kept:  # its own messages waited for it, the shared one does not come twice
        goes = await connect(endpoint, "goes", session_expiry_interval=kept)
        assert await goes.take(1) == [b"private"]
        await goes.silent()


async def test_shared_messages_wait_for_the_first_member_to_come_back(
    start: Start, connect: Connect
) -> None:
    endpoint = await start()
    for name in "ab":
        peer = await connect(endpoint, name, session_expiry_interval=600)
        await peer.subscribe("$share/coord/x")
        await peer.leave()
    for n in range(6):
        await endpoint.publish("x", b"%d" % n)
    peer = await connect(endpoint, "b", session_expiry_interval=600)
    assert len(await peer.take(6)) == 6
