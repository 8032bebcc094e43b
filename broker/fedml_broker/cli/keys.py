# SPDX-License-Identifier: Apache-2.0
"""`fedml-broker keys create|list|revoke`."""

import json
from pathlib import Path

import click

from fedml_broker.cli.client import Client, home_option, json_option, parse_labels
from fedml_broker.cli.tables import Columns, print_list, when, words

_COLUMNS: Columns = {
    "KEY": lambda key: key["id"],
    "USED": lambda key: f"{key['used']} of {key['uses'] or 'any'}",
    "GOOD UNTIL": lambda key: "revoked" if key["revoked"] else when(key["expires_at"]),
    "LABELS": lambda key: words(key["labels"]),
    "MADE BY": lambda key: f"{key['created_by']}, {when(key['created_at'])}",
}


@click.group()
def keys() -> None:
    """Login keys: the one string with which a machine joins.

    \b
    Examples:
      fedml-broker keys create --uses 20
      fedml-broker keys list
    """


@keys.command()
@click.option(
    "--uses", default=1, show_default=True, help="How many machines may use it; 0: any number."
)
@click.option(
    "--days", default=7.0, show_default=True, help="How long it is good for; 0: for ever."
)
@click.option("--label", "labels", metavar="NAME=VALUE", multiple=True, help="Put on each machine.")
@click.option("--tenant", default="", help="Whose machines they will be, if not your own tenant's.")
@home_option
@json_option
def create(
    uses: int, days: float, labels: tuple[str, ...], tenant: str, home: Path, as_json: bool
) -> None:
    """Make a login key and print it, this once.

    \b
    Examples:
      fedml-broker keys create
      fedml-broker keys create --uses 20 --days 1 --label site=north
      fedml-agent login $(fedml-broker keys create)
    """
    body = {
        "uses": uses or None,
        "days": days or None,
        "labels": parse_labels(labels),
        "tenant": tenant,
    }
    found = Client(home).call("POST", "/v1/keys", body)
    click.echo(json.dumps(found) if as_json else found["key"])


@keys.command("list")
@home_option
@json_option
def list_keys(home: Path, as_json: bool) -> None:
    """List the login keys, without their secrets.

    \b
    Examples:
      fedml-broker keys list
      fedml-broker keys list --json | jq -r '.[].id'
    """
    found = Client(home).call("GET", "/v1/keys")["keys"]
    print_list(found, _COLUMNS, as_json=as_json, empty="no keys yet")


@keys.command()
@click.argument("key")
@home_option
def revoke(key: str, home: Path) -> None:
    """Let no further machine join with KEY (an id from `keys list`); those that did stay.

    \b
    Examples:
      fedml-broker keys revoke k-1c0ffee1
    """
    Client(home).call("DELETE", f"/v1/keys/{key}")
    click.echo(f"{key} is revoked", err=True)
