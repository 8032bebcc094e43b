# SPDX-License-Identifier: Apache-2.0
"""`fedml-agent logout`."""

import click

from fedml_agent import login as joining
from fedml_agent.cli.options import home_option
from fedml_agent.home import Home


@click.command()
@click.option("--yes", is_flag=True, help="Do not ask.")
@home_option
def logout(yes: bool, home: Home) -> None:
    """Forget the broker: this machine's key, certificate, journal and fetched files. The policy
    stays.

    The broker still lists the device; an admin forgets it with `fedml-broker devices remove`.

    \b
    Examples:
      fedml-agent logout
      fedml-agent logout --yes
    """
    membership = home.membership()
    if not yes:
        click.confirm(f"Leave {membership.url} (device {membership.device})?", abort=True, err=True)
    with home.locked():
        joining.logout(home)
    click.secho("This machine is no member of any broker now.", err=True)
