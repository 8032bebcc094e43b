# SPDX-License-Identifier: Apache-2.0
"""`fedml-agent login KEY`."""

import datetime
import json
import socket
import sys

import click

from fedml_agent import hardware, room, sandbox
from fedml_agent import login as joining
from fedml_agent.cli.options import home_option, json_option
from fedml_agent.errors import AgentError
from fedml_agent.home import Home
from fedml_agent.policy import closed
from fedml_agent.policy_file import load_or_refuse
from fedml_agent.version import VERSION


@click.command()
@click.argument("key")
@click.option("--name", help="How the machine is called; its host name if not given.")
@click.option("--label", "labels", metavar="NAME=VALUE", multiple=True, help="May be repeated.")
@home_option
@json_option
def login(key: str, name: str | None, labels: tuple[str, ...], home: Home, as_json: bool) -> None:
    """Let this machine join the broker that made KEY ("-" reads it from stdin).

    Logging in again with the same key is harmless.

    \b
    Examples:
      fedml-agent login fedml1d_…
      fedml-agent login fedml1d_… --name ward-3 --label site=north
      echo "$KEY" | fedml-agent login -
    """
    if key == "-":
        key = sys.stdin.readline()
    wanted: dict[str, str] = {}
    for text in labels:
        label, equals, value = text.partition("=")
        if not equals:
            raise click.BadParameter(f"{text!r} is not NAME=VALUE", param_hint="--label")
        wanted[label] = value
    home.make()
    inventory = hardware.inventory(nvml=hardware.nvml_of_this_process())
    policy = load_or_refuse(home.policy)
    if policy.broken:
        raise AgentError(policy.broken, "mend the policy first")
    joined = joining.login(
        home,
        key,
        name=name or socket.gethostname(),
        labels=wanted,
        inventory=room.report(inventory, policy, room.disk_free(home.root)),
        version=VERSION,
    )
    shut = closed(
        policy,
        at=datetime.datetime.now().astimezone().time(),
        disk_free=room.disk_free(home.root),
        cannot=sandbox.cannot(),
    )
    if shut:
        click.secho(f"No task will be taken as things are: {shut}", fg="yellow", err=True)
    if as_json:
        found = {"device": joined.device, "tenant": joined.tenant, "url": joined.url}
        click.echo(json.dumps(found))
        return
    click.secho(f"This machine is device {joined.device} of {joined.url}", fg="green", err=True)
    click.echo("  next: `fedml-agent run`", err=True)
