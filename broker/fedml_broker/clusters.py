# SPDX-License-Identifier: Apache-2.0
"""Clusters: machines that somebody has reserved under a name, for the runs that name it.

A cluster that is up keeps its machines from all other launched work; one that is stopped is a name
and a list, and gives them back. What ran on a machine before it was reserved runs to its end.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection

from fedml_broker import audit, match
from fedml_broker.accounts import User
from fedml_broker.dispatch import Dispatcher
from fedml_broker.fleet import Fleet, Machine
from fedml_broker.launch import NeedsBody
from fedml_broker.problems import Problem
from fedml_broker.store import Store
from fedml_broker.tables import clusters, runs
from fedml_protocol.errors import MalformedMessage
from fedml_protocol.ids import check_id
from fedml_protocol.tasks import FINAL

_FINAL_NAMES = [state.name for state in FINAL]


class ClusterRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A cluster to be made: of the machines named, or of `count` that have what is asked for."""

    name: str
    devices: list[str] = []
    count: int = 0
    labels: dict[str, str] = {}
    needs: NeedsBody = NeedsBody()
    autostop_minutes: float | None = None


class AutostopBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """After how many idle minutes a cluster stops by itself; null: never."""

    minutes: float | None = None


class Clusters:
    """The reserved machines; the fleet in memory is told whose each of them is."""

    def __init__(self, store: Store, fleet: Fleet, dispatcher: Dispatcher) -> None:
        self._store = store
        self._fleet = fleet
        self._dispatcher = dispatcher
        self._idle_since: dict[tuple[str, str], float] = {}

    async def load(self) -> None:
        """Reserve what was reserved before."""
        for row in await self._store.read(lambda tx: _rows(tx, sa.true())):
            if row["up"]:
                self._mark(row["devices"], row["name"])

    async def create(self, user: User, request: ClusterRequest) -> dict[str, Any]:
        """Reserve machines under a new name.

        Raises:
            Problem: 409 the name or a machine is taken; 404 no such machine; 422 too few fit.
        """
        try:
            check_id(request.name, "cluster")
        except MalformedMessage as error:
            raise Problem(422, "this cannot be a cluster's name", str(error)) from error
        devices = self._chosen(user.tenant, request)
        autostop_s = None if request.autostop_minutes is None else 60 * request.autostop_minutes
        row = {
            "tenant": user.tenant,
            "name": request.name,
            "user": user.name,
            "devices": devices,
            "up": True,
            "autostop_s": autostop_s,
            "created_at": time.time(),
        }

        def commit(tx: Connection) -> None:
            if _one(tx, user.tenant, request.name) is not None:
                raise Problem(
                    409,
                    f"there is a cluster {request.name} already",
                    "its machines stay as they are",
                    hint=f"`fedml cluster start {request.name}`, or choose another name",
                )
            self._check_free(tx, user.tenant, devices, request.name)
            tx.execute(clusters.insert().values(row))
            facts = {"devices": devices}
            audit.note(
                tx, user.tenant, audit.user(user.name), "cluster.create", request.name, **facts
            )

        await self._store.write(commit)
        self._mark(devices, request.name)
        return await self.show(user.tenant, request.name)

    async def every(self, tenant: str) -> list[dict[str, Any]]:
        """The clusters of a tenant, by name."""
        found = await self._store.read(lambda tx: _rows(tx, clusters.c.tenant == tenant))
        return [await self._described(row) for row in found]

    async def show(self, tenant: str, name: str) -> dict[str, Any]:
        """One cluster with its machines and its runs that have not ended.

        Raises:
            Problem: 404.
        """
        return await self._described(await self._store.read(lambda tx: _known(tx, tenant, name)))

    async def start(self, user: User, name: str) -> dict[str, Any]:
        """Reserve the machines of a stopped cluster again. Again is harmless.

        Raises:
            Problem: 404; 403 it is somebody else's; 409 a machine is in another cluster now.
        """

        def commit(tx: Connection) -> list[str]:
            row = _own(tx, user, name)
            self._check_free(tx, user.tenant, row["devices"], name)
            _set(tx, user.tenant, name, up=True)
            if not row["up"]:
                audit.note(tx, user.tenant, audit.user(user.name), "cluster.start", name)
            return list(row["devices"])

        self._mark(await self._store.write(commit), name)
        self._idle_since.pop((user.tenant, name), None)
        return await self.show(user.tenant, name)

    async def stop(self, user: User, name: str) -> dict[str, Any]:
        """Give the machines back; the name stays, and what runs goes on. Again is harmless.

        Raises:
            Problem: 404; 403 it is somebody else's.
        """
        await self._store.read(lambda tx: _own(tx, user, name))
        await self._stop(user.tenant, name, audit.user(user.name))
        return await self.show(user.tenant, name)

    async def _stop(self, tenant: str, name: str, by: str) -> None:
        def commit(tx: Connection) -> list[str]:
            row = _known(tx, tenant, name)
            _set(tx, tenant, name, up=False)
            if row["up"]:
                audit.note(tx, tenant, by, "cluster.stop", name)
            return list(row["devices"]) if row["up"] else []

        self._mark(await self._store.write(commit), "")

    async def autostop(self, user: User, name: str, minutes: float | None) -> dict[str, Any]:
        """Stop it by itself when it has been idle for so long; None: never.

        Raises:
            Problem: 404, 403, 422.
        """
        if minutes is not None and not 0 < minutes < 1e6:
            raise Problem(422, "not a number of minutes", f"{minutes:g}")

        def commit(tx: Connection) -> None:
            _own(tx, user, name)
            _set(tx, user.tenant, name, autostop_s=None if minutes is None else 60 * minutes)
            told = "never" if minutes is None else f"{minutes:g}"
            by = audit.user(user.name)
            audit.note(tx, user.tenant, by, "cluster.autostop", name, minutes=told)

        await self._store.write(commit)
        return await self.show(user.tenant, name)

    async def remove(self, user: User, name: str) -> list[str]:
        """Forget a cluster; the runs that have named it and not ended: they are to be stopped.

        Raises:
            Problem: 404, 403.
        """

        def commit(tx: Connection) -> tuple[list[str], list[str]]:
            row = _own(tx, user, name)
            open_runs = _open_runs(tx, user.tenant, name)
            of_it = sa.and_(clusters.c.tenant == user.tenant, clusters.c.name == name)
            tx.execute(clusters.delete().where(of_it))
            audit.note(tx, user.tenant, audit.user(user.name), "cluster.remove", name)
            return (list(row["devices"]) if row["up"] else []), open_runs

        devices, open_runs = await self._store.write(commit)
        self._mark(devices, "")
        return open_runs

    async def stop_idle(self) -> None:
        """Stop the clusters that have been idle for long enough."""
        now = self._fleet.clock()
        idle: dict[tuple[str, str], float] = {}
        up = sa.and_(clusters.c.up, clusters.c.autostop_s.is_not(None))
        for row in await self._store.read(lambda tx: _rows(tx, up)):
            key = (row["tenant"], row["name"])
            if await self._busy(row):
                continue
            idle[key] = self._idle_since.get(key, now)
            if now - idle[key] >= row["autostop_s"]:
                await self._stop(*key, audit.BROKER)
        self._idle_since = idle

    # ------------------------------------------------------------------ small print

    async def _busy(self, row: Mapping[str, Any]) -> bool:
        if any(m.holds for m in self._machines(row["devices"])):
            return True
        tenant, name = row["tenant"], row["name"]
        return bool(await self._store.read(lambda tx: _open_runs(tx, tenant, name)))

    def _chosen(self, tenant: str, request: ClusterRequest) -> list[str]:
        """The ids of the machines that it is to have."""
        candidates = self._fleet.candidates(tenant)
        if request.devices:
            by_name = {c.name: c.device for c in candidates} | {
                c.device: c.device for c in candidates
            }
            if missing := sorted(set(request.devices) - by_name.keys()):
                raise Problem(
                    404, "no such machine", ", ".join(missing), hint="`fedml device list`"
                )
            return sorted({by_name[name] for name in request.devices})
        wanted = match.Wanted(kind="launch", needs=request.needs.needs(), labels=request.labels)
        looked_at = [(c, match.never(wanted, c) or match.now(wanted, c)) for c in candidates]
        fitting = [c for c, reason in looked_at if not reason]
        if request.count < 1 or len(fitting) < request.count:
            reasons = "\n".join(f"  {c.name}: {why}" for c, why in looked_at if why)
            raise Problem(
                422,
                "too few machines for this cluster",
                f"{request.count} are asked for, {len(fitting)} can be had\n{reasons}",
                hint="ask for fewer, or name the machines: `--device NAME`",
            )
        fitting.sort(key=lambda c: (len(c.busy), c.name))
        return sorted(c.device for c in fitting[: request.count])

    def _check_free(self, tx: Connection, tenant: str, devices: Sequence[str], name: str) -> None:
        others = sa.and_(clusters.c.tenant == tenant, clusters.c.up, clusters.c.name != name)
        for row in _rows(tx, others):
            if both := sorted(set(devices) & set(row["devices"])):
                names = ", ".join(m.name for m in self._machines(both))
                raise Problem(
                    409,
                    f"{names} is in another cluster",
                    f"{row['user']} has reserved it as {row['name']}",
                    hint=f"`fedml cluster stop {row['name']}` gives it back",
                )

    def _machines(self, devices: Iterable[str]) -> list[Machine]:
        return [m for device in devices if (m := self._fleet.get(device)) is not None]

    def _mark(self, devices: Iterable[str], name: str) -> None:
        for device in devices:
            self._fleet.reserve(device, name)
        self._dispatcher.wake()

    async def _described(self, row: Mapping[str, Any]) -> dict[str, Any]:
        tenant, name = row["tenant"], row["name"]
        open_runs = await self._store.read(lambda tx: _open_runs(tx, tenant, name))
        machines = self._machines(row["devices"])
        return {
            "name": name,
            "user": row["user"],
            "status": "up" if row["up"] else "stopped",
            "devices": [
                {
                    "id": m.address.device,
                    "name": m.name,
                    "gpus": len(m.capacity.gpus),
                    "status": self._fleet.away(m) or ("busy" if m.holds else "idle"),
                }
                for m in machines
            ],
            "runs": open_runs,
            "autostop_minutes": None if row["autostop_s"] is None else row["autostop_s"] / 60,
            "created_at": row["created_at"],
        }


