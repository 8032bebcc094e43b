# SPDX-License-Identifier: Apache-2.0
"""`fedml-broker devices list|show|label|drain|revoke|remove`."""

from collections import Counter
from pathlib import Path
from typing import Any

import click

from fedml_broker.cli.client import Client, home_option, json_option, parse_labels
from fedml_broker.cli.tables import Columns, print_list, print_thing, when, words

GB = 1e9


def _size(capacity: dict[str, Any]) -> str:
    counted = Counter(gpu["name"] for gpu in capacity["gpus"])
    gpus = [f"{count} × {name}" for name, count in counted.items()]
    memory = f"{capacity['memory_bytes'] / GB:.0f} GB"
    return ", ".join([f"{capacity['cpus']} CPUs", memory, *gpus])


_COLUMNS: Columns = {
    "NAME": lambda device: device["name"],
    "DEVICE": lambda device: device["id"],
    "STATUS": lambda device: device["status"],
    "TASKS": lambda device: f"{len(device['tasks'])} of {device['capacity']['slots']}",
    "HAS": lambda device: _size(device["capacity"]),
    "LABELS": lambda device: words(device["labels"]),
    "SEEN": lambda device: when(device["last_seen_at"]),
}
_FACTS: Columns = {
    "name": lambda device: device["name"],
    "device": lambda device: device["id"],
    "status": lambda device: device["status"],
    "has": lambda device: _size(device["capacity"]),
    "labels": lambda device: words(device["labels"]),
    "cluster": lambda device: device["cluster"],
    "tasks": lambda device: "\n".join(device["tasks"]) or "none",
    "refusing": lambda device: device["refusing"] or "nothing",
    "agent": lambda device: device["agent_version"],
    "joined": lambda device: when(device["enrolled_at"]),
    "seen": lambda device: when(device["last_seen_at"]),
    "certificate": lambda device: f"until {when(device['certificate_expires_at'])}",
}


@click.group()
def devices() -> None:
    """The machines that have joined.

    \b
    Examples:
      fedml-broker devices list
      fedml-broker devices drain ward-3
    """


@devices.command("list")
@home_option
@json_option
def list_devices(home: Path, as_json: bool) -> None:
    """List the machines with what they have and what they do.

    \b
    Examples:
      fedml-broker devices list
    """
    found = Client(home).call("GET", "/v1/devices")["devices"]
    empty = "no machines yet: `fedml-broker keys create`"
    print_list(found, _COLUMNS, as_json=as_json, empty=empty)


@devices.command()
@click.argument("device")
@home_option
@json_option
def show(device: str, home: Path, as_json: bool) -> None:
    """Show one machine (by name or id) with its hardware.

    \b
    Examples:
      fedml-broker devices show ward-3
    """
    found = Client(home).call("GET", f"/v1/devices/{device}")
    print_thing(found, _FACTS, as_json=as_json)


@devices.command()
@click.argument("device")
@click.argument("changes", nargs=-1, required=True, metavar="NAME=VALUE|NAME-...")
@home_option
def label(device: str, changes: tuple[str, ...], home: Path) -> None:
    """Put labels on a machine (NAME=VALUE) or take them off (NAME-).

    \b
    Examples:
      fedml-broker devices label ward-3 site=north gpu=big
      fedml-broker devices label ward-3 gpu-
    """
    remove = [c[:-1] for c in changes if c.endswith("-") and "=" not in c]
    put = parse_labels([c for c in changes if not (c.endswith("-") and "=" not in c)])
    body = {"put": put, "remove": remove}
    found = Client(home).call("POST", f"/v1/devices/{device}/labels", body)
    click.echo(words(found["labels"]))


@devices.command()
@click.argument("device")
@click.option("--off", is_flag=True, help="Use it again.")
@home_option
def drain(device: str, off: bool, home: Path) -> None:
    """Give a machine nothing more; what runs on it goes on.

    \b
    Examples:
      fedml-broker devices drain ward-3
      fedml-broker devices drain ward-3 --off   # use it again
    """
    Client(home).call("POST", f"/v1/devices/{device}/drain", {"on": not off})
    click.echo(f"{device} is {'used again' if off else 'drained'}", err=True)


@devices.command()
@click.argument("device")
@home_option
def revoke(device: str, home: Path) -> None:
    """Shut a machine out at once and for good.

    \b
    Examples:
      fedml-broker devices revoke ward-3
    """
    Client(home).call("POST", f"/v1/devices/{device}/revoke")
    click.echo(f"{device} is revoked", err=True)


@devices.command()
@click.argument("device")
@home_option
def remove(device: str, home: Path) -> None:
    """Forget a machine; it must log in again.

    \b
    Examples:
      fedml-broker devices remove ward-3
    """
    Client(home).call("DELETE", f"/v1/devices/{device}")
    click.echo(f"{device} is removed", err=True)
