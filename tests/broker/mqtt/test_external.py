# SPDX-License-Identifier: Apache-2.0
"""The link to an external broker: back-off, resubscribing, acknowledging, giving up cleanly."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from fedml_broker.mqtt import Refused, Unavailable
from fedml_broker.mqtt.endpoint import Endpoint, Limits
from fedml_broker.mqtt.external import Backoff, ExternalPost
from tests.broker.mqtt.backends import External
from tests.broker.mqtt.certificates import Authority
from tests.broker.mqtt.conftest import Connect, Start, make_endpoint
from tests.broker.mqtt.fake_clock import FakeClock

QUICK = Backoff(first_s=0.01, most_s=0.1)


async def ignore(topic: str, payload: bytes) -> None:
    pass


def link(endpoint: Endpoint, **changes: Any) -> ExternalPost:
    """A link to our own endpoint: an MQTT broker whose every move a test can see."""
    settings: dict[str, Any] = {"backoff": QUICK}
    return ExternalPost("127.0.0.1", endpoint.port, **(settings | changes))


def test_the_backoff_doubles_and_forgets_only_after_a_stable_minute() -> None:
    backoff = Backoff(first_s=1, most_s=8, stable_s=60)
    delays, delay = [], 0.0
    for lasted_s in (0, 0, 59, 0, 0, 60, 0):
        delay = backoff.after(delay, lasted_s)
        delays.append(delay)
    assert delays == [1, 2, 4, 8, 8, 1, 2]


def test_plain_tcp_to_another_machine_is_refused() -> None:
    with pytest.raises(ValueError, match="SSL"):
        ExternalPost("mqtt.example.org", 1883)


async def test_a_broker_that_is_not_there_yet_is_no_error(tmp_path: Path) -> None:
    async with make_endpoint(tmp_path / "mqtt.db") as endpoint:
        port = endpoint.port
    post = ExternalPost("127.0.0.1", port, backoff=QUICK)
    post.subscribe("x", ignore)
    async with post:
        assert not post.connected
        with pytest.raises(Unavailable, match="being tried"):
            await post.publish("x", b"")
        async with make_endpoint(tmp_path / "mqtt.db", port=port):
            await post.until_connected()
            await post.publish("x", b"")


async def test_the_session_is_resumed_and_subscribed_anew_only_when_it_was_lost(
    tmp_path: Path, connect: Connect
) -> None:
    got: asyncio.Queue[bytes] = asyncio.Queue()

    async def handler(topic: str, payload: bytes) -> None:
        got.put_nowait(payload)

    endpoint = make_endpoint(tmp_path / "mqtt.db")
    async with endpoint:
        post = link(endpoint)
        post.subscribe("up/#", handler)
        subscribed = _count_calls(endpoint, "subscribe")
        async with post:
            await post.until_connected()
            assert len(subscribed) == 1
            await endpoint.disconnect("broker", "a network fault")
            await _reconnected(post)
            assert len(subscribed) == 1  # session_present: the subscription is still there
            session = endpoint.registry.get("broker")
            assert session is not None
            assert session.line is not None
            session.expiry_s = 0  # the next end of the connection ends the session
            await endpoint.disconnect("broker", "state lost")
            await _reconnected(post)
            assert len(subscribed) == 2
            device = await connect(endpoint, "a")
            await device.publish("up/x", b"heard")
            assert await got.get() == b"heard"


async def test_messages_wait_at_the_broker_while_the_link_is_down(
    tmp_path: Path, connect: Connect
) -> None:
    got: asyncio.Queue[bytes] = asyncio.Queue()

    async def handler(topic: str, payload: bytes) -> None:
        got.put_nowait(payload)

    async with make_endpoint(tmp_path / "mqtt.db") as endpoint:
        for payload in (b"1", b"2"):
            post = link(endpoint)
            post.subscribe("up/#", handler)
            async with post:
                await post.until_connected()
                if payload == b"2":
                    assert await got.get() == b"1"
            device = await connect(endpoint, "a")
            assert await device.publish("up/x", b"1") == 0


async def test_acknowledgements_follow_the_handlers_in_the_order_of_receipt(
    start: Start, connect: Connect
) -> None:
    endpoint = await start()
    gates = {name: asyncio.Event() for name in (b"1", b"2", b"3")}
    all_started = asyncio.Event()
    started: list[bytes] = []

    async def handler(topic: str, payload: bytes) -> None:
        started.append(payload)
        if len(started) == 3:
            all_started.set()
        await gates[payload].wait()
        if payload == b"2":
            raise RuntimeError("fails, and is acknowledged all the same")

    post = link(endpoint)
    post.subscribe("up/#", handler)
    async with post:
        await post.until_connected()
        session = endpoint.registry.get("broker")
        assert session is not None
        acked: asyncio.Queue[bytes] = asyncio.Queue()

        class Watched(dict[int, Any]):
            def pop(self, key: int, *default: Any) -> Any:
                delivery = super().pop(key, *default)
                acked.put_nowait(delivery.message.payload)
                return delivery

        session.inflight = Watched()
        device = await connect(endpoint, "a")
        for payload in gates:
            await device.publish("up/x", payload)
        await all_started.wait()
        gates[b"3"].set()
        gates[b"2"].set()
        await device.silent()
        assert acked.empty()
        gates[b"1"].set()
        assert [await acked.get() for _ in range(3)] == [b"1", b"2", b"3"]


async def test_a_handler_that_outlives_its_link_acknowledges_nothing_on_the_next(
    tmp_path: Path, connect: Connect
) -> None:
    calls: asyncio.Queue[asyncio.Event] = asyncio.Queue()

    async def handler(topic: str, payload: bytes) -> None:
        may_end = asyncio.Event()
        calls.put_nowait(may_end)
        await may_end.wait()

    async with make_endpoint(tmp_path / "mqtt.db") as endpoint:
        post = link(endpoint)
        post.subscribe("up/#", handler)
        async with post:
            await post.until_connected()
            device = await connect(endpoint, "a")
            await device.publish("up/x", b"1")
            before = await calls.get()
            await endpoint.disconnect("broker", "a network fault")
            await _reconnected(post)
            again = await calls.get()  # delivered again, handled again
            session = endpoint.registry.get("broker")
            assert session is not None
            before.set()
            await post.publish("a/round/trip", b"")
            assert len(session.inflight) == 1
            again.set()
            while session.inflight:
                await device.silent()


async def test_a_publish_under_way_fails_when_the_link_breaks(
    tmp_path: Path, connect: Connect
) -> None:
    never = asyncio.Event()
    reached = asyncio.Event()

    async def held(topic: str, payload: bytes) -> None:
        reached.set()
        await never.wait()

    endpoint = make_endpoint(tmp_path / "mqtt.db", limits=Limits(drain_s=0))
    endpoint.subscribe("slow", held)  # so that the PUBACK does not come
    async with endpoint:
        async with link(endpoint) as post:
            await post.until_connected()
            publishing = asyncio.create_task(post.publish("slow", b""))
            await reached.wait()
            await endpoint.disconnect("broker", "a network fault")
            with pytest.raises(Unavailable, match="send it again"):
                await publishing
        never.set()


@pytest.mark.parametrize(("allowed", "error"), [(False, Refused), (True, Unavailable)])
async def test_refusals_of_the_broker_are_told_apart(
    start: Start, connect: Connect, allowed: bool, error: type[Exception]
) -> None:
    endpoint = await start(
        may_publish=lambda identity, topic: allowed, limits=Limits(max_queued_messages=0)
    )
    away = await connect(endpoint, "away", session_expiry_interval=60)
    await away.subscribe("x")
    await away.leave()
    async with link(endpoint) as post:
        await post.until_connected()
        with pytest.raises(error):
            await post.publish("x", b"")


async def test_a_refused_subscription_is_an_alarm_and_not_a_connection(
    start: Start, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    endpoint = await start(may_subscribe=lambda identity, topic_filter: False)
    post = link(endpoint)
    post.subscribe("x", ignore)
    connects = _count_calls(endpoint, "open")
    witness = await connect(endpoint, "witness")
    async with post:
        while len(connects) < 3:  # the witness, and two attempts
            await witness.silent()
        assert not post.connected
    assert any("does not let us subscribe to x" in r.getMessage() for r in caplog.records)


async def test_another_client_with_our_name_makes_us_wait_the_longest(
    start: Start, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    endpoint = await start()
    clock = FakeClock()
    async with link(endpoint, clock=clock, backoff=Backoff(first_s=1, most_s=300)) as post:
        await post.until_connected()
        await connect(endpoint, "broker")
        witness = await connect(endpoint, "witness")
        while post.connected or not (delays := [d for d in clock.delays if d > 10]):
            await witness.silent()
    assert 150 <= delays[0] <= 300
    assert any("another client uses our identity" in r.getMessage() for r in caplog.records)


async def test_whatever_paho_comes_up_with_the_link_is_tried_again(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    post = link(await start())
    make, calls = post._make_client, iter([RuntimeError("out of sockets")])

    def failing_once() -> Any:
        for error in calls:
            raise error
        return make()

    monkeypatch.setattr(post, "_make_client", failing_once)
    async with post:
        await post.until_connected()


async def test_a_flood_of_qos_0_is_dropped_and_counted(start: Start, connect: Connect) -> None:
    endpoint = await start()
    started = 0
    go, got_last = asyncio.Event(), asyncio.Event()

    async def handler(topic: str, payload: bytes) -> None:
        nonlocal started
        started += 1
        if payload == b"last":
            got_last.set()
        await go.wait()

    post = link(endpoint, receive_maximum=4)
    post.subscribe("up/#", handler)
    async with post:
        await post.until_connected()
        device = await connect(endpoint, "a")
        for _ in range(10):
            device.publish_0("up/x", b"")
        await device.publish("up/x", b"last")
        await got_last.wait()  # QoS 1 is not dropped
        assert (started, post.dropped) == (5, 6)
        go.set()


async def test_mosquitto_restarted_without_its_state_is_subscribed_to_again(
    authority: Authority, tmp_path: Path
) -> None:
    got: asyncio.Queue[bytes] = asyncio.Queue()

    async def handler(topic: str, payload: bytes) -> None:
        got.put_nowait(payload)

    backend = External(authority, tmp_path)
    backend.post.subscribe("fed/1/+/d/+/up/#", handler)
    async with backend:
        await backend.stop_mosquitto()
        await backend.start_mosquitto()
        await _reconnected(backend.post)
        device = await backend.device("acme/d/node-1")
        await device.publish("fed/1/acme/d/node-1/up/task", b"heard")
        assert await got.get() == b"heard"


async def test_leaving_does_not_wait_for_a_broker_that_does_not_answer() -> None:
    """A peer that accepts and then says nothing: the link must still be left at once."""
    connected = asyncio.Event()

    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(2)
        connected.set()
        await reader.read()
        writer.close()

    server = await asyncio.start_server(mute, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        async with ExternalPost("127.0.0.1", port, drain_s=0.1, backoff=QUICK) as post:
            await connected.wait()
            assert not post.connected


def _count_calls(endpoint: Endpoint, name: str) -> list[str]:
    calls, call = list[str](), getattr(endpoint.registry, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return call(*args, **kwargs)

    setattr(endpoint.registry, name, counted)
    return calls


async def _reconnected(post: ExternalPost) -> None:
    """The link was up, went down, and is up again."""
    if post._link is not None:
        await asyncio.wait((post._link.ended,))
    await post.until_connected()
