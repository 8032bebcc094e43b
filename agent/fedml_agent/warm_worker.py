# SPDX-License-Identifier: Apache-2.0
"""The warm worker of one federated run, and the socket to it.

It prints a line when it listens, which is how we know when to connect. It is given one stage at a
time, and answers one that it has done before from its disk, so that an agent that was restarted
simply asks again.
"""

import asyncio
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedml_agent import tending
from fedml_agent.observe import LogShipper
from fedml_agent.sockets import address_of
from fedml_agent.tending import Ended, Gone, Tended
from fedml_protocol.codec import parse
from fedml_protocol.errors import ProtocolError
from fedml_protocol.federate import (
    StageCancel,
    StageDone,
    StageOrder,
    WorkerFrame,
    WorkerReady,
)
from fedml_protocol.frames import HEAD_BYTES, frame, frame_length

log = logging.getLogger(__name__)

SOCKET = "worker.sock"
# How long a worker has to give up a stage that nobody waits for.
_GIVE_UP_S = 5.0


class WorkerDied(Exception):
    """The worker is gone.

    Attributes:
        end: What its shim recorded; without it, the text says how it went.
        tail: What it wrote last.
    """

    def __init__(self, text: str, end: Ended | None = None, tail: str = "") -> None:
        super().__init__(text)
        self.end = end
        self.tail = tail


class Session:
    """The warm worker of one run, and the socket to it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.tended: Tended | None = None
        self.shipper: LogShipper | None = None
        self.starting = asyncio.Lock()
        self.used_at = asyncio.get_running_loop().time()
        self._turn = asyncio.Lock()
        # Stages that the worker was given and has not answered.
        self._open: set[tuple[str, int]] = set()
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._background: set[asyncio.Task[None]] = set()

    async def find(self) -> Tended | Ended | Gone | None:
        """The worker that a former agent started, if it lives."""
        dirs = sorted(self.folder.glob("shim-*"), key=lambda p: int(p.name.rpartition("-")[2]))
        if not dirs:
            return None
        return await tending.adopt(dirs[-1])

    def lease(self) -> dict[str, Any]:
        """What it holds of the machine, and since which boot; empty: it never began."""
        try:
            found: dict[str, Any] = json.loads((self.folder / "lease.json").read_text())
        except (OSError, ValueError):
            return {}
        return found

    @property
    def log_key(self) -> tuple[str, int]:
        """Under which (task, epoch) the worker's log is filed."""
        task, epoch = self.lease()["log"]
        return str(task), int(epoch)

    def next_shim_dir(self) -> Path:
        """A fresh directory for the next worker's shim."""
        numbers = [int(p.name.rpartition("-")[2]) for p in self.folder.glob("shim-*")]
        folder = self.folder / f"shim-{max(numbers, default=0) + 1}"
        folder.mkdir(mode=0o700, parents=True)
        return folder

    def take(self, tended: Tended, shipper: LogShipper | None) -> None:
        """The worker runs."""
        self.tended, self.shipper = tended, shipper
        if shipper is None:
            return
        shipping = asyncio.get_running_loop().create_task(shipper.run(), name=f"log.{self.name}")
        self._background.add(shipping)
        shipping.add_done_callback(self._background.discard)

    async def ask(self, order: Callable[[], StageOrder]) -> StageDone:
        """Give the worker a stage and wait for its answer.

        Args:
            order: Called when the worker is ready for it.

        Raises:
            WorkerDied: It ended before it answered.
        """
        async with self._turn:
            self.used_at = asyncio.get_running_loop().time()
            for attempt in (1, 2):
                try:
                    return await self._talk(order)
                except (OSError, asyncio.IncompleteReadError, ProtocolError) as error:
                    self._streams = None
                    self._open.clear()
                    if attempt == 2 or self.tended is None or self.tended.is_over:
                        raise await self._death(error) from error
            raise AssertionError("unreachable")

    async def _talk(self, make: Callable[[], StageOrder]) -> StageDone:
        reader, writer = await self._connected()
        order = make()
        writer.write(frame(WorkerFrame(body=order)))
        self._open.add((order.task, order.epoch))
        await writer.drain()
        while True:
            done = await self._next_answer(reader)
            if (done.task, done.epoch) == (order.task, order.epoch):
                return done

    async def _next_answer(self, reader: asyncio.StreamReader) -> StageDone:
        body = await _read(reader)
        if not isinstance(body, StageDone):
            raise ConnectionError(f"a worker does not send {type(body).__name__}")
        self._open.discard((body.task, body.epoch))
        return body

    def give_up(self, key: tuple[str, int]) -> None:
        """Make the worker give up a stage; one that does not is ended, and the next one starts."""
        if key not in self._open or self._streams is None:
            return
        task, epoch = key
        self._streams[1].write(frame(WorkerFrame(body=StageCancel(task=task, epoch=epoch))))
        waiting = asyncio.get_running_loop().create_task(
            self._await_end(key, self._streams[0]), name=f"give-up.{task}"
        )
        self._background.add(waiting)
        waiting.add_done_callback(self._background.discard)

    async def _await_end(self, key: tuple[str, int], reader: asyncio.StreamReader) -> None:
        async with self._turn:
            try:
                async with asyncio.timeout(_GIVE_UP_S):
                    while key in self._open:
                        await self._next_answer(reader)
            except (TimeoutError, OSError, asyncio.IncompleteReadError, ProtocolError) as error:
                log.warning("the worker of %s does not give up and is ended: %r", self.name, error)
                self._open.clear()
                self._streams = None
                tended, self.tended = self.tended, None
                if tended is not None:
                    tended.kill()
                    await tended.ended()

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._streams is None:
            if self.tended is None:
                raise ConnectionError("there is no worker")
            path = self.folder / "work"
            # A worker says a line when it listens; each growth of its log is a reason to look.
            async for _ in self.tended.events():
                if (path / SOCKET).exists():
                    break
            with address_of(path / SOCKET) as address:
                self._streams = await asyncio.open_unix_connection(address)
            ready = await _read(self._streams[0])
            if not isinstance(ready, WorkerReady):
                raise ConnectionError("the worker did not introduce itself")
        return self._streams

    async def _death(self, error: Exception) -> WorkerDied:
        if self.tended is None:
            return WorkerDied(str(error))
        try:
            async with asyncio.timeout(5):
                end = await self.tended.ended()
        except TimeoutError:
            self.tended.kill()
            return WorkerDied(f"it closed the connection: {error}")
        last = self.tended.log("err").read(max(self.tended.logs.err.size - 2000, 0), 2000)[1]
        tail = last.decode(errors="replace").strip()
        if isinstance(end, Gone):
            return WorkerDied(end.why, tail=tail)
        return WorkerDied(end.reason, end, tail)

    def detach(self) -> None:
        """Stop listening; the worker goes on."""
        for task in self._background:
            task.cancel()
        if self._streams is not None:
            self._streams[1].close()
        if self.tended is not None:
            self.tended.detach()

    async def end(self) -> None:
        """End the worker and wait for it; what it wrote last is still shipped."""
        if self._streams is not None:
            self._streams[1].close()
        if self.tended is None:
            return
        self.tended.stop(2.0)
        await self.tended.ended()
        if self._background:
            await asyncio.wait(self._background, timeout=10)
        for task in self._background:
            task.cancel()


async def _read(
    reader: asyncio.StreamReader,
) -> WorkerReady | StageOrder | StageDone | StageCancel:
    head = await reader.readexactly(HEAD_BYTES)
    return parse(WorkerFrame, await reader.readexactly(frame_length(head))).body
