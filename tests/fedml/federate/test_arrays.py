# SPDX-License-Identifier: Apache-2.0
"""Arithmetic on named arrays: quick ways give the bits of the formula."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedml.federate.arrays import Array, difference, moved

FLOATS = (np.float16, np.float32, np.float64)


def by_formula(sign: float, left: Array, right: Array) -> Array:
    """In float64, rounded once."""
    with np.errstate(over="ignore"):
        return (left.astype(np.float64) + sign * right.astype(np.float64)).astype(left.dtype)


@pytest.mark.filterwarnings("ignore:overflow")
@given(st.data(), st.sampled_from(FLOATS))
def test_floats_of_one_type_are_added_and_subtracted_as_if_in_float64(
    data: st.DataObject, dtype: Any
) -> None:
    values = st.floats(width=8 * np.dtype(dtype).itemsize, allow_nan=False, allow_infinity=False)
    left = data.draw(hnp.arrays(dtype, 30, elements=values))
    right = data.draw(hnp.arrays(dtype, 30, elements=values))

    minus, plus = difference({"w": left}, {"w": right})["w"], moved({"w": left}, {"w": right})["w"]

    assert minus.dtype == plus.dtype == dtype
    assert minus.tobytes() == by_formula(-1.0, left, right).tobytes()
    assert plus.tobytes() == by_formula(1.0, left, right).tobytes()


def test_integers_and_mixed_types_are_rounded_to_the_type_of_the_model() -> None:
    model = {"count": np.array([7, 8]), "w": np.array([1.0, 2.0], np.float32)}
    later = {"count": np.array([9, 8]), "w": np.array([1.5, 2.5])}

    delta = difference(later, model)
    again = moved(model, delta)

    assert {n: a.dtype for n, a in delta.items()} == {n: a.dtype for n, a in model.items()}
    assert again["count"].tolist() == [9, 8]
    assert again["w"].tolist() == [1.5, 2.5]
    assert again["count"].dtype == model["count"].dtype


def test_an_array_without_dimensions_stays_an_array() -> None:
    found = difference({"w": np.array(3.0)}, {"w": np.array(1.0)})["w"]

    assert isinstance(found, np.ndarray)
    assert found.shape == ()
