# SPDX-License-Identifier: Apache-2.0
"""Showing a run as it happens, and what Ctrl-C means meanwhile.

The run belongs to the broker: to stop watching is not to stop it, and nobody is left in doubt
which of the two has happened.
"""

import re
import sys
from collections.abc import Mapping
from typing import Any, Protocol

import click

from fedml.cli.job_view import JobView
from fedml.cli.log_lines import OneTask, lines_view, task_of
from fedml.cli.tables import duration, print_json, visible
from fedml.client import Client, Seen

INTERRUPTED = 130


class View(Protocol):
    """What shows the items of `Client.follow`."""

    def show(self, item: dict[str, Any]) -> None:
        """One item."""

    def close(self) -> None:
        """No more will come."""

    def has_told(self, cause: Mapping[str, Any]) -> bool:
        """Whether the traceback of a cause has been shown."""


class JsonView:
    """Each item as a line of JSON."""

    def show(self, item: dict[str, Any]) -> None:
        """One item."""
        print_json(item)

    def close(self) -> None:
        """Nothing is kept open."""

    def has_told(self, cause: Mapping[str, Any]) -> bool:
        """Scripts get everything, in the last line too."""
        return True


class SilentView(JobView):
    """Only the end is of interest."""

    def show(self, item: dict[str, Any]) -> None:
        """One item."""


def follow(
    client: Client,
    run: str,
    *,
    as_json: bool,
    logs: bool | None = None,
    stay: bool = True,
    rank: int | None = None,
    prefix: bool = True,
    timestamps: bool = False,
    starts: str = "",
) -> int:
    """Show a run until it ends, or (`stay` off) as far as it has come; the exit code for it.

    Unless said otherwise, the `logs` of a job are shown and those of a federated run are not.

    Args:
        rank: Only the output of this task.
        prefix: Where there are several tasks, say whose each line is.
        timestamps: Say when each line was written.
        starts: How much of its logs was shown before, see `Client.follow`.
    """
    details = client.call("GET", f"/v1/runs/{run}")
    federated = details["kind"] == "federate"
    view: View = JobView()
    if as_json:
        view = JsonView()
    elif federated:
        from fedml.cli.rounds import RoundsView

        view = RoundsView(details["spec"]["rounds"])
    elif timestamps or len(details["tasks"]) > 1:
        view = lines_view(client, details, prefix=prefix, timestamps=timestamps)
    if rank is not None:
        view = OneTask(view, task_of(details, rank))
    shown = (not federated) if logs is None else logs
    return watch(client, run, view, logs=shown or as_json, stay=stay, starts=starts)


def watch(
    client: Client,
    run: str,
    view: View,
    *,
    logs: bool = True,
    stay: bool = True,
    starts: str = "",
) -> int:
    """Hand a run to a view until it ends; the exit code for it, or for Ctrl-C."""
    seen = Seen(starts)
    try:
        return _show(client, run, view, seen, logs, stay)
    except KeyboardInterrupt:
        pass
    click.echo(err=True)
    if is_told_to_stop(run):
        try:
            client.call("POST", f"/v1/runs/{run}/stop")
            return _show(client, run, view, seen, logs, stay)
        except KeyboardInterrupt:
            click.echo(f"\n{run} is being stopped; `fedml run wait {run}` waits for it", err=True)
    else:
        click.echo(f"{run} goes on without you", err=True)
        click.echo(f"  watch it again: fedml run logs -f {run}", err=True)
        click.echo(f"  stop it:        fedml run stop {run}", err=True)
    return INTERRUPTED


def is_told_to_stop(run: str) -> bool:
    """Ask the person, if there is one; another Ctrl-C is a no."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    try:
        return click.confirm(f"Stop {run} too?", default=False, err=True)
    except click.Abort:
        click.echo(err=True)
        return False


def _show(client: Client, run: str, view: View, seen: Seen, logs: bool, stay: bool) -> int:
    try:
        for item in client.follow(run, logs=logs, stay=stay, seen=seen):
            view.show(item)
            if "end" in item:
                end = item["end"]
    finally:
        view.close()
    if end["ended_at"] is None:
        click.secho(f"{run} is {end['state']}; -f follows it", dim=True, err=True)
        return 0
    _tell_end(end, view)
    return exit_code(end)


def _tell_end(end: dict[str, Any], view: View) -> None:
    good = end["state"] == "FINISHED"
    took = f" after {duration(end['ended_at'] - end['created_at'])}"
    click.secho(f"{end['id']} {end['state']}{took}", fg="green" if good else "red", err=True)
    if good and end["kind"] == "federate":
        click.secho(f"  its model: fedml run download {end['id']}", dim=True, err=True)
    cause = end["cause"]
    if not cause or good:
        return
    click.echo(f"  {visible(cause['message'])}", err=True)
    if cause["traceback"] and not view.has_told(cause):
        click.echo(indented(visible(users_part(cause["traceback"]))), err=True)
    if cause["hint"]:
        click.echo(f"  try: {cause['hint']}", err=True)


# Where a device and the broker unpack a workspace.
_WORKSPACE = re.compile(r'File "[^"]*?/(?:work/package|work/r-[0-9a-f]+/app)/')


def users_part(traceback: str) -> str:
    """A traceback from where it enters the user's own files, which are named as he names them."""
    head, *frames = re.split(r"(?m)^(?=  File )", traceback)
    own = [i for i, frame in enumerate(frames) if _WORKSPACE.search(frame)]
    shown = frames[own[0] :] if own else frames
    return head + "".join(_WORKSPACE.sub('File "', frame) for frame in shown)


def indented(text: str) -> str:
    """Below the line that it belongs to."""
    return "\n".join(f"    {line}" for line in text.rstrip().splitlines())


def exit_code(end: dict[str, Any]) -> int:
    """Of a run that has ended: 0 finished, the job's own if it failed, else 7 (RunFailed's)."""
    if end["state"] == "FINISHED":
        return 0
    own = end["exit_code"] if end["state"] == "FAILED" else None
    return int(own or 7)
