# SPDX-License-Identifier: Apache-2.0
"""Clients with a deadline: how many epochs they have time for."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pytest

from fedml.federate.algorithm import create
from fedml.federate.application import UserTraining
from fedml.federate.local_sgd import LocalSGD
from fedml.federate.pace import Pace


class Clock:
    """Stands still, but for what a test says."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(time, "monotonic", found)
    return found


def test_before_the_first_training_all_epochs_are_tried() -> None:
    assert Pace().fitting(20, seconds=0.001) == 20


def test_as_many_epochs_fit_as_the_last_training_tells(clock: Clock) -> None:
    pace = Pace()
    with pace.measured(10):
        clock.now += 5.0
    assert [pace.fitting(10, s) for s in (0.1, 0.9, 1.0, 4.9, 5.0, 60.0)] == [1, 1, 2, 9, 10, 10]


def test_who_was_cut_off_tries_half_as_many_until_it_is_in_time(clock: Clock) -> None:
    # An epoch takes a second, and a round is over after three.
    pace, tried = Pace(), [16]
    while tried[-1] > 3:
        with _cut_off(), pace.measured(tried[-1]):
            clock.now += 3.0
            raise TimeoutError
        tried.append(pace.fitting(16, 3.0))
    assert tried == [16, 8, 4, 2]
    with pace.measured(2):
        clock.now += 2.0
    assert pace.fitting(16, 3.0) == 3


@contextmanager
def _cut_off() -> Iterator[None]:
    with suppress(TimeoutError):
        yield


class _Slow:
    """The user's file of a client that takes a second for each epoch, as its order is drawn."""

    takes_correction = True

    def __init__(self, model: Any, clock: Clock, epochs: int) -> None:
        self.model, self.clock = model, clock
        self.config = {"lr": 0.1, "batch_size": 4, "epochs": epochs}
        self.trainer = LocalSGD(loss="squared")

    def train(
        self, model: Any, data: Any, rng: np.random.Generator, correction: Any, changed: Any
    ) -> dict[str, float]:
        clock = self.clock

        class Rng:
            def permutation(self, count: int) -> Any:
                clock.now += 1.0
                return rng.permutation(count)

        return self.trainer(model, data, {**self.config, **changed}, Rng(), correction)  # type: ignore[arg-type]


def _update(clock: Clock, kind: str, epochs: int, deadline: float | None) -> tuple[Any, Any]:
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(12, 3)).astype(np.float32), rng.normal(size=(12, 1)).astype(np.float32)
    if kind == "dict":
        model: Any = {"w": np.zeros((3, 1), np.float32), "b": np.zeros(1, np.float32)}
        start = {name: array.copy() for name, array in model.items()}
    else:
        nn = pytest.importorskip("torch").nn
        model = nn.Linear(3, 1)
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        start = {"weight": np.zeros((1, 3), np.float32), "bias": np.zeros(1, np.float32)}
    local = UserTraining(_Slow(model, clock, epochs), model, (x, y), None, deadline)  # type: ignore[arg-type]
    algorithm = create("fednova", {})
    update = algorithm.client_update(start, {}, None, local, np.random.default_rng(7))  # type: ignore[attr-defined]
    return local, update


@pytest.mark.parametrize("kind", ["dict", "torch"])
def test_the_built_in_training_ends_with_the_last_epoch_that_fits(clock: Clock, kind: str) -> None:
    cut, update = _update(clock, kind, 10, clock.now + 3.5)
    assert cut.partial == 3
    _, whole = _update(clock, kind, 3, None)
    # What it sends is what a client sends that was asked for three: also FedNova's steps.
    assert update.metrics == whole.metrics
    for name, array in whole.arrays.items():
        np.testing.assert_array_equal(update.arrays[name], array)


def test_one_epoch_is_trained_even_without_time(clock: Clock) -> None:
    cut, _ = _update(clock, "dict", 10, clock.now - 1.0)
    assert cut.partial == 1


def test_who_is_through_in_time_is_not_counted_as_partial(clock: Clock) -> None:
    for deadline in (clock.now + 60.0, math.inf):
        done, _ = _update(clock, "dict", 4, deadline)
        assert done.partial is None
