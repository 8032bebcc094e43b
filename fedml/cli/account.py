# SPDX-License-Identifier: Apache-2.0
"""`fedml login`, `fedml whoami`, `fedml logout`: who you are to which broker."""

import sys
from pathlib import Path

import click

from fedml import session
from fedml.cli.options import connect, home_option, json_option
from fedml.cli.tables import print_facts, print_json


@click.command()
@click.argument("key")
@home_option
def login(key: str, home: Path) -> None:
    """Keep KEY as your login.

    "-" reads it from stdin, so that nobody sees it in the list of processes.

    \b
    Examples:
      fedml login KEY                            # from `fedml-broker users token NAME`
      fedml login - < ~/.fedml/broker/admin.key  # on the broker's own machine, as its admin
    """
    if key == "-":
        key = sys.stdin.readline()
    found = session.login(home, key)
    click.secho(f"logged in at {found.url}", fg="green", err=True)


@click.command()
@home_option
@json_option
def whoami(home: Path, as_json: bool) -> None:
    """Show who you are to which broker.

    The broker is asked, so that the answer is true now.
    """
    client = connect(home)
    found = {**client.call("GET", "/v1/whoami"), "url": client.url}
    found["broker_version"] = client.call("GET", "/v1/health")["version"]
    if as_json:
        print_json(found)
        return
    broker = f"{found['url']}, version {found['broker_version']}"
    print_facts(
        {
            "user": found["name"],
            "role": found["role"],
            "tenant": found["tenant"],
            "broker": broker,
            "kept in": str(home / "user"),
        }
    )


@click.command()
@home_option
def logout(home: Path) -> None:
    """Forget the login of this home. The token stays good until it expires."""
    session.logout(home)
    click.echo("logged out", err=True)
