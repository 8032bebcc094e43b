# SPDX-License-Identifier: Apache-2.0
"""The results file of a simulation: SQLite, one row a round, one a client and round.

    rounds    round, wall_s, simulated_s, asked, answered, bytes_down, bytes_up
    metrics   round, name, value               train.*, devices.*, central.* as in deployed runs
    clients   round, client, examples, seconds, metrics (JSON)
    run       key, value (JSON)

A metric that was NaN is null there, and NaN again when it is read here.
Round 0 is the first model. Rows are written in batches, so that a round of microseconds does not
wait for a disk; a reader sees the file as of some second ago.
"""

from __future__ import annotations

import json
import math
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedml.errors import ConfigError

NAME = "results.sqlite"
_FLUSH_S = 1.0
_MOST = 20_000
_TABLES = """
create table if not exists rounds (
    round integer primary key, wall_s real, simulated_s real, asked integer, answered integer,
    bytes_down integer, bytes_up integer);
create table if not exists metrics (
    round integer, name text, value real, primary key (round, name)) without rowid;
create table if not exists clients (
    round integer, client integer, examples integer, seconds real, metrics text,
    primary key (round, client)) without rowid;
create table if not exists run (key text primary key, value text);
"""


class Record:
    """One results file, or, without a folder, the same in memory."""

    def __init__(self, folder: Path | None = None) -> None:
        """Open or make it.

        Raises:
            ConfigError: The file that is there is none of ours.
        """
        path = ":memory:" if folder is None else str(folder / NAME)
        self._file = sqlite3.connect(path, isolation_level=None)
        try:
            # A results file can be made again; it need not survive a power cut.
            self._file.execute("pragma synchronous = off")
            self._file.execute("pragma journal_mode = wal")
            self._file.executescript(_TABLES)
        except sqlite3.DatabaseError as error:
            raise ConfigError(f"{path} is not a results file: {error}") from error
        self._rounds: list[tuple[Any, ...]] = []
        self._metrics: list[tuple[Any, ...]] = []
        self._clients: list[tuple[Any, ...]] = []
        self._flushed = time.monotonic()
        self._forms: dict[tuple[str, ...], str] = {}

    def add_round(
        self,
        number: int,
        *,
        wall_s: float,
        simulated_s: float | None = None,
        asked: int = 0,
        answered: int = 0,
        bytes_down: int = 0,
        bytes_up: int = 0,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """One round's row, and what is known of its model so far."""
        self._rounds.append((number, wall_s, simulated_s, asked, answered, bytes_down, bytes_up))
        self.add_metrics(number, metrics or {})

    def add_metrics(self, number: int, metrics: Mapping[str, float]) -> None:
        """What became known of a round's model."""
        self._metrics += [(number, name, value) for name, value in metrics.items()]

    def add_clients(
        self, number: int, rows: Iterable[tuple[int, int, float, Mapping[str, float]]]
    ) -> None:
        """Rows of clients: number, examples, seconds, metrics."""
        self._clients += [(number, *row) for row in rows]
        # `executemany` turns the metrics to text; here it would be in the way of the next round.
        if len(self._clients) > _MOST or time.monotonic() - self._flushed > _FLUSH_S:
            self.flush()

    def set(self, **facts: Any) -> None:
        """Facts about the run as a whole."""
        rows = [(key, json.dumps(value, default=str)) for key, value in facts.items()]
        self._file.executemany("insert or replace into run values (?, ?)", rows)

    def flush(self) -> None:
        """Write everything."""
        file = self._file
        file.execute("begin")
        file.executemany("insert or replace into rounds values (?,?,?,?,?,?,?)", self._rounds)
        file.executemany("insert or replace into metrics values (?,?,?)", self._metrics)
        file.executemany(
            "insert or replace into clients values (?,?,?,?,?)",
            [(*row[:4], self._as_json(row[4])) for row in self._clients],
        )
        file.execute("commit")
        self._rounds, self._metrics, self._clients = [], [], []
        self._flushed = time.monotonic()

    def _as_json(self, metrics: Mapping[str, float]) -> str:
        """As `json.dumps` has it; there are few sets of names and many clients."""
        names = tuple(metrics)
        form = self._forms.get(names)
        if form is None:
            keys = (json.dumps(name).replace("%", "%%") for name in names)
            form = self._forms[names] = "{" + ", ".join(f"{key}: %r" for key in keys) + "}"
        # Metrics are floats, whose repr is their JSON; for NaN it has no word.
        if all(map(math.isfinite, metrics.values())):
            return form % tuple(metrics.values())
        return json.dumps(sayable(metrics))

    def drop_after(self, number: int) -> None:
        """Forget rounds after this one: the run is taken up there."""
        for table in ("rounds", "metrics", "clients"):
            self._file.execute(f"delete from {table} where round > ?", (number,))  # noqa: S608

    def rounds(self) -> list[dict[str, Any]]:
        """Every round with its metrics, ascending."""
        self.flush()
        names = ("round", "wall_s", "simulated_s", "asked", "answered", "bytes_down", "bytes_up")
        query = f"select {', '.join(names)} from rounds order by round"  # noqa: S608
        rows = [dict(zip(names, row, strict=True)) for row in self._file.execute(query)]
        by_number = {row["round"]: row for row in rows}
        for number, name, value in self._file.execute("select round, name, value from metrics"):
            if number in by_number:
                by_number[number][name] = _number(value)
        return rows

    def facts(self) -> dict[str, Any]:
        """What `set` set."""
        rows = self._file.execute("select key, value from run")
        return {key: json.loads(value) for key, value in rows}

    def last(self, names: Sequence[str] | None = None) -> dict[str, float]:
        """The latest value of each metric."""
        self.flush()
        query = "select name, value, max(round) from metrics group by name order by name"
        found = {name: _number(value) for name, value, _ in self._file.execute(query)}
        return found if names is None else {n: found[n] for n in names if n in found}

    def close(self) -> None:
        """Write everything and close the file."""
        self.flush()
        self._file.close()


def sayable(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """For JSON, which has no word for NaN and infinities: they become null."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def _number(value: float | None) -> float:
    """SQLite keeps a NaN as null."""
    return math.nan if value is None else value
