# SPDX-License-Identifier: Apache-2.0
"""The choice of clients and of random numbers depends on nothing but its arguments."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedml.federate.cohort import choose, generator, server_generator, with_spares

CLIENTS = st.lists(st.integers(0, 10**9), min_size=1, max_size=40, unique=True)


@given(CLIENTS, st.integers(0, 2**40), st.integers(0, 1000), st.integers(1, 50), st.randoms())
def test_the_choice_ignores_the_order_that_clients_are_listed_in(clients, seed, turn, count, mix):
    chosen = choose(seed, turn, clients, count)
    shuffled = list(clients)
    mix.shuffle(shuffled)
    assert choose(seed, turn, shuffled, count) == chosen
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(clients)
    assert len(chosen) == min(count, len(clients))


def test_the_choice_is_the_same_for_ever() -> None:
    # Pinned: a broker that restarts on a newer release must go on with the same cohort.
    assert choose(7, 0, range(100), 5) == [10, 12, 30, 68, 81]
    raw = generator(7, 0, 3).bit_generator.random_raw(2).tolist()
    assert raw == [3494859133614666229, 9921744977732723933]


def test_rounds_and_seeds_give_different_cohorts() -> None:
    picks = {tuple(choose(seed, turn, range(1000), 10)) for seed in range(5) for turn in range(20)}
    assert len(picks) == 100


def test_every_client_is_chosen_equally_often() -> None:
    seen = Counter(c for turn in range(2000) for c in choose(0, turn, range(20), 5))
    assert all(abs(seen[c] - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5 for c in range(20))


def test_no_two_uses_share_random_numbers() -> None:
    draws = [
        generator(1, 2, 3).random(),
        generator(1, 3, 2).random(),
        generator(2, 1, 3).random(),
        generator(1, 2, 0).random(),
        server_generator(1, 2).random(),
        generator(0, 1, 2).random(),
        server_generator(0, 1).random(),
    ]
    assert len(set(draws)) == len(draws)
    assert generator(1, 2, 3).random() == draws[0]


def test_spares_make_up_for_the_expected_loss() -> None:
    assert with_spares(100, 0.0) == 100
    assert with_spares(100, 0.23) == 130  # Bonawitz et al. 2019 over-select by 30 %
    assert with_spares(1, 0.5) == 2


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda: choose(0, 0, [], 1), "cannot choose 1 of 0"),
        (lambda: choose(0, 0, [1], 0), "cannot choose 0 of 1"),
        (lambda: choose(0, 0, [1, 2, 1], 1), "listed twice"),
        (lambda: choose(-1, 0, [1, 2], 1), "count from 0"),
        (lambda: with_spares(10, 1.0), r"loss in \[0, 1\)"),
    ],
)
def test_impossible_choices_are_refused(call, why) -> None:
    with pytest.raises(ValueError, match=why):
        call()
