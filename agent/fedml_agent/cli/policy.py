# SPDX-License-Identifier: Apache-2.0
"""`fedml-agent policy show|check`."""

import datetime

import click

from fedml_agent import hardware, room
from fedml_agent import policy as rules
from fedml_agent.cli.options import home_option
from fedml_agent.errors import AgentError
from fedml_agent.home import Home
from fedml_agent.policy import PolicyError


@click.group()
def policy() -> None:
    """The machine owner's say: what may run here, for whom, and how much of it."""


@policy.command()
@home_option
def show(home: Home) -> None:
    """Print the policy in force as commented TOML.

    \b
    Example: start from the defaults and make them stricter
      fedml-agent policy show > ~/.fedml/agent/policy.toml
    """
    click.echo(rules.describe(_load(home)))
    if not home.policy.exists():
        click.echo(f"There is no {home.policy}: these are the defaults.", err=True)


@policy.command()
@click.option("--kind", default="launch", show_default=True, type=click.Choice(rules.KINDS))
@click.option("--publisher", default="somebody", show_default=True, help="Who asks.")
@click.option("--gpus", default=0, show_default=True, help="GPUs that are asked for.")
@click.option("--cpus", default=0.0, show_default=True, help="CPUs that are asked for.")
@click.option("--memory-gb", default=0.0, show_default=True, help="Memory that is asked for.")
@click.option(
    "--deadline", default=0.0, show_default=True, help="Seconds that it may run; 0: none."
)
@home_option
def check(
    kind: str,
    publisher: str,
    gpus: int,
    cpus: float,
    memory_gb: float,
    deadline: float,
    home: Home,
) -> None:
    """Check the file, and what it says to a task: rule by rule.

    Exit code 0: the task would be taken; 1: it would be refused, or the file cannot be used.

    \b
    Examples:
      fedml-agent policy check
      fedml-agent policy check --kind federate --publisher dr-lee --gpus 1
    """
    found = _load(home)
    inventory = hardware.inventory(nvml=hardware.nvml_of_this_process())
    request = rules.Request(
        kind=kind,
        publisher=publisher,
        tenant="default",
        at=datetime.datetime.now().astimezone().time(),
        held=rules.Held(),
        disk_free=room.disk_free(home.root) if home.root.exists() else 2**62,
        epsilon_spent=0.0,
        devices=room.all_names(inventory),
        commands=kind == "launch",
        gpus=gpus,
        cpus=cpus,
        memory=int(memory_gb * 1e9),
        deadline_s=deadline or None,
        network=kind == "launch",
    )
    refused = False
    for ruling in rules.explain(found, request):
        click.secho(str(ruling), fg=None if ruling.ok else "red")
        refused = refused or not ruling.ok
    if refused:
        raise SystemExit(1)


def _load(home: Home) -> rules.Policy:
    try:
        return rules.load(home.policy)
    except PolicyError as error:
        raise AgentError(str(error), "until it is mended, the agent refuses every task") from error
