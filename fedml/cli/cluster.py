# SPDX-License-Identifier: Apache-2.0
"""`fedml cluster create|list|status|start|stop|autostop|kill`: reserved machines."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from fedml.cli import remembered
from fedml.cli.options import connect, home_option, json_option
from fedml.cli.tables import print_facts, print_json, print_table, when
from fedml.client import Client
from fedml.clusters import Cluster
from fedml.errors import BrokerRefused

name_argument = click.argument("name", metavar="CLUSTER", shell_complete=remembered.clusters)
names_argument = click.argument(
    "names", metavar="CLUSTER...", nargs=-1, required=True, shell_complete=remembered.clusters
)
yes_option = click.option("-y", "--yes", is_flag=True, help="Do not ask.")


@click.group()
def cluster() -> None:
    """Reserve machines under a name, for the runs that name it.

    \b
    Examples:
      fedml cluster create lab --device box1 --device box2
      fedml cluster create night --count 2 --gpus 1 --autostop 30
      fedml launch job.yaml --cluster lab
    """


@cluster.command()
@name_argument
@click.option(
    "--device",
    "devices",
    multiple=True,
    metavar="NAME",
    shell_complete=remembered.devices,
    help="A machine; repeatable.",
)
@click.option("--count", type=click.IntRange(min=1), help="So many that fit, instead of names.")
@click.option("--label", "labels", multiple=True, metavar="NAME=VALUE", help="Which these wear.")
@click.option("--gpus", type=click.IntRange(min=0), default=0, help="GPUs that each of these has.")
@click.option("--gpu-model", default="", metavar="MODEL", help="Such as RTX-4090.")
@click.option("--autostop", type=float, metavar="MINUTES", help="Stop when idle for so long.")
@home_option
@json_option
def create(
    name: str,
    devices: tuple[str, ...],
    count: int | None,
    labels: tuple[str, ...],
    gpus: int,
    gpu_model: str,
    autostop: float | None,
    home: Path,
    as_json: bool,
) -> None:
    """Reserve machines under a new name: those named, or some that fit.

    What runs on them now runs to its end; nothing else is started on them.

    \b
    Examples:
      fedml cluster create lab --device box1 --device box2
      fedml cluster create night --count 2 --gpus 1 --label site=north --autostop 30
    """
    if bool(devices) == bool(count):
        raise click.UsageError("name the machines (--device NAME), or say how many (--count N)")
    pairs = [label.partition("=") for label in labels]
    if wrong := [label for label, (_, sign, _) in zip(labels, pairs, strict=True) if not sign]:
        raise click.UsageError(f"not NAME=VALUE: {wrong[0]}")
    made = Cluster.create(
        name,
        devices,
        count=count or 0,
        labels={label: value for label, _, value in pairs},
        autostop_minutes=autostop,
        at=connect(home),
        gpus=gpus,
        gpu_model=gpu_model,
    )
    _tell(made, as_json, f"{name} has {', '.join(made.devices)}")


@cluster.command("list")
@click.argument("names", metavar="[CLUSTER...]", nargs=-1, shell_complete=remembered.clusters)
@home_option
@json_option
def list_clusters(names: tuple[str, ...], home: Path, as_json: bool) -> None:
    """List the clusters, or those of these names.

    \b
    Examples:
      fedml cluster list
      fedml cluster list --json | jq -r '.[].name'
    """
    found = [c for c in Cluster.list(at=connect(home)) if not names or c.name in names]
    if as_json:
        print_json([c.details for c in found])
        return
    rows = [
        (c.name, c.status, c.details["user"], " ".join(c.devices), str(len(c.runs)), _autostop(c))
        for c in found
    ]
    columns = ("NAME", "STATUS", "USER", "MACHINES", "RUNS", "AUTOSTOP")
    print_table(columns, rows, "no clusters: `fedml cluster create NAME --device MACHINE`")


@cluster.command()
@name_argument
@home_option
@json_option
def status(name: str, home: Path, as_json: bool) -> None:
    """Show one cluster: its machines, and its runs that have not ended.

    \b
    Examples:
      fedml cluster status lab
      fedml cluster status lab --json | jq -r '.devices[].name'
    """
    found = Cluster.find(name, at=connect(home))
    if as_json:
        print_json(found.details)
        return
    machines = [
        f"{d['name']}: {d['status']}" + (f", {d['gpus']} GPUs" if d["gpus"] else "")
        for d in found.details["devices"]
    ]
    print_facts(
        {
            "cluster": name,
            "status": found.status,
            "user": found.details["user"],
            "machines": "\n".join(machines) or "all of them have left",
            "runs": "\n".join(found.runs) or "none",
            "autostop": _autostop(found),
            "made": when(found.details["created_at"]),
        }
    )


@cluster.command()
@names_argument
@home_option
@json_option
def start(names: tuple[str, ...], home: Path, as_json: bool) -> None:
    """Reserve the machines of stopped clusters again.

    \b
    Examples:
      fedml cluster start lab
      fedml cluster start lab night
    """
    _each(connect(home), names, Cluster.start, "is up", as_json=as_json)


@cluster.command()
@home_option
@json_option
def startall(home: Path, as_json: bool) -> None:
    """Reserve the machines of all stopped clusters again.

    \b
    Examples:
      fedml cluster startall
    """
    client = connect(home)
    names = [c.name for c in Cluster.list(at=client) if c.status == "stopped"]
    _each(client, names, Cluster.start, "is up", as_json=as_json)


@cluster.command()
@names_argument
@home_option
@json_option
def stop(names: tuple[str, ...], home: Path, as_json: bool) -> None:
    """Give the machines of clusters back and keep the names; what runs on them goes on.

    \b
    Examples:
      fedml cluster stop lab
      fedml cluster stop lab night
    """
    _each(connect(home), names, Cluster.stop, "has given its machines back", as_json=as_json)


@cluster.command()
@home_option
@json_option
def stopall(home: Path, as_json: bool) -> None:
    """Give the machines of all clusters back and keep the names.

    Those of others only if you are an admin.

    \b
    Examples:
      fedml cluster stopall
    """
    client = connect(home)
    names = [c.name for c in Cluster.list(at=client) if c.status == "up"]
    _each(client, names, Cluster.stop, "has given its machines back", as_json=as_json)


@cluster.command()
@name_argument
@click.argument("minutes", type=float, required=False)
@click.option("--never", is_flag=True, help="Not any more.")
@home_option
@json_option
def autostop(name: str, minutes: float | None, never: bool, home: Path, as_json: bool) -> None:
    """Stop a cluster by itself when it has been idle for so many MINUTES.

    \b
    Examples:
      fedml cluster autostop lab 30
      fedml cluster autostop lab --never
    """
    if never == (minutes is not None):
        raise click.UsageError("say after how many MINUTES, or --never")
    made = Cluster.find(name, at=connect(home)).autostop(minutes)
    _tell(made, as_json, f"{name} stops by itself: {_autostop(made)}")


@cluster.command()
@names_argument
@yes_option
@home_option
@json_option
def kill(names: tuple[str, ...], yes: bool, home: Path, as_json: bool) -> None:
    """Forget clusters and stop their runs.

    \b
    Examples:
      fedml cluster kill lab
      fedml cluster kill lab night --yes
    """
    client = connect(home)
    _kill(client, [Cluster.find(name, at=client) for name in names], yes, as_json)


@cluster.command()
@yes_option
@home_option
@json_option
def killall(yes: bool, home: Path, as_json: bool) -> None:
    """Forget all clusters and stop their runs.

    Those of others only if you are an admin.

    \b
    Examples:
      fedml cluster killall
      fedml cluster killall --yes
    """
    client = connect(home)
    _kill(client, Cluster.list(at=client), yes, as_json)


def _kill(client: Client, found: list[Cluster], yes: bool, as_json: bool) -> None:
    if runs := [run for c in found for run in c.runs]:
        question = f"This stops {len(runs)} runs: {', '.join(runs[:5])}. Go on?"
        if not yes and not click.confirm(question, err=True):
            raise click.Abort

    def forget(one: Cluster) -> dict[str, Any]:
        return {"cluster": one.name, "stopped": one.kill()}

    def said(one: dict[str, Any]) -> str:
        return "is forgotten" + (f"; stopped {', '.join(one['stopped'])}" if one["stopped"] else "")

    _each(client, [c.name for c in found], forget, said, as_json=as_json)


def _each(
    client: Client,
    names: Sequence[str],
    act: Callable[[Cluster], Any],
    said: str | Callable[[Any], str],
    *,
    as_json: bool,
) -> None:
    """Do one thing to each; what is refused of one keeps it from no other.

    Raises:
        BrokerRefused: Of one or more, with the reason for each, when all have had their turn.
    """
    done, refused = [], []
    for name in names:
        try:
            told = act(Cluster.find(name, at=client))
        except BrokerRefused as error:
            refused.append(error)
            continue
        done.append(told.details if isinstance(told, Cluster) else told)
        if not as_json:
            click.echo(f"{name} {said if isinstance(said, str) else said(told)}", err=True)
    if as_json:
        print_json(done)
    if refused:
        raise BrokerRefused("\n".join(map(str, refused)), refused[0].hint)


def _tell(made: Cluster, as_json: bool, text: str) -> None:
    if as_json:
        print_json(made.details)
    else:
        click.echo(text, err=True)


def _autostop(found: Cluster) -> str:
    minutes = found.details["autostop_minutes"]
    return "never" if minutes is None else f"after {minutes:g} idle minutes"
