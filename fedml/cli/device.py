# SPDX-License-Identifier: Apache-2.0
"""`fedml device list|show|resources`."""

from collections import Counter
from dataclasses import asdict
from pathlib import Path

import click

from fedml.cli import remembered
from fedml.cli.options import connect, home_option, json_option
from fedml.cli.tables import print_facts, print_json, print_table, size, when, words
from fedml.devices import Device
from fedml.devices import resources as all_resources


@click.group()
def device() -> None:
    """The machines that you may use.

    \b
    Examples:
      fedml device list
      fedml device resources
    """


@device.command("list")
@home_option
@json_option
def list_devices(home: Path, as_json: bool) -> None:
    """List the machines with what they have and what they do.

    \b
    Examples:
      fedml device list
      fedml device list --json | jq -r '.[] | select(.status == "online") | .name'
    """
    found = Device.list(at=connect(home))
    if as_json:
        print_json([d.details for d in found])
        return
    reserved = any(d.cluster for d in found)
    rows = [
        (
            d.name,
            d.status,
            f"{len(d.tasks)} of {d.slots}",
            _has(d),
            " ".join(d.kinds),
            words(d.labels),
            *([d.cluster or "–"] if reserved else []),
            when(d.details["last_seen_at"]),
        )
        for d in found
    ]
    columns = ["NAME", "STATUS", "TASKS", "HAS", "TAKES", "LABELS", "SEEN"]
    columns[-1:-1] = ["CLUSTER"] if reserved else []
    print_table(columns, rows, "no machine has joined yet; its admin makes a key for each")


@device.command()
@click.argument("name", metavar="DEVICE", shell_complete=remembered.devices)
@home_option
@json_option
def show(name: str, home: Path, as_json: bool) -> None:
    """Show one machine, by name or id.

    \b
    Examples:
      fedml device show ward-3
      fedml device show ward-3 --json | jq .capacity
    """
    found = Device.find(name, at=connect(home))
    if as_json:
        print_json(found.details)
        return
    told = found.details
    print_facts(
        {
            "name": found.name,
            "device": found.id,
            "status": found.status,
            "takes": f"{', '.join(found.kinds)}; {found.slots} tasks at the same time",
            "refusing": told["refusing"] or "nothing",
            "holds": "\n".join(found.tasks) or "nothing",
            "labels": words(found.labels),
            "cluster": found.cluster or "none",
            "lets out": f"{_has(found)}, {size(found.disk_bytes)} of disk",
            "gpus": "\n".join(found.gpus) or "none",
            "agent": told["agent_version"],
            "joined": when(told["enrolled_at"]),
            "seen": when(told["last_seen_at"]),
        }
    )


@device.command()
@home_option
@json_option
def resources(home: Path, as_json: bool) -> None:
    """List what the machines have together: CPUs, and each model of GPU.

    TO ASK FOR is what `computing.resource_type` of a job file says. ONLINE are
    those on machines that are there now.

    \b
    Examples:
      fedml device resources
      fedml device resources --json | jq -r '.[] | select(.online > 0) | .resource_type'
    """
    found = all_resources(Device.list(at=connect(home)))
    if as_json:
        print_json([asdict(resource) for resource in found])
        return
    rows = [
        (
            r.resource_type,
            r.gpu or "–",
            size(r.memory_bytes),
            str(r.count),
            str(r.online),
            " ".join(r.machines),
        )
        for r in found
    ]
    columns = ("TO ASK FOR", "GPU", "MEMORY", "IN ALL", "ONLINE", "MACHINES")
    print_table(columns, rows, "no machine has joined yet; its admin makes a key for each")


# As FedML spells it.
device.add_command(
    click.Command(
        "resource-type",
        callback=resources.callback,
        params=resources.params,
        help=resources.help,
        hidden=True,
    )
)


def _bind(verb: str, instead: str) -> click.Command:
    """A verb of FedML's that is another program's here."""

    def say(words: tuple[str, ...]) -> None:
        raise click.UsageError(f"there is no `fedml device {verb}`: {instead}")

    return click.Command(
        verb,
        callback=say,
        params=[click.Argument(["words"], nargs=-1, type=click.UNPROCESSED)],
        context_settings={"ignore_unknown_options": True},
        help=f"{instead}.",
        hidden=True,
    )


_JOIN = (
    "a machine joins with `fedml-agent login KEY`, then `fedml-agent run`; an admin makes the key"
)
_LEAVE = (
    "a machine leaves with `fedml-agent logout`; an admin removes it: `fedml-broker devices remove`"
)
device.add_command(_bind("bind", _JOIN))
device.add_command(_bind("unbind", _LEAVE))


def _has(device: Device) -> str:
    gpus = [f"{count} × {name}" for name, count in Counter(device.gpus).items()]
    return ", ".join([f"{device.cpus} CPUs", size(device.memory_bytes), *gpus])
