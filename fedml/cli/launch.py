# SPDX-License-Identifier: Apache-2.0
"""`fedml launch job.yaml`, and `fedml launch init`."""

from pathlib import Path
from typing import Any

import click

from fedml import launch as submit
from fedml.cli.file_or_verb import FileOrVerb, complete
from fedml.cli.following import follow
from fedml.cli.options import connect, home_option, json_lines_option, package_option
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
@click.option(
    "-c", "--cluster", default="", metavar="NAME", help="On the machines of this cluster."
)
@package_option
@json_lines_option
@home_option
def launch(
    job: Path,
    stay: bool,
    dry_run: bool,
    any_resource: bool,
    cluster: str,
    package: str,
    as_json: bool,
    home: Path,
) -> None:
    """Run the JOB file on a machine that matches.

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
      fedml launch job.yaml --json     # one JSON object a line, for scripts
    """
    client = connect(home)
    if dry_run:
        found = submit.look(client, job, any_resource=any_resource, cluster=cluster)
        _show(found, as_json=as_json)
        return
    with transfer("workspace") as told:
        run = submit.launch(
            client,
            job,
            follow=stay,
            any_resource=any_resource,
            cluster=cluster,
            package=package,
            told=told,
        )
    if as_json:
        print_json({"run": run})
    elif not stay:
        click.echo(run)
    if stay:
        raise SystemExit(follow(client, run, as_json=as_json))


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
    from fedml.jobfile import EXAMPLE

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
    taken, machines = found["taken"], found["machines"]
    if as_json:
        print_json(found)
    else:
        rows = [(m["name"], m["fits"], m["why"] or _why(m, taken)) for m in machines]
        print_table(("MACHINE", "FITS", "WHY"), rows, "no machine has joined yet")
    fitting = [m for m in machines if m["fits"] != "never"]
    if not fitting:
        raise BrokerRefused(
            f"no machine can ever run this: it asks for {_asked(found['needs'])}",
            "ask for less, or let a machine join that has it"
            + ("; `--any-resource` does without" if found["needs"]["gpus"] else ""),
        )
    if not as_json:
        names = [m["name"] for m in machines if m["device"] == taken]
        where = f"it would run on {names[0]}" if names else "it would wait for one of them"
        click.echo(f"{where}; it asks for {_asked(found['needs'])}", err=True)


def _why(machine: dict[str, Any], taken: str | None) -> str:
    return "it would run here" if machine["device"] == taken else "would do, has less room free"


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
