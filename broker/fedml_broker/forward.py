# SPDX-License-Identifier: Apache-2.0
"""What runs record, sent on to an MLflow server: metrics, parameters and how runs end.

How far it has come is in the store and moves only once the server has answered, so nothing is left
out, whichever of the two is killed or away. What is sent twice in such a case is the same to the
digit, which an MLflow server keeps once.
"""

import asyncio
import logging
import math
import os
import re
import ssl
from collections import defaultdict
from typing import Any

import aiohttp
import sqlalchemy as sa
from sqlalchemy import Connection

from fedml_broker.store import Store
from fedml_broker.tables import DEFAULT_TENANT, metrics, params, runs, settings

log = logging.getLogger(__name__)

EXPERIMENT = "fedml"
# By this tag a run is found again at the server.
TAG = "fedml.run"

_BATCH = 1000
_EVERY_S = 1.0
_LONGEST_S = 60.0
_SETTING = "forward"
_STATUS = {"STOPPED": "KILLED", "LOST": "FAILED"}


class ServerAway(Exception):
    """No answer, or one that may be better later."""


class ServerRefused(Exception):
    """The same again would be refused again."""


class Forwarder:
    """Sends on what is new, for ever.

    The server's token and CA come from MLFLOW_TRACKING_TOKEN and MLFLOW_TRACKING_SERVER_CERT_PATH,
    as for MLflow's own clients.
    """

    def __init__(self, store: Store, url: str) -> None:
        self._store = store
        self._url = url.rstrip("/")
        self._experiments: dict[str, str] = {}

    async def serve(self) -> None:
        """Look for what is new every few seconds; wait longer while the server is away."""
        token, ca = (
            os.environ.get(name)
            for name in ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_SERVER_CERT_PATH")
        )
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        connector = aiohttp.TCPConnector(ssl=ssl.create_default_context(cafile=ca or None))
        timeout = aiohttp.ClientTimeout(total=60)
        pause = _EVERY_S
        async with aiohttp.ClientSession(
            connector=connector, headers=headers, timeout=timeout
        ) as http:
            while True:
                try:
                    more = await self._send_some(http)
                except (ServerAway, ServerRefused) as error:
                    log.warning("%s takes no metrics now: %s", self._url, error)
                    pause = min(pause * 2, _LONGEST_S)
                    await asyncio.sleep(pause)
                    continue
                pause = _EVERY_S
                if not more:
                    await asyncio.sleep(pause)

    async def _send_some(self, http: aiohttp.ClientSession) -> bool:
        """One batch; whether there may be more."""
        state, rows = await self._store.read(_look)
        batches = defaultdict(list)
        for row in rows:
            batches[row.run].append(row)
        for run, batch in batches.items():
            await self._send_run(http, state, run, [_metric(row) for row in batch])
        if rows:
            state["after"] = rows[-1].id
            await self._store.write(lambda tx: _keep(tx, state))
        ended = await self._store.read(lambda tx: _ended(tx, list(state["open"])))
        for run, status, at in ended:
            await self._send_params(http, run, state["open"][run])
            said = {"run_id": state["open"][run], "status": status, "end_time": int(at * 1000)}
            await self._ask(http, "runs/update", said)
            # What an agent still sends of it opens it again.
            del state["open"][run]
            await self._store.write(lambda tx: _keep(tx, state))
        return len(rows) == _BATCH

    async def _send_run(
        self, http: aiohttp.ClientSession, state: dict[str, Any], run: str, batch: list[Any]
    ) -> None:
        if run not in state["open"]:
            found = await self._target(http, run)
            if found is None:  # removed here meanwhile
                return
            state["open"][run] = found
            await self._store.write(lambda tx: _keep(tx, state))
        target = state["open"][run]
        await self._send_params(http, run, target)
        await self._try(http, "runs/log-batch", {"run_id": target, "metrics": batch})

    async def _send_params(self, http: aiohttp.ClientSession, run: str, target: str) -> None:
        query = sa.select(params).where(params.c.run == run)
        rows = await self._store.read(lambda tx: tx.execute(query).all())
        said = [{"key": _name(row), "value": row.value[:6000]} for row in rows]
        for start in range(0, len(said), 100):
            part = said[start : start + 100]
            await self._try(http, "runs/log-batch", {"run_id": target, "params": part})

    async def _try(self, http: aiohttp.ClientSession, path: str, said: dict[str, Any]) -> None:
        try:
            await self._ask(http, path, said)
        except ServerRefused as error:  # one bad piece does not hold up all that follow
            log.error("%s refuses a piece, which is left out: %s", self._url, error)

    async def _target(self, http: aiohttp.ClientSession, run: str) -> str | None:
        """The run at the server that stands for ours, made if it is not there."""
        row = await self._store.read(
            lambda tx: tx.execute(sa.select(runs).where(runs.c.id == run)).first()
        )
        if row is None:
            return None
        experiment = await self._experiment(http, row.tenant)
        wanted = f"tags.`{TAG}` = '{run}'"
        said = {"experiment_ids": [experiment], "filter": wanted, "max_results": 1}
        found = (await self._ask(http, "runs/search", said)).get("runs")
        if found:
            return str(found[0]["info"]["run_id"])
        tags = {
            TAG: run,
            "fedml.kind": row.kind,
            "fedml.user": row.user,
            "mlflow.runName": row.name,
        }
        made = await self._ask(
            http,
            "runs/create",
            {
                "experiment_id": experiment,
                "run_name": row.name,
                "start_time": int(row.created_at * 1000),
                "tags": [{"key": name, "value": value} for name, value in tags.items()],
            },
        )
        return str(made["run"]["info"]["run_id"])

    async def _experiment(self, http: aiohttp.ClientSession, tenant: str) -> str:
        if tenant not in self._experiments:
            name = EXPERIMENT if tenant == DEFAULT_TENANT else f"{EXPERIMENT}/{tenant}"
            said = {"filter": f"name = '{name}'", "max_results": 1}
            found = (await self._ask(http, "experiments/search", said)).get("experiments")
            made = (
                found[0] if found else await self._ask(http, "experiments/create", {"name": name})
            )
            self._experiments[tenant] = str(made["experiment_id"])
        return self._experiments[tenant]

    async def _ask(
        self, http: aiohttp.ClientSession, path: str, said: dict[str, Any]
    ) -> dict[str, Any]:
        try:
            async with http.post(f"{self._url}/api/2.0/mlflow/{path}", json=said) as answer:
                text = await answer.text()
                if answer.status == 400:
                    raise ServerRefused(f"{path}: {text[:300]}")
                if answer.status != 200:
                    raise ServerAway(f"{path}: {answer.status} {text[:300]}")
                found: dict[str, Any] = await answer.json(content_type=None)
                return found
        except (aiohttp.ClientError, TimeoutError, ValueError, OSError) as error:
            raise ServerAway(f"{path}: {error}") from error


