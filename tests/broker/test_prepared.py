# SPDX-License-Identifier: Apache-2.0
"""Prepared statements do what SQLAlchemy's own do, and miss nothing that was not given."""

import sqlite3
from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from sqlalchemy import Connection

from fedml_broker.prepared import Prepared, driver_of, given
from fedml_broker.tables import events, metadata

COLUMNS = ("run", "at", "kind", "data")
ROW = {"run": "r-1", "at": 1.5, "kind": "state", "data": {"ä": [1, None, "x"]}}

INSERT = Prepared(events.insert(), COLUMNS)
FIND = Prepared(sa.select(*(events.c[name] for name in COLUMNS)).where(events.c.run == given("r")))
RENAME = Prepared(
    events.update()
    .where(events.c.run == given("r"), events.c.kind.not_in(["state", "end"]))
    .values(run=given("new"))
    .returning(events.c.run, events.c.data)
)


@pytest.fixture
def tx() -> Iterator[Connection]:
    with sa.create_engine("sqlite://").connect() as connection:
        metadata.create_all(connection)
        yield connection


def test_what_is_prepared_reads_and_writes_as_sqlalchemy_does(tx: Connection) -> None:
    other = {**ROW, "run": "r-2"}
    assert INSERT.run(tx, **ROW) == 1
    tx.execute(events.insert(), other)
    stored = driver_of(tx).execute("SELECT at, kind, data FROM events").fetchall()
    assert stored[0] == stored[1]
    assert FIND.first(tx, r="r-1") == tuple(ROW.values())
    assert FIND.first(tx, r="r-2") == tuple(other.values())
    assert FIND.first(tx, r="r-3") is None


def test_constants_stay_and_what_is_returned_is_converted(tx: Connection) -> None:
    INSERT.each(tx, [{**ROW, "kind": kind} for kind in ("state", "again")])
    assert RENAME.first(tx, r="r-1", new="r-2") == ("r-2", ROW["data"])
    kinds = sa.select(events.c.run, events.c.kind).order_by(events.c.id)
    assert tx.execute(kinds).all() == [("r-1", "state"), ("r-2", "again")]


def test_a_value_that_is_not_given_is_no_null(tx: Connection) -> None:
    with pytest.raises(KeyError, match="kind"):
        INSERT.run(tx, run="r-1", at=1.0, data={})
    with pytest.raises(sqlite3.IntegrityError, match="NOT NULL"):
        INSERT.run(tx, **{**ROW, "kind": None})
