# SPDX-License-Identifier: Apache-2.0
"""A workflow as it happens: a live table on a terminal, else a line for each change."""

import sys
import time
from collections.abc import Mapping
from typing import Any

import click

from fedml.cli.following import INTERRUPTED, is_told_to_stop
from fedml.cli.tables import duration, print_json
from fedml.client import Client, Seen
from fedml.workflows import WorkflowRun

COLUMNS = ("STEP", "STATE", "RUN", "TOOK", "")
_COLOURS = {
    "RUNNING": "cyan",
    "STARTING": "cyan",
    "FINISHED": "green",
    "FAILED": "red",
    "STOPPED": "red",
    "WAITING": "bright_black",
    "SKIPPED": "bright_black",
}


def watch(client: Client, workflow: str, *, as_json: bool) -> int:
    """Show a workflow's latest try until it ends; the exit code for it, or for Ctrl-C."""
    found = WorkflowRun.find(client, workflow)
    seen = Seen()
    try:
        return _show(found, seen, as_json)
    except KeyboardInterrupt:
        pass
    click.echo(err=True)
    if is_told_to_stop(found.id):
        try:
            found.stop()
            return _show(found, seen, as_json)
        except KeyboardInterrupt:
            click.echo(f"\n{found.id} is being stopped", err=True)
    else:
        click.echo(f"{found.id} goes on without you", err=True)
        click.echo(f"  look at it: fedml workflow status {found.id}", err=True)
        click.echo(f"  stop it:    fedml workflow stop {found.id}", err=True)
    return INTERRUPTED


def rows(steps: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The table of a workflow's steps."""
    return [
        (name, step["state"], step["run"] or "–", took(step), _said(step))
        for name, step in steps.items()
    ]


def _said(step: Mapping[str, Any]) -> str:
    """Why it is where it is; of a service, where it answers."""
    where = step["outputs"]["values"].get("url", "") if step["kind"] == "deploy" else ""
    return str(step["cause"] or step["waiting"] or where)


def took(what: Mapping[str, Any]) -> str:
    """How long a step, or a workflow, has run; so far, if it goes on."""
    if what["started_at"] is None:
        return "–"
    return duration((what["ended_at"] or time.time()) - what["started_at"])


def _show(found: WorkflowRun, seen: Seen, as_json: bool) -> int:
    if as_json:
        end: dict[str, Any] = {}
        for item in found.follow(seen=seen):
            print_json(item)
            end = item.get("end", end)
        return _code(end)
    view: _Table | _Lines
    view = _Table(found.refresh()) if sys.stdout.isatty() else _Lines(found)
    try:
        for item in found.follow(seen=seen):
            view.show(item)
            if "end" in item:
                found.details = item["end"]
    finally:
        view.close(found)
    _tell_end(found)
    return _code(found.details)


def _tell_end(found: WorkflowRun) -> None:
    good = found.state == "FINISHED"
    said = f"{found.name} ({found.id}) {found.state} after {took(found.details)}"
    click.secho(said, fg="green" if good else "red", err=True)
    if not good:
        click.echo(found.blame().lstrip("\n"), err=True)
        for step in found.steps.values():
            if step["state"] == "FAILED" and step["run"]:
                said = f"  its output: fedml workflow logs {found.id} {step['name']}"
                click.secho(said, dim=True, err=True)
        click.echo(f"  mend it, then: {found.next_step()}", err=True)


def _code(end: Mapping[str, Any]) -> int:
    """0 finished, else 7, as of a run that did not finish."""
    return 0 if end.get("state") == "FINISHED" else 7


class _Lines:
    """A line for each change of a step."""

    def __init__(self, found: WorkflowRun) -> None:
        self._told = ""

    def show(self, item: Mapping[str, Any]) -> None:
        """One item of the stream."""
        if item.get("waiting", self._told) != self._told:
            self._told = item["waiting"]
            if self._told:
                click.secho(f"waiting: {self._told}", dim=True, err=True)
        event = item.get("event", {})
        data = event.get("data", {})
        if event.get("kind") == "step" and data["state"] != "STARTING":
            why = f": {data['cause']}" if data["cause"] else ""
            run = f" {data['run']}" if data["run"] else ""
            click.echo(f"{data['step']} {data['state']}{run}{why}")
        elif event.get("kind") == "stopping":
            click.echo(f"{data['by']} stops the workflow", err=True)

    def close(self, found: WorkflowRun) -> None:
        """Nothing is kept open."""


class _Table:
    """Every step in a row that changes; what is left in the end is the last state."""

    def __init__(self, found: WorkflowRun) -> None:
        from rich.console import Console
        from rich.live import Live

        self._steps = found.steps
        self._live = Live(
            console=Console(), get_renderable=self._table, refresh_per_second=4, transient=False
        )
        self._live.start()

    def show(self, item: Mapping[str, Any]) -> None:
        """One item of the stream."""
        if "waiting" in item:
            waits = [line.partition(": ") for line in item["waiting"].splitlines()]
            for step in self._steps.values():
                step["waiting"] = ""
            for name, _, why in waits:
                self._steps[name]["waiting"] = why
        event = item.get("event", {})
        data = event.get("data", {})
        if event.get("kind") == "step" and data["step"] in self._steps:
            step = self._steps[data["step"]]
            step |= {key: data[key] for key in ("state", "run", "cause")}
            if data["state"] == "STARTING":
                step |= {"started_at": event["at"], "ended_at": None}
            elif data["state"] not in ("RUNNING", "SKIPPED"):
                step["ended_at"] = event["at"]

    def close(self, found: WorkflowRun) -> None:
        """The table stays as it is."""
        if found.ended:
            self._steps = found.steps
        self._live.stop()

    def _table(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in COLUMNS:
            table.add_column(name, overflow="fold")
        for name, state, *others in rows(self._steps):
            colour = _COLOURS.get(state, "")
            table.add_row(Text(name), Text(state, style=colour), *(Text(cell) for cell in others))
        return table
