# SPDX-License-Identifier: Apache-2.0
"""Output of tasks as whole lines: whose each is, when it was written, and from which stream."""

import re
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import click

from fedml.cli.job_view import JobView
from fedml.client import Client

_COLOURS = ("cyan", "green", "magenta", "yellow", "blue", "bright_cyan", "bright_magenta")
# A line without an end is shown in parts.
_MOST_HELD = 64 * 1024


def rank_of(task: str) -> int:
    """Which one of its run's tasks: `r-1-t2` is 2, the only one of a run (`r-1-t`) 0."""
    found = re.search(r"-t(\d+)$", task)
    return int(found[1]) if found else 0


class LinesView(JobView):
    """A job of one or several tasks: whole lines, so that those of two tasks never mix."""

    def __init__(
        self,
        tasks: Sequence[Mapping[str, Any]],
        names: Mapping[str, str],
        *,
        prefix: bool = True,
        timestamps: bool = False,
    ) -> None:
        """
        Args:
            tasks: Those of the run, as the broker shows them.
            names: What people call each device.
            prefix: Say whose each line is.
            timestamps: Say when it was written.
        """  # fmt: skip
        self._names = {t["id"]: names.get(t["device"], t["device"] or "") for t in tasks}
        self._prefix = prefix
        self._timestamps = timestamps
        self._held: dict[tuple[str, str], str] = {}

    def show(self, item: dict[str, Any]) -> None:
        """One item."""
        if "event" in item and item["event"]["kind"] == "started":
            data = item["event"]["data"]
            if "task" in data:
                self._names[data["task"]] = data["name"]
        if "log" in item:
            self._take(item["log"])
        else:
            super().show(item)

    def close(self) -> None:
        """Lines that have no end are shown at the end."""
        for (task, stream), text in self._held.items():
            if text:
                self.line(task, stream, None, text)
        self._held.clear()

    def _take(self, log: Mapping[str, Any]) -> None:
        key = (log["task"], log["stream"])
        *lines, rest = (self._held.get(key, "") + log["text"]).split("\n")
        if len(rest) > _MOST_HELD:
            lines, rest = [*lines, rest], ""
        self._held[key] = rest
        for text in lines:
            self.line(*key, log.get("at"), text)
        sys.stdout.flush()
        sys.stderr.flush()

    def line(self, task: str, stream: str, at: float | None, text: str) -> None:
        """Show one line."""
        to = sys.stderr if stream == "stderr" else sys.stdout
        # A progress bar draws over itself: its last state stands for it.
        text = text.rstrip("\r").rpartition("\r")[2]
        head = ""
        if self._timestamps:
            head += click.style(moment(at) + " ", dim=True)
        if self._prefix:
            rank = rank_of(task)
            colour = _COLOURS[rank % len(_COLOURS)]
            name = " ".join(filter(None, (str(rank), self._names.get(task, ""))))
            mark = click.style(" stderr", fg="red") if stream == "stderr" else ""
            head += click.style(f"[{name}", fg=colour) + mark + click.style("] ", fg=colour)
        click.echo(head + text, file=to)


class OneTask:
    """Hands a view what is of one task, and what is of none."""

    def __init__(self, view: Any, task: str) -> None:
        self._view = view
        self._task = task

    def show(self, item: dict[str, Any]) -> None:
        """One item."""
        if item.get("log", {}).get("task", self._task) == self._task:
            self._view.show(item)

    def close(self) -> None:
        """No more will come."""
        self._view.close()

    def has_told(self, cause: Mapping[str, Any]) -> bool:
        """As the view says."""
        return bool(self._view.has_told(cause))


def moment(at: float | None) -> str:
    """A time to the millisecond, local, without the day; as wide where it is not known."""
    if at is None:
        return "--:--:--.---"
    return time.strftime("%H:%M:%S", time.localtime(at)) + f".{int(at * 1000) % 1000:03}"


def lines_view(
    client: Client, details: dict[str, Any], *, prefix: bool, timestamps: bool
) -> LinesView:
    """A view of the run's lines; whose each is, is said where there are several tasks."""
    several = len(details["tasks"]) > 1 and prefix
    names = {}
    if several:
        names = {d["id"]: d["name"] for d in client.call("GET", "/v1/devices")["devices"]}
    return LinesView(details["tasks"], names, prefix=several, timestamps=timestamps)


def task_of(details: dict[str, Any], rank: int) -> str:
    """The id of a run's task.

    Raises:
        UsageError: It has no such task.
    """
    for task in details["tasks"]:
        if rank_of(task["id"]) == rank:
            return str(task["id"])
    raise click.UsageError(f"{details['id']} has no rank {rank}: 0 to {len(details['tasks']) - 1}")
