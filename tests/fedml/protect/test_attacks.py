# SPDX-License-Identifier: Apache-2.0
"""Attacks are what their papers say, and ALIE stays within the crowd."""

from __future__ import annotations

import numpy as np
import pytest

from fedml.federate.algorithm import BadParameter
from fedml.protect import attacks

RNG = np.random.default_rng(0)
HONEST = [
    {"w": RNG.standard_normal((3, 2)).astype(np.float32), "n": np.array(k)} for k in range(40)
]
OWN = {"w": np.ones((3, 2), np.float32), "n": np.array(9)}
STACK = np.stack([h["w"] for h in HONEST]).astype(np.float64)


@pytest.mark.parametrize(
    ("attack", "expected"),
    [
        (attacks.Zero(), np.zeros((3, 2))),
        (attacks.SignFlip(2.0), np.full((3, 2), -2.0)),
        (attacks.InnerProduct(0.5), -0.5 * STACK.mean(axis=0)),
        (attacks.LittleIsEnough(50, 10, z=0.7), STACK.mean(axis=0) - 0.7 * STACK.std(axis=0)),
    ],
    ids=repr,
)
def test_each_attack_is_its_formula(attack, expected) -> None:
    forged = attack.forge(OWN, HONEST, np.random.default_rng(1))
    assert forged["w"].dtype == np.float32
    assert forged["n"].dtype == OWN["n"].dtype
    np.testing.assert_allclose(forged["w"], expected, rtol=1e-6)


def test_noise_is_noise_of_the_size_asked_for() -> None:
    forged = attacks.Noise(3.0).forge({"w": np.zeros(50_000)}, [], np.random.default_rng(1))
    assert forged["w"].std() == pytest.approx(3.0, rel=0.02)


def test_alie_takes_its_papers_z_for_50_workers_of_which_24_lie() -> None:
    # s = floor(50/2 + 1) - 24 = 2 honest ones must side with the liars.
    attack = attacks.LittleIsEnough(50, 24)
    assert attack.deviations == pytest.approx(1.43, abs=0.01)  # Phi^-1(24 / 26)


def test_alie_hides_within_the_spread_of_the_honest() -> None:
    forged = attacks.LittleIsEnough(50, 10).forge(OWN, HONEST, RNG)["w"]
    assert ((forged > STACK.min(axis=0)) & (forged < STACK.mean(axis=0))).all()
    assert attacks.LittleIsEnough(4, 1).deviations >= 0


def test_a_parameter_that_an_attack_does_not_have_is_told_those_it_has() -> None:
    with pytest.raises(BadParameter, match="flip: unknown parameter 'scal'; known are scale"):
        attacks.create("flip", {"scal": 3.0})
    with pytest.raises(BadParameter, match="zero: unknown parameter 'scale'; known are none"):
        attacks.create("zero", {"scale": 3.0})


def test_attacks_are_found_by_name() -> None:
    assert attacks.create("flip", {"scale": 3.0}) == attacks.SignFlip(3.0)
    for name, parameters, why in (
        ("nuke", {}, "there are zero, random, flip, alie, ipm"),
        ("flip", {"size": 1}, "size"),
        ("alie", {"clients": 4, "byzantine": 2}, "no minority"),
    ):
        with pytest.raises(BadParameter, match=why):
            attacks.create(name, parameters)
    with pytest.raises(ValueError, match="copies the honest clients"):
        attacks.InnerProduct().forge(OWN, [], RNG)
