# SPDX-License-Identifier: Apache-2.0
"""Writes the table of algorithms in `federate.md` anew, from the classes and their docstrings.

python docs/generate.py            after an algorithm was added or its parameters have changed
python docs/generate.py --check    ends with 1 when the page does not fit the code
"""

import argparse
import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from fedml.federate import algorithm
from fedml.federate.algorithm import Algorithm, Kind, Need

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "federate.md"
BEGIN, END = "<!-- of docs/generate.py -->\n", "<!-- until here -->\n"

# What `needs` does not say: it depends on a parameter, or is asked for when training has ended.
_ASKS = {
    "fedasync": "a `correction` if `rho` > 0",
    "fednova": "`steps`, `lr`, `momentum`; a `correction` if `mu` > 0",
    "scaffold": "a `correction`, `steps`, `lr`, `momentum`",
}


def rows() -> Iterator[str]:
    """The table, line by line."""
    yield "| name | parameters (default) | from | asks of `train` | example |"
    yield "|---|---|---|---|---|"
    names = sorted(algorithm.names(), key=lambda name: (_created(name).kind is not _FIRST, name))
    for name in names:
        one = _created(name)
        kind = "" if one.kind is _FIRST else ", without rounds"
        example = f"[`{name}.yaml`](../examples/algorithms/{name}.yaml)"
        cells = [f"`{name}`{kind}", _parameters(one), _source(one), _asks(one), example]
        yield f"| {' | '.join(cells)} |"


_FIRST = Kind.SYNCHRONOUS


def _created(name: str) -> Algorithm:
    return algorithm.create(name)


def _parameters(one: Algorithm) -> str:
    return ", ".join(f"`{f.name}` ({_shown(f.default)})" for f in dataclasses.fields(one))  # type: ignore[arg-type]


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def _source(one: Algorithm) -> str:
    """First author and year, of the class where it has a paper of its own, else of the module."""
    own = re.search(r"\(([A-Z]\w+) et al\.,? (\d{4})\)", type(one).__doc__ or "")
    if own is not None:
        return f"{own[1]} {own[2]}"
    paper = (sys.modules[type(one).__module__].__doc__ or "").split("\n\n")[1]
    year = re.search(r"\b20\d\d\b", paper)
    if year is None:
        raise SystemExit(f"the head of {type(one).__module__} names no paper with its year")
    return f"{paper.split(',')[0]} {year[0]}"


def _asks(one: Algorithm) -> str:
    if one.name in _ASKS:
        return _ASKS[one.name]
    if Need.GRADIENT in one.needs:
        return "the built-in training"
    return "a `correction`" if Need.CORRECTION in one.needs else "nothing"


def page() -> str:
    """The page as it should be."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{PAGE} has no place for the table")
    return before + BEGIN + "\n" + "".join(f"{row}\n" for row in rows()) + "\n" + END + after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        PAGE.write_text(page())
    elif PAGE.read_text() != page():
        raise SystemExit("docs/federate.md does not fit the algorithms: python docs/generate.py")


if __name__ == "__main__":
    main()
