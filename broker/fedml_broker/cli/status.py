# SPDX-License-Identifier: Apache-2.0
"""`fedml-broker status`."""

from pathlib import Path

import click

from fedml_broker.cli.client import Client, home_option, json_option
from fedml_broker.cli.tables import Columns, Row, print_thing


def _broker(found: Row) -> str:
    return f"{found['url']}, version {found['version']}, up {found['up_s'] / 60:.0f} min"


def _runs(found: Row) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(found["runs"].items()))


_FACTS: Columns = {
    "broker": _broker,
    "mqtt": lambda found: found["mqtt"],
    "machines": lambda found: f"{found['online']} of {found['devices']} online",
    "runs": lambda found: _runs(found) or "none yet",
    "refused": lambda found: f"{found['refused_messages']} messages",
}


@click.command()
@home_option
@json_option
def status(home: Path, as_json: bool) -> None:
    """Show the broker at a glance: addresses, machines, runs.

    \b
    Examples:
      fedml-broker status
      fedml-broker status --json | jq .online
    """
    print_thing(Client(home).call("GET", "/v1/status"), _FACTS, as_json=as_json)
