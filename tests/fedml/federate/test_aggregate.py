# SPDX-License-Identifier: Apache-2.0
"""The mean is correctly rounded, so nothing but the updates can change a bit of it.

The oracle is `math.fsum`, which shares no code with what is tested.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save_file

from fedml.federate import aggregate
from fedml.federate.aggregate import Fold, PartialSum, SumBroken, combine, weighted_mean
from fedml.federate.algorithm import Update
from fedml.federate.arrays import Arrays
from fedml.federate.layout import CHUNK, BadUpdate, Layout, fineness, grid

DTYPES = st.sampled_from([np.float16, np.float32, np.float64, np.int32, np.int64])


def open_files() -> int:
    return len([*Path("/proc/self/fd").iterdir()])


def oracle(updates: Sequence[Arrays], weights: Sequence[float]) -> Arrays:
    """``dtype(fsum(w x) / fsum(w))``, one coordinate at a time, in Python's own floats."""
    total = math.fsum(weights)
    out: Arrays = {}
    for name, first in updates[0].items():
        columns = zip(*(u[name].ravel().astype(float).tolist() for u in updates), strict=True)
        means = [math.fsum(w * x for w, x in zip(weights, c, strict=True)) / total for c in columns]
        if first.dtype.kind == "i":
            means = [float(round(m)) for m in means]
        out[name] = np.array(means).astype(first.dtype).reshape(first.shape)
    return out


def same_bits(a: Arrays, b: Arrays) -> bool:
    # Zeros are all +0 here: the sign of a zero is the one bit that a sum leaves open.
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and (a[n] + 0 == b[n] + 0).all()
        for n in a
    )


@st.composite
def rounds(draw: st.DrawFn) -> tuple[list[Arrays], list[float]]:
    dtype = draw(DTYPES)
    n = draw(st.integers(1, 7))
    if dtype in (np.int32, np.int64):
        values: st.SearchStrategy = st.integers(-(2**31), 2**31 - 1)
    else:
        width = np.dtype(dtype).itemsize * 8
        top = {16: 65504.0, 32: float(np.float32(3e38)), 64: 1e140}[width]
        values = st.floats(-top, top, width=width)
        # Ties and cancellation are what rounding goes wrong on; plain floats rarely hit them.
        values |= st.sampled_from([0.0, 1.0, -1.0, 1.5, 2.0**-20, 1 + 2.0**-10, -1 - 2.0**-10])
    arrays = hnp.arrays(dtype, (2, 3), elements=values)
    weight = st.integers(0, 600).map(float) | st.floats(1e-3, 1e6) | st.just(1.0)
    updates = [{"a": draw(arrays), "b": draw(arrays)[0, :1]} for _ in range(n)]
    weights = [draw(weight) for _ in range(n)]
    weights[draw(st.integers(0, n - 1))] = draw(st.integers(1, 600).map(float))
    return updates, weights


@settings(deadline=None, max_examples=300)
@given(rounds(), st.randoms())
def test_the_mean_is_the_exact_sum_rounded_once_in_any_order(given_round, mix) -> None:
    updates, weights = given_round
    expected = oracle(updates, weights)
    order = list(range(len(updates)))
    mix.shuffle(order)
    fold = Fold()
    for k in order:
        fold.add(k, updates[k], weights[k])
    result = fold.result()
    assert same_bits(result.arrays, expected)
    assert result.weight == math.fsum(weights)


