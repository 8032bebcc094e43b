# SPDX-License-Identifier: Apache-2.0
"""`fedml federate run.yaml`."""

from pathlib import Path

import click

from fedml import jobfile
from fedml.cli.following import connect, follow
from fedml.cli.launch import upload


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--follow/--detach", "stay", default=True, help="Show rounds until the run ends.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines, for scripts.")
@click.option("--home", metavar="DIR", help="Where the login is kept (FEDML_HOME; ~/.fedml).")
def federate(file: Path, stay: bool, as_json: bool, home: str | None) -> None:
    """Train one model on many machines, as FILE says; see docs/federate.md."""
    request, workspace = jobfile.read_federated(file)
    client = connect(home)
    request["package"] = upload(client, workspace)
    run = client.call("POST", "/v1/federate", request)["run"]
    if not stay:
        click.echo(run)
        return
    raise SystemExit(follow(client, run, as_json=as_json))
