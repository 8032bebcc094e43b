# SPDX-License-Identifier: Apache-2.0
"""The agent's MQTT connection to the broker's own endpoint, over real TLS and real sockets."""

import asyncio
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import mqtt5
import pytest

from fedml_agent import link as link_module
from fedml_agent.home import Home
from fedml_agent.link import Link, LinkDown
from fedml_agent.login import _csr, _device_key, mqtt_context
from fedml_broker.identity import Identity, common_name
from fedml_broker.mqtt.endpoint import Endpoint, Refusal
from fedml_protocol import topics
from fedml_protocol.devices import RECONNECT_BEATS
from fedml_protocol.topics import Address
from tests.fakes.standing_time import StandingTime

ONE = Address("acme", "one")
DOWN = ONE.topic(topics.DN_TASK)
UP = ONE.topic(topics.UP_TASK)
PRESENCE = ONE.topic(topics.UP_PRESENCE)


class Office:
    """The broker's endpoint, which may die, forget everything and come back at the same port."""

    def __init__(self, identity: Identity, folder: Path) -> None:
        self.port = 0
        self.refuses = False
        self.heard: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()
        self.may_confirm = asyncio.Event()
        self.may_confirm.set()
        self._identity = identity
        self._file = folder / "mqtt.db"

    async def open(self) -> None:
        self.post = Endpoint(
            self._file,
            authenticate=self._who,
            may_publish=topics.may_publish,
            may_subscribe=topics.may_subscribe,
            port=self.port,
            ssl_context=self._identity.mqtt_context(),
        )
        self.post.subscribe(topics.ALL_UP, self._take)
        await self.post.__aenter__()
        self.port = self.post.port

    async def close(self, *, forget: bool = False) -> None:
        await self.post.__aexit__(None, None, None)
        for file in self._file.parent.glob("mqtt.db*") if forget else ():
            file.unlink()

    def _who(self, packet: mqtt5.ConnectPacket, peer: Mapping[str, Any] | None) -> str | Refusal:
        name = common_name(peer)
        return Refusal(text="revoked") if name is None or self.refuses else name

    async def _take(self, topic: str, payload: bytes) -> None:
        self.heard.put_nowait((topic, payload))
        await self.may_confirm.wait()


class Machine:
    """One agent's link, and what its handler got. It greets each connection with "hello N"."""

    def __init__(self, office: Office, context: ssl.SSLContext) -> None:
        self.got: asyncio.Queue[str] = asyncio.Queue()
        self.broken = False
        self.connections = 0
        self._office = office
        self._context = context
        self.link = Link(ONE, self._where, (PRESENCE, b"vanished"), self._handle, self._greet)
        self.serving = asyncio.create_task(self.link.serve())

    def _where(self) -> tuple[str, int, ssl.SSLContext]:
        return "localhost", self._office.port, self._context

    async def _handle(self, topic: str, payload: bytes) -> None:
        self.got.put_nowait(payload.decode())
        if self.broken:
            raise RuntimeError("the journal's disk is full")

    async def _greet(self) -> None:
        self.connections += 1
        greeting = f"hello {self.connections}".encode()
        await self.link.publish(PRESENCE, greeting, retain=True)

    async def close(self) -> None:
        self.serving.cancel()
        await asyncio.gather(self.serving, return_exceptions=True)


class Place:
    """An office with machines."""

    def __init__(self, identity: Identity, folder: Path, stack: AsyncExitStack) -> None:
        self.office = Office(identity, folder)
        home = Home(folder)
        home.make()
        home.ca.write_bytes(identity.ca_pem)
        csr = _csr(_device_key(home)).encode()
        home.certificate.write_bytes(identity.issue(csr, ONE.client_id))
        self.context = mqtt_context(home)
        self._stack = stack

    def machine(self, context: ssl.SSLContext | None = None) -> Machine:
        machine = Machine(self.office, context or self.context)
        self._stack.push_async_callback(machine.close)
        return machine

    async def greeted(self, n: int = 1) -> None:
        """The n-th connection has subscribed: its greeting came, and that is sent behind it."""
        while (heard := await self.office.heard.get()) != (PRESENCE, f"hello {n}".encode()):
            assert heard[0] == PRESENCE  # retained from the connection before


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return Identity.open(tmp_path_factory.mktemp("identity"), names=["localhost"])


@pytest.fixture
async def place(
    identity: Identity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Place]:
    monkeypatch.setattr(link_module, "_FIRST_PAUSE_S", 0.01)
    async with AsyncExitStack() as stack:
        place = Place(identity, tmp_path, stack)
        await place.office.open()
        stack.push_async_callback(place.office.close)
        yield place


