# SPDX-License-Identifier: Apache-2.0
"""Levels hold sums without rounding; a partial sum survives the wire or is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from fedml.federate.exact_sum import Levels, PartialSum
from fedml.federate.layout import BadUpdate, Spec, SumBroken


@settings(deadline=None, max_examples=300)
@given(st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=30))
def test_the_sum_of_any_floats_is_that_of_fsum(values: list[float]) -> None:
    levels = Levels(1)
    for value in values:
        levels.deposit(np.array([value]))
    assert levels.rounded_sum()[0] == math.fsum(values)


def test_a_third_level_appears_only_where_it_is_needed() -> None:
    levels = Levels(2)
    for pair in ([1.0, 1e100], [2.0, 1.0], [0.1, 1e-100]):
        levels.deposit(np.array(pair))
    assert len(levels.arrays) == 3
    assert levels.rounded_sum().tolist() == [math.fsum([1.0, 2.0, 0.1]), 1e100]
    levels.deposit(np.array([0.0, -1e100]))
    assert levels.rounded_sum()[1] == 1.0


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("term", [math.nan, math.inf, 1.7e308])
def test_what_has_no_sum_is_an_error_not_an_endless_loop(term: float) -> None:
    levels = Levels(1)
    levels.arrays[0][0] = 1.7e308
    with pytest.raises(OverflowError):
        levels.deposit(np.array([term]))


class Fickle:
    """A source that passes its check and then cannot be read."""

    def __init__(self) -> None:
        self.specs = {"w": Spec((2,), np.dtype(np.float32))}
        self.reads = 0

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        self.reads += 1
        if self.reads > 1:
            raise OSError("gone")
        return np.ones(2, np.float32)

    def take(self, name: str, indices: np.ndarray) -> np.ndarray:
        raise OSError("gone")

    def close(self) -> None:
        pass


def test_an_update_that_breaks_off_half_added_spoils_the_sum_for_good() -> None:
    total = PartialSum()
    total.add(0, {"w": np.ones(2, np.float32)}, 1.0)
    with pytest.raises(SumBroken, match="client 1: its update changed"):
        total.add(1, Fickle(), 1.0)
    for again in (
        total.result,
        lambda: total.add(2, {"w": np.ones(2, np.float32)}, 1.0),
        lambda: total.merge(PartialSum()),
        lambda: PartialSum().merge(total),
    ):
        with pytest.raises(SumBroken, match="start the sum anew"):
            again()


def partial() -> PartialSum:
    out = PartialSum()
    rng = np.random.default_rng(0)
    for k in range(5):
        arrays = {"w": rng.standard_normal((3, 2)).astype(np.float32), "n": np.array(k)}
        out.add(k, arrays, 0.1 * (k + 1), {"loss": 1 / 3, "bad": math.nan if k == 3 else 1.0})
    return out


def test_a_partial_sum_survives_a_safetensors_file() -> None:
    before = partial()
    after = PartialSum.from_arrays(load(save(before.to_arrays())))
    assert after.clients == before.clients
    assert after.weight == before.weight
    a, b = after.result(), before.result()
    for name in b.arrays:
        np.testing.assert_array_equal(a.arrays[name], b.arrays[name])
    assert a.metrics["loss"] == b.metrics["loss"] == 1 / 3
    assert math.isnan(a.metrics["bad"])


def test_an_empty_partial_sum_merges_as_nothing() -> None:
    total, empty = partial(), PartialSum.from_arrays(PartialSum().to_arrays())
    weight = total.weight
    total.merge(empty)
    empty.merge(total)
    assert total.weight == empty.weight == weight
    np.testing.assert_array_equal(empty.result().arrays["w"], total.result().arrays["w"])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda a: a.pop("weight"), "'weight' is missing"),
        (lambda a: a.pop("sum0::w"), "'sum0::w' is missing"),
        (lambda a: a.update({"sum1::w": np.zeros(1)}), "level 1 of 'w' is misshapen"),
        (lambda a: a.update({"sum0::w": np.full((3, 2), np.nan)}), "is not finite"),
        (lambda a: a.update({"sum0::w": np.full((3, 2), 1.7e308)}), "is not finite"),
        (lambda a: a.update({"weight": np.array([np.inf])}), "weight is not finite"),
        (lambda a: a.update({"weight": np.array([-1.0])}), "weight below zero"),
        (lambda a: a.update({"clients": np.array([1, 1])}), "a client twice"),
    ],
)
def test_a_malformed_partial_sum_is_refused(change, why) -> None:
    arrays = partial().to_arrays()
    change(arrays)
    with pytest.raises(ValueError, match=why):
        PartialSum.from_arrays(arrays)


def test_partial_sums_of_different_layouts_do_not_merge() -> None:
    total, other = partial(), PartialSum()
    other.add(9, {"w": np.ones(2, np.float32)}, 1.0)
    with pytest.raises(BadUpdate, match="client 9, tensor 'w'"):
        total.merge(other)
    assert total.clients == {0, 1, 2, 3, 4}
