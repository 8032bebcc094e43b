# SPDX-License-Identifier: Apache-2.0
"""The same run with some values varied: every combination, one folder each, one table for all."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedml import yamlfile
from fedml.errors import ConfigError
from fedml.simulation import report
from fedml.simulation.plan import read
from fedml.simulation.result import Listener, Result
from fedml.simulation.run import Simulation


@dataclass(frozen=True, slots=True)
class Point:
    """One combination and what came of it.

    Attributes:
        changes: Key to value, as in `plan.read`.
        result: Of its run.
    """

    changes: Mapping[str, Any]
    result: Result

    @property
    def label(self) -> str:
        """``lr=0.1 seed=2``."""
        return label(self.changes)


def label(changes: Mapping[str, Any]) -> str:
    """``lr=0.1 seed=2``."""
    return " ".join(f"{key}={value}" for key, value in changes.items())


def parse(texts: Sequence[str]) -> list[dict[str, Any]]:
    """Every combination of ``KEY=VALUE,VALUE,…``; a value is read as YAML reads it.

    Raises:
        ConfigError: A text is not of that form, or a key is there twice.
    """
    axes: dict[str, list[Any]] = {}
    for text in texts:
        key, sign, values = text.partition("=")
        if not sign or not key or not values:
            raise ConfigError(f"--sweep {text}: not KEY=VALUE,VALUE", "as in --sweep lr=0.01,0.1")
        if key in axes:
            raise ConfigError(f"--sweep: {key} is there twice")
        try:
            axes[key] = [yaml.load(value, yamlfile.Loader) for value in values.split(",")]  # noqa: S506 - a safe one
        except yaml.YAMLError as error:
            raise ConfigError(f"--sweep {text}: {error}") from error
    return [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]


def sweep(
    source: Path | str | Mapping[str, Any],
    points: Sequence[Mapping[str, Any]],
    *,
    out: Path,
    listener: Callable[[Mapping[str, Any]], Listener],
    resume: bool = False,
    **settings: Any,
) -> list[Point]:
    """Run every point, each in a folder of its own below ``out``; one report for all.

    Args:
        source: The run file.
        points: From `parse`.
        out: Where all of it goes.
        listener: Makes one for each point.
        resume: Go on where an earlier sweep was stopped; finished points are not run again.
        **settings: As for `plan.read`.
    """
    # All are checked before the first is run.
    plans = [read(source, changes=changes, **settings) for changes in points]
    done: list[Point] = []
    folders: dict[str, Path] = {}
    for plan, changes in zip(plans, points, strict=True):
        folder = out / label(changes).replace(" ", ",").replace("/", "_")
        folders[label(changes)] = folder
        run = Simulation(plan, folder=folder, resume=resume, listener=listener(changes))
        done.append(Point(changes, run.run()))
        report.write(folder)
    report.write(out, folders)
    return done


def table(points: Sequence[Point]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: what was varied, then the latest metrics."""
    keys = list(points[0].changes)
    names = [
        name
        for name in sorted({name for point in points for name in point.result.metrics})
        if not name.endswith(".examples") and not name.startswith("groups.")
    ]
    rows = [
        [str(point.changes[key]) for key in keys]
        + [f"{m:.4f}" if (m := point.result.metrics.get(n)) is not None else "" for n in names]
        for point in points
    ]
    return keys + names, rows