def said(logger: str, words: str) -> asyncio.Event:
    """Set when a log line of that logger has these words in it."""
    event = asyncio.Event()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if words in record.getMessage():
                event.set()

    logging.getLogger(logger).addHandler(Listener())
    return event


@pytest.fixture(autouse=True)
def nobody_listens_on() -> Any:
    """Listeners of one test are gone before the next."""
    logger = logging.getLogger(link_module.__name__)
    logger.setLevel(logging.INFO)
    before = list(logger.handlers)
    yield
    logger.handlers[:] = before
    logger.setLevel(logging.NOTSET)


# ---------------------------------------------------------------------- both ways


async def test_what_is_sent_is_confirmed_and_what_comes_is_handled_in_order(place: Place) -> None:
    machine = place.machine()
    await place.greeted()
    assert machine.link.up.is_set()
    assert machine.link.trouble == ""
    before = machine.link.confirmed_at

    await machine.link.publish(UP, b"a result")
    assert await place.office.heard.get() == (UP, b"a result")
    assert machine.link.confirmed_at > before

    for n in range(100):
        await place.office.post.publish(DOWN, f"order {n}".encode())
    assert [await machine.got.get() for _ in range(100)] == [f"order {n}" for n in range(100)]


async def test_a_small_message_waits_for_no_acknowledgement_of_the_one_before(
    place: Place,
) -> None:
    one = place.machine()
    await one.link.up.wait()
    client = one.link._client
    assert client is not None
    opened = client.socket()
    assert isinstance(opened, ssl.SSLSocket)
    # With Nagle's algorithm it would, for 40 ms: a round of two agents took three times as long.
    assert opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_a_message_of_a_megabyte_comes_through_both_ways(place: Place) -> None:
    """More than a socket's buffer, and more than one TLS record."""
    machine = place.machine()
    await place.greeted()
    large = b"x" * 120_000
    await asyncio.gather(*(machine.link.publish(UP, large) for _ in range(10)))
    assert [await place.office.heard.get() for _ in range(10)] == [(UP, large)] * 10
    await asyncio.gather(*(place.office.post.publish(DOWN, large) for _ in range(10)))
    assert [await machine.got.get() for _ in range(10)] == [large.decode()] * 10


