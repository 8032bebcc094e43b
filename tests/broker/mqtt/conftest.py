# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the MQTT tests: endpoints and clients that are closed when the test ends."""

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import mqtt5
import pytest

from fedml_broker.mqtt.endpoint import Endpoint
from tests.broker.mqtt.certificates import Authority
from tests.broker.mqtt.fake_clock import FakeClock
from tests.broker.mqtt.peer import Peer

Start = Callable[..., Awaitable[Endpoint]]
Connect = Callable[..., Awaitable[Peer]]


def open_door(packet: mqtt5.ConnectPacket, certificate: dict[str, Any] | None) -> str:
    """Everybody is who he says he is."""
    return packet.client_id or "nobody-in-particular"


def make_endpoint(path: Path, **changes: Any) -> Endpoint:
    """An endpoint that lets everybody do everything, but for the changes."""
    settings: dict[str, Any] = {
        "authenticate": open_door,
        "may_publish": lambda identity, topic: True,
        "may_subscribe": lambda identity, topic_filter: True,
    }
    return Endpoint(path, **(settings | changes))


async def until_only(endpoint: Endpoint, left: Peer, connections: int) -> None:
    """Go back and forth with one client until the endpoint has seen the others leave."""
    while endpoint.counters.connections > connections:
        await left.silent()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
async def closing() -> AsyncIterator[AsyncExitStack]:
    """Whatever is entered here is left in the opposite order when the test ends."""
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
def start(closing: AsyncExitStack, tmp_path: Path, clock: FakeClock) -> Start:
    """Start an endpoint on the test's own file and clock: `await start(limits=...)`."""

    async def starting(**changes: Any) -> Endpoint:
        endpoint = make_endpoint(tmp_path / "mqtt.db", clock=clock, **changes)
        return await closing.enter_async_context(endpoint)

    return starting


@pytest.fixture
def dial(closing: AsyncExitStack) -> Connect:
    """Open a socket and say nothing: `await dial(endpoint)`."""

    async def dialling(endpoint: Endpoint | int, tls: ssl.SSLContext | None = None) -> Peer:
        port = endpoint if isinstance(endpoint, int) else endpoint.port
        peer = await Peer.open(port, tls)
        closing.push_async_callback(peer.close)
        return peer

    return dialling


@pytest.fixture
def connect(dial: Connect) -> Connect:
    """Connect a client: `await connect(endpoint, "a", clean_start=True)`."""

    async def connecting(
        endpoint: Endpoint | int, client_id: str, tls: ssl.SSLContext | None = None, **fields: Any
    ) -> Peer:
        peer = await dial(endpoint, tls)
        await peer.connect(client_id, **fields)
        return peer

    return connecting
