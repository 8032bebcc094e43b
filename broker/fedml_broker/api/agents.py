# SPDX-License-Identifier: Apache-2.0
"""What agents ask: to join, to be known again, to hand over logs."""

import asyncio
import gzip
import io
from typing import TYPE_CHECKING, Any

import msgspec
import sqlalchemy as sa

from fedml_broker.api.call import Call, number
from fedml_broker.devices import Inventory
from fedml_broker.log_order import LogFile
from fedml_broker.problems import Problem
from fedml_broker.tables import tasks
from fedml_protocol.records import STREAM
from fedml_protocol.topics import Address

if TYPE_CHECKING:
    from fedml_broker.app import Broker


_MAX_LOG_CHUNK = 4 * 1024 * 1024


class Hello(msgspec.Struct, frozen=True):
    """What an agent says at each start."""

    inventory: Inventory
    agent_version: str


class Resync(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an agent asks about; `sessions`: the federated runs that it keeps something of."""

    sessions: list[str]


class Handlers:
    """For machines."""

    def __init__(self, broker: "Broker") -> None:
        self._broker = broker

    async def enrol(self, call: Call) -> Any:
        """Let a machine join with a login key."""
        answer = await self._broker.devices.enrol(call.body)
        self._broker.dispatcher.wake()
        return answer

    async def challenge(self, call: Call) -> Any:
        """A nonce to be signed by a device whose certificate has expired."""
        return {"nonce": self._broker.devices.challenge()}

    async def recover(self, call: Call) -> Any:
        """A new certificate for a device that proves that it has its key."""
        return {"certificate": await self._broker.devices.recover(call.body)}

    async def hello(self, call: Call) -> Any:
        """An agent has started."""
        hello: Hello = call.body
        answer = await self._broker.devices.hello(call.device, hello.inventory, hello.agent_version)
        self._broker.dispatcher.wake()  # it may have more to give than it had
        return answer

    async def renew(self, call: Call) -> Any:
        """A new certificate before the present one ends."""
        return {"certificate": await self._broker.devices.renew(call.device, call.body.csr)}

    async def resync(self, call: Call) -> Any:
        """Which runs are `over`, and the number of the newest order (`counter`)."""
        # Read before the answer: every order up to it was sent earlier.
        counter = await self._broker.orders.last(call.device.device)
        return {"over": await self._broker.runs.over(call.body.sessions), "counter": counter}

    async def put_log(self, call: Call) -> Any:
        """Append a chunk of a task's log or records; answers how long that is now."""
        log = LogFile(call.part("task"), number(call.part("epoch")), call.part("stream"))
        run = await self._run_of(call.device, log.task)
        data, offset, gap = await chunk_of(call)
        if log.stream == STREAM:
            source = await self._broker.tracker.source_of(log.task)
            place = f"{log.task}/{log.epoch}"
            return {"size": await self._broker.tracker.take(run, place, offset, data, source)}
        ordered = call.http.query.get("ordered") == "1"
        append = self._broker.observer.append
        return {"size": await append(run, log, offset, data, gap=gap, ordered=ordered)}

    async def _run_of(self, device: Address, task: str) -> str:
        query = sa.select(tasks.c.run).where(
            tasks.c.id == task, tasks.c.tenant == device.tenant, tasks.c.device == device.device
        )
        run = await self._broker.store.read(lambda tx: tx.execute(query).scalar())
        if run is None:
            raise Problem(403, "not this device's task", f"{task} was offered to another device")
        return str(run)


async def chunk_of(call: Call) -> tuple[bytes, int, int]:
    """A piece of a log or of records, at which byte it begins, and how many are missing before."""
    data = await call.http.read()
    if call.http.headers.get("X-Chunk-Encoding") == "gzip":
        data = await asyncio.to_thread(_gunzip, data)
    offset = number(call.http.query.get("offset", "0"))
    gap = number(call.http.query.get("gap", "0"))
    return data, offset, gap


def _gunzip(data: bytes) -> bytes:
    """At most `_MAX_LOG_CHUNK`, whatever the compressed bytes promise."""
    try:
        with gzip.open(io.BytesIO(data)) as stream:
            text = stream.read(_MAX_LOG_CHUNK + 1)
    except (OSError, EOFError) as error:
        raise Problem(422, "not gzip", str(error)) from error
    if len(text) > _MAX_LOG_CHUNK:
        raise Problem(413, "the chunk is too large", f"at most {_MAX_LOG_CHUNK} bytes")
    return text