def _look(tx: Connection) -> tuple[dict[str, Any], list[Any]]:
    found = tx.execute(sa.select(settings.c.value).where(settings.c.name == _SETTING)).scalar()
    state: dict[str, Any] = found or {"after": 0, "open": {}}
    query = sa.select(metrics).where(metrics.c.id > state["after"]).order_by(metrics.c.id)
    return state, list(tx.execute(query.limit(_BATCH)))


def _keep(tx: Connection, state: dict[str, Any]) -> None:
    tx.execute(settings.delete().where(settings.c.name == _SETTING))
    tx.execute(settings.insert().values(name=_SETTING, value=state))


def _ended(tx: Connection, names: list[str]) -> list[tuple[str, str, float]]:
    query = sa.select(runs).where(runs.c.id.in_(names), runs.c.ended_at.is_not(None))
    return [(r.id, _STATUS.get(r.state, r.state), r.ended_at) for r in tx.execute(query)]


def _metric(row: Any) -> dict[str, Any]:
    value = "NaN" if row.value is None or math.isinf(row.value) else row.value
    return {"key": _name(row), "value": value, "step": row.step, "timestamp": int(row.at * 1000)}


def _name(row: Any) -> str:
    """As MLflow takes names; those of several clients are told apart."""
    whole = f"{row.source}/{row.name}" if row.source else row.name
    return re.sub(r"[^\w\-. :/]", "_", whole)[:250]