@settings(deadline=None, max_examples=300)
@given(rounds(), st.randoms())
def test_partial_sums_of_partial_sums_give_the_bits_of_the_flat_mean(given_round, mix) -> None:
    updates, weights = given_round
    parts = []
    for k, (update, weight) in enumerate(zip(updates, weights, strict=True)):
        part = PartialSum()
        part.add(k, update, weight, {"loss": weight / 3})
        parts.append(part)
    while len(parts) > 1:  # merge any two, until one is left: any tree at all
        mix.shuffle(parts)
        left, right = parts.pop(), parts.pop()
        if mix.random() < 0.5:
            right = PartialSum.from_arrays(right.to_arrays())  # ... some of them over the wire
        left.merge(right)
        parts.append(left)
    tree = parts[0].result()
    flat = combine(
        Update(arrays=u, weight=w, metrics={"loss": w / 3})
        for u, w in zip(updates, weights, strict=True)
    )
    assert same_bits(tree.arrays, flat.arrays)
    assert same_bits(tree.arrays, oracle(updates, weights))
    assert tree.weight == flat.weight
    assert tree.metrics == flat.metrics


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 9])
def test_large_tensors_are_folded_chunk_by_chunk_to_the_same_bits(tmp_path: Path, n: int) -> None:
    rng = np.random.default_rng(n)
    size = CHUNK + 123
    updates = [
        {
            "w": rng.standard_normal(size).astype(np.float32),
            "steps": rng.integers(0, 99, 3),
            "s": np.array(rng.standard_normal(), np.float32),
        }
        for _ in range(n)
    ]
    weights = [1.0] * n if n in (2, 4) else [float(w) for w in rng.integers(1, 600, n)]
    expected = oracle(updates, weights)
    assert same_bits(weighted_mean(updates, weights), expected)
    fold = Fold(Layout.of(updates[0]))
    for k, update in enumerate(updates):
        save_file(update, tmp_path / f"{k}")
        fold.add(k, tmp_path / f"{k}", weights[k])
    assert same_bits(fold.result().arrays, expected)


def test_ties_are_summed_again_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    # The mean of two float32 is half-way between two others every other time.
    rng = np.random.default_rng(0)
    updates = [{"w": (1 + rng.random(5000)).astype(np.float32)} for _ in range(2)]
    updates[0]["w"][0] = 1e-30  # so fine a unit that the sums need not be exact
    again = []
    sum_again = Fold._sum_again
    monkeypatch.setattr(
        Fold, "_sum_again", lambda fold, batch: again.append(batch) or sum_again(fold, batch)
    )
    monkeypatch.setattr(aggregate, "_BATCH", 1000)
    assert same_bits(weighted_mean(updates, [1, 1]), oracle(updates, [1, 1]))
    assert 2000 < sum(len(batch["w"]) for batch in again) < 3000
    assert max(len(batch["w"]) for batch in again) <= 1000


@pytest.mark.parametrize("weights", [(1.0, 1.0), (60.0, 44.0), (0.5, 2.0**90), (3.0, 0.0)])
def test_a_sum_that_float64_holds_is_not_summed_again(
    monkeypatch: pytest.MonkeyPatch, weights: tuple[float, float]
) -> None:
    rng = np.random.default_rng(0)
    updates = [{"w": (1 + rng.random(5000)).astype(np.float32)} for _ in range(2)]
    updates[0]["w"][:9] = 0
    if weights[1] > 2**50:
        updates[0]["w"][:] = 0  # nothing of the light one: not even its digits count
    monkeypatch.delattr(Fold, "_sum_again")

    assert same_bits(weighted_mean(updates, weights), oracle(updates, weights))


def test_a_layer_that_nobody_changed_is_not_summed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    updates = [{"frozen": np.zeros(CHUNK + 1, np.float16)} for _ in range(3)]
    monkeypatch.delattr(Fold, "_sum_again")

    assert not weighted_mean(updates, [1.0, 0.1, 7.0])["frozen"].any()


@given(hnp.arrays(np.float32, 20, elements=st.floats(width=32)))
def test_the_grid_of_values_holds_each_of_them(values: np.ndarray) -> None:
    unit, most = grid(values)

    finite = np.isfinite(values).all()
    assert math.isinf(most) == (not finite)
    if finite:
        largest = float(np.abs(values).max())
        assert largest <= most <= max(2 * largest, 2.0**-126)
        assert all(Fraction(v) % (Fraction(2) ** unit) == 0 for v in values.tolist())
    for weight in np.abs(values[np.isfinite(values)]).tolist():
        assert weight == 0 or Fraction(weight) % (Fraction(2) ** fineness(weight)) == 0


