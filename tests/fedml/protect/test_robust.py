# SPDX-License-Identifier: Apache-2.0
"""Robust rules against plain formulas, their laws, and the attacks they are for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save_file

from fedml.federate.algorithm import BadParameter
from fedml.federate.layout import BadUpdate
from fedml.protect import attacks, robust
from fedml.protect.robust import (
    Bucketing,
    CentredClipping,
    GeometricMedian,
    Krum,
    Mean,
    Median,
    NearestNeighbours,
    NormClipping,
    RobustFold,
    TooFewClients,
    TrimmedMean,
)

RULES = [
    Mean(),
    Median(),
    TrimmedMean(2),
    Krum(2),
    Krum(2, keep=3),
    GeometricMedian(),
    CentredClipping(radius=2.0),
    NormClipping(bound=2.0),
]
# What does not depend on where zero is.
COVARIANT = [rule for rule in RULES if not isinstance(rule, CentredClipping | NormClipping)]
ROWS = hnp.arrays(np.float64, (7, 5), elements=st.integers(-64, 64).map(lambda i: i / 4))


def apply(rule, rows: np.ndarray, **options) -> np.ndarray:
    """Combine rows, split over two tensors."""
    fold = RobustFold(rule, **options)
    for k, row in enumerate(rows):
        fold.add(k, {"a": row[:2].reshape(2, 1), "b": row[2:]})
    out = fold.result().arrays
    return np.concatenate([out["a"].ravel(), out["b"]])


def distances(rows: np.ndarray) -> np.ndarray:
    return np.linalg.norm(rows[:, None] - rows, axis=2)


@given(ROWS)
def test_coordinate_rules_are_their_definitions(rows) -> None:
    np.testing.assert_array_equal(apply(Median(), rows), np.median(rows, axis=0))
    np.testing.assert_array_equal(apply(Median(), rows[:6]), np.median(rows[:6], axis=0))
    expected = np.sort(rows, axis=0)[2:-2].mean(axis=0)
    np.testing.assert_allclose(apply(TrimmedMean(2), rows), expected, atol=1e-12)
    np.testing.assert_allclose(apply(TrimmedMean(0), rows), rows.mean(axis=0), atol=1e-12)


@given(ROWS)
def test_krum_is_its_definition(rows) -> None:
    squared = distances(rows) ** 2
    scores = np.array([np.sort(np.delete(squared[i], i))[: 7 - 2 - 2].sum() for i in range(7)])
    one = apply(Krum(2), rows)
    assert any((one == row).all() for row in rows[scores <= scores.min() + 1e-6])
    gaps = np.diff(np.sort(scores))
    if gaps[2] > 1e-6:
        best = np.argsort(scores)[:3]
        np.testing.assert_allclose(
            apply(Krum(2, keep=3), rows), rows[best].mean(axis=0), atol=1e-12
        )


@settings(deadline=None)
@given(ROWS)
def test_the_geometric_median_has_the_least_total_distance(rows) -> None:
    found = apply(GeometricMedian(iterations=2000), rows)
    total = np.linalg.norm(rows - found, axis=1).sum()
    rng = np.random.default_rng(0)
    for scale in (1.0, 0.1, 0.01):
        for _ in range(20):
            other = found + scale * rng.standard_normal(5)
            assert total <= np.linalg.norm(rows - other, axis=1).sum() * (1 + 1e-4) + 1e-4
    for row in rows:
        assert total <= np.linalg.norm(rows - row, axis=1).sum() * (1 + 1e-4) + 1e-4


@given(ROWS, hnp.arrays(np.float64, 5, elements=st.floats(-5, 5)), st.floats(0.1, 20))
def test_centred_clipping_is_its_iteration(rows, start, radius) -> None:
    v = start.copy()
    for _ in range(3):
        off = rows - v
        norms = np.linalg.norm(off, axis=1, keepdims=True)
        v = v + (off * np.minimum(1, radius / np.maximum(norms, 1e-300))).mean(axis=0)
    reference = {"a": start[:2].reshape(2, 1), "b": start[2:]}
    got = apply(CentredClipping(radius, iterations=3), rows, reference=reference)
    np.testing.assert_allclose(got, v, atol=1e-9)


@given(ROWS, st.floats(0.1, 20))
def test_norm_clipping_is_the_mean_of_clipped_rows(rows, bound) -> None:
    norms = np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300)
    expected = (rows * np.minimum(1, bound / norms)).mean(axis=0)
    np.testing.assert_allclose(apply(NormClipping(bound), rows), expected, atol=1e-9)


@pytest.mark.parametrize("rule", RULES, ids=repr)
@given(rows=hnp.arrays(np.float64, (9, 5), elements=st.floats(-5, 5, width=16)))
@settings(deadline=None, max_examples=25)
def test_mixing_before_a_rule_is_the_rule_on_the_mixed_rows(rule, rows) -> None:
    f = 2
    gaps = distances(rows)
    ordered = np.sort(gaps, axis=1)
    if (ordered[:, 9 - f] - ordered[:, 9 - f - 1] < 1e-6).any():
        return  # a tie: either neighbour will do
    nearest = np.argsort(gaps, axis=1, kind="stable")[:, : 9 - f]
    mixed = np.stack([rows[index].mean(axis=0) for index in nearest])
    got = apply(rule, rows, mixing=[NearestNeighbours(f)])
    if isinstance(rule, Krum):
        score = np.sort(distances(mixed) ** 2, axis=1)[:, 1 : 9 - 2 - 1].sum(axis=1)
        if np.diff(np.sort(score)).min() < 1e-6:
            return
    np.testing.assert_allclose(got, apply(rule, mixed), atol=1e-5)


def test_bucketing_averages_a_random_partition() -> None:
    rows = np.arange(7.0)[:, None] * np.ones(5)
    weights = Bucketing(3).weights(np.eye(7), np.random.default_rng(0))
    assert weights.shape == (3, 7)
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    assert sorted((weights > 0).sum(axis=1)) == [1, 3, 3]
    assert ((weights > 0).sum(axis=0) == 1).all()
    rng = np.random.default_rng(0)
    got = apply(Median(), rows, mixing=[Bucketing(3)], rng=rng)
    np.testing.assert_allclose(got, np.median(weights @ rows, axis=0))
    with pytest.raises(ValueError, match="give RobustFold an rng"):
        apply(Median(), rows, mixing=[Bucketing(3)])


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_equal_updates_give_that_update(rule) -> None:
    row = np.array([0.25, -1.0, 0.5, 0.0, 0.125])
    np.testing.assert_allclose(apply(rule, np.tile(row, (7, 1))), row, rtol=1e-12)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_the_order_of_arrival_changes_no_bit(rule) -> None:
    rows = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float32)
    results = []
    for order in (range(7), [3, 0, 6, 1, 5, 2, 4]):
        fold = RobustFold(rule)
        for k in order:
            fold.add(k, {"w": rows[k]}, 1.0, {"loss": float(k)})
        results.append(fold.result())
    np.testing.assert_array_equal(results[0].arrays["w"], results[1].arrays["w"])
    assert results[0].metrics == results[1].metrics == {"loss": 3.0}
    assert results[0].weight == 7


@pytest.mark.parametrize("rule", COVARIANT, ids=repr)
def test_shifting_and_scaling_all_updates_shifts_and_scales_the_result(rule) -> None:
    rows = np.random.default_rng(1).standard_normal((9, 5))
    moved = apply(rule, 3 * rows + 100)
    np.testing.assert_allclose(moved, 3 * apply(rule, rows) + 100, atol=1e-5)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_files_and_memory_agree_and_chunks_do_not_show(tmp_path: Path, rule, monkeypatch) -> None:
    rng = np.random.default_rng(2)
    updates = [
        {"w": rng.standard_normal((40, 30)).astype(np.float32), "n": np.array(k, np.int64)}
        for k in range(7)
    ]
    memory, files = RobustFold(rule), RobustFold(rule)
    for k, update in enumerate(updates):
        memory.add(k, update)
        save_file(update, tmp_path / f"{k}")
        files.add(k, tmp_path / f"{k}")
    expected = memory.result().arrays
    monkeypatch.setattr(robust, "_CELLS", 7 * 100)
    got = files.result().arrays
    assert got["n"].dtype == np.int64
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-5, atol=1e-6)


def test_close_updates_far_from_zero_are_told_apart() -> None:
    # In float32 these distances drown in the norms; the rough Gram matrix must notice.
    rng = np.random.default_rng(3)
    rows = (1000 + 0.01 * rng.standard_normal((9, 400))).astype(np.float32)
    rows[:2] += np.float32(0.5)
    exact = rows.astype(np.float64)
    squared = np.sort(distances(exact) ** 2, axis=1)[:, 1 : 9 - 2 - 1].sum(axis=1)
    fold = RobustFold(Krum(2))
    for k, row in enumerate(rows):
        fold.add(k, {"w": row})
    np.testing.assert_array_equal(fold.result().arrays["w"], rows[squared.argmin()])


def test_batch_statistics_do_not_decide_who_lies() -> None:
    rows = np.random.default_rng(4).standard_normal((7, 5)).astype(np.float32)
    fold, plain = RobustFold(Krum(2)), RobustFold(Krum(2))
    for k, row in enumerate(rows):
        fold.add(k, {"w": row, "bn.running_var": np.array([1e6 * k], np.float32)})
        plain.add(k, {"w": row})
    np.testing.assert_array_equal(fold.result().arrays["w"], plain.result().arrays["w"])


# Ten clients of which two lie; what is honest lies around (1, ..., 1).
def attacked(attack: attacks.Attack) -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    honest = [{"w": 1 + 0.3 * rng.standard_normal(200)} for _ in range(8)]
    own = {"w": 1 + 0.3 * rng.standard_normal(200)}
    forged = [attack.forge(own, honest, rng) for _ in range(2)]
    return [update["w"] for update in honest + forged]


ATTACKS = [
    attacks.Zero(),
    attacks.Noise(50.0),
    attacks.SignFlip(20.0),
    attacks.LittleIsEnough(10, 2, z=1.5),
    attacks.InnerProduct(10.0),
    attacks.Noise(1e12),
    attacks.Noise(1e100),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
@pytest.mark.parametrize(
    ("rule", "mixing"),
    [
        (Median(), []),
        (TrimmedMean(2), []),
        (Krum(2, keep=5), []),
        (GeometricMedian(), []),
        (CentredClipping(6.0, iterations=10), []),
        (Median(), [NearestNeighbours(2)]),
        (TrimmedMean(2), [NearestNeighbours(2)]),
        (GeometricMedian(), [NearestNeighbours(2)]),
    ],
    ids=repr,
)
def test_two_liars_of_ten_cannot_move_a_robust_rule_far(attack, rule, mixing) -> None:
    rows = attacked(attack)
    fold = RobustFold(rule, mixing=mixing)
    for k, row in enumerate(rows):
        fold.add(k, {"w": row})
    honest = np.mean(rows[:8], axis=0)
    spread = np.sqrt(np.mean([np.sum((row - honest) ** 2) for row in rows[:8]]))
    assert np.linalg.norm(fold.result().arrays["w"] - honest) < 1.5 * spread


@pytest.mark.parametrize("rule", [Krum(2), GeometricMedian(), CentredClipping(20.0)], ids=repr)
@pytest.mark.parametrize("mixing", [[], [NearestNeighbours(2)]], ids=["alone", "mixed"])
def test_a_huge_float32_does_not_hide_the_honest_from_each_other(rule, mixing) -> None:
    rng = np.random.default_rng(6)
    honest = 1 + 0.3 * rng.standard_normal((8, 200))
    fold = RobustFold(rule, mixing=mixing)
    for k in range(10):
        row = honest[k] if k < 8 else np.full(200, 3e38 * (-1) ** k)
        fold.add(k, {"w": row.astype(np.float32)}, 1.0, {"loss": np.nan if k > 7 else 1.0})
    result = fold.result()
    assert np.linalg.norm(result.arrays["w"] - honest.mean(axis=0)) < 1.5 * 0.3 * np.sqrt(200)
    assert result.metrics == {"loss": 1.0}


def test_a_majority_of_equal_updates_is_their_geometric_median() -> None:
    rows = np.array([[1.0, 2, 3, 4, 5]] * 4 + [[9.0, 9, 9, 9, 9], [0, 0, 0, 0, 0], [7, 0, 7, 0, 7]])
    np.testing.assert_array_equal(apply(GeometricMedian(), rows), rows[0])


def test_the_same_liars_move_the_mean_wherever_they_want() -> None:
    rows = np.array(attacked(attacks.SignFlip(20.0)))
    assert np.linalg.norm(rows.mean(axis=0) - rows[:8].mean(axis=0)) > 30


def test_a_malformed_update_is_refused_by_client_and_tensor() -> None:
    fold = RobustFold(Median())
    fold.add(0, {"w": np.ones(2)})
    for bad, why in (
        ({"w": np.array([1.0, np.nan])}, "client 3, tensor 'w': holds NaN"),
        ({"w": np.ones(3)}, "client 3, tensor 'w': has shape"),
    ):
        with pytest.raises(BadUpdate, match=why):
            fold.add(3, bad)
    with pytest.raises(BadUpdate, match="client 0: was counted before"):
        fold.add(0, {"w": np.ones(2)})
    assert fold.clients == [0]
    with pytest.raises(ValueError, match="no update"):
        RobustFold(Median()).result()


@pytest.mark.parametrize(
    ("rule", "mixing"),
    [(Krum(3), []), (Krum(1, keep=7), []), (TrimmedMean(4), []), (Mean(), [NearestNeighbours(4)])],
)
def test_too_few_clients_for_a_promise_is_an_error(rule, mixing) -> None:
    with pytest.raises(TooFewClients):
        apply(rule, np.zeros((7, 5)), mixing=mixing)


def test_rules_are_found_by_name_and_fedmls_spellings() -> None:
    assert robust.create("multikrum", {"byzantine_client_num": 2, "krum_param_m": 3}) == Krum(2, 3)
    assert robust.create("wise_median") == Median()
    assert robust.create("RFA") == GeometricMedian()
    assert robust.create("norm_diff_clipping", {"norm_bound": 5.0}) == NormClipping(5.0)
    assert robust.create("cclip", {"tau": 10}) == CentredClipping(10)
    for name, parameters, why in (
        ("magic", {}, "no robust rule is called 'magic'; there are mean, median"),
        ("krum", {"bogus": 1}, "bogus"),
        ("krum", {}, "krum: there is no `byzantine`; it needs one"),
        ("norm_clipping", {}, "there is no `bound`"),
        ("krum", {"byzantine": 1.5}, "whole number"),
        ("trimmed_mean", {"trim": -1}, ">= 0"),
        ("cclip", {"radius": 0}, "> 0"),
    ):
        with pytest.raises(BadParameter, match=why):
            robust.create(name, parameters)
