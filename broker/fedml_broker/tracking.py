# SPDX-License-Identifier: Apache-2.0
"""What runs record of themselves: metrics, parameters, artifacts, events.

Records come as lines of JSON (see `fedml_protocol.records`) at stated offsets. The rows that they
make and how far the lines were taken are one transaction: a piece that came twice, or a broker that
died in between, counts nothing twice. Lines that are no records are counted and skipped.
"""

from collections.abc import Iterator
from typing import Annotated, Any

import msgspec
import sqlalchemy as sa
from msgspec import Meta
from sqlalchemy import Connection

from fedml_broker import runs
from fedml_broker.blobs import Blobs
from fedml_broker.observe import Observer, add_event
from fedml_broker.queue import Terms
from fedml_broker.store import Store
from fedml_broker.tables import artifacts, blob_refs, metrics, params, records, tasks
from fedml_protocol.records import MAX_LINE_BYTES, MAX_NAME

Name = Annotated[str, Meta(min_length=1, max_length=MAX_NAME)]
Step = Annotated[int, Meta(ge=-(2**53), le=2**53)]


class Metrics(msgspec.Struct, frozen=True, tag="metrics", tag_field="kind"):
    """Numbers at one step; None is one that is not finite."""

    at: float
    metrics: dict[Name, float | None]
    step: Step = 0


class Params(msgspec.Struct, frozen=True, tag="params", tag_field="kind"):
    """What was chosen before; said again, the later one counts."""

    at: float
    params: dict[Name, str]


class Artifact(msgspec.Struct, frozen=True, tag="artifact", tag_field="kind"):
    """A file; its bytes come as a blob, before or after this."""

    at: float
    name: Name
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    size: Annotated[int, Meta(ge=0, le=2**62)]
    type: str = "artifact"

    def __post_init__(self) -> None:
        check_artifact_name(self.name)


class Event(msgspec.Struct, frozen=True, tag="event", tag_field="kind"):
    """Something that happened, in the run's own words."""

    at: float
    name: Name
    data: dict[str, Any] = {}


class Lost(msgspec.Struct, frozen=True, tag="lost", tag_field="kind"):
    """The writer could not keep so many records."""

    at: float
    count: Annotated[int, Meta(ge=0, le=2**53)]
    why: str = ""


Record = Metrics | Params | Artifact | Event | Lost
_DECODER: msgspec.json.Decoder[Record] = msgspec.json.Decoder(Record)


def check_artifact_name(name: str) -> None:
    """It becomes a path on other people's machines.

    Raises:
        ValueError: It would leave the directory that it is written into.
    """
    parts = name.split("/")
    if "\0" in name or "\\" in name or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{name!r} is not the name of an artifact")


class Tracker:
    """The records of all runs."""

    def __init__(self, store: Store, observer: Observer, blobs: Blobs) -> None:
        self._store = store
        self._observer = observer
        self._blobs = blobs

    async def take(self, run: str, log: str, offset: int, data: bytes, source: str = "") -> int:
        """Take the whole lines of a piece; up to which byte everything is here now.

        What was taken before is skipped; where something is missing before `offset`, nothing is
        taken and the answer is smaller.
        """
        taken = await self._store.write(lambda tx: _take(tx, run, log, offset, data, source))
        if data:
            self._observer.ring(run)
        return taken

    async def source_of(self, task: str) -> str:
        """How the records of a task are told from others of its run: by its client, or its rank.

        What a worker records is filed under the stage that it was started for.
        """
        query = sa.select(tasks.c.client, tasks.c.rank, tasks.c.terms).where(tasks.c.id == task)
        row = await self._store.read(lambda tx: tx.execute(query).first())
        if row is None:
            return ""
        if row.client is not None:
            return f"client {row.client}"
        return f"rank {row.rank}" if Terms(**row.terms).nodes > 1 else ""

    async def metrics(
        self, run: str, *, name: str | None = None, after: int = 0, points: int = 1000
    ) -> dict[str, Any]:
        """Series of a run, by name and source, each of `points` points at most.

        Of longer ones the least and the greatest value of each stretch are kept.
        """
        return await self._store.read(lambda tx: _series(tx, run, name, after, points))

    async def params(self, run: str) -> list[dict[str, Any]]:
        """The parameters of a run, by name."""
        query = (
            sa.select(params.c.name, params.c.source, params.c.value)
            .where(params.c.run == run)
            .order_by(params.c.name, params.c.source)
        )
        return await self._store.read(lambda tx: [dict(r) for r in tx.execute(query).mappings()])

    async def artifacts(self, run: str) -> list[dict[str, Any]]:
        """The artifacts of a run, by name; `here` once its bytes have come."""
        query = (
            sa.select(*(c for c in artifacts.c if c.name != "run"))
            .where(artifacts.c.run == run)
            .order_by(artifacts.c.name, artifacts.c.source)
        )
        found = await self._store.read(lambda tx: [dict(r) for r in tx.execute(query).mappings()])
        for row in found:
            row["here"] = self._blobs.size(row["sha256"]) is not None
        return found


