# SPDX-License-Identifier: Apache-2.0
"""A group of clients is one client; one round within is flat FedAvg."""

from __future__ import annotations

import numpy as np
import pytest

from fedml.federate.algorithm import Local, Need, UnsupportedByTraining, create
from fedml.federate.cohort import server_generator
from fedml.federate.fedavg import FedAvg
from fedml.federate.fedprox import FedProx
from fedml.federate.fedsgd import FedSGD
from fedml.federate.hierarchical import Group, assign
from fedml.federate.scaffold import Scaffold
from tests.fedml.federate.quadratic import Quadratic, at, run


def clients() -> dict[int, Quadratic]:
    return {k: Quadratic(at(float(k)), curvature=1.0 + k % 2, examples=k + 1) for k in range(6)}


def groups(algorithm=None, rounds: int = 1, **options) -> dict[int, Group]:
    each = clients()
    return {
        g: Group({k: each[k] for k in members}, algorithm or FedAvg(), rounds=rounds, **options)
        for g, members in enumerate(([0, 3], [1, 2, 5], [4]))
    }


def test_a_group_is_a_client() -> None:
    assert isinstance(groups()[0], Local)
    assert groups()[1].examples == 2 + 3 + 6


def test_one_round_within_is_flat_fedavg() -> None:
    flat, _ = run(FedAvg(), clients(), at(9.0), 4)
    two_levels, _ = run(FedAvg(), groups(), at(9.0), 4)
    np.testing.assert_allclose(two_levels["w"], flat["w"], rtol=1e-12)


def test_rounds_within_are_the_groups_own_federation() -> None:
    inner = groups(rounds=3)
    model, _ = run(FedAvg(), inner, at(9.0), 1)
    each = clients()
    ends = [
        run(FedAvg(), {k: each[k] for k in members}, at(9.0), 3)[0]["w"]
        for members in ([0, 3], [1, 2, 5], [4])
    ]
    weights = np.array([1 + 4, 2 + 3 + 6, 5])
    np.testing.assert_allclose(model["w"], weights @ np.array(ends) / weights.sum(), rtol=1e-12)


def test_members_keep_their_state_from_round_to_round() -> None:
    # SCAFFOLD within one group of all reaches the optimum of all: sum a b / sum a.
    each = clients()
    whole = {0: Group(each, Scaffold(), rounds=2)}
    model, _ = run(FedAvg(), whole, at(9.0), 150)
    a = np.array([c.curvature for c in each.values()])
    np.testing.assert_allclose(model["w"], [a @ np.arange(6) / a.sum()], rtol=1e-6)
    again = Group(each, Scaffold(), client_states=whole[0].client_states)
    assert again.client_states.keys() == each.keys()


def test_groups_nest() -> None:
    inner = groups()
    outer = {0: Group({0: inner[0], 1: inner[1]}, FedAvg()), 1: Group({2: inner[2]}, FedAvg())}
    flat, _ = run(FedAvg(), clients(), at(9.0), 2)
    nested, _ = run(FedAvg(), outer, at(9.0), 2)
    np.testing.assert_allclose(nested["w"], flat["w"], rtol=1e-12)


def test_full_gradients_pass_through_groups() -> None:
    flat, _ = run(FedSGD(), clients(), at(9.0), 3)
    grouped, _ = run(FedSGD(), groups(), at(9.0), 3)
    np.testing.assert_allclose(grouped["w"], flat["w"], rtol=1e-12)
    silent = Group({0: Quadratic(at(0.0), supports=frozenset())}, FedAvg())
    assert Need.GRADIENT not in silent.supports


def test_what_a_group_cannot_do_is_refused() -> None:
    with pytest.raises(UnsupportedByTraining, match="takes no correction"):
        run(FedProx(), groups(), at(9.0), 1)
    with pytest.raises(ValueError, match="fedbuff is asynchronous"):
        groups(create("fedbuff"))
    with pytest.raises(ValueError, match="does nothing"):
        Group({}, FedAvg())
    with pytest.raises(UnsupportedByTraining, match="the training of client 8"):
        Group({8: Quadratic(at(0.0), supports=frozenset())}, Scaffold())


def test_assignment_is_even_and_repeatable() -> None:
    parts = assign([5, 3, 9, 1, 7, 2, 8], 3, server_generator(0, 0))
    assert sorted(len(part) for part in parts) == [2, 2, 3]
    assert sorted(c for part in parts for c in part) == [1, 2, 3, 5, 7, 8, 9]
    assert assign([9, 8, 7, 5, 3, 2, 1], 3, server_generator(0, 0)) == parts
    with pytest.raises(ValueError, match="cannot split 2 clients into 3"):
        assign([1, 2], 3, server_generator(0, 0))
