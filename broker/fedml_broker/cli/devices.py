# SPDX-License-Identifier: Apache-2.0
"""`fedml-broker devices list|show|label|drain|revoke|remove`."""

import json
from pathlib import Path
from typing import Any

import click

from fedml_broker.cli.client import (
    Client,
    home_option,
    json_option,
    parse_labels,
    print_table,
    when,
    words,
)

GB = 1e9


@click.group()
def devices() -> None:
    """The machines that have joined."""


@devices.command("list")
@home_option
@json_option
def list_devices(home: Path, as_json: bool) -> None:
    """List the machines with what they have and what they do."""
    found = Client(home).call("GET", "/v1/devices")["devices"]
    if as_json:
        click.echo(json.dumps(found))
        return
    rows = [
        (
            device["name"],
            device["id"],
            device["status"],
            f"{len(device['tasks'])} of {device['capacity']['slots']}",
            _size(device["capacity"]),
            words(device["labels"]),
            when(device["last_seen_at"]),
        )
        for device in found
    ]
    columns = ("NAME", "DEVICE", "STATUS", "TASKS", "HAS", "LABELS", "SEEN")
    print_table(columns, rows, "no machines yet: `fedml-broker keys create`")


@devices.command()
@click.argument("device")
@home_option
@json_option
def show(device: str, home: Path, as_json: bool) -> None:
    """Show one machine (by name or id) with its hardware."""
    found = Client(home).call("GET", f"/v1/devices/{device}")
    if as_json:
        click.echo(json.dumps(found))
        return
    rows = {
        "name": found["name"],
        "device": found["id"],
        "status": found["status"],
        "has": _size(found["capacity"]),
        "labels": words(found["labels"]),
        "tasks": ", ".join(found["tasks"]) or "none",
        "refusing": found["refusing"] or "nothing",
        "agent": found["agent_version"],
        "joined": when(found["enrolled_at"]),
        "seen": when(found["last_seen_at"]),
        "certificate": f"until {when(found['certificate_expires_at'])}",
    }
    for name, text in rows.items():
        click.echo(f"{name:<13}{text}")


@devices.command()
@click.argument("device")
@click.argument("changes", nargs=-1, required=True, metavar="NAME=VALUE|NAME-...")
@home_option
def label(device: str, changes: tuple[str, ...], home: Path) -> None:
    """Put labels on a machine (NAME=VALUE) or take them off (NAME-)."""
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
    """Give a machine nothing more; what runs on it goes on."""
    Client(home).call("POST", f"/v1/devices/{device}/drain", {"on": not off})
    click.echo(f"{device} is {'used again' if off else 'drained'}", err=True)


@devices.command()
@click.argument("device")
@home_option
def revoke(device: str, home: Path) -> None:
    """Shut a machine out at once and for good."""
    Client(home).call("POST", f"/v1/devices/{device}/revoke")
    click.echo(f"{device} is revoked", err=True)


@devices.command()
@click.argument("device")
@home_option
def remove(device: str, home: Path) -> None:
    """Forget a machine; it must log in again."""
    Client(home).call("DELETE", f"/v1/devices/{device}")
    click.echo(f"{device} is removed", err=True)


def _size(capacity: dict[str, Any]) -> str:
    gpus = capacity["gpus"]
    text = f"{capacity['cpus']} CPUs, {capacity['memory_bytes'] / GB:.0f} GB"
    return text + (f", {len(gpus)} × {gpus[0]['name']}" if gpus else "")
