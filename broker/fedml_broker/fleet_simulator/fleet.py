# SPDX-License-Identifier: Apache-2.0
"""All simulated machines of one process: their connections, and what they have in common."""

import asyncio
import errno
import socket
import ssl
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from random import Random

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedml_broker.fleet_simulator.agent import Agent, Line, Tally
from fedml_broker.mqtt.clock import Clock, SystemClock
from fedml_broker.mqtt.pipe import Pipe
from fedml_broker.mqtt.tls import Tls
from fedml_protocol.devices import RECONNECT_BEATS
from fedml_protocol.topics import Address

_BUFFER_BYTES = 256 * 1024
# Connections from one address to one port of another: Linux has 28,000 ports to choose from.
_PER_SOURCE = 20_000
# Handshakes under way at one time. All at once would only wait in the broker's queue, where the
# first would be given up before the last is looked at.
_AT_ONCE = 256
_PATIENCE_S = 60.0
_FIRST_PAUSE_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One enrolled machine. `certificate`: certificate and key, PEM."""

    address: Address
    certificate: bytes


class Fleet:
    """The machines; an agent's `Surroundings`."""

    def __init__(
        self,
        members: Iterable[Member],
        *,
        where: tuple[str, int],
        ca_pem: str,
        verify_keys: Mapping[str, str],
        heartbeat_s: float,
        task_s: float,
        slots: int,
        folder: Path,
        seed: int = 0,
    ) -> None:
        """
        Args:
            where: Host and port of MQTT.
            folder: For the one file from which OpenSSL reads certificates.
        """
        self.buffer = memoryview(bytearray(_BUFFER_BYTES))
        self.tally = Tally()
        self.clock: Clock = SystemClock()
        self.rng = Random(seed)  # noqa: S311 - how long a task lasts is no secret
        self.verify_keys = {
            name: Ed25519PublicKey.from_public_bytes(bytes.fromhex(raw))
            for name, raw in verify_keys.items()
        }
        self.heartbeat_s = heartbeat_s
        self.task_s = task_s
        self.online = 0
        self.agents = [
            Agent(self, number, member.address, member.certificate, slots)
            for number, member in enumerate(members)
        ]
        self._where = where
        self._address = where
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._context.load_verify_locations(cadata=ca_pem)
        self._file = folder / "device.pem"
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._news = asyncio.Event()
        self._dirty: list[Pipe] = []
        self._leaving = False
        self._back: set[asyncio.Task[None]] = set()

    async def connect(self, told: Callable[[int], None]) -> None:
        """Connect every machine; `told` how many are.

        Raises:
            OSError: This machine gives no more sockets or ports.
            TimeoutError: One did not get through.
        """
        self._address = await _resolve(*self._where)
        queue, done = iter(self.agents), count(1)

        async def some() -> None:
            for agent in queue:
                await self._connect(agent)
                told(next(done))

        async with asyncio.TaskGroup() as group:
            for _ in range(min(_AT_ONCE, len(self.agents))):
                group.create_task(some(), name="fleet.connect")

    async def _connect(self, agent: Agent) -> None:
        loop = asyncio.get_running_loop()
        ready = self._waiting[agent.number] = loop.create_future()
        try:
            async with asyncio.timeout(_PATIENCE_S):
                await loop.create_connection(
                    lambda: Line(agent, self, self._tls(agent)),
                    *self._address,
                    local_addr=self._source(agent.number),
                )
                await ready
        except TimeoutError:
            raise TimeoutError(f"no connection within {_PATIENCE_S:g} s") from None
        finally:
            del self._waiting[agent.number]

    def _tls(self, agent: Agent) -> Tls:
        # One context for all: a session keeps the certificate that the context had when it began,
        # and ten thousand contexts would take more memory than the sessions.
        self._file.write_bytes(agent.certificate)
        self._context.load_cert_chain(self._file)
        return Tls(self._context, self._where[0])

    def _source(self, number: int) -> tuple[str, int] | None:
        """On loopback, the next address when the ports of one are used up."""
        group = number // _PER_SOURCE
        here = self._address[0] == "127.0.0.1"
        return (f"127.0.0.{group + 1}", 0) if here and group else None

    async def all_acknowledged(self, tasks: int) -> None:
        """Return when the results of so many tasks have been acknowledged."""
        while self.tally.acknowledged < tasks:
            self._news.clear()
            await self._news.wait()

    async def leave(self) -> None:
        """Every machine says goodbye."""
        self._leaving = True
        for task in self._back:
            task.cancel()
        for agent in self.agents:
            agent.stop()
            if agent.line is not None:
                agent.line.goodbye()
        await asyncio.sleep(0)

    # ------------------------------------------------------------------ machines call these

    def ready(self, agent: Agent) -> None:
        """It is connected."""
        self.online += 1
        waiting = self._waiting.get(agent.number)
        if waiting is not None and not waiting.done():
            waiting.set_result(None)

    def lost(self, agent: Agent) -> None:
        """Its connection has ended: it comes back, as a real agent does."""
        waiting = self._waiting.get(agent.number)
        if waiting is not None:
            if not waiting.done():
                waiting.set_exception(ConnectionError("the broker closed the connection"))
            return
        self.online -= 1
        if not self._leaving:
            self.tally.troubles["a connection was lost"] += 1
            task = asyncio.get_running_loop().create_task(self._return(agent), name="fleet.return")
            self._back.add(task)
            task.add_done_callback(self._back.discard)

    def acknowledged(self) -> None:
        """A result was acknowledged."""
        self.tally.acknowledged += 1
        self._news.set()

    async def _return(self, agent: Agent) -> None:
        pause = _FIRST_PAUSE_S
        while True:
            await asyncio.sleep(self.rng.uniform(pause / 2, pause))
            pause = min(2 * pause, RECONNECT_BEATS * self.heartbeat_s)
            try:
                await self._connect(agent)
                return
            except OSError as error:
                name = errno.errorcode.get(error.errno or 0, type(error).__name__)
                self.tally.troubles[f"no connection: {name}"] += 1

    def flush_soon(self, pipe: Pipe) -> None:
        """Write a connection's packets at the end of this turn of the event loop."""
        if not self._dirty:
            asyncio.get_running_loop().call_soon(self._flush)
        self._dirty.append(pipe)

    def _flush(self) -> None:
        dirty, self._dirty = self._dirty, []
        for pipe in dirty:
            pipe.flush()


async def _resolve(host: str, port: int) -> tuple[str, int]:
    """The address behind a name, looked up once; IPv4 first, on which loopback has many."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    address = min(found, key=lambda info: info[0] is not socket.AF_INET)[4]
    return str(address[0]), int(address[1])
