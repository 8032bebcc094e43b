# SPDX-License-Identifier: Apache-2.0
"""What parts and splits promise."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedml.data.dataset import Dataset, Examples, Ratings, Series, Texts, Words, by_digest

keys = st.lists(st.text(max_size=8), min_size=1, max_size=60, unique=True)


@given(names=keys, share=st.floats(0, 1), kinds=st.integers(1, 4))
def test_a_split_by_digest_is_disjoint_complete_and_even_within_labels(
    names: list[str], share: float, kinds: int
) -> None:
    labels = [len(name) % kinds for name in names]
    train, test = by_digest(names, labels, share)

    assert np.array_equal(np.sort(np.concatenate([train, test])), np.arange(len(names)))
    for label in set(labels):
        rows = [row for row in range(len(names)) if labels[row] == label]
        assert len(set(rows) & set(test.tolist())) == round(len(rows) * share)


@given(names=keys)
def test_a_split_by_digest_follows_the_row_not_its_place(names: list[str]) -> None:
    _train, test = by_digest(names, [0] * len(names), 0.4)
    turned = names[::-1]
    _train, test_turned = by_digest(turned, [0] * len(names), 0.4)

    assert {names[row] for row in test} == {turned[row] for row in test_turned}


def test_a_hospital_alone_gets_the_split_that_it_has_among_all() -> None:
    names = [f"patient {number}" for number in range(40)]
    owner = [number % 3 for number in range(40)]
    _train, test = by_digest(names, owner, 0.25)
    mine = [row for row in range(40) if owner[row] == 1]
    _train, alone = by_digest([names[row] for row in mine], [1] * len(mine), 0.25)

    assert [mine[row] for row in alone] == [row for row in test if owner[row] == 1]


def test_the_split_is_the_one_of_the_written_rule() -> None:
    names = ["a", "b", "c", "d"]
    first = min(range(4), key=lambda row: hashlib.sha256(names[row].encode()).hexdigest())
    _train, test = by_digest(names, [0] * 4, 0.25)
    assert test.tolist() == [first]


def test_parts_take_rows_in_the_given_order() -> None:
    rows = np.asarray([2, 0])
    client = np.asarray([5, 6, 7])
    examples = Examples(x=np.arange(6).reshape(3, 2), y=np.arange(3), client=client)
    texts = Texts(x=("a", "b", "c"), client=client)
    series = Series(
        x=tuple(np.full((n, 1), n) for n in (3, 4, 5)), y=np.arange(3), rate_hz=1.0, client=client
    )
    ratings = Ratings(user=client, item=client, y=np.arange(3.0), users=8, items=8)

    assert examples.take(rows).x.tolist() == [[4, 5], [0, 1]]
    assert texts.take(rows).x == ("c", "a")
    assert texts.take(rows).y is None
    assert [len(recording) for recording in series.take(rows).x] == [5, 3]
    for part in (examples, texts, series, ratings):
        taken = part.take(rows)
        assert len(taken) == 2
        assert taken.client is not None
        assert taken.client.tolist() == [7, 5]


def test_columns_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match="differ in length"):
        Examples(x=np.zeros((3, 1)), y=np.zeros(2))
    with pytest.raises(ValueError, match="differ in length"):
        Texts(x=("a",), client=np.zeros(2, np.int64))


def test_one_owner_can_be_taken_out() -> None:
    part = Examples(x=np.arange(4)[:, None], y=np.arange(4), client=np.asarray([0, 1, 0, 1]))
    whole = Dataset(name="two", train=part, test=part, clients=("left", "right"))
    right = whole.of_client("right")

    assert right.train.x.ravel().tolist() == [1, 3]
    assert right.clients == whole.clients
    with pytest.raises(KeyError, match="left, right"):
        whole.of_client("middle")


def test_windows_inherit_class_and_client_and_skip_short_recordings() -> None:
    series = Series(
        x=(np.arange(5.0)[:, None], np.arange(2.0)[:, None], np.arange(7.0)[:, None]),
        y=np.asarray([4, 5, 6]),
        rate_hz=50.0,
        client=np.asarray([1, 2, 3]),
    )
    windows = series.windows(3, 2)

    assert windows.x[..., 0].tolist() == [[0, 1, 2], [2, 3, 4], [0, 1, 2], [2, 3, 4], [4, 5, 6]]
    assert windows.y.tolist() == [4, 4, 6, 6, 6]
    assert windows.client is not None
    assert windows.client.tolist() == [1, 1, 3, 3, 3]
    assert series.windows(100, 1).x.shape == (0, 100, 1)
    with pytest.raises(ValueError, match=">= 1"):
        series.windows(3, 0)


def test_drawn_words_follow_their_frequencies() -> None:
    words = Words(x=("often", "rare"), y=np.asarray([0.9, 0.1]))
    drawn = words.draw(10_000, seed=1)

    assert drawn == words.draw(10_000, seed=1)
    assert abs(drawn.count("often") / 10_000 - 0.9) < 0.02
