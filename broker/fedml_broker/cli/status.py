# SPDX-License-Identifier: Apache-2.0
"""`fedml-broker status`."""

import json
from pathlib import Path

import click

from fedml_broker.cli.client import Client, home_option, json_option


@click.command()
@home_option
@json_option
def status(home: Path, as_json: bool) -> None:
    """Show the broker at a glance: addresses, machines, runs."""
    found = Client(home).call("GET", "/v1/status")
    if as_json:
        click.echo(json.dumps(found))
        return
    states = ", ".join(f"{count} {name}" for name, count in sorted(found["runs"].items()))
    rows = {
        "broker": f"{found['url']}, version {found['version']}, up {found['up_s'] / 60:.0f} min",
        "mqtt": found["mqtt"],
        "machines": f"{found['online']} of {found['devices']} online",
        "runs": states or "none yet",
        "refused": f"{found['refused_messages']} messages",
    }
    for name, text in rows.items():
        click.echo(f"{name:<10}{text}")