@settings(deadline=None)
@given(rounds(), st.integers(1, 9), st.integers(0, 3))
def test_equal_updates_average_to_that_update(given_round, k, exponent) -> None:
    update = {name: array + 0 for name, array in given_round[0][0].items()}
    mean = weighted_mean([update] * k, [2.0**exponent * 3] * k)
    if update["a"].dtype == np.float64:
        # Product, sum and division each round in float64 as well: less than 3 units in all.
        np.testing.assert_array_max_ulp(mean["a"], update["a"], 2)
    else:
        assert same_bits(mean, update)


@given(rounds(), st.integers(-20, 20))
def test_only_ratios_of_weights_count(given_round, exponent) -> None:
    updates, weights = given_round
    scaled = [w * 2.0**exponent for w in weights]
    assert same_bits(weighted_mean(updates, scaled), oracle(updates, scaled))
    if all(a.dtype != np.float64 for a in updates[0].values()):
        assert same_bits(weighted_mean(updates, scaled), weighted_mean(updates, weights))


@given(rounds())
@example(([{"a": np.array([1e30], np.float32)}, {"a": np.array([1e-30], np.float32)}], [1.0, 1.0]))
def test_updates_add_like_their_mean(given_round) -> None:
    updates, weights = given_round
    parts = [Update(arrays=u, weight=w) for u, w in zip(updates, weights, strict=True) if w]
    both = parts[0] + parts[-1]
    assert both.weight == parts[0].weight + parts[-1].weight
    assert same_bits(both.arrays, (parts[-1] + parts[0]).arrays)


def test_metrics_average_by_weight_over_those_who_report_them() -> None:
    w = {"w": np.zeros(1)}
    result = combine(
        [
            Update(arrays=w, weight=1, metrics={"loss": 4.0, "odd": math.nan}),
            Update(arrays=w, weight=3, metrics={"loss": 0.0, "acc": 0.5, "odd": 1.0}),
            Update(arrays=w, weight=9),
        ]
    )
    assert result.metrics["loss"] == 1.0
    assert result.metrics["acc"] == 0.5
    assert math.isnan(result.metrics["odd"])
    nothing = Update(arrays=w, weight=0, metrics={"loss": math.nan, "odd": 2.0})
    result = combine([Update(arrays=w, weight=1, metrics={"loss": 4.0}), nothing])
    assert result.metrics["loss"] == 4.0
    assert "odd" not in result.metrics  # nobody who counts has said it


GOOD: Arrays = {"w": np.ones((2, 2), np.float32), "b": np.ones(2, np.float32)}
BAD = {
    "is missing": {"w": GOOD["w"]},
    "is not expected": {**GOOD, "extra": np.ones(1, np.float32)},
    r"has shape \(4,\), expected \(2, 2\)": {**GOOD, "w": np.ones(4, np.float32)},
    "has type float64, expected float32": {**GOOD, "w": np.ones((2, 2))},
    "holds NaN": {**GOOD, "w": np.array([[1, np.nan], [1, 1]], np.float32)},
    "holds an infinity": {**GOOD, "w": np.array([[1, -np.inf], [1, 1]], np.float32)},
}


@pytest.mark.parametrize("make", [Fold, PartialSum])
@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("why", BAD)
def test_a_refused_update_names_the_culprit_and_leaves_no_trace(
    tmp_path: Path, make, on_disk: bool, why: str
) -> None:
    total = make(Layout.of(GOOD))
    total.add(1, GOOD, 1.0)
    bad: Arrays | Path = BAD[why]
    if on_disk:
        save_file(bad, tmp_path / "bad")
        bad = tmp_path / "bad"
    before = open_files()
    with pytest.raises(BadUpdate, match=f"^client 7, tensor '(w|b|extra)': .*{why}") as caught:
        total.add(7, bad, 1.0)
    assert open_files() == before
    assert caught.value.client == 7
    total.add(7, {name: 3 * array for name, array in GOOD.items()}, 1.0)
    np.testing.assert_array_equal(total.result().arrays["w"], np.full((2, 2), 2, np.float32))


