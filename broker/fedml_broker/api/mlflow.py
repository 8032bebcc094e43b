# SPDX-License-Identifier: Apache-2.0
"""MLflow's REST API, as far as its clients need it to log and to look (docs/mlops.md).

Refusals have the shape that those clients read: {"error_code": …, "message": …}.
"""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

from aiohttp import web
from sqlalchemy import Connection

from fedml_broker import mlflow
from fedml_broker.api.call import Call
from fedml_broker.experiments import find
from fedml_broker.problems import Problem
from fedml_broker.tracking import Artifact, set_artifact
from fedml_broker.uploads import full_disk_is_a_problem

if TYPE_CHECKING:
    from fedml_broker.app import Broker

_CHUNK = 1 << 20
_CODES = {401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 404: mlflow.MISSING}

Answer = Callable[["Handlers", Call], Awaitable[Any]]


def _in_their_words(handler: Answer) -> Answer:
    @wraps(handler)
    async def told(self: "Handlers", call: Call) -> Any:
        try:
            return await handler(self, call)
        except Problem as problem:
            known = problem.title in (mlflow.MISSING, mlflow.TAKEN, mlflow.INVALID)
            default = mlflow.INVALID if problem.status < 500 else "TEMPORARILY_UNAVAILABLE"
            code = problem.title if known else _CODES.get(problem.status, default)
            body = {"error_code": code, "message": problem.detail or problem.title}
            return web.json_response(body, status=problem.status)

    return told