def _take(tx: Connection, run: str, log: str, offset: int, data: bytes, source: str) -> int:
    row = tx.execute(sa.select(records).where(records.c.log == log)).first()
    taken = 0 if row is None else row.taken
    if offset > taken:
        return taken
    fresh = data[taken - offset :]
    end = fresh.rfind(b"\n") + 1
    if not end and len(fresh) > MAX_LINE_BYTES:
        end = len(fresh)  # no record is so long: its end will be refused as well
    if not end:
        return taken
    refused, lost = keep(tx, run, source, fresh[:end].splitlines())
    values = {"taken": taken + end, "refused": refused, "lost": lost}
    if row is None:
        tx.execute(records.insert().values(log=log, run=run, **values))
    else:
        values |= {"refused": row.refused + refused, "lost": row.lost + lost}
        tx.execute(records.update().where(records.c.log == log).values(**values))
    return taken + end


def keep(tx: Connection, run: str, source: str, lines: list[bytes]) -> tuple[int, int]:
    """Make rows of lines; how many were refused, and how many records their writer has lost."""
    rows: list[dict[str, Any]] = []
    refused = lost = 0
    for line in lines:
        if not line:
            continue
        try:
            if len(line) > MAX_LINE_BYTES:
                raise ValueError("too long")
            record = _DECODER.decode(line)
        except (ValueError, RecursionError):  # of msgspec, too
            refused += 1
            continue
        match record:
            case Metrics():
                rows.extend(
                    {
                        "run": run,
                        "source": source,
                        "name": name,
                        "step": record.step,
                        "value": value,
                        "at": record.at,
                    }
                    for name, value in record.metrics.items()
                )
            case Params():
                set_params(tx, run, source, record.params)
            case Artifact():
                set_artifact(tx, run, source, record)
            case Event():
                add_event(tx, run, "recorded", {"name": record.name, "data": record.data})
            case Lost():
                lost += record.count
    if rows:
        tx.execute(metrics.insert(), rows)
    return refused, lost


def set_params(tx: Connection, run: str, source: str, said: dict[str, str]) -> None:
    """Keep parameters; the later one counts."""
    for name, value in said.items():
        key = (params.c.run == run, params.c.source == source, params.c.name == name)
        tx.execute(params.delete().where(*key))
        tx.execute(params.insert().values(run=run, source=source, name=name, value=value))


def set_artifact(tx: Connection, run: str, source: str, said: Artifact) -> None:
    """Keep an artifact in the place of the one that had its name, and its blob with it."""
    owner = f"run/{run}/artifact/{source}/{said.name}"
    key = (artifacts.c.run == run, artifacts.c.source == source, artifacts.c.name == said.name)
    tx.execute(artifacts.delete().where(*key))
    tx.execute(blob_refs.delete().where(blob_refs.c.owner == owner))
    runs.refer(tx, said.sha256, owner)
    values = {"type": said.type, "sha256": said.sha256, "size": said.size, "at": said.at}
    tx.execute(artifacts.insert().values(run=run, source=source, name=said.name, **values))


def _series(tx: Connection, run: str, name: str | None, after: int, points: int) -> dict[str, Any]:
    mine = [metrics.c.run == run, metrics.c.id > after]
    if name is not None:
        mine.append(metrics.c.name == name)
    counts = tx.execute(
        sa.select(metrics.c.name, metrics.c.source, sa.func.count(), sa.func.max(metrics.c.id))
        .where(*mine)
        .group_by(metrics.c.name, metrics.c.source)
        .order_by(metrics.c.name, metrics.c.source)
    ).all()
    found = []
    for series, source, count, _ in counts:
        query = (
            sa.select(metrics.c.step, metrics.c.value, metrics.c.at)
            .where(*mine, metrics.c.name == series, metrics.c.source == source)
            .order_by(metrics.c.step, metrics.c.id)
        )
        kept = thinned(iter(tx.execute(query)), count, points)
        found.append(
            {"name": series, "source": source, "count": count, "points": [list(p) for p in kept]}
        )
    sums = sa.select(sa.func.sum(records.c.refused), sa.func.sum(records.c.lost))
    refused, lost = tx.execute(sums.where(records.c.run == run)).one()
    last = max((row[3] for row in counts), default=after)
    return {"series": found, "last": last, "refused": refused or 0, "lost": lost or 0}


def thinned(rows: Iterator[Any], count: int, points: int) -> list[Any]:
    """At most `points` of `count` rows (step, value, at): the extremes of each stretch."""
    if count <= points:
        return list(rows)
    stretch = -(-count // max(points // 2, 1))
    kept: list[Any] = []
    chunk: list[Any] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == stretch:
            kept += _extremes(chunk)
            chunk = []
    return kept + (_extremes(chunk) if chunk else [])


def _extremes(chunk: list[Any]) -> list[Any]:
    numbers = [i for i, row in enumerate(chunk) if row[1] is not None]
    if not numbers:
        return [chunk[0]]
    least = min(numbers, key=lambda i: chunk[i][1])
    greatest = max(numbers, key=lambda i: chunk[i][1])
    return [chunk[i] for i in sorted({least, greatest})]
