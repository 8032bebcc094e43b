# SPDX-License-Identifier: Apache-2.0
"""A federated run as it happens: a bar for the round at work, a row for each that is done.

A model's metrics come in two parts: those of the training and of central data when its round ends,
those of the devices during the next one. A row is printed when both are there.
"""

import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from fedml.cli.following import indented, users_part
from fedml.cli.job_view import noted
from fedml.cli.tables import duration, size, worth_showing

_SOURCES = ("devices", "central", "train")
_FIRST = ("accuracy", "loss")


@dataclass(slots=True)
class _Row:
    """One round, as far as it is known."""

    number: int
    began_at: float = 0.0
    ended_at: float | None = None
    asked: int = 0
    counted: int = 0
    refused: int = 0
    received_bytes: int = 0
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float | None:
        """How long it took."""
        return None if self.ended_at is None else self.ended_at - self.began_at


class RoundsView:
    """Shows the items of `Client.follow`; rows go to stdout, everything else to stderr."""

    def __init__(self, rounds: int) -> None:
        self._rounds = rounds
        self._names: list[str] = []
        self._rows: dict[int, _Row] = {}
        # Every metric that was seen, and those of them that have a column.
        self._known: set[str] | None = None
        self._head: list[str] = []
        # Messages whose traceback was shown, and who was last said to be away, in which round.
        self._told: set[str] = set()
        self._away = (0, "")
        self._half_lines: dict[tuple[str, str], str] = {}
        self._bar = _Bar(rounds)

    def show(self, item: dict[str, Any]) -> None:
        """One item."""
        if "event" in item:
            self._event(item["event"])
        elif "log" in item:
            self._log(item["log"])
        elif "round" in item:
            self._missing(item["round"], item["waiting"].partition("waiting for ")[2])
        elif item.get("waiting"):
            click.secho(f"waiting: {item['waiting']}", dim=True, err=True)

    def close(self) -> None:
        """Print what is left and take the bar away."""
        for number in sorted(self._rows):
            self._print(number)
        self._bar.close()
        for (name, _), text in self._half_lines.items():
            click.echo(f"[{name}] {text}", err=True)
        self._half_lines.clear()

    def has_told(self, cause: Mapping[str, Any]) -> bool:
        """Whether the traceback of such a cause has been shown; each client has the same one."""
        return any(cause["message"].endswith(message) for message in self._told)

    def _missing(self, numbers: dict[str, int], missing: str) -> None:
        """Who has not answered yet, such as ``one, two (offline)``."""
        self._bar.move(numbers, missing)
        # Not only late but away: nobody should have to guess why nothing happens.
        away = ", ".join([name for name in missing.split(", ") if name.endswith(")")][:5])
        if away and (numbers["number"], away) != self._away:
            self._away = (numbers["number"], away)
            click.secho(f"round {numbers['number']} waits for {away}", fg="yellow", err=True)

    # ------------------------------------------------------------------ events

    def _event(self, event: dict[str, Any]) -> None:
        kind, data = event["kind"], event["data"]
        if kind == "clients":
            self._names = data["names"]
            more = f" and {len(self._names) - 8} more" if len(self._names) > 8 else ""
            names = ", ".join(self._names[:8]) + more
            click.secho(f"{len(self._names)} clients: {names}", dim=True, err=True)
        elif kind == "round_begins":
            row = self._row(data["round"])
            row.began_at, row.asked = event["at"], data["clients"]
            if row.number:
                self._bar.begin(row.number, row.asked, self._seconds_left(row.number))
        elif kind == "metrics":
            self._row(data["round"]).metrics |= data["metrics"]
        elif kind == "round_ends":
            row = self._row(data["round"])
            row.ended_at = event["at"]
            row.counted, row.refused = data["replies"], data["refused"]
            row.received_bytes = data.get("received_bytes", 0)
            row.metrics = {**data["metrics"], **row.metrics}
            # The devices have evaluated the model before this one by now, if they do at all.
            self._print(row.number - 1)
        elif kind == "client_failed":
            self._client_failed(data)
        elif kind == "noted":
            click.secho(noted(data), fg="yellow", err=True)
        elif kind == "stopping":
            click.echo(f"{data['by']} stops the run", err=True)

    def _client_failed(self, data: dict[str, Any]) -> None:
        cause = data["cause"]
        text = f"round {data['round']}: {data['name']} failed: {cause['message']}"
        click.secho(text, fg="yellow", err=True)
        if cause["traceback"] and not self.has_told(cause):
            self._told.add(cause["message"])
            click.echo(indented(users_part(cause["traceback"])), err=True)

    def _log(self, log: dict[str, Any]) -> None:
        """What a worker printed, line by line, under the name of its device."""
        name = self._name(log["task"])
        text = self._half_lines.pop((name, log["stream"]), "") + log["text"]
        *lines, rest = text.split("\n")
        if rest:
            self._half_lines[name, log["stream"]] = rest
        for line in lines:
            click.echo(f"[{name}] {line}", err=True)

    def _name(self, task: str) -> str:
        client = task.rpartition("-")[2]
        known = client.isdigit() and int(client) < len(self._names)
        return self._names[int(client)] if known else task

    # ------------------------------------------------------------------ rows

    def _row(self, number: int) -> _Row:
        return self._rows.setdefault(number, _Row(number))

    def _seconds_left(self, number: int) -> float | None:
        done = [row.seconds for row in self._rows.values() if row.number and row.seconds]
        return sum(done) / len(done) * (self._rounds - number + 1) if done else None

    def _print(self, number: int) -> None:
        row = self._rows.get(number)
        if row is None or row.ended_at is None:
            return
        del self._rows[number]
        if number == 0 and not row.metrics:
            return  # nobody has evaluated the first model
        known = {name for r in (row, *self._rows.values()) for name in r.metrics}
        if self._known is None or not known <= self._known:
            self._known = known | (self._known or set())
            self._head = _chosen(self._known)
            click.secho(_line("round", [*self._head], "seconds", "clients", "refused", "received"))
        numbers = [_number(row.metrics.get(name)) for name in self._head]
        if row.number:
            took = f"{row.seconds or 0:.1f}"
            told = (f"{row.counted} of {row.asked}", str(row.refused), size(row.received_bytes))
        else:
            took, told = "–", ("–", "–", "–")
        widths = [max(len(name), 8) for name in self._head]
        cells = [cell.rjust(width) for cell, width in zip(numbers, widths, strict=True)]
        click.echo(_line(str(row.number), cells, took, *told))


