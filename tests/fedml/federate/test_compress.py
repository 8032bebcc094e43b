# SPDX-License-Identifier: Apache-2.0
"""Compression loses nothing for ever: top-k remembers, int8 is right on average."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedml.federate.aggregate import Fold, combine
from fedml.federate.algorithm import BadParameter, Update
from fedml.federate.arrays import Arrays
from fedml.federate.compress import Int8, Packed, TopK
from fedml.federate.layout import BadUpdate, Layout

VECTORS = hnp.arrays(np.float32, st.integers(64, 300), elements=st.floats(-100, 100, width=32))


def update(arrays: Arrays) -> Update:
    return Update(arrays=arrays, weight=2.0, metrics={"loss": 1.0})


def sample(size: int = 5000) -> Arrays:
    rng = np.random.default_rng(0)
    return {
        "w": rng.standard_normal((size // 50, 50)).astype(np.float32),
        "b": rng.standard_normal(3).astype(np.float32),
        "n": np.array(7, np.int64),
    }


@given(st.lists(VECTORS.filter(lambda v: v.size == v.size), min_size=1, max_size=1), st.data())
def test_what_is_sent_and_what_is_remembered_is_what_there_was(first, data) -> None:
    topk = TopK(data.draw(st.floats(0.01, 1.0)))
    size = first[0].size
    memory, sent, total = None, np.zeros(size), np.zeros(size)
    for _ in range(4):
        v = data.draw(hnp.arrays(np.float32, size, elements=st.integers(-64, 64).map(float)))
        packed, memory = topk.compress(update({"w": v}), memory)
        expanded = Packed(packed.arrays, Layout.of({"w": v})).expand()["w"]
        assert np.count_nonzero(expanded) <= math.ceil(topk.fraction * size)
        sent += expanded
        total += v
    np.testing.assert_array_equal(sent + memory["w"], total)  # small integers: exact


def test_topk_keeps_the_largest() -> None:
    arrays = sample()
    packed, memory = TopK(0.1).compress(update(arrays))
    kept = Packed(packed.arrays, Layout.of(arrays)).expand()["w"]
    flat = np.sort(np.abs(arrays["w"]), axis=None)
    assert np.abs(kept[kept != 0]).min() == flat[-500]
    np.testing.assert_array_equal(kept + memory["w"], arrays["w"])
    assert (packed.weight, packed.metrics) == (2.0, {"loss": 1.0})


def test_int8_is_right_on_average_and_off_by_no_more_than_its_step() -> None:
    arrays = {"w": sample()["w"].reshape(-1)[:2000]}
    layout, rng = Layout.of(arrays), np.random.default_rng(1)
    draws = 4000
    mean = np.zeros(2000)
    step = np.repeat(
        [np.abs(arrays["w"][:1024]).max() / 127, np.abs(arrays["w"][1024:]).max() / 127],
        [1024, 976],
    )
    for _ in range(draws):
        got = Packed(Int8().compress(update(arrays), rng).arrays, layout).expand()["w"]
        assert (np.abs(got - arrays["w"]) < step * 1.0001).all()
        mean += got.astype(np.float64) / draws
    error = mean - arrays["w"]
    # 2,000 means, each with a standard error of at most step / 2 / sqrt(draws).
    assert (np.abs(error) < 5 * step / 2 / math.sqrt(draws)).all()
    assert abs(error.mean()) < 5 * step.max() / 2 / math.sqrt(draws * 2000)


@given(VECTORS, st.floats(-100, 100))
def test_int8_never_leaves_its_range(v: np.ndarray, power: float) -> None:
    v = (v * np.float32(10.0 ** (power / 4))).astype(np.float32)
    if not np.isfinite(v).all():
        return
    packed = Int8().compress(update({"w": v}), np.random.default_rng(0)).arrays
    assert np.abs(packed["code::w"].astype(int)).max(initial=0) <= 127
    got = Packed(packed, Layout.of({"w": v})).expand()["w"]
    assert np.abs(got - v).max() <= np.abs(v).max() / 127 * 1.001 + 1e-44


def test_int8_takes_a_quarter_of_the_bytes() -> None:
    arrays = sample(100_000)
    packed = Int8().compress(update(arrays), np.random.default_rng(0)).arrays
    assert sum(a.nbytes for a in packed.values()) < 0.26 * sum(a.nbytes for a in arrays.values())


@pytest.mark.parametrize("how", ["topk", "int8"])
def test_a_fold_reads_packed_updates_as_if_they_were_whole(how: str) -> None:
    arrays = sample(100_000)
    layout = Layout.of(arrays)
    rng = np.random.default_rng(2)
    packed = [
        TopK(0.05).compress(update(arrays))[0].scale(1.0)
        if how == "topk"
        else Int8().compress(update(arrays), rng)
        for _ in range(3)
    ]
    fold = Fold(layout)
    for k, one in enumerate(packed):
        fold.add(k, Packed(one.arrays, layout), k + 1.0)
    whole = combine(
        Update(arrays=Packed(one.arrays, layout).expand(), weight=k + 1.0)
        for k, one in enumerate(packed)
    )
    for name, array in fold.result().arrays.items():
        np.testing.assert_array_equal(array, whole.arrays[name])


BREAK = {
    "comes as nothing": lambda p: p.pop("raw::b"),
    r"comes as \['index', 'raw', 'value'\]": lambda p: p.update({"raw::w": sample()["w"]}),
    "'raw::x' is not expected": lambda p: p.update({"raw::x": np.zeros(1)}),
    r"payload \(index, value\) does not fit": lambda p: p["index::w"].__setitem__(0, 10**6),
    r"\(index, value\) does not": lambda p: p["index::w"].__setitem__(3, p["index::w"][2]),
    r"\(index, value\) does": lambda p: p.update({"value::w": p["value::w"][1:]}),
    r"payload \(raw\) does not fit": lambda p: p.update({"raw::n": np.array(7.0)}),
}


@pytest.mark.parametrize("why", BREAK)
def test_a_forged_payload_is_refused(why: str) -> None:
    arrays = sample()
    payload = TopK(0.1).compress(update(arrays))[0].arrays
    BREAK[why](payload)
    with pytest.raises(ValueError, match=why):
        Packed(payload, Layout.of(arrays))


def test_nan_inside_a_payload_is_found_by_the_fold() -> None:
    arrays = sample()
    payload = Int8().compress(update(arrays), np.random.default_rng(0)).arrays
    payload["scale::w"][1] = np.nan
    with pytest.raises(BadUpdate, match="client 4, tensor 'w': holds NaN"):
        Fold().add(4, Packed(payload, Layout.of(arrays)), 1.0)


def test_a_share_outside_its_range_is_refused() -> None:
    for fraction in (0.0, 1.5):
        with pytest.raises(BadParameter, match=r"\(0, 1\]"):
            TopK(fraction)
