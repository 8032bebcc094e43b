# SPDX-License-Identifier: Apache-2.0
"""What a run that has ended leaves for others: files by their path, and values by name.

Of a job, what its first task has written into $FEDML_OUTPUT_DIR and $FEDML_OUTPUT. Of a federated
run, its latest model and the metrics of that. Of a service, as long as it answers, where it does.
"""

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from fedml_broker import deploy
from fedml_broker.blobs import Blobs
from fedml_broker.store import Store
from fedml_broker.tables import rounds, tasks
from fedml_protocol.blob import Blob
from fedml_protocol.codec import parse
from fedml_protocol.launch import OUTPUT_FILES, OUTPUT_VALUES
from fedml_protocol.tasks import Result

MODEL = "model.safetensors"
_LINE = re.compile(r"([A-Za-z_][A-Za-z0-9_.-]*)=(.*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """Files and values."""

    files: Mapping[str, Blob] = field(default_factory=dict)
    values: Mapping[str, str] = field(default_factory=dict)

    def shown(self) -> dict[str, Any]:
        """As JSON."""
        files = [{"path": p, "sha256": b.sha256, "size": b.size} for p, b in self.files.items()]
        return {"files": files, "values": dict(self.values)}

    @classmethod
    def read(cls, shown: Mapping[str, Any]) -> "Outputs":
        """What `shown` has written."""
        files = {f["path"]: Blob(sha256=f["sha256"], size=f["size"]) for f in shown["files"]}
        return cls(files=files, values=shown["values"])


async def of_run(store: Store, blobs: Blobs, run: Mapping[str, Any]) -> Outputs:
    """What a run has left; as long as it goes on, only where a service answers."""
    if run["kind"] == "federate":
        return await store.read(lambda tx: _of_federated(tx, run["id"]))
    if run["ended_at"] is None:
        found = (await deploy.endpoints(store, [run["id"]])).get(run["id"])
        return Outputs() if found is None else Outputs(values=found.values(run["id"]))
    result = await store.read(lambda tx: _first_result(tx, run["id"]))
    if result is None:
        return Outputs()
    files, values = {}, {}
    for artifact in result.artifacts:
        kind, _, path = artifact.name.partition("/")
        if kind == OUTPUT_FILES and path:
            files[path] = artifact.blob
        elif artifact.name == OUTPUT_VALUES and blobs.size(artifact.blob.sha256) is not None:
            file = blobs.path(artifact.blob.sha256)
            values = parse_values(await asyncio.to_thread(file.read_text, errors="replace"))
    return Outputs(files=files, values=values)


def parse_values(text: str) -> dict[str, str]:
    """Lines NAME=VALUE; of a name that is there twice, the last. Other lines say nothing."""
    found = (_LINE.fullmatch(line) for line in text.splitlines())
    return {line[1]: line[2] for line in found if line is not None}


def _first_result(tx: Connection, run: str) -> Result | None:
    query = sa.select(tasks.c.result).where(tasks.c.run == run, tasks.c.rank == 0)
    result = tx.execute(query).scalar()
    return None if result is None else parse(Result, result)


def _of_federated(tx: Connection, run: str) -> Outputs:
    query = sa.select(rounds).where(rounds.c.run == run).order_by(rounds.c.round)
    done = [row for row in tx.execute(query) if row.model]
    if not done:
        return Outputs()
    values = {name: f"{value:.10g}" for name, value in done[-1].metrics.items()}
    values["round"] = str(done[-1].round)
    return Outputs(files={MODEL: Blob(**done[-1].model)}, values=values)
