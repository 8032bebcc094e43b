# SPDX-License-Identifier: Apache-2.0
"""`fedml-broker runs list|show|stop|remove`."""

import time
from pathlib import Path

import click

from fedml_broker.cli.client import Client, home_option, json_option, parse_age
from fedml_broker.cli.tables import Columns, Row, print_list, print_thing, when

_TASKS_SHOWN = 20
_PAGE = 1000


def _tasks(run: Row) -> str:
    lines = [
        f"{task['id']}: {task['state']} on {task['device'] or 'no machine'}, epoch {task['epoch']}"
        for task in run["tasks"]
    ]
    more = [f"… and {len(lines) - _TASKS_SHOWN} before"] if len(lines) > _TASKS_SHOWN else []
    return "\n".join(more + lines[-_TASKS_SHOWN:]) or "none yet"


_COLUMNS: Columns = {
    "RUN": lambda run: run["id"],
    "KIND": lambda run: run["kind"],
    "NAME": lambda run: run["name"],
    "STATE": lambda run: run["state"],
    "USER": lambda run: run["user"],
    "ASKED FOR": lambda run: when(run["created_at"]),
    "ENDED": lambda run: when(run["ended_at"]),
}
_FACTS: Columns = {
    "run": lambda run: f"{run['id']}, {run['name']} ({run['kind']}) of {run['user']}",
    "state": lambda run: run["state"] + (f", by {who}" if (who := run["stopped_by"]) else ""),
    "waits": lambda run: run["waiting"].replace("; ", "\n"),
    "cause": lambda run: run["cause"]["message"] if run["cause"] else "",
    "asked for": lambda run: when(run["created_at"]),
    "ended": lambda run: when(run["ended_at"]),
    "tasks": _tasks,
}


@click.group()
def runs() -> None:
    """Runs of everybody.

    \b
    Examples:
      fedml-broker runs list
      fedml-broker runs stop r-1c0ffee123
    """


@runs.command("list")
@click.option("--limit", default=50, show_default=True, help="How many, the newest first.")
@home_option
@json_option
def list_runs(limit: int, home: Path, as_json: bool) -> None:
    """List the newest runs.

    \b
    Examples:
      fedml-broker runs list
      fedml-broker runs list --json | jq -r '.[].id'
    """
    found = Client(home).call("GET", f"/v1/runs?limit={limit}")["runs"]
    print_list(found, _COLUMNS, as_json=as_json, empty="no runs yet")


@runs.command()
@click.argument("run")
@home_option
@json_option
def show(run: str, home: Path, as_json: bool) -> None:
    """Show one run: its state and cause, its tasks, what it waits for.

    \b
    Examples:
      fedml-broker runs show r-1c0ffee123
    """
    print_thing(Client(home).call("GET", f"/v1/runs/{run}"), _FACTS, as_json=as_json)


@runs.command()
@click.argument("run")
@home_option
def stop(run: str, home: Path) -> None:
    """Stop a run.

    \b
    Examples:
      fedml-broker runs stop r-1c0ffee123
    """
    Client(home).call("POST", f"/v1/runs/{run}/stop")
    click.echo(f"{run} is being stopped", err=True)


@runs.command()
@click.argument("run", nargs=-1)
@click.option("--older-than", metavar="AGE", help="All that ended so long ago: 12h, 30d, 8w.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@home_option
def remove(run: tuple[str, ...], older_than: str | None, yes: bool, home: Path) -> None:
    """Delete runs that have ended, with their logs and models.

    \b
    Examples:
      fedml-broker runs remove r-1c0ffee123
      fedml-broker runs remove --older-than 30d --yes     # from cron
    """
    if bool(run) == bool(older_than):
        raise click.UsageError("name runs, or --older-than, one of the two")
    before = (
        None if older_than is None else int(time.time() - parse_age(older_than, "--older-than"))
    )
    client = Client(home)
    if before is not None:
        first = _ended_before(client, before)
        count = f"{len(first)} or more" if len(first) == _PAGE else str(len(first))
        if first and not yes:
            click.confirm(f"Delete {count} runs with logs and models?", abort=True, err=True)
        run = tuple(first)
    removed, freed = 0, 0
    while run:
        for name in run:
            freed += client.call("DELETE", f"/v1/runs/{name}")["freed_bytes"]
            removed += 1
        run = () if before is None else tuple(_ended_before(client, before))
    click.echo(f"{removed} runs are deleted, {freed / 1e6:.1f} MB of models are free", err=True)


def _ended_before(client: Client, moment: int) -> list[str]:
    found = client.call("GET", f"/v1/runs?ended_before={moment}&limit={_PAGE}")["runs"]
    return [row["id"] for row in found]
