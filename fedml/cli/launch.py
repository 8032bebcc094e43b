# SPDX-License-Identifier: Apache-2.0
"""`fedml launch job.yaml`, and `fedml launch init`."""

import sys
from pathlib import Path
from typing import Any

import click

from fedml import launch as submit
from fedml.cli.file_or_verb import FileOrVerb, complete
from fedml.cli.following import follow
from fedml.cli.options import (
    cluster_option,
    connect,
    home_option,
    json_lines_option,
    no_effect,
    package_option,
    strict_option,
)
from fedml.cli.tables import print_json, print_table, size, transfer
from fedml.errors import BrokerRefused


@click.group(cls=FileOrVerb, invoke_without_command=True, subcommand_metavar="")
@click.argument(
    "job",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    shell_complete=complete,
)
@click.option("--follow/--detach", "stay", default=True, help="Show the log until the run ends.")
@click.option("--dry-run", is_flag=True, help="Show where it would run and why; start nothing.")
@click.option(
    "--any-resource", is_flag=True, help="GPUs of any model, or none where no machine has them."
)
@cluster_option
@click.option(
    "-y", "--yes", is_flag=True, help="Reserve machines for a cluster that is new; do not ask."
)
@no_effect("-g", "--group", why="`cluster` or `labels` choose machines")
@strict_option
@package_option
@json_lines_option
@home_option
def launch(
    job: Path,
    stay: bool,
    dry_run: bool,
    any_resource: bool,
    cluster: str,
    yes: bool,
    strict: bool,
    package: str,
    as_json: bool,
    home: Path,
) -> None:
    """Run the JOB file on a machine that matches.

    With `job_type: federate` it is a federated run on several; see docs/fedml.md.

    The exit code is that of its commands. Ctrl-C asks whether the run is to be
    stopped too. Without a terminal it goes on. With --dry-run it is 6 if no
    machine can ever run it.

    \b
    Examples:
      fedml launch init                # write a commented job.yaml to begin with
      fedml launch job.yaml            # run it, watch it
      fedml launch job.yaml --detach   # run it, print its id
      fedml launch job.yaml --dry-run  # where would it run, and why?
      fedml launch job.yaml -c lab     # on the machines reserved as `lab`
      fedml launch job.yaml -c new -y  # reserve what it asks for, as `new`
      fedml launch job.yaml --json     # one JSON object a line, for scripts
    """
    client = connect(home)
    if dry_run:
        found = submit.look(client, job, any_resource=any_resource, cluster=cluster)
        _show(found, as_json=as_json)
        return
    if cluster and (yes or sys.stdin.isatty()):
        made = submit.reserve(
            client, job, cluster, any_resource=any_resource, wanted=lambda: yes or _asks(cluster)
        )
        if made is not None:
            back = f"`fedml cluster kill {cluster}` gives them back"
            click.echo(
                f"reserved as {cluster}: {', '.join(sorted(made.devices))}; {back}", err=True
            )
    with transfer("workspace") as told:
        run = submit.launch(
            client,
            job,
            follow=stay,
            any_resource=any_resource,
            cluster=cluster,
            package=package,
            strict=strict,
            told=told,
        )
    if as_json:
        print_json({"run": run})
    elif not stay:
        click.echo(run)
    if stay:
        raise SystemExit(follow(client, run, as_json=as_json))


def _asks(cluster: str) -> bool:
    """Whether a name that no cluster has is meant; a slip must reserve nothing."""
    question = f"There is no cluster {cluster}. Reserve what the job asks for under this name?"
    return click.confirm(question, abort=True, err=True)


@launch.command()
@click.argument(
    "file", default="job.yaml", type=click.Path(dir_okay=False, writable=True, path_type=Path)
)
def init(file: Path) -> None:
    """Write a commented job file that runs as it stands: FILE, or job.yaml.

    What is there already is never replaced.

    \b
    Examples:
      fedml launch init
      fedml launch init train.yaml
    """
    from fedml.jobkeys import EXAMPLE

    try:
        with file.open("x") as new:
            new.write(EXAMPLE)
    except FileExistsError:
        raise click.UsageError(f"{file} exists already; name another file") from None
    click.echo(f"{file}: run it with `fedml launch {file}`", err=True)


def _show(found: dict[str, Any], *, as_json: bool) -> None:
    """The machines, one by one.

    Raises:
        BrokerRefused: None of them could ever run it.
    """
    nodes, machines = found["nodes"], found["machines"]
    if as_json:
        print_json(found)
    else:
        rows = [(m["name"], m["fits"], *_rank(m, nodes), _why(m)) for m in machines]
        columns = ("MACHINE", "FITS", *(("RANK",) if nodes > 1 else ()), "WHY")
        print_table(columns, rows, "no machine has joined yet")
    fitting = [m for m in machines if m["fits"] != "never"]
    if len(fitting) < nodes:
        why = f"it asks for {_asked(found['needs'])}"
        if nodes > 1:
            why = f"{nodes} machines are asked for, {len(fitting)} fit; of each {why}"
        raise BrokerRefused(
            f"no machine can ever run this: {why}",
            "ask for less, or let a machine join that has it"
            + ("; `--any-resource` does without" if found["needs"]["gpus"] else ""),
        )
    if not as_json:
        ranked = sorted((m["rank"], m["name"]) for m in machines if m["rank"] is not None)
        names = ", ".join(name for _, name in ranked)
        where = f"it would run on {names}" if names else _waits(nodes)
        click.echo(f"{where}; it asks for {_asked(found['needs'])}", err=True)


def _rank(machine: dict[str, Any], nodes: int) -> tuple[str, ...]:
    return () if nodes == 1 else ("–" if machine["rank"] is None else str(machine["rank"]),)


def _why(machine: dict[str, Any]) -> str:
    return str(machine["why"]) if machine["rank"] is None else f"it goes here: {machine['why']}"


def _waits(nodes: int) -> str:
    return "it would wait for one of them" if nodes == 1 else f"it would wait for {nodes} of them"


def _asked(needs: dict[str, Any]) -> str:
    """What a job asks of a machine, for people."""
    gpus, model = needs["gpus"], needs["gpu_model"]
    parts = [f"{gpus} × {model or 'GPU'}" if gpus else "no GPU"]
    if needs["gpu_memory_bytes"]:
        parts.append(f"{size(needs['gpu_memory_bytes'])} on each")
    parts += [f"{needs['cpus']} CPUs"] if needs["cpus"] else []
    parts += [f"{size(needs['memory_bytes'])} of memory"] if needs["memory_bytes"] else []
    parts += [f"{size(needs['disk_bytes'])} of disk"] if needs["disk_bytes"] else []
    return ", ".join(parts)
