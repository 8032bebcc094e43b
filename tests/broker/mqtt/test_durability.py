# SPDX-License-Identifier: Apache-2.0
"""What survives: `kill -9`, restarts, reboots, full disks, damaged files, clocks that jump."""

import asyncio
import random
import sqlite3
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import mqtt5
import pytest

from fedml_broker.mqtt import Unavailable
from fedml_broker.mqtt.endpoint import Endpoint, Limits
from fedml_broker.mqtt.journal import JournalUnusable
from tests.broker.mqtt.conftest import Connect, make_endpoint, until_only
from tests.broker.mqtt.fake_clock import FakeClock
from tests.broker.mqtt.peer import Peer

SERVE = Path(__file__).with_name("serve.py")
WINDOW = 20
KEPT: dict[str, Any] = {"session_expiry_interval": 3600}


@asynccontextmanager
async def process(path: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, int]]:
    """An endpoint in a process of its own, and its port."""
    server = await asyncio.create_subprocess_exec(
        sys.executable, SERVE, path, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert server.stdout is not None
        yield server, int(await server.stdout.readline())
    finally:
        with suppress(ProcessLookupError):
            server.kill()
        await server.wait()
        server._transport.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("online", [False, True])
async def test_no_acknowledged_message_is_lost_by_kill_9(
    tmp_path: Path, connect: Connect, online: bool
) -> None:
    """Random moments, the subscriber away or reading (and acknowledging) at the same time."""
    rng = random.Random()
    acknowledged: set[bytes] = set()
    received: set[bytes] = set()
    for round_ in range(3):
        async with process(tmp_path / "mqtt.db") as (server, port):
            keeper = await connect(port, "keeper", **KEPT)
            assert keeper.connack.session_present is (round_ > 0)
            await keeper.subscribe("kept")
            if not online:
                keeper.drop()
            publisher = await connect(port, "publisher")
            reading = asyncio.create_task(_read(keeper, received)) if online else None
            acknowledged |= await _publish_until_killed(
                publisher, server, f"{round_}", rng.randrange(50, 800)
            )
            if reading is not None:
                await reading
    async with process(tmp_path / "mqtt.db") as (_, port):
        keeper = await connect(port, "keeper", **KEPT)
        reading = asyncio.create_task(_read(keeper, received, until=acknowledged))
        await reading
    assert len(acknowledged) >= 150
    assert not acknowledged - received


async def _publish_until_killed(
    publisher: Peer, server: asyncio.subprocess.Process, round_: str, acks: int
) -> set[bytes]:
    """Publish with a window, kill the server after some PUBACKs; what had been acknowledged."""
    sent: dict[int, bytes] = {}
    done: set[bytes] = set()
    for n in range(acks + WINDOW):
        payload = f"{round_}-{n}".encode()
        sent[publisher.offer("kept", payload)] = payload
        if n >= WINDOW:
            puback = await publisher.expect(mqtt5.PubAckPacket)
            assert puback.reason_code == 0
            done.add(sent[puback.packet_id])
    server.kill()
    with suppress(EOFError):
        while True:  # what was on its way when the server died counts too
            done.add(sent[(await publisher.expect(mqtt5.PubAckPacket)).packet_id])
    return done


async def _read(keeper: Peer, received: set[bytes], until: set[bytes] | None = None) -> None:
    with suppress(EOFError):
        while until is None or until - received:
            received.update(await keeper.take(1))


async def test_everything_of_a_session_survives_a_kill(tmp_path: Path, connect: Connect) -> None:
    async with process(tmp_path / "mqtt.db") as (_, port):
        peer = await connect(port, "a", **KEPT)
        wish = mqtt5.TopicFilter("x", max_qos=mqtt5.QoS.AT_LEAST_ONCE, no_local=True)
        await peer.subscribe(wish, ident=77)
        await peer.subscribe("$share/g/shared", "gone")
        await peer.unsubscribe("gone")
        peer.drop()
        writer = await connect(port, "w")
        await writer.publish("x", b"1", content_type="text/plain", message_expiry_interval=600)
        await writer.publish("shared", b"2")
        await writer.publish("r/1", b"kept", retain=True)
        await writer.publish("r/2", b"kept", retain=True)
        await writer.publish("r/2", b"", retain=True)
    async with process(tmp_path / "mqtt.db") as (_, port):
        peer = await connect(port, "a", **KEPT)
        assert peer.connack.session_present
        first, second = await peer.message(), await peer.message()
        assert (first.payload, first.content_type, first.subscription_ids) == (
            b"1",
            "text/plain",
            [77],
        )
        assert 500 < (first.message_expiry_interval or 0) <= 600
        assert first.duplicate  # it may have been sent before; nobody can know any more
        assert second.payload == b"2"
        assert await peer.publish("x", b"own") == 0
        await peer.silent()  # No Local still holds
        assert await peer.publish("gone", b"") == 0x10
        await peer.subscribe("r/#")
        assert (await peer.message()).topic == "r/1"
        await peer.silent()


async def test_a_will_survives_a_kill_of_the_endpoint(tmp_path: Path, connect: Connect) -> None:
    """The device dies together with the endpoint: its will is still published afterwards."""
    async with process(tmp_path / "mqtt.db") as (_, port):
        watcher = await connect(port, "watcher", **KEPT)
        await watcher.subscribe("presence")
        await connect(port, "a", will=mqtt5.Will("presence", payload=b"gone", qos=Q1))
        await watcher.publish("commit", b"", retain=True)  # the will's row is on the disk by now
    async with process(tmp_path / "mqtt.db") as (_, port):
        watcher = await connect(port, "watcher", **KEPT)
        assert await watcher.take(1) == [b"gone"]


Q1 = mqtt5.QoS.AT_LEAST_ONCE


async def test_wills_wait_for_their_clients_after_a_restart(
    tmp_path: Path, connect: Connect, clock: FakeClock
) -> None:
    limits = Limits(restart_grace_s=60)
    async with make_endpoint(tmp_path / "mqtt.db", clock=clock, limits=limits) as endpoint:
        for name, delay in (("back", 0), ("late", 0), ("delayed", 100)):
            will = mqtt5.Will(
                f"{name}/presence", payload=name.encode(), qos=Q1, will_delay_interval=delay
            )
            peer = await connect(endpoint, name, will=will, **KEPT)
        peer.drop()  # "delayed": due in 100 s from now
        await until_only(endpoint, await connect(endpoint, "witness"), 3)
    clock.advance(30)
    async with make_endpoint(tmp_path / "mqtt.db", clock=clock, limits=limits) as endpoint:
        watcher = await connect(endpoint, "watcher", keep_alive=600)
        await watcher.subscribe("+/presence")
        await connect(endpoint, "back", keep_alive=600, **KEPT)
        clock.advance(59)
        await watcher.silent()
        clock.advance(1)
        assert await watcher.take(1) == [b"late"]
        clock.advance(9)
        await watcher.silent()
        clock.advance(1)
        assert await watcher.take(1) == [b"delayed"]
        await watcher.silent()
    assert _rows(tmp_path / "mqtt.db")["will"] == 0  # "back" left none this time


async def test_expiry_counts_on_over_a_restart(
    tmp_path: Path, connect: Connect, clock: FakeClock
) -> None:
    await _leave_two_messages(tmp_path, connect, clock)
    clock.advance(50)
    clock.set_wall(-24 * 3600)  # somebody sets the clock: of no account within one boot
    assert await _what_is_left(tmp_path, connect, clock) == [(b"long", 950), (b"for ever", None)]


async def test_a_reboot_counts_as_the_wall_clock_says(
    tmp_path: Path, connect: Connect, clock: FakeClock
) -> None:
    await _leave_two_messages(tmp_path, connect, clock)
    clock.reboot(off_s=500)
    assert await _what_is_left(tmp_path, connect, clock) == [(b"long", 500), (b"for ever", None)]


async def test_nothing_expires_early_when_the_wall_clock_was_set_back_at_a_reboot(
    tmp_path: Path, connect: Connect, clock: FakeClock
) -> None:
    await _leave_two_messages(tmp_path, connect, clock)
    clock.reboot(off_s=-24 * 3600)
    left = await _what_is_left(tmp_path, connect, clock)
    assert left == [(b"short", 50), (b"long", 1000), (b"for ever", None)]


async def _leave_two_messages(path: Path, connect: Connect, clock: FakeClock) -> None:
    async with make_endpoint(path / "mqtt.db", clock=clock) as endpoint:
        peer = await connect(endpoint, "a", **KEPT)
        await peer.subscribe("x")
        await peer.leave()
        await endpoint.publish("x", b"short", expiry_s=50)
        await endpoint.publish("x", b"long", expiry_s=1000)
        await endpoint.publish("x", b"for ever")


async def _what_is_left(
    path: Path, connect: Connect, clock: FakeClock
) -> list[tuple[bytes, int | None]]:
    async with make_endpoint(path / "mqtt.db", clock=clock) as endpoint:
        peer = await connect(endpoint, "a", **KEPT)
        assert peer.connack.session_present
        left = []
        for _ in range(3 - endpoint.counters.dropped_expired):
            message = await peer.message()
            left.append((message.payload, message.message_expiry_interval))
        await peer.silent()
        return left


async def test_sessions_end_while_the_endpoint_is_down(
    tmp_path: Path, connect: Connect, clock: FakeClock
) -> None:
    async with make_endpoint(tmp_path / "mqtt.db", clock=clock) as endpoint:
        for name, expiry_s in (("short", 10), ("long", 100), ("none", 0)):
            peer = await connect(endpoint, name, session_expiry_interval=expiry_s)
            await peer.subscribe("x")
        await endpoint.publish("x", b"1")
    clock.advance(10)
    async with make_endpoint(tmp_path / "mqtt.db", clock=clock) as endpoint:
        assert len(endpoint.registry) == 1
        clock.advance(90)
        assert len(endpoint.registry) == 0
    assert not any(_rows(tmp_path / "mqtt.db").values())


async def test_nothing_stays_in_the_file_of_what_was_delivered(
    tmp_path: Path, connect: Connect
) -> None:
    async with make_endpoint(tmp_path / "mqtt.db") as endpoint:
        peers = [await connect(endpoint, name, **KEPT) for name in "ab"]
        for peer in peers:
            await peer.subscribe("x")
        for n in range(50):
            await endpoint.publish("x", b"%d" % n)
        for peer in peers:
            assert len(await peer.take(50)) == 50
            await peer.silent()
    rows = _rows(tmp_path / "mqtt.db")
    assert (rows["message"], rows["delivery"]) == (0, 0)


async def test_one_message_to_many_sessions_is_stored_once(
    tmp_path: Path, connect: Connect
) -> None:
    async with make_endpoint(tmp_path / "mqtt.db") as endpoint:
        for name in "abc":
            peer = await connect(endpoint, name, **KEPT)
            await peer.subscribe("group")
            peer.drop()
        await endpoint.publish("group", b"to all")
    rows = _rows(tmp_path / "mqtt.db")
    assert (rows["message"], rows["delivery"]) == (1, 3)


async def test_a_full_disk_refuses_and_recovers(
    tmp_path: Path, connect: Connect, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with make_endpoint(tmp_path / "mqtt.db", clock=clock) as endpoint:
        peer = await connect(endpoint, "a", **KEPT)
        await peer.subscribe("x")
        peer.drop()
        writer = await connect(endpoint, "w")
        journal = endpoint.share.journal
        commit = journal._commit

        def full(database: sqlite3.Connection, batch: object) -> None:
            raise sqlite3.OperationalError("database or disk is full")

        journal._commit = full  # type: ignore[method-assign]
        assert await writer.publish("x", b"1") == 0x97
        with pytest.raises(Unavailable, match="disk"):
            await endpoint.publish("x", b"2")
        assert await writer.publish("nobody/stores/this", b"") == 0x10
        await (await connect(endpoint, "late", **KEPT)).leave()
        clock.advance(1)  # another attempt, in vain
        await journal.drain()
        journal._commit = commit  # type: ignore[method-assign]
        clock.advance(1)
        await journal.drain()
        assert await writer.publish("x", b"3") == 0
        # The refused ones may come as well: whoever sent them was told to send them again.
        peer = await connect(endpoint, "a", **KEPT)
        payloads = []
        while b"3" not in payloads:
            payloads += await peer.take(1)
    async with make_endpoint(tmp_path / "mqtt.db", clock=clock) as endpoint:
        # What could not be written at the time was written later.
        assert (await connect(endpoint, "late", **KEPT)).connack.session_present
    errors = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert len(errors) == 1
    assert "free some space" in errors[0]


async def test_a_damaged_file_is_set_aside_and_never_deleted(
    tmp_path: Path, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "mqtt.db"
    path.write_bytes(b"this is not a database " * 500)
    async with make_endpoint(path) as endpoint:
        assert (await connect(endpoint, "a", **KEPT)).connack.reason_code == 0
    (aside,) = tmp_path.glob("mqtt.db.corrupt-*")
    assert aside.read_bytes().startswith(b"this is not a database")
    assert any("damaged" in record.getMessage() for record in caplog.records)


async def test_one_file_serves_one_endpoint(tmp_path: Path) -> None:
    async with make_endpoint(tmp_path / "mqtt.db"):
        with pytest.raises(JournalUnusable, match="another broker"):
            async with make_endpoint(tmp_path / "mqtt.db"):
                raise AssertionError("two endpoints on one file")
    async with make_endpoint(tmp_path / "mqtt.db"):
        pass


async def test_a_file_of_another_version_is_left_alone(tmp_path: Path) -> None:
    async with make_endpoint(tmp_path / "mqtt.db"):
        pass
    with sqlite3.connect(tmp_path / "mqtt.db") as database:
        database.execute("UPDATE meta SET value = 99 WHERE name = 'schema'")
    database.close()
    with pytest.raises(JournalUnusable, match="another version"):
        async with make_endpoint(tmp_path / "mqtt.db"):
            raise AssertionError("opened")


async def test_a_port_in_use_is_an_error_that_leaves_nothing_behind(tmp_path: Path) -> None:
    async with make_endpoint(tmp_path / "mqtt.db") as endpoint:
        other: Endpoint = make_endpoint(tmp_path / "other.db", port=endpoint.port)
        with pytest.raises(OSError, match="in use"):
            async with other:
                raise AssertionError("listening twice")
    async with make_endpoint(tmp_path / "other.db"):  # the file was let go
        pass


def _rows(path: Path) -> dict[str, int]:
    database = sqlite3.connect(path)
    tables = ("session", "subscription", "message", "delivery", "retained", "will")
    counted = {
        table: database.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in tables
    }
    database.close()
    return counted
