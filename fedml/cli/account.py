# SPDX-License-Identifier: Apache-2.0
"""`fedml login`, `fedml logout`."""

import sys

import click

from fedml import session


@click.command()
@click.argument("key")
@click.option("--home", metavar="DIR", help="Where the login is kept (FEDML_HOME; ~/.fedml).")
def login(key: str, home: str | None) -> None:
    """Keep KEY as your login ("-" reads it from stdin)."""
    if key == "-":
        key = sys.stdin.readline()
    found = session.login(session.find_home(home), key)
    click.secho(f"logged in at {found.url}", fg="green", err=True)


@click.command()
@click.option("--home", metavar="DIR", help="Where the login is kept (FEDML_HOME; ~/.fedml).")
def logout(home: str | None) -> None:
    """Forget the login of this home."""
    session.logout(session.find_home(home))
    click.echo("logged out", err=True)