class _Bar:
    """The round at work, on a terminal; otherwise nothing."""

    def __init__(self, rounds: int) -> None:
        self._rounds = rounds
        self._number = 0
        self._progress: Progress | None = None

    def begin(self, number: int, asked: int, seconds_left: float | None) -> None:
        """Another round."""
        if not sys.stderr.isatty():
            return
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.completed} of {task.total} clients"),
                TextColumn("{task.fields[received]}"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}", style="dim"),
                TextColumn("{task.fields[missing]}", style="dim", markup=False),
                console=Console(stderr=True),
                # Where stdout is a file, what is printed there is none of the bar's business.
                redirect_stdout=sys.stdout.isatty(),
                transient=True,
            )
            self._progress.add_task("", total=asked, received="", left="", missing="")
            self._progress.start()
        bar = self._progress.task_ids[0]
        last = number > self._rounds
        title = "last evaluation" if last else f"round {number} of {self._rounds}"
        self._number = number
        left = "" if seconds_left is None or last else f"about {duration(seconds_left)} left"
        # At once, or the new round is drawn with what the one before has received.
        self._progress.reset(
            bar, total=asked, description=title, received="", left=left, missing=""
        )

    def move(self, numbers: dict[str, int], missing: str) -> None:
        """Somebody has answered; `missing` names those who have not."""
        if self._progress is not None and numbers["number"] == self._number:
            self._progress.update(
                self._progress.task_ids[0],
                completed=numbers["answered"],
                received=size(numbers["received_bytes"]),
                missing=f"waiting for {missing}" if missing and missing.count(",") < 2 else "",
            )

    def close(self) -> None:
        """Give the terminal back."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _chosen(names: set[str]) -> list[str]:
    """The columns: accuracy and loss first, and no more than the terminal has room for."""

    def rank(name: str) -> tuple[int, int, str]:
        source, _, metric = name.partition(".")
        first = _FIRST.index(metric) if metric in _FIRST else len(_FIRST)
        return first, _SOURCES.index(source) if source in _SOURCES else len(_SOURCES), name

    chosen = sorted(filter(worth_showing, names), key=rank)  # `--json` has them all
    if sys.stdout.isatty():
        room = shutil.get_terminal_size().columns - len(_line("", [], "", "", "", ""))
        while len(chosen) > 2 and sum(max(len(name), 8) + 2 for name in chosen) > room:
            chosen.pop()
    return chosen


def _line(number: str, metrics: list[str], took: str, clients: str, refused: str, got: str) -> str:
    middle = "".join(f"  {cell:>8}" for cell in metrics)
    return f"{number:>5}{middle}  {took:>7}  {clients:>10}  {refused:>7}  {got:>9}"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    plain = value == 0 or 1e-3 <= abs(value) < 1e4
    return f"{value:.4f}" if plain else f"{value:.3g}"
