# SPDX-License-Identifier: Apache-2.0
"""`fedml federate run.yaml`, and `fedml federate build`."""

from pathlib import Path

import click

from fedml import launch as submit
from fedml.cli.build import build_command
from fedml.cli.file_or_verb import FileOrVerb, complete
from fedml.cli.following import follow
from fedml.cli.options import (
    cluster_option,
    connect,
    home_option,
    json_lines_option,
    package_option,
    strict_option,
)
from fedml.cli.tables import print_json, transfer


@click.group(cls=FileOrVerb, invoke_without_command=True, subcommand_metavar="")
@click.argument(
    "file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    shell_complete=complete,
)
@click.option("--follow/--detach", "stay", default=True, help="Show rounds until the run ends.")
@click.option("--logs", is_flag=True, help="Show what your code prints on the machines, too.")
@cluster_option
@strict_option
@package_option
@json_lines_option
@home_option
def federate(
    file: Path,
    stay: bool,
    logs: bool,
    cluster: str,
    strict: bool,
    package: str,
    as_json: bool,
    home: Path,
) -> None:
    """Train one model on many machines, as FILE says.

    Ctrl-C asks whether the run is to be stopped too. Without a terminal it goes on.
    FILE may be a fedml_config.yaml or a federated job of FedML's; see docs/fedml.md.

    \b
    Examples:
      fedml federate run.yaml            # run it, see a row for each round
      fedml federate run.yaml --detach   # run it, print its id
      fedml federate run.yaml -c lab     # on the machines reserved as `lab`
      fedml federate run.yaml --json     # one JSON object a line, for scripts
    """
    client = connect(home)
    with transfer("workspace") as told:
        run = submit.federate(
            client, file, cluster=cluster, strict=strict, package=package, told=told
        )
    if as_json:
        print_json({"run": run})
    elif not stay:
        click.echo(run)
    if stay:
        raise SystemExit(follow(client, run, as_json=as_json, logs=logs))


federate.add_command(build_command("federate", "a run FILE", "fedml federate"))
