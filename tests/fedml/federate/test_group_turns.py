# SPDX-License-Identifier: Apache-2.0
"""One turn of groups at the server: who sits out, and what is kept of him.

That whole rounds have the bits of the plain loop is in `tests/fedml/simulation/test_grouped.py`.
"""

from __future__ import annotations

import numpy as np
import pytest

from fedml.federate.algorithm import NobodyLearned, create
from fedml.federate.arrays import Arrays
from fedml.federate.fedavg import FedAvg
from fedml.federate.group_turns import GroupTurn, own_state, starts

MEMBERS = [[0, 2], [1, 3]]
MODEL = {"w": np.array([1.0, 2.0])}
WITHIN = create("fedavgm", {"momentum": 0.5})


def turn(state: Arrays, models: dict[int, Arrays], clients: tuple[int, ...] = (0, 1, 2, 3)):
    return GroupTurn(WITHIN, MEMBERS, clients, MODEL, state, models)


def delta(value: float) -> Arrays:
    return {"w": np.full(2, value)}


def test_a_group_of_which_nobody_answers_sits_out_and_keeps_what_it_kept() -> None:
    first = turn({}, {})
    for client in (0, 1, 2):
        first.add(client, delta(client + 1.0), 1.0, {})
    found, state = first.turned()
    assert sorted(found) == [0, 1]
    np.testing.assert_array_equal(found[0].model["w"], [3.0, 4.0])  # the mean of 1 and 3
    np.testing.assert_array_equal(found[1].model["w"], [3.0, 4.0])

    second = turn(state, {g: start.model for g, start in found.items()}, clients=(0, 1, 2))
    second.add(1, delta(1.0), 4.0, {"loss": 0.5, "eval.loss": 9.0})
    made = second.finish(FedAvg(), turns=2)

    # Group 1 alone: v = 0.5 * 2 + 1.
    np.testing.assert_array_equal(made.model["w"], [5.0, 6.0])
    assert made.told == {"groups.1.clients": 1.0, "groups.1.loss": 0.5}
    kept = own_state(WITHIN, MODEL, made.state, 0)
    np.testing.assert_array_equal(kept["v::w"], [2.0, 2.0])


def test_a_round_begins_with_what_each_group_sends() -> None:
    scaffold = create("scaffold", {})
    state = {"groups::1::control::w": np.array([5.0, 6.0])}
    sent = starts(scaffold, MODEL, state, 2)
    np.testing.assert_array_equal(sent[0]["control::w"], [0.0, 0.0])
    np.testing.assert_array_equal(sent[1]["control::w"], [5.0, 6.0])


def test_a_group_that_has_no_example_goes_along_and_counts_for_nothing() -> None:
    first = turn({}, {})
    first.add(0, delta(1.0), 1.0, {})
    first.add(3, delta(9.0), 0.0, {})
    found, state = first.turned()
    np.testing.assert_array_equal(found[1].model["w"], MODEL["w"])

    second = turn(state, {g: start.model for g, start in found.items()}, clients=(0, 3))
    second.add(0, delta(1.0), 1.0, {})
    second.add(3, delta(9.0), 0.0, {})
    made = second.finish(FedAvg(), turns=2)
    # Group 0 alone: v = 1, then 0.5 * 1 + 1.
    np.testing.assert_array_equal(made.model["w"], [3.5, 4.5])
    assert made.told == {"groups.0.clients": 1.0}


def test_groups_of_which_none_has_an_example_end_the_run() -> None:
    this = turn({}, {})
    this.add(0, delta(1.0), 0.0, {})
    this.add(3, delta(1.0), 0.0, {})
    with pytest.raises(NobodyLearned, match="none of 2 clients has an example"):
        this.finish(FedAvg(), turns=1)
