# SPDX-License-Identifier: Apache-2.0
"""`fedml launch job.yaml`."""

import tempfile
from pathlib import Path
from typing import Any

import click

from fedml import jobfile
from fedml.cli.following import connect, follow
from fedml.package import build


@click.command()
@click.argument("job", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--follow/--detach", "stay", default=True, help="Show the log until the run ends.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines, for scripts.")
@click.option("--home", metavar="DIR", help="Where the login is kept (FEDML_HOME; ~/.fedml).")
def launch(job: Path, stay: bool, as_json: bool, home: str | None) -> None:
    """Run the JOB file's commands on a machine that matches; exit with their exit code.

    \b
    Examples:
      fedml launch job.yaml            # run it, watch it; Ctrl-C stops the run
      fedml launch job.yaml --detach   # run it, print its id
    """
    request, workspace = jobfile.read_job(job)
    client = connect(home)
    if workspace is not None:
        request["package"] = upload(client, workspace)
    run = client.call("POST", "/v1/launch", {**request, "follow": stay})["run"]
    if not stay:
        click.echo(run)
        return
    raise SystemExit(follow(client, run, as_json=as_json))


def upload(client: Any, workspace: Path) -> dict[str, Any]:
    """Pack a workspace and put it where the broker finds it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "package.tar.gz"
        build(workspace, file)
        blob: dict[str, Any] = client.upload(file)
        return blob
