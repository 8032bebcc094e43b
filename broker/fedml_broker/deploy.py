# SPDX-License-Identifier: Apache-2.0
"""Services: jobs that stay up, and where each of them answers at this moment.

The table holds those that do; each machine's heartbeats say so. A service that ends, is queued
again or falls silent is in it no longer.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy import Connection

from fedml_broker.observe import add_event
from fedml_broker.store import Store
from fedml_broker.tables import services, tasks
from fedml_protocol.tasks import FINAL, TaskState


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a service answers.

    Attributes:
        host: The machine, as other machines find it.
        since: Seconds since 1970.
    """

    device: str
    name: str
    host: str
    port: int
    since: float

    @property
    def url(self) -> str:
        """The same as a URL."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def shown(self) -> dict[str, object]:
        """For people."""
        told = ("device", "name", "host", "port", "url", "since")
        return {name: getattr(self, name) for name in told}

    def values(self, run: str) -> dict[str, str]:
        """What a step of a workflow that needs the service learns of it."""
        told = {"url": self.url, "host": self.host, "port": str(self.port)}
        return {**told, "device": self.device, "run": run}


def answers(tx: Connection, run: str, task: str, epoch: int, endpoint: Endpoint) -> bool:
    """A service answers; False when that was known, or its task is elsewhere by now."""
    state = tx.execute(
        sa.select(tasks.c.state).where(tasks.c.id == task, tasks.c.epoch == epoch)
    ).scalar()
    if state is None or TaskState(state) in {TaskState.QUEUED, *FINAL}:
        return False
    known = _read(tx, [run]).get(run)
    if known is not None and (known.device, known.port) == (endpoint.device, endpoint.port):
        return False
    forget(tx, run)
    row = {"run": run, "device": endpoint.device, "name": endpoint.name, "host": endpoint.host}
    tx.execute(services.insert(), {**row, "port": endpoint.port, "since": endpoint.since})
    add_event(tx, run, "answers", endpoint.shown())
    return True


def silent(tx: Connection, run: str) -> bool:
    """A service no longer answers, though its job runs; False when that was known."""
    known = _read(tx, [run]).get(run)
    if known is None:
        return False
    forget(tx, run)
    add_event(tx, run, "silent", known.shown())
    return True


def forget(tx: Connection, run: str) -> None:
    """The job has ended, or is queued again."""
    tx.execute(services.delete().where(services.c.run == run))


async def endpoints(store: Store, runs: Sequence[str]) -> dict[str, Endpoint]:
    """Those of these runs that answer at this moment."""
    return await store.read(lambda tx: _read(tx, runs)) if runs else {}


def endpoint(device: str, name: str, host: str, port: int) -> Endpoint:
    """One that answers from now on; `host` is empty where nobody knows the machine's address."""
    return Endpoint(device=device, name=name, host=host or name, port=port, since=time.time())


def _read(tx: Connection, runs: Sequence[str]) -> dict[str, Endpoint]:
    query = sa.select(services).where(services.c.run.in_(runs))
    return {
        row["run"]: Endpoint(
            **{key: row[key] for key in ("device", "name", "host", "port", "since")}
        )
        for row in tx.execute(query).mappings()
    }
