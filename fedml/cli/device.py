# SPDX-License-Identifier: Apache-2.0
"""`fedml device list|show`."""

from pathlib import Path

import click

from fedml.cli.options import connect, home_option, json_option
from fedml.cli.tables import print_facts, print_json, print_table, size, when, words
from fedml.devices import Device


@click.group()
def device() -> None:
    """The machines that you may use."""


@device.command("list")
@home_option
@json_option
def list_devices(home: Path, as_json: bool) -> None:
    """List the machines with what they have and what they do."""
    found = Device.list(at=connect(home))
    if as_json:
        print_json([d.details for d in found])
        return
    rows = [
        (
            d.name,
            d.status,
            f"{len(d.tasks)} of {d.slots}",
            _has(d),
            " ".join(d.kinds),
            words(d.labels),
            when(d.details["last_seen_at"]),
        )
        for d in found
    ]
    columns = ("NAME", "STATUS", "TASKS", "HAS", "TAKES", "LABELS", "SEEN")
    print_table(columns, rows, "no machine has joined yet; its admin makes a key for each")


@device.command()
@click.argument("name", metavar="DEVICE")
@home_option
@json_option
def show(name: str, home: Path, as_json: bool) -> None:
    """Show one machine, by name or id."""
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
            "lets out": f"{_has(found)}, {size(found.disk_bytes)} of disk",
            "gpus": "\n".join(found.gpus) or "none",
            "agent": told["agent_version"],
            "joined": when(told["enrolled_at"]),
            "seen": when(told["last_seen_at"]),
        }
    )


def _has(device: Device) -> str:
    text = f"{device.cpus} CPUs, {size(device.memory_bytes)}"
    return text + (f", {len(device.gpus)} × {device.gpus[0]}" if device.gpus else "")
