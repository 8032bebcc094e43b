# SPDX-License-Identifier: Apache-2.0
"""How things are printed: tables for people, plain columns in a pipe, JSON for scripts."""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

Row = Mapping[str, Any]
# Heading (or name) -> how it is read out of what the broker has answered.
Columns = Mapping[str, Callable[[Row], str]]


# A name may hold what moves the cursor of whoever reads it, or renames his window.
_SHOWN = {code: f"^{chr(code ^ 64)}" for code in (*range(9), *range(11, 32), 127)}
_SHOWN |= dict.fromkeys(range(128, 160), "\N{REPLACEMENT CHARACTER}")


def print_list(found: Sequence[Row], columns: Columns, *, as_json: bool, empty: str) -> None:
    """What every `list` does; `empty` is said when there is nothing."""
    if as_json:
        click.echo(json.dumps(found))
    elif not found:
        click.echo(empty, err=True)
    else:
        rows = [[read(row).translate(_SHOWN) for read in columns.values()] for row in found]
        _print_table(list(columns), rows)


def print_thing(found: Row, facts: Columns, *, as_json: bool) -> None:
    """What every `show` does: a name and a value on each line."""
    if as_json:
        click.echo(json.dumps(found))
        return
    width = max(map(len, facts)) + 2
    for name, read in facts.items():
        if text := read(found).translate(_SHOWN):
            click.echo(f"{name:<{width}}" + text.replace("\n", "\n" + " " * width))


def _print_table(heads: list[str], rows: list[list[str]]) -> None:
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in heads:
            table.add_column(name, overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))  # what comes from elsewhere is no markup
        Console().print(table)
        return
    rows = [[cell.replace("\n", " ") for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in (heads, *rows)) for i in range(len(heads))]
    for line in (heads, *rows):
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        click.echo("  ".join(cells).rstrip())


def when(moment: float | None) -> str:
    """A time for people."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(moment)) if moment else "–"


def words(labels: Mapping[str, str]) -> str:
    """Labels for people."""
    return " ".join(f"{name}={value}" for name, value in sorted(labels.items())) or "–"
