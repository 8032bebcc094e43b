# SPDX-License-Identifier: Apache-2.0
"""A graph as text: a line for each node, with lanes beside it for the edges that pass."""

from collections.abc import Mapping, Sequence


def drawn(needs: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    """Lines of a drawing, each with the node that it is of, or nothing.

    Args:
        needs: Nodes, each after those that it needs.
    """
    children = {name: [c for c, its in needs.items() if name in its] for name in needs}
    lanes: list[str] = []  # which node each of them leads to; empty: it is free
    lines: list[tuple[str, str]] = []
    for name in needs:
        ends = [at for at, to in enumerate(lanes) if to == name]
        if not ends:
            ends = [lanes.index("")] if "" in lanes else [len(lanes)]
            lanes[ends[0] :] = [name, *lanes[ends[0] + 1 :]]
        column = ends[0]
        if len(ends) > 1:
            lines.append((_bend(lanes, column, ends[1:], "┴╯"), ""))
            for at in ends[1:]:
                lanes[at] = ""
        marks = ["●" if at == column else "│" if to else " " for at, to in enumerate(lanes)]
        lines.append((" ".join(marks).rstrip(), name))
        first, *others = children[name] or [""]
        lanes[column] = first
        opened = []
        for child in others:
            free = [at for at, to in enumerate(lanes) if not to and at > column]
            at = free[0] if free else len(lanes)
            lanes[at:] = [child, *lanes[at + 1 :]]
            opened.append(at)
        if opened:
            lines.append((_bend(lanes, column, opened, "┬╮"), ""))
        while lanes and not lanes[-1]:
            lanes.pop()
    return lines


def _bend(lanes: Sequence[str], column: int, bends: Sequence[int], corners: str) -> str:
    """The line between two nodes, where lanes leave a column or come back to it."""
    last = max(bends)
    line = ""
    for at, to in enumerate(lanes):
        between = column < at < last
        if at == column:
            mark = "├"
        elif at in bends:
            mark = corners[at == last]
        elif between:
            mark = "┼" if to else "─"
        else:
            mark = "│" if to else " "
        line += mark + ("─" if column <= at < last else " ")
    return line.rstrip()
