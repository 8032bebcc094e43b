# SPDX-License-Identifier: Apache-2.0
"""Encoding by constants alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedml.data.columns import Category, Columns, Number, encode, feature_names
from fedml.data.errors import DamagedData

COLUMNS: Columns = {
    "age": Number(50, 10),
    "pressure": Number(120, 20, may_miss=True, zero_is_missing=True),
    "sex": Category(("f", "m")),
    "scan": Category(("clear", "shade"), may_miss=True),
}

row = st.fixed_dictionaries(
    {
        "age": st.integers(0, 120).map(str),
        "pressure": st.sampled_from(["", "0", "100", "180.5"]),
        "sex": st.sampled_from(["f", "m"]),
        "scan": st.sampled_from(["", "clear", "shade"]),
    }
)


def test_the_layout_is_fixed_by_the_columns() -> None:
    assert feature_names(COLUMNS) == (
        *("age", "pressure", "pressure missing", "sex=f", "sex=m"),
        *("scan=clear", "scan=shade", "scan=missing"),
    )


def test_numbers_categories_and_gaps() -> None:
    rows = [
        {"age": "60", "pressure": "100", "sex": "m", "scan": "shade"},
        {"age": "50", "pressure": "0", "sex": "f", "scan": ""},
    ]
    assert encode(COLUMNS, rows).tolist() == [
        [1, -1, 0, 0, 1, 0, 1, 0],
        [0, 0, 1, 1, 0, 0, 0, 1],
    ]


@given(rows=st.lists(row, min_size=2, max_size=8))
def test_no_row_depends_on_another(rows: list[dict[str, str]]) -> None:
    together = encode(COLUMNS, rows)
    alone = np.concatenate([encode(COLUMNS, [one]) for one in rows])

    assert np.array_equal(together, alone)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"age": ""}, "age cannot be ''"),
        ({"age": "old"}, "age cannot be 'old'"),
        ({"sex": "x"}, "sex cannot be 'x'"),
        ({"sex": ""}, "may not be missing"),
        ({"scan": "blurred"}, "scan cannot be 'blurred'"),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_its_row(
    changed: dict[str, str], named: str
) -> None:
    good = {"age": "60", "pressure": "100", "sex": "m", "scan": "shade"}
    with pytest.raises(DamagedData, match=f"row 1: .*|{named}") as caught:
        encode(COLUMNS, [good, good | changed])
    assert named in str(caught.value)
    assert "row 1" in str(caught.value)


def test_a_missing_column_is_refused() -> None:
    with pytest.raises(DamagedData, match="sex cannot be None"):
        encode(COLUMNS, [{"age": "60", "pressure": "1"}])