def _rows(tx: Connection, where: Any) -> list[dict[str, Any]]:
    query = sa.select(clusters).where(where).order_by(clusters.c.name)
    return [dict(row) for row in tx.execute(query).mappings()]


def _one(tx: Connection, tenant: str, name: str) -> dict[str, Any] | None:
    found = _rows(tx, sa.and_(clusters.c.tenant == tenant, clusters.c.name == name))
    return found[0] if found else None


def _known(tx: Connection, tenant: str, name: str) -> dict[str, Any]:
    row = _one(tx, tenant, name)
    if row is None:
        raise Problem(404, "no such cluster", name, hint="`fedml cluster list`")
    return row


def _own(tx: Connection, user: User, name: str) -> dict[str, Any]:
    row = _known(tx, user.tenant, name)
    if row["user"] != user.name and not user.may("admin"):
        raise Problem(
            403,
            f"the cluster {name} is {row['user']}'s",
            "who has reserved machines, or an admin, gives them back",
            hint=f"ask {row['user']}",
        )
    return row


def _set(tx: Connection, tenant: str, name: str, **values: Any) -> None:
    of_it = sa.and_(clusters.c.tenant == tenant, clusters.c.name == name)
    tx.execute(clusters.update().where(of_it).values(values))


def _open_runs(tx: Connection, tenant: str, name: str) -> list[str]:
    query = (
        sa.select(runs.c.id)
        .where(
            runs.c.tenant == tenant,
            runs.c.state.not_in(_FINAL_NAMES),
            runs.c.spec["cluster"].as_string() == name,
        )
        .order_by(runs.c.created_at)
    )
    return list(tx.execute(query).scalars())
