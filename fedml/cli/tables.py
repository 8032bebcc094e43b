# SPDX-License-Identifier: Apache-2.0
"""How things are printed: tables for people, plain columns in a pipe, JSON for scripts."""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import click


def print_json(found: Any) -> None:
    """One line of JSON."""
    click.echo(json.dumps(found))


def worth_showing(metric: str) -> bool:
    """Whether people see it at once; of single groups of clients there may be hundreds."""
    return not metric.endswith(".examples") and not metric.startswith("groups.")


# A name or a cause may hold what moves the cursor of whoever reads it, or renames his window.
_SHOWN = {code: f"^{chr(code ^ 64)}" for code in (*range(9), *range(11, 32), 127)}
_SHOWN |= dict.fromkeys(range(128, 160), "\N{REPLACEMENT CHARACTER}")


def visible(text: str) -> str:
    """A text from elsewhere, whose control characters are shown and do nothing."""
    return text.translate(_SHOWN)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], empty: str) -> None:
    """Rows under a head; `empty` is said instead when there are none."""
    if not rows:
        click.echo(empty, err=True)
        return
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in columns:
            table.add_column(name, overflow="fold")
        for row in rows:
            table.add_row(*(_plain(visible(cell)) for cell in row))
        Console().print(table)
        return
    lines = [list(columns), *([visible(cell).replace("\n", " ") for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        click.echo("  ".join(cells).rstrip())


def print_facts(facts: Mapping[str, str]) -> None:
    """One thing: a name and a value on each line; a value of several lines is indented."""
    width = max(map(len, facts)) + 2
    for name, value in facts.items():
        click.echo(f"{name:<{width}}" + visible(value).replace("\n", "\n" + " " * width))


def _plain(cell: str) -> Any:
    """What comes from elsewhere is no markup of ours."""
    from rich.text import Text

    return Text(cell)


def when(moment: float | None) -> str:
    """A time for people."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(moment)) if moment else "–"


def duration(seconds: float | None) -> str:
    """How long something takes, for people: 0.4 s, 12 s, 3:05, 2:10:00."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def words(labels: Mapping[str, str]) -> str:
    """Labels for people."""
    return " ".join(f"{name}={value}" for name, value in sorted(labels.items())) or "–"


# Below this a transfer is over before anybody could read its bar.
_WORTH_A_BAR = 2_000_000


@contextlib.contextmanager
def transfer(what: str, *, at_once: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A bar of bytes for something that may take a while; nothing off a terminal.

    Gives the function that is to be called with the bytes moved so far and the bytes in all. With
    `at_once` there is a bar before that.
    """
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    bar = progress.add_task(what, total=None)

    def told(done: int, total: int) -> None:
        if total >= _WORTH_A_BAR:
            progress.start()
        progress.update(bar, completed=done, total=total or None)

    if at_once:
        progress.start()
    try:
        yield told
    finally:
        progress.stop()
