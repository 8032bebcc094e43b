# SPDX-License-Identifier: Apache-2.0
"""Shared memory: boards of arrays, and shelves of clients' data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedml.data.dataset import Examples
from fedml.errors import RunFailed
from fedml.federate.layout import Spec
from fedml.simulation import simulate
from fedml.simulation.arena import Board, Shelf
from tests.fedml.simulation import apps

ROOM = 1 << 24


@dataclass
class Mine:
    rows: Any
    text: str


def test_two_boards_on_one_file_see_the_same(tmp_path: Path) -> None:
    specs = {
        "w": Spec((3, 5), np.dtype(np.float32)),
        "none": Spec((0, 4), np.dtype(np.float64)),
        "steps": Spec((), np.dtype(np.int64)),
    }
    one, other = Board(tmp_path / "b", specs, create=True), Board(tmp_path / "b", specs)
    w = np.arange(15, dtype=np.float32).reshape(3, 5)
    one.write({"w": w, "none": np.empty((0, 4)), "steps": np.array(7)})
    np.testing.assert_array_equal(other.arrays["w"], w)
    assert other.arrays["steps"] == 7
    other.arrays["w"][0, 0] = 9
    assert one.arrays["w"][0, 0] == 9
    assert all(array.ctypes.data % 64 == 0 for array in one.arrays.values() if array.size)
    with pytest.raises(TypeError):
        one.write({"w": w.astype(np.float64), "none": np.empty((0, 4)), "steps": np.array(7)})


def test_a_board_that_does_not_fit_is_an_error_and_no_signal(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="no room for"):
        Board(tmp_path / "b", {"w": Spec((1 << 50,), np.dtype(np.float64))}, create=True)


@pytest.mark.parametrize(
    "thing",
    [
        np.arange(12.0).reshape(3, 4).T,
        {"x": np.ones((2, 3), np.float32), "y": [1, 2], "name": "heart"},
        (np.zeros(0), "nothing"),
        Examples(x=np.ones((5, 2), np.float32), y=np.arange(5)),
        Mine(rows=np.arange(9), text="own class"),
        ["words", "of", "one", "client"],
        {"x": torch.arange(6.0).reshape(2, 3), "y": torch.tensor([1, 0])},
    ],
)
def test_what_one_process_puts_another_gets_in_shared_memory(thing: Any, tmp_path: Path) -> None:
    writer, reader = Shelf(tmp_path, "data-1", ROOM), Shelf(tmp_path, "data-2", ROOM)
    writer.put(np.ones(3))
    place = writer.put(thing)
    assert place is not None
    assert _plain(reader.get(place)) == _plain(thing)
    # Arrays are views of the file: what one writes, the other sees.
    if isinstance(thing, dict) and isinstance(thing["x"], np.ndarray):
        reader.get(place)["x"][0, 0] = 42
        assert writer.get(place)["x"][0, 0] == 42


def test_what_cannot_be_taken_apart_or_does_not_fit_stays_in_its_process(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, "data-1", 4096)
    assert shelf.put(lambda: None) is None
    assert shelf.put(np.zeros(4096)) is None
    place = shelf.put(np.arange(100))
    assert place is not None
    np.testing.assert_array_equal(shelf.get(place), np.arange(100))


def test_what_clients_share_is_not_stored_once_for_each(tmp_path: Path) -> None:
    everything = np.ones((1000, 100))
    shelf = Shelf(tmp_path, "data-1", ROOM)
    assert shelf.put({"of": everything, "rows": [1]}) is not None
    assert shelf.put({"of": everything, "rows": [2]}) is None
    mapped = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (1000, 100))
    assert Shelf(tmp_path, "data-2", ROOM).put({"x": mapped[:500]}) is None


def test_memory_that_runs_short_costs_time_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = {
        "app": apps.write(tmp_path, apps.LINEAR).name,
        "workspace": str(tmp_path),
        "rounds": 20,
        "config": {"lr": 0.1},
        "clients": {"count": 9, "per_round": 6},
    }
    calm = simulate(plan, debug=True)
    monkeypatch.setattr("fedml.simulation.member._resident", lambda: 1 << 60)
    monkeypatch.setattr("fedml.simulation.member._LOOK_EVERY", 1)
    monkeypatch.setattr("fedml.simulation.arena.Shelf.put", lambda *_: None)
    tight = simulate(plan, debug=True)
    assert all(np.array_equal(calm.model[n], tight.model[n]) for n in calm.model)


def _plain(thing: Any) -> Any:
    if isinstance(thing, np.ndarray | torch.Tensor):
        return str(thing.dtype), thing.tolist()
    if isinstance(thing, dict):
        return {key: _plain(value) for key, value in thing.items()}
    if isinstance(thing, tuple | list):
        return [_plain(value) for value in thing]
    if isinstance(thing, Examples):
        return _plain(thing.x), _plain(thing.y)
    if isinstance(thing, Mine):
        return _plain(thing.rows), thing.text
    return thing
