# SPDX-License-Identifier: Apache-2.0
"""The laws of partitions, for many sizes and seeds, and the published shapes on real labels."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedml import data
from fedml.data import partition
from fedml.data.dataset import Examples, Texts
from fedml.data.errors import ImpossibleSplit
from fedml.data.partition import Partition

Load = Callable[[str], data.Dataset[Any]]

seeds = st.integers(0, 2**32 - 1)
clients = st.integers(1, 30)
alphas = st.floats(0.001, 1000)
labels = st.lists(st.integers(0, 6), min_size=30, max_size=300).map(
    lambda values: np.asarray(values, np.int64)
)


def check(parts: Partition, examples: int, expected_clients: int, minimum: int = 1) -> None:
    """A partition is disjoint, complete, sorted, and leaves no client empty."""
    assert len(parts) == expected_clients
    assert all(len(rows) >= minimum for rows in parts)
    assert all(rows.dtype == np.int64 and (np.diff(rows) > 0).all() for rows in parts)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(examples))


def same(one: Partition, other: Partition) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@given(examples=st.integers(30, 500), count=clients, seed=seeds)
def test_iid_is_a_partition_into_even_parts(examples: int, count: int, seed: int) -> None:
    parts = partition.iid(examples, count, seed=seed)

    check(parts, examples, count)
    sizes = [len(rows) for rows in parts]
    assert max(sizes) - min(sizes) <= 1
    assert same(parts, partition.iid(examples, count, seed=seed))


@given(y=labels, count=clients, alpha=alphas, seed=seeds, level=st.booleans(), data_=st.data())
def test_dirichlet_is_a_partition_with_the_minimum(
    y: np.ndarray, count: int, alpha: float, seed: int, level: bool, data_: st.DataObject
) -> None:
    minimum = data_.draw(st.integers(1, len(y) // count))
    parts = partition.dirichlet(y, count, alpha, seed=seed, minimum=minimum, level=level)

    check(parts, len(y), count, minimum)
    again = partition.dirichlet(y, count, alpha, seed=seed, minimum=minimum, level=level)
    assert same(parts, again)


@given(y=labels, count=st.integers(1, 10), each=st.integers(1, 3), seed=seeds)
def test_shards_are_a_partition_and_limit_the_classes(
    y: np.ndarray, count: int, each: int, seed: int
) -> None:
    parts = partition.shards(y, count, each, seed=seed)

    check(parts, len(y), count)
    assert same(parts, partition.shards(y, count, each, seed=seed))
    # Shards are equal runs of the sorted classes; a long class makes several, so few see many.
    sizes = [len(rows) for rows in parts]
    assert max(sizes) - min(sizes) <= each


@given(count=st.integers(1, 20), each=st.integers(1, 7), seed=seeds)
def test_classes_each_gives_exactly_that_many_classes(count: int, each: int, seed: int) -> None:
    y = np.repeat(np.arange(7), 40)
    if count * each < 7:
        with pytest.raises(ImpossibleSplit, match="cannot hold all 7"):
            partition.classes_each(y, count, each, seed=seed)
        return
    parts = partition.classes_each(y, count, each, seed=seed)

    check(parts, len(y), count)
    assert all(len(np.unique(y[rows])) == each for rows in parts)
    assert same(parts, partition.classes_each(y, count, each, seed=seed))


@given(examples=st.integers(30, 500), count=clients, alpha=alphas, seed=seeds)
def test_quantity_skew_is_a_partition(examples: int, count: int, alpha: float, seed: int) -> None:
    minimum = examples // count // 2 or 1
    parts = partition.quantity(examples, count, alpha, seed=seed, minimum=minimum)

    check(parts, examples, count, minimum)
    assert same(parts, partition.quantity(examples, count, alpha, seed=seed, minimum=minimum))


@given(owners=st.lists(st.integers(0, 15), min_size=20, max_size=200), seed=seeds)
def test_natural_keeps_every_owner_whole(owners: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    client = np.asarray(owners, np.int64)
    part = Examples(x=np.zeros((len(client), 1)), y=np.zeros(len(client)), client=client)
    names = np.unique(client)

    check(partition.natural(part), len(client), len(names))
    fewer = int(rng.integers(1, len(names) + 1))
    parts = partition.natural(part, fewer)
    check(parts, len(client), fewer)
    for name in names:
        assert sum(bool((client[rows] == name).any()) for rows in parts) == 1


def test_different_seeds_differ() -> None:
    y = np.repeat(np.arange(5), 40)
    methods: tuple[Callable[[int], Partition], ...] = (
        lambda seed: partition.iid(200, 7, seed=seed),
        lambda seed: partition.dirichlet(y, 7, 0.5, seed=seed),
        lambda seed: partition.shards(y, 7, 2, seed=seed),
        lambda seed: partition.classes_each(y, 7, 2, seed=seed),
        lambda seed: partition.quantity(200, 7, 0.5, seed=seed),
    )
    for made in methods:
        assert not same(made(0), made(1))


def test_the_pathological_split_gives_most_clients_two_digits(real: Load) -> None:
    y = real("mnist-5k").train.y
    kinds = [len(np.unique(y[rows])) for rows in partition.shards(y, 100, 2)]

    assert max(kinds) <= 2  # 400 images of each digit are 20 whole shards
    assert np.mean(kinds) > 1.8


def test_small_alpha_concentrates_classes_and_large_alpha_spreads_them(real: Load) -> None:
    y = real("fashion-mnist").train.y

    def largest_share(alpha: float) -> float:
        parts = partition.dirichlet(y, 10, alpha, minimum=10)
        return float(np.mean([np.bincount(y[rows]).max() / len(rows) for rows in parts]))

    assert largest_share(0.1) > 0.4
    assert largest_share(0.5) < largest_share(0.1)
    assert largest_share(1000) < 0.12


def test_levelling_keeps_sizes_closer() -> None:
    y = np.repeat(np.arange(10), 500)

    def spread(level: bool) -> float:
        sizes = [
            [len(rows) for rows in partition.dirichlet(y, 10, 0.2, seed=seed, level=level)]
            for seed in range(10)
        ]
        return float(np.std(sizes))

    assert spread(True) < spread(False)


@pytest.mark.parametrize("seed", [1, 42])
def test_the_levelled_split_draws_what_niid_bench_draws(seed: int) -> None:
    # Li et al. 2022: class after class, shuffle, draw shares, none for who holds an even part.
    kinds, count, alpha = np.random.default_rng(0).integers(0, 10, 5000), 10, 0.5
    rng = np.random.default_rng(seed)
    held: list[list[int]] = [[] for _ in range(count)]
    for kind in range(10):
        rows = np.flatnonzero(kinds == kind)
        rng.shuffle(rows)
        shares = rng.dirichlet([alpha] * count)
        shares[[len(own) >= len(kinds) / count for own in held]] = 0
        ends = (np.cumsum(shares / shares.sum()) * len(rows)).astype(int)
        for own, piece in zip(held, np.split(rows, ends[:-1]), strict=True):
            own.extend(piece.tolist())
    expected = tuple(np.sort(own) for own in held)
    assert same(partition.dirichlet(kinds, count, alpha, seed=seed), expected)


def test_a_vanishing_alpha_still_gives_everybody_something() -> None:
    y = np.repeat(np.arange(3), 100)
    check(partition.dirichlet(y, 30, 1e-300), 300, 30)
    check(partition.quantity(300, 30, 1e-300), 300, 30)


def test_hospitals_are_natural_clients(real: Load) -> None:
    train = real("heart").train
    parts = partition.natural(train)

    assert [len(rows) for rows in parts] == [202, 196, 82, 133]


def test_users_can_be_put_together_evenly(real: Load) -> None:
    train = real("movielens-100k").train
    sizes = [len(rows) for rows in partition.natural(train, 10)]

    assert sum(sizes) == 80_000
    assert max(sizes) - min(sizes) < 100


def test_feature_noise_grows_with_the_client_and_leaves_the_input_alone() -> None:
    x = np.zeros((4000, 5), np.float32)
    parts = partition.iid(4000, 4)
    noisy = partition.feature_noise(x, parts, 0.8, seed=3)

    assert not x.any()
    assert noisy.dtype == np.float32
    variances = [noisy[rows].var() for rows in parts]
    assert np.allclose(variances, [0.2, 0.4, 0.6, 0.8], rtol=0.1)
    assert np.array_equal(noisy, partition.feature_noise(x, parts, 0.8, seed=3))
    assert not partition.feature_noise(x, parts, 0.0).any()


def test_impossible_wishes_say_which_number_to_change() -> None:
    y = np.repeat(np.arange(3), 4)
    with pytest.raises(ImpossibleSplit, match="at most 12 clients"):
        partition.iid(12, 13)
    with pytest.raises(ImpossibleSplit, match="at most 4 clients"):
        partition.dirichlet(y, 5, 0.5, minimum=3)
    with pytest.raises(ImpossibleSplit, match="alpha must be > 0"):
        partition.dirichlet(y, 2, 0.0)
    with pytest.raises(ImpossibleSplit, match="alpha must be > 0"):
        partition.quantity(12, 2, float("nan"))
    with pytest.raises(ImpossibleSplit, match="at least one client"):
        partition.iid(12, 0)
    with pytest.raises(ImpossibleSplit, match="shards per client"):
        partition.shards(y, 2, 0)
    with pytest.raises(ImpossibleSplit, match="there are 3"):
        partition.classes_each(y, 5, 4)
    with pytest.raises(ImpossibleSplit, match="4 examples for 6 clients"):
        partition.classes_each(y, 6, 3)
    with pytest.raises(ImpossibleSplit, match="minimum=0"):
        partition.quantity(12, 2, 0.5, minimum=0)
    with pytest.raises(ImpossibleSplit, match="noise level"):
        partition.feature_noise(np.zeros((2, 2)), partition.iid(2, 1), -1.0)
    with pytest.raises(ImpossibleSplit, match="floating-point"):
        partition.feature_noise(np.zeros((2, 2), np.int64), partition.iid(2, 1), 1.0)


def test_methods_are_chosen_by_name_also_by_fedmls() -> None:
    y = np.repeat(np.arange(4), 25)
    part = Examples(x=np.zeros((100, 1)), y=y, client=np.arange(100) % 9)

    assert same(partition.divide(part, "homo", 5), partition.iid(100, 5))
    assert same(
        partition.divide(part, "hetero", 5, alpha=0.3, seed=2),
        partition.dirichlet(y, 5, 0.3, seed=2),
    )
    assert same(partition.divide(part, "natural", 9), partition.natural(part))
    for method in ("iid", "dirichlet", "shards", "classes", "quantity", "natural"):
        check(partition.divide(part, method, 5), 100, 5)
    with pytest.raises(ImpossibleSplit, match="hetero"):
        partition.divide(part, "heterogeneous", 5)


def test_label_methods_refuse_data_without_classes() -> None:
    numbers = Examples(x=np.zeros((9, 1)), y=np.zeros(9, np.float32))
    language = Texts(x=("a",) * 9)
    for part in (numbers, language):
        with pytest.raises(ImpossibleSplit, match="one class a row"):
            partition.divide(part, "dirichlet", 3)
        with pytest.raises(ImpossibleSplit, match="names no owners"):
            partition.divide(part, "natural", 3)
        check(partition.divide(part, "iid", 3), 9, 3)
