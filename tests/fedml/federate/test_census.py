# SPDX-License-Identifier: Apache-2.0
"""The N of the papers: what servers keep of all clients is a mean of those with examples."""

from __future__ import annotations

import numpy as np
import pytest

from fedml.federate.algorithm import Algorithm, Facts, client_part, create, nothing
from fedml.federate.arrays import Arrays
from fedml.federate.census import facts_of
from fedml.federate.cohort import choose, generator
from fedml.federate.round import ServerRound
from fedml.federate.treatment import Treatment
from tests.fedml.federate.quadratic import Quadratic, at


def walked(algorithm: Algorithm, rounds: int) -> tuple[Arrays, list[Arrays]]:
    """Two clients with examples, two without, three a round; the state, and what clients keep."""
    clients = {
        0: Quadratic(at(-1.0), curvature=1.0, lr=0.1, steps=10),
        3: Quadratic(at(3.0), curvature=3.0, lr=0.1, steps=10),
    }
    model, state = at(0.0), algorithm.start(at(0.0))
    kept: dict[int, Arrays | None] = {}
    for index in range(rounds):
        asked = choose(10, index, range(4), 3)
        this = ServerRound(
            algorithm, Treatment(), model, state, seed=10, index=index, asked=3, population=4
        )
        own = {name: array for name, array in state.items() if not name.startswith("census")}
        for k in asked:
            update = nothing(algorithm.layout(model))
            if k in clients:
                sent, rng = algorithm.sent(model, own), generator(10, index, k)
                update = client_part(algorithm, model, sent, kept.get(k), clients[k], rng)
                kept[k] = update.client_state
            this.add(k, update.arrays, update.weight, {})
        model, state, *_ = this.finish()
    return state, [each for each in kept.values() if each is not None]


@pytest.mark.parametrize("rounds", [3, 4, 7])
@pytest.mark.parametrize(
    ("algorithm", "mean"),
    [(create("scaffold"), "control::w"), (create("feddyn", {"alpha": 0.5}), "h::w")],
)
def test_clients_without_examples_are_none_of_those_that_a_mean_is_of(
    algorithm: Algorithm, mean: str, rounds: int
) -> None:
    # The first round asks 0, 1 and 3, so client 2 is counted until it is asked.
    assert [choose(10, n, range(4), 3) for n in range(3)] == [[0, 1, 3], [1, 2, 3], [0, 1, 2]]
    first, kept = walked(algorithm, 1)
    np.testing.assert_allclose(first[mean], sum(k["w"] for k in kept) / 3, rtol=1e-12)
    state, kept = walked(algorithm, rounds)
    np.testing.assert_allclose(state[mean], sum(k["w"] for k in kept) / 2, rtol=1e-12)


def test_who_has_examples_after_all_is_counted_again() -> None:
    facts, state = facts_of({}, {0: 1.0, 1: 0.0, 2: 0.0}, 5)
    assert facts == Facts(clients=1, population=3, counted=5)
    facts, state = facts_of(state, {1: 2.0, 4: 0.0}, 5)
    assert facts == Facts(clients=1, population=3, counted=3)
    facts, state = facts_of(state, {2: 1.0, 4: 2.0}, 5)
    assert facts == Facts(clients=2, population=5, counted=3)
    assert state == {}
