# SPDX-License-Identifier: Apache-2.0
"""Tables of patients to feature matrices, by constants alone.

Every centre, scale and list of categories is written down in the provider, none is computed from
rows. So each hospital encodes its own rows without asking anybody, and the encoding of one row
never depends on another row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedml.data.dataset import Array
from fedml.data.errors import DamagedData


@dataclass(frozen=True, slots=True)
class Number:
    """A numeric column: ``(value - centre) / scale``, in the unit of the column.

    Attributes:
        may_miss: Missing values are expected: they become 0, which is the centre, and set a
            column of their own to 1. Where this is False, a missing value is an error.
        zero_is_missing: 0 is how this column spells "not measured".
    """

    centre: float
    scale: float
    may_miss: bool = False
    zero_is_missing: bool = False


@dataclass(frozen=True, slots=True)
class Category:
    """A column with listed values, one 0/1 feature each, and one for "missing" where it may be."""

    values: tuple[str, ...]
    may_miss: bool = False


Columns = Mapping[str, Number | Category]
Row = Mapping[str, str]


def feature_names(columns: Columns) -> tuple[str, ...]:
    """The names of the features that `encode` makes, in order."""
    names: list[str] = []
    for column, kind in columns.items():
        match kind:
            case Number():
                names.append(column)
                names += [f"{column} missing"] if kind.may_miss else []
            case Category():
                names += [f"{column}={value}" for value in kind.values]
                names += [f"{column}=missing"] if kind.may_miss else []
    return tuple(names)


def encode(columns: Columns, rows: Sequence[Row], *, missing: str = "") -> Array:
    """Encode rows of text, column name -> value, into ``(N, features)`` float32.

    Raises:
        DamagedData: A column is not there, a number is none, a category is not listed, or a value
            is missing where none may be. The message has the row's position.
    """
    place = {name: number for number, name in enumerate(feature_names(columns))}
    table = np.zeros((len(rows), len(place)), np.float32)
    for position, row in enumerate(rows):
        for column, kind in columns.items():
            try:
                name, value = _encoded(column, kind, row[column], missing)
                table[position, place[name]] = value
            except (KeyError, ValueError):
                raise DamagedData(
                    f"row {position}: {column} cannot be {row.get(column)!r}",
                    hint="" if kind.may_miss else "this column may not be missing",
                ) from None
    return table


def _encoded(column: str, kind: Number | Category, text: str, missing: str) -> tuple[str, float]:
    """Which feature the value sets, and to what."""
    match kind:
        case Number():
            value = None if text == missing else float(text)
            if value is None or (kind.zero_is_missing and value == 0):
                return f"{column} missing", 1.0
            return column, (value - kind.centre) / kind.scale
        case Category():
            return f"{column}={'missing' if text == missing else text}", 1.0
