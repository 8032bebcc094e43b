# SPDX-License-Identifier: Apache-2.0
"""Both carriers behind one door, with the same certificates: what the conformance suite runs on.

backend = Embedded(authority, folder) | External(authority, folder)
backend.post.subscribe("fed/1/+/d/+/up/#", handler)
async with backend:
    device = await backend.device("acme/d/node-1")     # a client with that certificate
"""

import asyncio
import shutil
import socket
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any, Self

import mqtt5
import pytest

from fedml_broker.mqtt.endpoint import Endpoint, Refusal
from fedml_broker.mqtt.external import Backoff, ExternalPost
from fedml_broker.mqtt.mosquitto import Mosquitto
from tests.broker.mqtt.certificates import Authority
from tests.broker.mqtt.peer import Peer


def by_certificate(
    packet: mqtt5.ConnectPacket, certificate: dict[str, Any] | None
) -> str | Refusal:
    """The common name, as Mosquitto takes it with `use_identity_as_username`."""
    for part in (certificate or {}).get("subject", ()):
        for key, value in part:
            if key == "commonName":
                return str(value)
    return Refusal(0x87, "no certificate")


class _Backend:
    """Clients of either kind of post."""

    post: Endpoint | ExternalPost

    def __init__(self, authority: Authority, folder: Path) -> None:
        self.authority = authority
        self.folder = folder
        self.stack = AsyncExitStack()

    @property
    def port(self) -> int:
        raise NotImplementedError

    async def device(self, name: str, **fields: Any) -> Peer:
        """A connected client with a certificate of that name."""
        peer = await Peer.open(self.port, self.authority.client_context(name))
        self.stack.push_async_callback(peer.close)
        await peer.connect(name, **fields)
        return peer

    async def __aenter__(self) -> Self:
        raise NotImplementedError

    async def __aexit__(self, *exc: object) -> None:
        await self.stack.aclose()


class Embedded(_Backend):
    """The endpoint in this process, with the access rules of the protocol."""

    post: Endpoint

    def __init__(self, authority: Authority, folder: Path) -> None:
        super().__init__(authority, folder)
        self.post = Endpoint(
            folder / "mqtt.db",
            authenticate=by_certificate,
            may_publish=lambda name, topic: topic.startswith(f"fed/1/{name}/up/"),
            may_subscribe=lambda name, wanted: wanted.startswith(f"fed/1/{name}/dn/"),
            ssl_context=authority.server_context(),
        )

    @property
    def port(self) -> int:
        return self.post.port

    async def __aenter__(self) -> Self:
        await self.stack.enter_async_context(self.post)
        return self


class External(_Backend):
    """A Mosquitto of our own on loopback, and the link to it."""

    post: ExternalPost

    def __init__(self, authority: Authority, folder: Path, **changes: Any) -> None:
        super().__init__(authority, folder)
        if shutil.which("mosquitto") is None:
            pytest.skip("Mosquitto is not installed")
        server = authority.issue("localhost")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port: int = probe.getsockname()[1]
        self.mosquitto = Mosquitto(
            port=self._port,
            ca_file=authority.ca,
            cert_file=server.certificate,
            key_file=server.key,
            groups={"acme/d/member": ["fed/1/acme/g/trainers/dn"]},
        )
        settings: dict[str, Any] = {
            "ssl_context": authority.client_context("broker"),
            "backoff": Backoff(first_s=0.01, most_s=0.1),
        }
        self.post = ExternalPost("localhost", self._port, **(settings | changes))
        self.process: asyncio.subprocess.Process | None = None

    @property
    def port(self) -> int:
        return self._port

    async def start_mosquitto(self) -> None:
        """Start it, and return once it listens."""
        config = self.mosquitto.write(self.folder / "mosquitto")
        self.process = await asyncio.create_subprocess_exec(
            "mosquitto", "-c", config, stderr=asyncio.subprocess.PIPE
        )
        assert self.process.stderr is not None
        lines = []
        while line := await self.process.stderr.readline():
            lines.append(line.decode())
            if b" running" in line:
                return
        raise AssertionError(f"Mosquitto did not start: {''.join(lines)}")

    async def stop_mosquitto(self) -> None:
        """SIGKILL: whatever it had not saved is gone."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                self.process.kill()
            await self.process.wait()
            self.process._transport.close()  # type: ignore[attr-defined]
            self.process = None

    async def __aenter__(self) -> Self:
        self.stack.push_async_callback(self.stop_mosquitto)
        await self.start_mosquitto()
        await self.stack.enter_async_context(self.post)
        await self.post.until_connected()
        return self
