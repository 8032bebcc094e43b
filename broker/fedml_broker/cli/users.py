# SPDX-License-Identifier: Apache-2.0
"""`fedml-broker users create|role|list|token|revoke`."""

from pathlib import Path

import click

from fedml_broker.cli.client import Client, home_option, json_option
from fedml_broker.cli.tables import Columns, print_list, when
from fedml_protocol.keys import Scope, parse_login_key

_ROLES = ("viewer", "member", "admin")
_COLUMNS: Columns = {
    "USER": lambda user: user["name"],
    "ROLE": lambda user: user["role"],
    "TOKENS": lambda user: str(user["tokens"]),
    "SINCE": lambda user: when(user["created_at"]),
}


def _named(role: str) -> str:
    return f"an {role}" if role == "admin" else f"a {role}"


@click.group()
def users() -> None:
    """People who launch runs, and their tokens.

    \b
    Examples:
      fedml-broker users create lee --role member
      fedml-broker users token lee --days 30
      fedml-broker users revoke lee
    """


@users.command()
@click.argument("name")
@click.option(
    "--role",
    type=click.Choice(_ROLES),
    default="member",
    show_default=True,
    help="viewer: sees everything, changes nothing; member: runs things; admin: manages.",
)
@click.option("--admin", is_flag=True, help="The same as --role admin.")
@click.option("--tenant", default="", help="To whom they belong, if not to your own tenant.")
@home_option
def create(name: str, role: str, admin: bool, tenant: str, home: Path) -> None:
    """Add a user. What `fedml login` takes is printed by `users token NAME`.

    \b
    Examples:
      fedml-broker users create alice
      fedml-broker users create visitor --role viewer
      fedml-broker users create bob --admin --tenant acme    # a tenant begins with its first user
    """
    if admin and role == "viewer":
        raise click.UsageError("--admin and --role viewer are two different roles")
    role = "admin" if admin else role
    Client(home).call("POST", "/v1/users", {"name": name, "role": role, "tenant": tenant})
    click.echo(f"{name} is {_named(role)}; next: `fedml-broker users token {name}`", err=True)


@users.command("role")
@click.argument("name")
@click.argument("role", type=click.Choice(_ROLES))
@home_option
def change_role(name: str, role: str, home: Path) -> None:
    """Give user NAME another ROLE: viewer, member or admin. It counts at once.

    \b
    Examples:
      fedml-broker users role alice admin
    """
    Client(home).call("PUT", f"/v1/users/{name}/role", {"role": role})
    click.echo(f"{name} is {_named(role)} now", err=True)


@users.command("list")
@home_option
@json_option
def list_users(home: Path, as_json: bool) -> None:
    """List the users.

    \b
    Examples:
      fedml-broker users list
    """
    found = Client(home).call("GET", "/v1/users")["users"]
    print_list(found, _COLUMNS, as_json=as_json, empty="no users yet")


@users.command()
@click.argument("name")
@click.option("--days", default=0.0, help="How long it is good for; 0: for ever.")
@click.option("--bearer", is_flag=True, help="As other HTTP clients take it, such as Prometheus.")
@home_option
def token(name: str, days: float, bearer: bool, home: Path) -> None:
    """Print a new token of user NAME, this once, as the string that `fedml login` takes.

    \b
    Examples:
      fedml-broker users token alice --days 90
      fedml-broker users token scraper --bearer > /etc/prometheus/fedml-token
    """
    found = Client(home).call("POST", f"/v1/users/{name}/tokens", {"days": days or None})
    key = found["key"]
    click.echo(parse_login_key(key, Scope.USER).secret.hex() if bearer else key)


@users.command()
@click.argument("name")
@home_option
def revoke(name: str, home: Path) -> None:
    """End all tokens of user NAME at once, and what browsers are signed in with.

    What NAME has started runs on. The token with which this very command asks
    stays, so for yourself these are all the others. Somebody whom a sign-in
    provider lets in can come back: take the person off there first.

    \b
    Examples:
      fedml-broker users revoke alice
    """
    count = Client(home).call("DELETE", f"/v1/users/{name}/tokens")["tokens"]
    many = f"{count} token{'' if count == 1 else 's'}"
    click.echo(f"{name} is signed out everywhere: {many} ended", err=True)
