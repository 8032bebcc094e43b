# SPDX-License-Identifier: Apache-2.0
"""Statements that every task needs: compiled once, then given to SQLite as they are.

SQLAlchemy takes five times as long to find that it knows a statement already as SQLite takes to
run it.

    _END = Prepared(runs.update().where(runs.c.id == given("id_")).values(state=given("state_")))
    _END.run(tx, id_=run, state_="FINISHED")
"""

import sqlite3
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy import BindParameter, Connection
from sqlalchemy.dialects import sqlite
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.expression import ClauseElement

_DIALECT = sqlite.dialect()
_Conversion = Callable[[Any], Any] | None


def given(name: str, type_: Any = None) -> BindParameter[Any]:
    """A value that is given each time, by this name."""
    return sa.bindparam(name, required=False, type_=type_)


class Prepared:
    """One statement. `columns`: those that an INSERT is given each time; all, unless said.

    What goes wrong is an error of `sqlite3`, not one of SQLAlchemy's.
    """

    def __init__(self, statement: ClauseElement, columns: Sequence[str] | None = None) -> None:
        compiled = cast(
            SQLCompiler,
            statement.compile(
                dialect=_DIALECT,
                column_keys=columns,
                compile_kwargs={"render_postcompile": True},
            ),
        )
        self._sql = str(compiled)
        # For each mark: the name of what is given and how it is stored, or else what it always is.
        self._marks: list[tuple[str | None, Any]] = []
        for name in compiled.positiontup or ():
            bind, always = compiled.binds.get(name), compiled.params[name]
            if bind is not None and (bind.required or always is None):
                kind = bind.type.dialect_impl(_DIALECT)
                self._marks.append((name, kind.bind_processor(_DIALECT)))
            else:
                self._marks.append((None, always))
        self._read: list[_Conversion] = [
            column.type.dialect_impl(_DIALECT).result_processor(_DIALECT, None)
            for column in getattr(statement, "exported_columns", ())
        ]

    def run(self, tx: Connection, **values: Any) -> int:
        """How many rows it has changed."""
        return self._execute(driver_of(tx), values).rowcount

    def each(self, tx: Connection, rows: Iterable[dict[str, Any]]) -> None:
        """Run it with the values of each row."""
        driver = driver_of(tx)
        for values in rows:
            self._execute(driver, values)

    def first(self, tx: Connection | sqlite3.Connection, **values: Any) -> tuple[Any, ...] | None:
        """The first row of the answer; None: it has none."""
        driver = tx if isinstance(tx, sqlite3.Connection) else driver_of(tx)
        # All of it: a statement that has more to say would stay open.
        rows = self._execute(driver, values).fetchall()
        if not rows:
            return None
        return tuple(
            value if read is None else read(value)
            for value, read in zip(rows[0], self._read, strict=True)
        )

    def _execute(self, driver: sqlite3.Connection, values: dict[str, Any]) -> sqlite3.Cursor:
        return driver.execute(
            self._sql,
            [
                store if name is None else values[name] if store is None else store(values[name])
                for name, store in self._marks
            ],
        )


def driver_of(tx: Connection) -> sqlite3.Connection:
    """SQLite's own connection below one of SQLAlchemy's."""
    return cast(sqlite3.Connection, tx.connection.driver_connection)
