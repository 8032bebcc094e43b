# SPDX-License-Identifier: Apache-2.0
"""Training by two names: what is said of each data set is so, and a model of each kind learns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedml import data, named
from fedml.data.stand_in import nearest
from fedml.federate.application import Client
from fedml.named import sgd
from fedml.simulation import simulate

Load = Callable[[str], data.Dataset[Any]]


@pytest.fixture(autouse=True)
def _at_home(data_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fetched archives are found, and nothing is remembered from one test to the next."""
    monkeypatch.setenv("FEDML_HOME", str(data_home))
    yield
    named.loaded.cache_clear()
    named.divided.cache_clear()


@pytest.mark.parametrize("name", named.SHAPES)
def test_every_shape_is_that_of_the_data(name: str, real: Load) -> None:
    real(name)
    shape, dataset = named.SHAPES[name], named.loaded(name)
    for part in (dataset.train, dataset.test):
        assert part.x[0].size == shape.inputs
        assert part.y.dtype == np.int64
        assert 0 <= part.y.min() <= part.y.max() < shape.classes
    if shape.side:
        assert part.x.shape[1:] == (1, shape.side, shape.side)


@pytest.mark.parametrize(
    ("dataset", "model", "better"),
    [
        ("digits", "lr", 0.85),
        ("digits", "mlp", 0.8),
        ("heart", "lr", 0.75),
        ("digits", "cnn", 0.85),
    ],
)
def test_a_model_by_name_learns(dataset: str, model: str, better: float, real: Load) -> None:
    real(dataset)
    workspace = Path(sgd.__file__).parent
    config = {"dataset": dataset, "model": model, "lr": 0.1, "batch_size": 16, "epochs": 2}
    run = {"app": "sgd.py", "workspace": str(workspace), "rounds": 12, "clients": {"count": 4},
           "config": config, "evaluate": {"devices": False, "every": 12}}  # fmt: skip
    assert simulate(run, workers=1).metrics["central.accuracy"] > better


def test_hospitals_are_the_clients_where_there_are_enough(real: Load) -> None:
    real("heart")
    config = {"dataset": "heart", "model": "lr", "local_test": True}
    owners = []
    for index in range(4):
        mine = named.data(Client(index=index, count=4), config)
        assert len(np.unique(mine.train.client)) == 1
        assert set(mine.test.client) == set(mine.train.client)
        owners.append(int(mine.train.client[0]))
    assert sorted(owners) == [0, 1, 2, 3]
    assert sum(len(p) for p in named.divided("heart", "hetero", 9, 0.5, 0)) == 613


def test_the_nearest_is_taken_in_order_and_never_silently() -> None:
    assert nearest("heart", lambda name: True) == ("heart", "", False)
    used, note, differs = nearest("mnist", lambda name: True)
    assert (used, differs) == ("mnist-5k", True)
    assert "5,000 of its 70,000" in note
    assert nearest("fmnist", lambda name: True)[2] is False
    used, note, differs = nearest("mnist", lambda name: name == "digits")
    assert (used, differs) == ("digits", True)
    assert "fedml data fetch mnist-5k" in note
