# SPDX-License-Identifier: Apache-2.0
"""`fedml login`, `fedml whoami`, `fedml logout`: who you are to which broker."""

import os
import sys
import webbrowser
from pathlib import Path

import click

from fedml import session
from fedml.cli.options import connect, home_option, json_option
from fedml.cli.tables import print_facts, print_json, when
from fedml.client import Client
from fedml.session import Session


@click.command()
@click.argument("key", required=False)
@click.option(
    "--oidc",
    "oidc_url",
    is_flag=False,
    flag_value="",
    metavar="[URL]",
    help="Sign in with a browser, at the broker of this URL, or that of the last login.",
)
@click.option("--no-browser", is_flag=True, help="With --oidc: the browser is on another machine.")
# FedML's: this machine joins as one that does work.
@click.option("-c", "--compute-node", "joins", is_flag=True, hidden=True, help="Not here.")
@click.option("-s", "--server", "joins", is_flag=True, hidden=True, help="Not here.")
@click.option("-p", "--provider", "joins", is_flag=True, hidden=True, help="Not here.")
@home_option
def login(key: str | None, oidc_url: str | None, no_browser: bool, joins: bool, home: Path) -> None:
    """Keep KEY as your login, or sign in with a browser. What was kept before is replaced.

    "-" reads it from stdin, so that nobody sees it in the list of processes.
    With --oidc a browser opens where the broker's sign-in provider is, and what
    it brings back is kept: no key is shown. Where no browser can come back to
    this machine, --no-browser shows where to get a key, and asks for it.

    \b
    Examples:
      fedml login KEY                            # from `fedml-broker users token NAME`
      fedml login - < ~/.fedml/broker/admin.key  # on the broker's own machine, as its admin
      fedml login --oidc https://broker:8443     # with a browser; later on: fedml login --oidc
      fedml login --oidc https://broker:8443 --no-browser
    """
    if joins:
        raise click.UsageError(
            "this is for people: a machine joins with `fedml-agent login KEY`, whose key an admin "
            "makes with `fedml-broker keys create`"
        )
    if (key is None) == (oidc_url is None):
        raise click.UsageError("either a KEY, or --oidc")
    if key is not None:
        found = session.of_key(sys.stdin.readline() if key == "-" else key)
    else:
        url = oidc_url or session.load(home).url
        found = _with_key(url) if no_browser else _with_browser(url)
    me = Client(found).call("GET", "/v1/whoami")
    session.keep(home, found)
    click.secho(f"logged in at {found.url} as {me['name']}, {me['role']}", fg="green", err=True)


def _with_browser(url: str) -> Session:
    from fedml.sign_in import sign_in

    def show(where: str) -> None:
        # A browser in this very terminal would be in the way of everything.
        display = sys.platform == "darwin" or any(
            map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY"))
        )
        opened = display and webbrowser.open(where)
        said = "Sign in with the browser that has opened" if opened else "Open this with a browser"
        click.echo(f"{said} on this machine (elsewhere: --no-browser):\n  {where}", err=True)

    return sign_in(url, show)


def _with_key(url: str) -> Session:
    from fedml.sign_in import page

    click.echo(f"Open this with a browser, on any machine:\n  {page(url)}", err=True)
    said = click.prompt("The key that it shows", hide_input=True, err=True)
    # As it stands on the page, too: `fedml login KEY`.
    return session.of_key(said.split()[-1])


@click.command()
@home_option
@json_option
def whoami(home: Path, as_json: bool) -> None:
    """Show who you are to which broker.

    The broker is asked, so that the answer is true now.

    \b
    Examples:
      fedml whoami
      fedml whoami --json | jq -r .role
    """
    client = connect(home)
    found = {**client.call("GET", "/v1/whoami"), "url": client.url}
    found["broker_version"] = client.call("GET", "/v1/health")["version"]
    if as_json:
        print_json(found)
        return
    broker = f"{found['url']}, version {found['broker_version']}"
    until = {"good until": when(found["expires_at"])} if "expires_at" in found else {}
    run = {"of the run": found["run"]} if "run" in found else {}
    print_facts(
        {
            "user": found["name"],
            "role": found["role"],
            **run,
            "tenant": found["tenant"],
            "broker": broker,
            **until,
            "kept in": session.RUN_KEY if run else str(home / "user"),
        }
    )


@click.command()
@click.option("--revoke", is_flag=True, help="The key is good nowhere any more.")
@home_option
def logout(revoke: bool, home: Path) -> None:
    """Forget the login of this home.

    The key itself stays good until it expires, here and wherever else it is
    used. With --revoke the broker ends it, and browsers that are signed in with
    it; nothing is forgotten if the broker does not answer.

    \b
    Examples:
      fedml logout
      fedml logout --revoke      # a lost laptop: an admin has `fedml-broker users revoke NAME`
      fedml logout --home ~/another
    """
    if revoke:
        connect(home).call("DELETE", "/v1/token")
    session.logout(home)
    click.echo("logged out, and the key has ended" if revoke else "logged out", err=True)