class Handlers:
    """For MLflow's clients."""

    def __init__(self, broker: "Broker") -> None:
        self._broker = broker

    async def _said(self, call: Call) -> dict[str, Any]:
        if call.http.method == "GET":
            return dict(call.http.query)
        try:
            said = await call.http.json()
        except ValueError as error:
            raise Problem(400, mlflow.INVALID, f"the body is no JSON: {error}") from error
        if not isinstance(said, dict):
            raise Problem(400, mlflow.INVALID, "the body is no object")
        return said

    async def _write(self, call: Call, work: Callable[[Connection, dict[str, Any]], Any]) -> Any:
        said = await self._said(call)
        return await self._broker.store.write(lambda tx: work(tx, said))

    async def _change(
        self, call: Call, work: Callable[[Connection, str, dict[str, Any]], Any]
    ) -> dict[str, Any]:
        """Change a tracked run; whoever follows it is woken."""
        said = await self._said(call)
        run = str(said.get("run_id") or said.get("run_uuid") or "")

        def change(tx: Connection) -> None:
            mlflow.writable(tx, call.user, run)
            work(tx, run, said)

        await self._broker.store.write(change)
        self._broker.observer.ring(run)
        return {}

    # ------------------------------------------------------------------ experiments

    @_in_their_words
    async def create_experiment(self, call: Call) -> Any:
        """MLflow: a new experiment."""
        made = await self._write(
            call,
            lambda tx, said: mlflow.create_experiment(
                tx, call.user, said.get("name", ""), mlflow.named(said.get("tags"))
            ),
        )
        return {"experiment_id": made}

    @_in_their_words
    async def get_experiment(self, call: Call) -> Any:
        """MLflow: one experiment, by its id."""
        found = await self._write(
            call, lambda tx, said: mlflow.experiment(tx, call.user, said.get("experiment_id", ""))
        )
        return {"experiment": mlflow.shown_experiment(found)}

    @_in_their_words
    async def get_experiment_by_name(self, call: Call) -> Any:
        """MLflow: one experiment, by its name."""
        name = call.http.query.get("experiment_name", "")
        found = await self._broker.store.read(lambda tx: find(tx, call.user.tenant, name))
        if found is None:
            raise mlflow.missing(f"no experiment {name!r}")
        return {"experiment": mlflow.shown_experiment(found)}

    @_in_their_words
    async def search_experiments(self, call: Call) -> Any:
        """MLflow: experiments that fit a filter."""
        found, token = await self._write(
            call, lambda tx, said: mlflow.search_experiments(tx, call.user, said)
        )
        return {"experiments": found, **({"next_page_token": token} if token else {})}

    @_in_their_words
    async def update_experiment(self, call: Call) -> Any:
        """MLflow: another name for an experiment."""
        return await self._change_experiment(call, lambda said: {"name": said.get("new_name")})

    @_in_their_words
    async def delete_experiment(self, call: Call) -> Any:
        """MLflow: an experiment is not shown any more; nothing is lost."""
        return await self._change_experiment(call, lambda said: {"deleted": True})

    @_in_their_words
    async def restore_experiment(self, call: Call) -> Any:
        """MLflow: a deleted experiment is shown again."""
        return await self._change_experiment(call, lambda said: {"deleted": False})

    @_in_their_words
    async def tag_experiment(self, call: Call) -> Any:
        """MLflow: a tag of an experiment."""

        def tag(tx: Connection, said: dict[str, Any]) -> None:
            number = said.get("experiment_id", "")
            row = mlflow.experiment(tx, call.user, number)
            tags = {**row["tags"], **mlflow.named([said])}
            mlflow.change_experiment(tx, call.user, number, tags=tags)

        await self._write(call, tag)
        return {}

    async def _change_experiment(
        self, call: Call, values: Callable[[dict[str, Any]], dict[str, Any]]
    ) -> Any:
        await self._write(
            call,
            lambda tx, said: mlflow.change_experiment(
                tx, call.user, said.get("experiment_id", ""), **values(said)
            ),
        )
        return {}

    # ------------------------------------------------------------------ runs

    @_in_their_words
    async def create_run(self, call: Call) -> Any:
        """MLflow: begin a run."""

        def begin(tx: Connection, said: dict[str, Any]) -> Any:
            return mlflow.get_run(tx, call.user, mlflow.create_run(tx, call.user, said))

        return {"run": await self._write(call, begin)}

    @_in_their_words
    async def get_run(self, call: Call) -> Any:
        """MLflow: one run."""
        run = call.http.query.get("run_id") or call.http.query.get("run_uuid", "")
        return {"run": await self._broker.store.read(lambda tx: mlflow.get_run(tx, call.user, run))}

    @_in_their_words
    async def update_run(self, call: Call) -> Any:
        """MLflow: a run's status or name."""
        said = await self._said(call)
        run = str(said.get("run_id") or said.get("run_uuid") or "")
        await self._change(call, lambda tx, _, told: mlflow.update_run(tx, call.user, run, told))
        shown = await self._broker.store.read(lambda tx: mlflow.get_run(tx, call.user, run))
        return {"run_info": shown["info"]}

    @_in_their_words
    async def delete_run(self, call: Call) -> Any:
        """MLflow: a run is not shown to MLflow's clients any more; nothing is lost."""
        return await self._change(
            call, lambda tx, run, _: mlflow.hide_run(tx, call.user, run, deleted=True)
        )

    @_in_their_words
    async def restore_run(self, call: Call) -> Any:
        """MLflow: a deleted run is shown again."""
        return await self._change(
            call, lambda tx, run, _: mlflow.hide_run(tx, call.user, run, deleted=False)
        )

    @_in_their_words
    async def search_runs(self, call: Call) -> Any:
        """MLflow: runs that fit a filter."""
        found, token = await self._write(
            call, lambda tx, said: mlflow.search_runs(tx, call.user, said)
        )
        return {"runs": found, **({"next_page_token": token} if token else {})}

    @_in_their_words
    async def log_metric(self, call: Call) -> Any:
        """MLflow: one value of a metric."""
        return await self._change(
            call, lambda tx, run, said: mlflow.log_batch(tx, run, {"metrics": [said]})
        )

    @_in_their_words
    async def log_parameter(self, call: Call) -> Any:
        """MLflow: a parameter."""
        return await self._change(
            call, lambda tx, run, said: mlflow.log_batch(tx, run, {"params": [said]})
        )

    @_in_their_words
    async def set_tag(self, call: Call) -> Any:
        """MLflow: a tag of a run."""
        return await self._change(
            call, lambda tx, run, said: mlflow.log_batch(tx, run, {"tags": [said]})
        )

    @_in_their_words
    async def delete_tag(self, call: Call) -> Any:
        """MLflow: a run has a tag no more."""
        return await self._change(
            call, lambda tx, run, said: mlflow.delete_tag(tx, run, str(said.get("key", "")))
        )

    @_in_their_words
    async def log_batch(self, call: Call) -> Any:
        """MLflow: metrics, parameters and tags at once."""
        return await self._change(call, mlflow.log_batch)

    @_in_their_words
    async def history(self, call: Call) -> Any:
        """MLflow: every value of a metric."""
        run, name = call.http.query.get("run_id", ""), call.http.query.get("metric_key", "")
        found = await self._broker.store.read(lambda tx: mlflow.history(tx, call.user, run, name))
        return {"metrics": found}

    @_in_their_words
    async def search_models(self, call: Call) -> Any:
        """MLflow: none; its clients ask for such models whenever they look for files."""
        return {"models": []}

    # ------------------------------------------------------------------ artifacts

    @_in_their_words
    async def list_artifacts(self, call: Call) -> Any:
        """MLflow: the files of a run."""
        run, folder = call.http.query.get("run_id", ""), call.http.query.get("path", "")
        shown = await self._broker.store.read(lambda tx: mlflow.get_run(tx, call.user, run))
        found = await self._broker.store.read(lambda tx: mlflow.files(tx, run, folder))
        return {"root_uri": shown["info"]["artifact_uri"], "files": found}

    @_in_their_words
    async def list_proxied(self, call: Call) -> Any:
        """MLflow: the files in a directory of the artifact store."""
        run, folder = _place(call.http.query.get("path", ""))
        await self._broker.store.read(lambda tx: mlflow.get_run(tx, call.user, run))
        found = await self._broker.store.read(lambda tx: mlflow.files(tx, run, folder))
        return {"files": [{**one, "path": one["path"].rpartition("/")[2]} for one in found]}

    @_in_their_words
    async def get_artifact(self, call: Call) -> Any:
        """MLflow: the bytes of a file."""
        run, name = _place(call.part("path"))
        await self._broker.store.read(lambda tx: mlflow.get_run(tx, call.user, run))
        for found in await self._broker.tracker.artifacts(run):
            if found["name"] == name:
                return await self._broker.blobs.get(call.http, found["sha256"])
        raise mlflow.missing(f"{run} has no file {name!r}")

    @_in_their_words
    async def put_artifact(self, call: Call) -> Any:
        """MLflow: upload a file."""
        run, name = _place(call.part("path"))
        await self._broker.store.read(lambda tx: mlflow.writable(tx, call.user, run))
        file = self._broker.config.home / "incoming" / secrets.token_hex(8)
        owner = f"mlflow/{file.name}"
        try:
            with full_disk_is_a_problem():
                file.parent.mkdir(mode=0o700, exist_ok=True)
                with file.open("wb") as into:
                    async for piece in call.http.content.iter_chunked(_CHUNK):
                        await asyncio.to_thread(into.write, piece)
            blob = await self._broker.blobs.adopt(file, owner=owner)
            try:
                said = Artifact(at=time.time(), name=name, sha256=blob.sha256, size=blob.size)
            except ValueError as error:
                raise Problem(400, mlflow.INVALID, str(error)) from error
            await self._broker.store.write(lambda tx: set_artifact(tx, run, "", said))
            self._broker.blobs.release(blob.sha256, owner)
        finally:
            file.unlink(missing_ok=True)
        self._broker.observer.ring(run)
        return {}


def _place(path: str) -> tuple[str, str]:
    """The run and the name of what lies at EXPERIMENT/RUN/artifacts/NAME."""
    parts = path.strip("/").split("/", 3)
    if len(parts) < 3 or parts[2] != "artifacts":
        raise Problem(400, mlflow.INVALID, f"not EXPERIMENT/RUN/artifacts/NAME: {path!r}")
    return parts[1], parts[3] if len(parts) > 3 else ""
