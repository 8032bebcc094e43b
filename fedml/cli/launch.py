# SPDX-License-Identifier: Apache-2.0
"""`fedml launch job.yaml`."""

from pathlib import Path

import click

from fedml import launch as submit
from fedml.cli.following import follow
from fedml.cli.options import connect, home_option, json_lines_option
from fedml.cli.tables import print_json, transfer


@click.command()
@click.argument("job", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--follow/--detach", "stay", default=True, help="Show the log until the run ends.")
@json_lines_option
@home_option
def launch(job: Path, stay: bool, as_json: bool, home: Path) -> None:
    """Run the JOB file on a machine that matches.

    The exit code is that of its commands. Ctrl-C asks whether the run is to be
    stopped too. Without a terminal it goes on.

    \b
    Examples:
      fedml launch job.yaml            # run it, watch it
      fedml launch job.yaml --detach   # run it, print its id
      fedml launch job.yaml --json     # one JSON object a line, for scripts
    """
    client = connect(home)
    with transfer("workspace") as told:
        run = submit.launch(client, job, follow=stay, told=told)
    if as_json:
        print_json({"run": run})
    elif not stay:
        click.echo(run)
    if stay:
        raise SystemExit(follow(client, run, as_json=as_json))
