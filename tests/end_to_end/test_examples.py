# SPDX-License-Identifier: Apache-2.0
"""Every example on its real data: simulated, and on machines; each must beat a guess.

A guess knows the training data and nothing of the one asked about: the most frequent class, or
each film's mean. The first rounds of the examples' own run files are what runs here.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import fedml
from fedml import api, data
from fedml.errors import RunFailed
from fedml.simulation import ClientFailed
from tests.place import Place

EXAMPLES = Path(__file__).parents[2] / "examples"
Load = Callable[[str], data.Dataset[Any]]

# Folder, data set, rounds, metric, and how far the guess must be left behind.
RUNS = [
    ("fashion_mnist", "fashion-mnist", 5, "central.accuracy", 0.5),
    ("heart", "heart", 10, "devices.accuracy", 0.2),
    ("mnist", "mnist-5k", 5, "central.accuracy", 0.5),
    ("text", "reuters-r8", 5, "central.accuracy", 0.35),
    ("text", "20news", 5, "central.accuracy", 0.4),
    ("cora", "cora", 12, "central.accuracy", 0.2),
    ("movielens", "movielens-100k", 5, "devices.rmse", 0.05),
]


def _guess(loaded: data.Dataset[Any]) -> float:
    """The accuracy, or the root of the mean squared error, of a guess."""
    train, test = loaded.train, loaded.test
    if loaded.name != "movielens-100k":
        return float((test.y == np.bincount(train.y).argmax()).mean())
    rated, times = np.bincount(train.item, train.y, train.items), np.bincount(train.item)
    films = (rated + train.y.mean()) / (np.resize(times, train.items) + 1)
    return float(np.sqrt(np.mean((films[test.item] - test.y) ** 2)))


def _run_file(folder: str, into: Path, **other: Any) -> Path:
    """The example's own run file, but for a few keys."""
    said = yaml.safe_load((EXAMPLES / folder / "run.yaml").read_text())
    config = {**said.get("config", {}), **other.pop("config", {})}
    file = into / "run.yaml"
    text = {**said, "workspace": str(EXAMPLES / folder), "config": config, **other}
    file.write_text(yaml.safe_dump(text))
    return file


@pytest.mark.parametrize(("folder", "name", "rounds", "metric", "better"), RUNS)
def test_the_example_learns_in_a_simulation(
    folder: str,
    name: str,
    rounds: int,
    metric: str,
    better: float,
    real: Load,
    data_home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    guessed = _guess(real(name))
    monkeypatch.setenv("FEDML_HOME", str(data_home))
    config = {"texts": name} if folder == "text" else {}

    result = fedml.simulate(_run_file(folder, tmp_path, rounds=rounds, config=config))

    learned = result.metrics[metric]
    gained = guessed - learned if metric.endswith("rmse") else learned - guessed
    assert gained > better, f"{metric} {learned:.3f}, guessed {guessed:.3f}"


def test_each_example_says_what_brings_its_data_and_what_it_reaches_as_the_page_does() -> None:
    page = (EXAMPLES.parent / "docs" / "simulate.md").read_text()
    rows = re.findall(r"^\| \[`(\w+)`\]\(\.\./(\S+)\) \| `([\w-]+)`[^|]* \|(.*)\|$", page, re.M)
    assert {row[0] for row in rows} == {path.parent.name for path in EXAMPLES.glob("*/run.yaml")}
    for folder, file, name, cells in rows:
        said = yaml.safe_load((EXAMPLES / folder / "run.yaml").read_text())
        assert file == f"examples/{folder}/{said['app']}"
        docstring = (EXAMPLES.parent / file).read_text().split('"""')[1]
        ways = [way.partition(" --home")[0] for way in data.describe(name).how_to_get]
        assert any(way in docstring for way in ways), folder
        assert f"fedml simulate examples/{folder}/run.yaml" in docstring
        for number in re.findall(r"\d+\.\d+", "|".join(cells.split("|")[1:3])):
            assert number in docstring, f"{folder}: {number}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Four machines and a broker; nobody has fetched anything yet."""
    with Place(tmp_path_factory.mktemp("place")) as place:
        for name in ("north", "east", "south", "west"):
            place.agent(name)
        yield place


@contextlib.contextmanager
def _fetched(place: Place, data_home: Path) -> Iterator[None]:
    """As if somebody had run `fedml data fetch` on each machine and on the broker's."""
    links = [home / "data" for home in (place.home, *(a.home for a in place.agents.values()))]
    for link in links:
        link.symlink_to(data_home / "data")
    try:
        yield
    finally:
        for link in links:
            link.unlink()


@pytest.mark.parametrize(
    ("folder", "name", "rounds", "metric", "better"),
    [
        ("text", "reuters-r8", 3, "central.accuracy", 0.3),
        ("cora", "cora", 8, "central.accuracy", 0.1),
        ("movielens", "movielens-100k", 3, "devices.rmse", 0.05),
    ],
)
def test_the_example_learns_on_four_machines(
    place: Place,
    folder: str,
    name: str,
    rounds: int,
    metric: str,
    better: float,
    real: Load,
    data_home: Path,
    tmp_path: Path,
) -> None:
    guessed = _guess(real(name))
    file = _run_file(folder, tmp_path, rounds=rounds, evaluate={"every": rounds})
    with _fetched(place, data_home):
        run = api.federate(file, home=place.folder / "me").wait(check=True)
    learned = run.metrics[-1][metric]
    gained = guessed - learned if metric.endswith("rmse") else learned - guessed
    assert gained > better, f"{metric} {learned:.3f}, guessed {guessed:.3f}"


def test_a_set_that_is_missing_is_named_with_the_command_for_that_machine(
    place: Place, tmp_path: Path
) -> None:
    agents = [agent.home for agent in place.agents.values()]
    for folder, name, where, homes in (
        ("heart", "heart", "", agents),
        ("text", "reuters-r8", "on the broker: ", [place.home]),
    ):
        file = _run_file(folder, tmp_path, rounds=1)
        with pytest.raises(RunFailed) as caught:
            api.federate(file, home=place.folder / "me").wait(check=True)
        said = str(caught.value)
        missing = f"{where}{name} is not on this machine; run: fedml data fetch {name} --home"
        assert any(f"{missing} {home}, or: pip install" in said for home in homes), said
        assert "Traceback" not in said


def test_a_set_that_is_missing_in_a_simulation_is_said_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDML_HOME", str(tmp_path))
    with pytest.raises(ClientFailed, match=f"run: fedml data fetch heart --home {tmp_path}") as one:
        fedml.simulate(EXAMPLES / "heart" / "run.yaml")
    assert one.value.traceback == ""
