# SPDX-License-Identifier: Apache-2.0
"""The whole agent in this process, with a broker that says what a test tells it to say."""

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from fedml_agent import daemon as daemon_module
from fedml_agent.daemon import Daemon
from fedml_agent.home import Home, Membership
from fedml_agent.login import _csr, _device_key
from fedml_broker.identity import Identity
from tests.fakes.https_server import Asked, HttpsServer


class Broker:
    """Answers HTTPS; its MQTT is never there. `refusals`: how often a resync is refused first."""

    def __init__(self, server: HttpsServer, home: Home, identity: Identity) -> None:
        self.server = server
        self.refusals = 0
        self.resynced = asyncio.Event()
        self.sessions: list[list[str]] = []
        self._loop = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self._facts = {
            "mqtt_host": "localhost",
            "mqtt_port": port,
            "heartbeat_s": 10.0,
            "verify_keys": {k: v.hex() for k, v in identity.verify_keys_raw.items()},
        }
        home.make()
        home.ca.write_bytes(identity.ca_pem)
        csr = _csr(_device_key(home)).encode()
        home.certificate.write_bytes(identity.issue(csr, "acme/d/one"))
        home.remember(Membership(url=server.url, tenant="acme", device="one", **self._facts))  # type: ignore[arg-type]
        server.on("POST", "/v1/agent/hello", self._hello)
        server.on("POST", "/v1/agent/resync", self._resync)

    def _hello(self, asked: Asked) -> None:
        asked.read()
        asked.answer(200, json.dumps(self._facts).encode())

    def _resync(self, asked: Asked) -> None:
        self.sessions.append(json.loads(asked.read())["sessions"])
        if self.refusals:
            self.refusals -= 1
            asked.problem(503, "the broker cannot write to its disk", "disk full", "free some")
            return
        asked.answer(200, json.dumps({"over": self.sessions[-1], "counter": 7}).encode())
        self._loop.call_soon_threadsafe(self.resynced.set)


@pytest.fixture
async def broker(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Broker]:
    identity = Identity.open(tmp_path / "identity", names=["localhost"])
    with HttpsServer(identity) as server:
        yield Broker(server, Home(tmp_path), identity)


@pytest.fixture
async def start(tmp_path: Path, broker: Broker) -> AsyncIterator[Callable[[], Daemon]]:
    """Starts the agent; it is stopped at the end, and must not have ended before."""
    serving: list[tuple[Daemon, asyncio.Task[None]]] = []

    def begin() -> Daemon:
        daemon = Daemon(Home(tmp_path), "0.0")
        serving.append((daemon, asyncio.create_task(daemon.serve())))
        return daemon

    yield begin
    for daemon, task in serving:
        assert not task.done()
        daemon.stop()
        await task


async def test_a_resync_that_the_broker_refuses_is_asked_again_soon_and_ends_nothing(
    broker: Broker,
    start: Callable[[], Daemon],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(daemon_module, "_HOUSE_S", 0.05)
    broker.refusals = 2
    with caplog.at_level(logging.INFO):
        start()
        await broker.resynced.wait()
    assert broker.sessions == [[], [], []]
    told = [r for r in caplog.records if "did not say what was missed" in r.message]
    assert len(told) == 2
    assert "cannot write to its disk: disk full" in told[0].message
    assert not [r for r in caplog.records if r.exc_info]


async def test_a_resync_is_asked_once_at_a_start(
    broker: Broker, start: Callable[[], Daemon], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon_module, "_HOUSE_S", 0.001)
    daemon = start()
    await broker.resynced.wait()
    looks = 0
    looked = asyncio.Event()
    look = daemon._look_at_machine

    async def counted() -> None:
        nonlocal looks
        looks += 1
        await look()
        if looks == 5:
            looked.set()

    monkeypatch.setattr(daemon, "_look_at_machine", counted)
    await looked.wait()
    assert broker.sessions == [[]]
