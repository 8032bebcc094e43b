# SPDX-License-Identifier: Apache-2.0
"""Published numbers beside ours: what is kept, what is written, and when it says that we differ."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from benchmarks import reproduce
from benchmarks.published.claims import CLAIMS, Claim
from fedml.simulation.plan import read


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Results of these tests go here, not among the real ones."""
    monkeypatch.setattr(reproduce, "KEPT", tmp_path)
    path = tmp_path / "results.json"
    monkeypatch.setattr(reproduce, "RESULTS", path)
    return path


def claim(**changes: Any) -> Claim:
    settings: dict[str, Any] = {
        "name": "pi",
        "claim": "pi",
        "source": "Archimedes",
        "published": 3.14,
        "digits": 2,
        "measure": lambda seed, folder: 3.1,
        "seeds": 3,
    }
    return Claim(**(settings | changes))


def found(*values: float) -> dict[str, dict[str, Any]]:
    more = {"minutes": 0.5, "date": "2026-01-01", "machine": "m", "versions": "v"}
    return {str(seed): {"value": value, **more} for seed, value in enumerate(values, 1)}


def test_a_run_that_was_broken_off_measures_only_what_is_missing() -> None:
    asked: list[int] = []

    def broken(seed: int, folder: Path) -> float:
        asked.append(seed)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return float(seed)

    with pytest.raises(KeyboardInterrupt):
        reproduce.measure([claim(measure=broken)], None, reproduce.load())
    again = reproduce.load()
    reproduce.measure([claim(measure=broken)], None, again)
    assert asked == [1, 2, 2, 3]
    assert [one["value"] for one in reproduce.load()["pi"].values()] == [1.0, 2.0, 3.0]


def test_what_has_no_randomness_is_measured_once_whatever_is_asked() -> None:
    results = reproduce.load()
    reproduce.measure([claim(seeds=1)], 5, results)
    assert list(results["pi"]) == ["1"]


def test_a_claim_whose_library_is_missing_is_left_out_and_the_next_measured(capsys) -> None:
    def absent(seed: int, folder: Path) -> float:
        raise ModuleNotFoundError("pip install it")

    results = reproduce.load()
    reproduce.measure([claim(measure=absent), claim(name="e")], 1, results)
    assert "pip install it" in capsys.readouterr().out
    assert results["pi"] == {}
    assert list(results["e"]) == ["1"]


@pytest.mark.parametrize("split", ["iid", "dirichlet"])
def test_the_long_ones_are_run_files_that_fedml_simulate_takes(split: str) -> None:
    (shown,) = (each.command for each in CLAIMS if each.name == f"lenet-{split}")
    source = shown.removeprefix("fedml simulate ").partition(" ")[0]
    plan = read(reproduce.ROOT / source)
    assert (plan.rounds, plan.clients, plan.per_round) == (50, 10, 10)
    assert plan.config["split"] == split
    assert {"epochs": 10, "batch_size": 64, "momentum": 0.9}.items() <= plan.config.items()


def test_the_minutes_of_a_simulation_that_went_on_are_those_of_all_its_parts(tmp_path) -> None:
    assert reproduce.spent(tmp_path, 7.0) == 7.0
    with contextlib.closing(sqlite3.connect(tmp_path / "results.sqlite")) as database:
        database.execute("create table rounds (wall_s real)")
        database.executemany("insert into rounds values (?)", [(100.0,), (250.0,)])
        database.commit()
    assert reproduce.spent(tmp_path, 7.0) == 250.0


def test_a_row_tells_mean_spread_and_seeds_and_what_was_not_run() -> None:
    text = reproduce.row(claim(), found(3.13, 3.15))
    assert text.startswith("| pi | Archimedes | 3.14 | 3.14 ± 0.01 | 2 | 0.5 |")
    assert "not run here yet" in reproduce.row(claim(), {})


@pytest.mark.parametrize(
    ("changes", "values", "same"),
    [
        ({}, [3.1412], True),  # in its digits
        ({}, [3.15], False),
        ({"spread": 0.1}, [3.33], True),  # within two of theirs
        ({"spread": 0.1}, [3.35], False),
        ({}, [3.2, 3.1, 3.3], True),  # within two of ours
        ({}, [3.5, 3.51, 3.52], False),
    ],
)
def test_ours_differs_beyond_two_standard_deviations(changes, values, same) -> None:
    text = reproduce.row(claim(**changes), found(*values))
    assert ("differs" not in text) is same


def test_the_page_in_the_repository_has_every_claim_as_it_stands() -> None:
    written = reproduce.PAGE.read_text()
    assert len({each.name for each in CLAIMS}) == len(CLAIMS)
    for each in CLAIMS:
        start = reproduce.row(each, {}).partition(" | not run here yet")[0]
        assert start in written, f"{each.name}: run `python -m benchmarks.reproduce --write`"
        assert not each.note or each.note in written
