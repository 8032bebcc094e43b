# SPDX-License-Identifier: Apache-2.0
"""`fedml run list|logs|stop`."""

import json

import click

from fedml.cli.following import connect, follow

_HOME = click.option("--home", metavar="DIR", help="Where the login is kept (FEDML_HOME).")


@click.group()
def run() -> None:
    """Runs that exist already."""


@run.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
@_HOME
def list_runs(as_json: bool, home: str | None) -> None:
    """List the newest runs."""
    found = connect(home).call("GET", "/v1/runs")["runs"]
    if as_json:
        click.echo(json.dumps(found))
        return
    for row in found:
        click.echo(f"{row['id']}  {row['state']:<9} {row['kind']:<9} {row['name']}")


@run.command()
@click.argument("run_id")
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines, for scripts.")
@_HOME
def logs(run_id: str, as_json: bool, home: str | None) -> None:
    """Show a run from its beginning until it ends."""
    raise SystemExit(follow(connect(home), run_id, as_json=as_json))


@run.command()
@click.argument("run_id")
@_HOME
def stop(run_id: str, home: str | None) -> None:
    """Stop a run."""
    connect(home).call("POST", f"/v1/runs/{run_id}/stop")
    click.echo(f"{run_id} is being stopped", err=True)
