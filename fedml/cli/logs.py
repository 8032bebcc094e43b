# SPDX-License-Identifier: Apache-2.0
"""`fedml run logs`, and `fedml logs`, which is the same for the newest run."""

import datetime
import re
import sys
import time
from pathlib import Path
from typing import Any

import click

from fedml.cli import remembered
from fedml.cli.following import follow
from fedml.cli.log_lines import lines_view, task_of
from fedml.cli.options import connect, home_option, json_lines_option, run_argument
from fedml.cli.tables import print_json
from fedml.client import Client
from fedml.errors import BrokerRefused

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class _Moment(click.ParamType[float]):
    """`10m`, `2h`, or a local time such as 2026-05-01T12:00."""

    name = "when"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        if isinstance(value, float):
            return value
        if found := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", value):
            return time.time() - float(found[1]) * _UNITS[found[2]]
        try:
            return datetime.datetime.fromisoformat(value).astimezone().timestamp()
        except ValueError:
            self.fail(f"{value!r} is neither like 10m nor like 2026-05-01T12:00", param, ctx)


def _options(function: Any) -> Any:
    options = (
        click.option("-f", "--follow", "stay", is_flag=True, help="Go on until the run has ended."),
        click.option("--search", metavar="TEXT", default="", help="Only lines that hold this."),
        click.option("--regex", is_flag=True, help="TEXT is a pattern (RE2's syntax)."),
        click.option("-i", "--ignore-case", is_flag=True, help="Whatever its case."),
        click.option(
            "-C", "--context", metavar="N", default=0, type=click.IntRange(0, 100),
            help="With --search: so many lines before and after each.",
        ),
        click.option("--since", type=_Moment(), help="Not older than: 10m, 2h, a local time."),
        click.option("--tail", metavar="N", type=click.IntRange(1, 10_000), help="The last N."),
        click.option("--timestamps", is_flag=True, help="Say when each line was written."),
        click.option("--rank", metavar="N", type=click.IntRange(0), help="Only of task N."),
        click.option("--no-prefix", is_flag=True, help="Do not say whose each line is."),
        json_lines_option,
        home_option,
    )  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


@click.command()
@run_argument
@_options
def run_logs(run_id: str, home: Path, **how: Any) -> None:
    """Show what a run has printed: all so far, or the lines asked for.

    Lines come in the order in which they were written; stderr goes to stderr.
    Where a run has several tasks, each line begins with its rank and machine.
    With --follow, the exit code is that of the run; Ctrl-C leaves it running
    unless you say otherwise.

    \b
    Examples:
      fedml run logs -f r-1c0ffee123
      fedml run logs -f --tail 20 --rank 0 r-1c0ffee123
      fedml run logs r-1c0ffee123 --search Traceback -C 10
      fedml run logs r-1c0ffee123 --search 'loss=(nan|inf)' --regex --timestamps
      fedml run logs r-1c0ffee123 --since 10m
    """
    show_logs(connect(home), run_id, **how)


@click.command()
@click.argument("run_id", metavar="[RUN]", required=False, shell_complete=remembered.runs)
@_options
def logs(run_id: str | None, home: Path, **how: Any) -> None:
    """Show what the newest run, or RUN, has printed: `fedml run logs`.

    \b
    Examples:
      fedml logs
      fedml logs -f
      fedml logs --search error -i
    """
    client = connect(home)
    if run_id is None:
        newest = client.call("GET", "/v1/runs?limit=1")["runs"]
        if not newest:
            raise BrokerRefused("there are no runs yet", "fedml launch job.yaml")
        run_id = newest[0]["id"]
        click.secho(f"{run_id} {newest[0]['name']}", dim=True, err=True)
    show_logs(client, run_id, **how)


def show_logs(
    client: Client,
    run: str,
    *,
    stay: bool,
    search: str,
    regex: bool,
    ignore_case: bool,
    context: int,
    since: float | None,
    tail: int | None,
    timestamps: bool,
    rank: int | None,
    no_prefix: bool,
    as_json: bool,
) -> None:
    """Show them, and leave with the exit code."""
    if stay and search:
        raise click.UsageError("--follow shows every line; without it, --search finds some")
    if (regex or ignore_case or context) and not search:
        raise click.UsageError("--regex, --ignore-case and --context belong to --search TEXT")
    starts = ""
    if search or since is not None or tail is not None:
        query: dict[str, Any] = {
            "search": search,
            "regex": int(regex),
            "case": int(not ignore_case),
            "context": context,
            "since": since or 0,
            "tail": tail or 0,
        }
        starts = _show_found(client, run, query, timestamps, rank, no_prefix, as_json)
        if not stay:
            raise SystemExit(0)
    code = follow(
        client, run, as_json=as_json, logs=True, stay=stay,
        rank=rank, prefix=not no_prefix, timestamps=timestamps, starts=starts,
    )  # fmt: skip
    raise SystemExit(code if stay else 0)


def _show_found(
    client: Client,
    run: str,
    query: dict[str, Any],
    timestamps: bool,
    rank: int | None,
    no_prefix: bool,
    as_json: bool,
) -> str:
    """Print the lines; how far the logs were read, for `follow`."""
    details = client.call("GET", f"/v1/runs/{run}")
    if rank is not None:
        query["task"] = task_of(details, rank)
    found = client.logs(run, **query)
    if as_json:
        for line in found["lines"]:
            print_json({"line": line})
    else:
        view = lines_view(client, details, prefix=not no_prefix, timestamps=timestamps)
        for line in found["lines"]:
            view.line(line["task"], line["stream"], line["at"], line["text"])
        sys.stdout.flush()
        if query["search"] and not found["lines"]:
            click.secho("no line has it", dim=True, err=True)
    if not found["complete"]:
        click.secho(
            f"that is not all: {len(found['lines'])} lines of at least {found['total']}; "
            "ask for less, with --since, --rank or a longer text",
            fg="yellow",
            err=True,
        )
    return ",".join(f"{name}:{end}" for name, end in found["ends"].items())
