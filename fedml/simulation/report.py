# SPDX-License-Identifier: Apache-2.0
"""A results file as pictures: report.html, whole in itself, and report.png where matplotlib is.

    accuracy, loss     every metric of that kind, by round
    bytes              moved until then, both directions, all clients
    epsilon            where a metric of that name is there
    accuracy by time   where devices are simulated: what compares algorithms

Several runs (a sweep) share each picture, one colour a run.
"""

from __future__ import annotations

import html
import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedml.simulation.record import Record

_WIDTH, _HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 20, 14, 40
_POINTS = 500
# Okabe and Ito's colours, which people with any kind of colour vision tell apart.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")
_DASHES = ("", "6 3", "2 3", "8 3 2 3")

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width">
<style>
:root {{ color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif; }}
body {{ max-width: 1200px; margin: 2em auto; padding: 0 1em; }}
figure {{ display: inline-block; margin: 0 1em 1.5em 0; vertical-align: top; }}
figcaption {{ font-weight: 600; }}
svg {{ max-width: 100%; height: auto; font-size: 12px; }}
svg text {{ fill: currentColor; }} .grid {{ stroke: currentColor; opacity: .15; }}
.key {{ font-size: 13px; max-width: {width}px; }} .key span {{ margin-right: 1em; }}
td, th {{ padding: .15em .9em .15em 0; text-align: left; }} td.n {{ text-align: right; }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


@dataclass(frozen=True, slots=True)
class Line:
    """One curve."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    dash: int = 0


@dataclass(frozen=True, slots=True)
class Chart:
    """One picture."""

    title: str
    x: str
    y: str
    lines: Sequence[Line] = field(default_factory=tuple)


def write(folder: Path, runs: Mapping[str, Path] | None = None) -> Path:
    """Write the report into ``folder``; the path of the page.

    Args:
        folder: Where it goes, and where the results are unless ``runs`` says otherwise.
        runs: Folders of results by label, for several runs in one report.
    """
    read = {label: _read(each) for label, each in (runs or {"": folder}).items()}
    charts = list(_charts({label: rows for label, (rows, _) in read.items()}))
    every = [facts for _, facts in read.values()]
    # Of several runs, what is true of all of them.
    facts = {
        key: value for key, value in every[0].items() if all(f.get(key) == value for f in every)
    }
    title = str(facts.get("name", "simulation"))
    if len(read) == 1:
        title += f": {facts.get('algorithm', '')}"
    body = [_facts(facts)]
    body += [_figure(chart) for chart in charts]
    body.append(_last(read))
    page = folder / "report.html"
    text = _PAGE.format(title=html.escape(title), body="\n".join(body), width=_WIDTH)
    page.write_text(text, encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is not None:
        _png(charts, title, folder / "report.png")
    return page


def _read(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    record = Record(folder)
    try:
        return record.rounds(), record.facts()
    finally:
        record.close()


def _charts(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[Chart]:
    # Of single groups of clients there may be hundreds; the table has them.
    keys = {key for rows in runs.values() for row in rows for key in row}
    names = {key for key in keys if not key.startswith("groups.")}
    for kind, title in (("accuracy", "Accuracy"), ("loss", "Loss"), ("epsilon", "Epsilon")):
        chosen = sorted(name for name in names if name.rpartition(".")[2] == kind)
        if chosen:
            yield Chart(title, "round", kind, list(_lines(runs, chosen, "round")))
    timed = any(row["simulated_s"] is not None for rows in runs.values() for row in rows)
    accuracies = sorted(name for name in names if name.endswith(".accuracy"))
    if timed and accuracies:
        lines = list(_lines(runs, accuracies, "simulated_s"))
        yield Chart("Accuracy by simulated time", "seconds", "accuracy", lines)
    moved = []
    for colour, (label, rows) in enumerate(runs.items()):
        total, points = 0.0, []
        for row in rows:
            total += (row["bytes_down"] + row["bytes_up"]) / 1e6
            points.append((float(row["round"]), total))
        moved.append(Line(label or "all clients", points, colour))
    yield Chart("Megabytes moved", "round", "MB", moved)


def _lines(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], names: Sequence[str], x: str
) -> Iterator[Line]:
    several = len(runs) > 1
    for colour, (label, rows) in enumerate(runs.items()):
        for place, name in enumerate(names):
            points = [
                (float(row[x]), float(row[name]))
                for row in rows
                if row.get(name) is not None and row.get(x) is not None
            ]
            points = [point for point in points if math.isfinite(point[1])]
            if points:
                shown = f"{label} {name}" if several else name
                yield Line(shown, points, colour if several else place, place if several else 0)


def _figure(chart: Chart) -> str:
    lines = [Line(line.name, _thinned(line.points), line.colour, line.dash) for line in chart.lines]
    points = [point for line in lines for point in line.points]
    if not points:
        return ""
    xs, ys = _ticks([x for x, _ in points]), _ticks([y for _, y in points])
    inner_w, inner_h = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (x - xs[0]) / (xs[-1] - xs[0]) * inner_w,
            _TOP + (1 - (y - ys[0]) / (ys[-1] - ys[0])) * inner_h,
        )

    size = f'width="{_WIDTH}" height="{_HEIGHT}"'
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" {size} role="img">']
    bottom = _HEIGHT - _BOTTOM
    for x in xs:
        px = at(x, ys[0])[0]
        parts.append(f'<line class="grid" x1="{px:.1f}" x2="{px:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(
            f'<text x="{px:.1f}" y="{bottom + 16}" text-anchor="middle">{_short(x)}</text>'
        )
    for y in ys:
        py = at(xs[0], y)[1]
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{py:.1f}" y2="{py:.1f}"/>'
            f'<text x="{_LEFT - 6}" y="{py + 4:.1f}" text-anchor="end">{_short(y)}</text>'
        )
    middle = _LEFT + inner_w / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{chart.x}</text>')
    for line in lines:
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in (at(*point) for point in line.points))
        colour, dash = _COLOURS[line.colour % len(_COLOURS)], _DASHES[line.dash % len(_DASHES)]
        parts.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="1.8" '
            f'stroke-dasharray="{dash}" points="{path}">'
            f"<title>{html.escape(line.name)}: {line.points[-1][1]:.5g}</title></polyline>"
        )
    parts.append("</svg>")
    key = "".join(
        f'<span style="color:{_COLOURS[line.colour % len(_COLOURS)]}">'
        f"{'┅' if line.dash else '━'} {html.escape(line.name)}</span>"
        for line in lines
    )
    return (
        f"<figure><figcaption>{html.escape(chart.title)}</figcaption>"
        f"{''.join(parts)}<div class=key>{key}</div></figure>"
    )


def _facts(facts: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(key)}<td>{html.escape(str(value))}"
        for key, value in facts.items()
        if key != "name" and value not in ({}, [], None)
    )
    return f"<table>{rows}</table>"


def _last(read: Mapping[str, tuple[list[dict[str, Any]], dict[str, Any]]]) -> str:
    """The latest value of each metric, a column a run."""
    latest: dict[str, dict[str, float]] = {}
    for label, (rows, _) in read.items():
        for row in rows:
            for name, value in row.items():
                if "." in name and value is not None:
                    latest.setdefault(name, {})[label] = value
    heads = "".join(f"<th>{html.escape(label) or 'latest'}" for label in read)
    lines = "".join(
        f"<tr><th>{html.escape(name)}"
        + "".join(f"<td class=n>{_number(values.get(label))}" for label in read)
        for name, values in sorted(latest.items())
    )
    return f"<table><tr><th>{heads}{lines}</table>"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.5g}"


def _thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """At most some hundred points, the last one among them."""
    step = max(1, -(-len(points) // _POINTS))
    return [*points[:-1:step], points[-1]] if step > 1 else points


def _ticks(values: Sequence[float]) -> list[float]:
    """Some five round numbers from below the smallest to above the largest."""
    low, high = min(values), max(values)
    if high <= low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * f for f in (1, 2, 2.5, 5, 10) if unit * f >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, max(last, first + 1) + 1)]


def _short(value: float) -> str:
    return f"{value:.4g}"


def _png(charts: Sequence[Chart], title: str, path: Path) -> None:
    # No window system is asked for, and none needed.
    from matplotlib.figure import Figure  # type: ignore[import-not-found,unused-ignore]

    figure = Figure(figsize=(6 * min(2, len(charts)), 3.6 * -(-len(charts) // 2)))
    figure.suptitle(title)
    for place, chart in enumerate(charts):
        axes = figure.add_subplot(-(-len(charts) // 2), min(2, len(charts)), place + 1)
        for line in chart.lines:
            xs, ys = zip(*line.points, strict=True)
            colour, dash = _COLOURS[line.colour % len(_COLOURS)], "--" if line.dash else "-"
            axes.plot(xs, ys, color=colour, linestyle=dash, label=line.name)
        axes.set_title(chart.title)
        axes.set_xlabel(chart.x)
        axes.grid(alpha=0.2)
        axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