@pytest.mark.parametrize("why", ["holds NaN", "holds an infinity"])
def test_combine_finds_the_client_that_sent_nan(why: str) -> None:
    updates = [Update(arrays=GOOD, weight=1)] * 6 + [Update(arrays=BAD[why], weight=1)]
    with pytest.raises(BadUpdate, match=f"client 6, tensor 'w': {why}"):
        combine(updates)


def test_combine_finds_nan_in_float64_and_overflow_too() -> None:
    for bad, why in ((np.nan, "holds NaN"), (np.inf, "an infinity"), (1e200, "too large")):
        updates = [Update(arrays={"w": np.array([1.0, x])}, weight=1) for x in (1.0, bad, 1.0)]
        with pytest.raises(BadUpdate, match=f"client 1, tensor 'w': holds .*{why[-6:]}"):
            combine(updates)


def test_an_accepted_file_that_vanishes_breaks_the_fold_not_the_next_client(
    tmp_path: Path,
) -> None:
    fold = Fold()
    for k in range(3):
        save_file(GOOD, tmp_path / str(k))
        fold.add(k, tmp_path / str(k), 1.0)
    (tmp_path / "1").unlink()
    with pytest.raises(SumBroken, match="cannot be read again"):
        fold.add(3, GOOD, 1.0)  # the fourth makes a full pass
    for again in (lambda: fold.add(4, GOOD, 1.0), fold.result):
        with pytest.raises(SumBroken, match="fold the round anew"):
            again()


@pytest.mark.parametrize(
    ("arrays", "weight", "why"),
    [
        (GOOD, -1.0, "weight"),
        (GOOD, math.nan, "weight"),
        (GOOD, math.inf, "weight"),
        (Path("/nowhere"), 1.0, "cannot be read"),
        ({"w": np.array([1e250])}, 1.0, "too large to sum"),
        ({"w": np.array([True])}, 1.0, "have no mean"),
        ({"w": np.array([1j])}, 1.0, "have no mean"),
    ],
)
def test_what_cannot_be_averaged_is_refused(arrays, weight, why) -> None:
    for total in (Fold(), PartialSum()):
        with pytest.raises(BadUpdate, match=f"client 3.*{why}"):
            total.add(3, arrays, weight)


def test_a_client_counts_once() -> None:
    fold, left, right = Fold(), PartialSum(), PartialSum()
    for total in (fold, left, right):
        total.add(5, GOOD, 1.0)
    for again in (
        lambda: fold.add(5, GOOD, 1.0),
        lambda: left.add(5, GOOD, 1.0),
        lambda: left.merge(right),
    ):
        with pytest.raises(BadUpdate, match="client 5: was counted before"):
            again()
    assert fold.clients == [5]
    assert fold.result().weight == left.result().weight == 1.0


def test_a_mean_of_nothing_is_an_error() -> None:
    fold = Fold()
    fold.add(0, GOOD, 0.0)
    for empty in (fold, Fold(), PartialSum()):
        with pytest.raises(ValueError, match="no update of weight > 0"):
            empty.result()


def test_many_open_files_are_not_needed(tmp_path: Path) -> None:
    save_file(GOOD, tmp_path / "u")
    before = open_files()
    fold = Fold()
    for k in range(50):
        fold.add(k, tmp_path / "u", 1.0)
        assert open_files() == before
    fold.result()
    assert open_files() == before


def test_non_contiguous_arrays_are_averaged_as_they_look() -> None:
    a = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.testing.assert_array_equal(weighted_mean([{"w": a.T}, {"w": a.T}], [1, 2])["w"], a.T)