async def test_what_is_not_confirmed_in_time_is_not_known_to_be_there(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = place.machine()
    await place.greeted()
    monkeypatch.setattr(link_module, "_PUBACK_S", 0.05)
    place.office.may_confirm.clear()
    with pytest.raises(LinkDown, match=r"not confirmed within 0\.05 s"):
        await machine.link.publish(UP, b"a result")
    place.office.may_confirm.set()


async def test_without_a_connection_nothing_is_sent_and_the_reason_is_said(place: Place) -> None:
    refused = said(link_module.__name__, "refused the connection")
    place.office.refuses = True
    machine = place.machine()
    await refused.wait()
    with pytest.raises(LinkDown, match="refused the connection"):
        await machine.link.publish(UP, b"a result")


# ---------------------------------------------------------------------- cuts


async def test_after_a_cut_it_comes_back_and_gets_what_was_sent_meanwhile(place: Place) -> None:
    machine = place.machine()
    await place.greeted()
    await place.office.close()
    await place.office.open()
    await place.office.post.publish(DOWN, b"sent to its session")
    await place.greeted(2)
    assert await machine.got.get() == "sent to its session"


async def test_a_broker_that_has_forgotten_its_session_is_subscribed_to_again(
    place: Place,
) -> None:
    machine = place.machine()
    await place.greeted()
    await place.office.close(forget=True)
    await place.office.open()
    await place.greeted(2)
    await place.office.post.publish(DOWN, b"an order")
    assert await machine.got.get() == "an order"


async def test_what_was_on_its_way_when_the_line_broke_is_told_to_whoever_sent_it(
    place: Place,
) -> None:
    machine = place.machine()
    await place.greeted()
    place.office.may_confirm.clear()
    sending = asyncio.create_task(machine.link.publish(UP, b"a result"))
    assert await place.office.heard.get() == (UP, b"a result")
    await place.office.post.disconnect(ONE.client_id, "a test")
    with pytest.raises(LinkDown, match="broke"):
        await sending
    place.office.may_confirm.set()
    await place.greeted(2)
    assert place.office.heard.empty()  # nobody but the outbox sends anything again


async def test_what_could_not_be_handled_comes_again_after_the_next_connect(place: Place) -> None:
    machine = place.machine()
    await place.greeted()
    machine.broken = True
    await place.office.post.publish(DOWN, b"an order")
    assert await machine.got.get() == "an order"
    machine.broken = False
    await place.office.close()
    await place.office.open()
    assert await machine.got.get() == "an order"
    await place.greeted(2)
    await place.office.close()
    await place.office.open()
    await place.greeted(3)
    await place.office.post.publish(DOWN, b"the next")
    assert await machine.got.get() == "the next"  # and not once more when it was


async def test_a_goodbye_leaves_no_will_behind(place: Place) -> None:
    machine = place.machine()
    await place.greeted()
    await machine.link.goodbye(PRESENCE, b"gone")
    assert await place.office.heard.get() == (PRESENCE, b"gone")
    await place.greeted(2)  # `serve` goes on: it is the daemon that ends it
    assert place.office.heard.empty()


# ---------------------------------------------------------------------- who it talks to


async def test_a_second_agent_with_the_same_identity_ends_the_older_one(place: Place) -> None:
    alarm = said(link_module.__name__, "another agent uses this device's identity")
    older = place.machine()
    await place.greeted()
    newer = place.machine()
    await place.greeted()

    await alarm.wait()

    assert not older.link.up.is_set()
    with pytest.raises(LinkDown, match="another agent uses this device's identity"):
        await older.link.publish(UP, b"a result")
    assert newer.link.up.is_set()
    await place.office.post.publish(DOWN, b"an order")
    assert await newer.got.get() == "an order"
    assert (older.connections, newer.connections) == (1, 1)  # they do not throw each other out
    assert older.got.empty()


# What paho does not close when a handshake fails is closed with its object.
@pytest.mark.filterwarnings("ignore:.*unclosed <ssl.SSLSocket")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_broker_with_another_ca_is_not_spoken_to(place: Place, tmp_path: Path) -> None:
    stranger = Identity.open(tmp_path / "stranger", names=["localhost"])
    context = ssl.create_default_context(cafile=str(stranger.ca_file))
    refused = said(link_module.__name__, "certificate verify failed")
    machine = place.machine(context)
    await refused.wait()
    assert machine.link.trouble.startswith("cannot connect: ")
    assert not machine.link.up.is_set()


async def test_an_agent_without_a_certificate_is_refused(place: Place, identity: Identity) -> None:
    ended = said(link_module.__name__, "the connection ended")
    context = ssl.create_default_context(cafile=str(identity.ca_file))
    machine = place.machine(context)
    await ended.wait()
    assert not machine.link.up.is_set()
    assert place.office.heard.empty()


# ---------------------------------------------------------------------- how often it tries


class Tries(Link):
    """A link whose connections last as long as a test says, and then break."""

    def __init__(self, *lasting: float) -> None:
        async def never(*_: Any) -> None:
            raise AssertionError

        super().__init__(
            ONE, lambda: ("", 0, ssl.create_default_context()), ("", b""), never, never
        )
        self.began: list[float] = []
        self.ends_with = 0
        self._lasting = list(lasting)

    async def _one_connection(self) -> int:
        loop = asyncio.get_running_loop()
        self.began.append(loop.time())
        await asyncio.sleep(self._lasting.pop(0) if self._lasting else 0)
        return self.ends_with


async def test_pauses_grow_and_only_a_connection_that_held_makes_them_short_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A broker that drops everybody right after the handshake is not hammered."""
    monkeypatch.setattr("random.uniform", lambda low, high: high)
    time = StandingTime()
    link = Tries(*[30] * 20, 61, 0)
    link.beat_every_s = 10.0
    serving = asyncio.create_task(link.serve())
    await time.pass_by(3000)
    serving.cancel()
    gaps = [later - former for former, later in zip(link.began, link.began[1:], strict=False)]
    longest = RECONNECT_BEATS * link.beat_every_s
    assert gaps[:3] == [31, 31, 31]  # a quarter, a half, one second
    assert gaps[10:20] == [30 + longest] * 10
    assert gaps[20] == 62
    assert max(gaps[21:24]) <= 2


async def test_an_agent_that_was_ended_by_another_stays_away_for_five_minutes() -> None:
    time = StandingTime()
    link = Tries()
    link.ends_with = link_module._TAKEN_OVER
    serving = asyncio.create_task(link.serve())
    await time.pass_by(299)
    assert len(link.began) == 1
    await time.pass_by(5)
    assert len(link.began) == 2
    serving.cancel()
