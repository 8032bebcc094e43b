# SPDX-License-Identifier: Apache-2.0
"""`fedml-broker runs list|show|stop`."""

import json
from pathlib import Path

import click

from fedml_broker.cli.client import Client, home_option, json_option, print_table, when


@click.group()
def runs() -> None:
    """Runs of everybody."""


@runs.command("list")
@click.option("--limit", default=50, show_default=True)
@home_option
@json_option
def list_runs(limit: int, home: Path, as_json: bool) -> None:
    """List the newest runs."""
    found = Client(home).call("GET", f"/v1/runs?limit={limit}")["runs"]
    if as_json:
        click.echo(json.dumps(found))
        return
    rows = [
        (r["id"], r["kind"], r["name"], r["state"], r["user"], when(r["created_at"])) for r in found
    ]
    print_table(("RUN", "KIND", "NAME", "STATE", "USER", "SINCE"), rows, "no runs yet")


@runs.command()
@click.argument("run")
@home_option
@json_option
def show(run: str, home: Path, as_json: bool) -> None:
    """Show one run: its state and cause, its tasks, what it waits for."""
    found = Client(home).call("GET", f"/v1/runs/{run}")
    if as_json:
        click.echo(json.dumps(found))
        return
    click.echo(f"{found['id']}  {found['kind']}  {found['name']}  {found['state']}")
    if found["waiting"]:
        click.echo(f"waits: {found['waiting']}")
    if found["cause"]:
        click.echo(f"cause: {found['cause']['message']}")
    rows = [
        (t["id"], t["device"] or "–", t["state"], str(t["epoch"])) for t in found["tasks"][-20:]
    ]
    print_table(("TASK", "DEVICE", "STATE", "EPOCH"), rows, "no tasks yet")


@runs.command()
@click.argument("run")
@home_option
def stop(run: str, home: Path) -> None:
    """Stop a run."""
    Client(home).call("POST", f"/v1/runs/{run}/stop")
    click.echo(f"{run} is being stopped", err=True)
