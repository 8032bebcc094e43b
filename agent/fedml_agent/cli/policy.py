# SPDX-License-Identifier: Apache-2.0
"""`fedml-agent policy show|check`."""

import datetime
import json
import os
from pathlib import Path

import click

from fedml_agent import hardware, policy_file, room, sandbox
from fedml_agent import policy as rules
from fedml_agent.cli.options import home_option, json_option
from fedml_agent.diagnose import unlock
from fedml_agent.errors import AgentError, HomeUnusable
from fedml_agent.home import Home
from fedml_agent.policy_file import PolicyError


@click.group()
def policy() -> None:
    """The machine owner's say: what may run here, for whom, and how much of it.

    \b
    Examples:
      fedml-agent policy show
      fedml-agent policy check
    """


@policy.command()
@click.option(
    "--output",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write it there, as a whole or not at all, instead of printing it.",
)
@home_option
def show(output: Path | None, home: Home) -> None:
    """Print the policy in force as commented TOML.

    To start from it, use --output: `show > policy.toml` would let the shell empty the file before
    it is read, and an empty file is the default policy.

    \b
    Examples:
      fedml-agent policy show
      fedml-agent policy show --output ~/.fedml/agent/policy.toml   # then edit that
    """
    text = policy_file.describe(_load(home))
    if output is None:
        click.echo(text, nl=False)
    else:
        _replace(output, text)
        click.echo(f"written to {output}", err=True)
    if not home.policy.exists():
        click.echo(f"There is no {home.policy}: these are the defaults.", err=True)


@policy.command()
@click.option(
    "--kind",
    default="launch",
    show_default=True,
    type=click.Choice(rules.KINDS),
    help="What is asked for: a job, or a stage of a federated run.",
)
@click.option("--publisher", default="somebody", show_default=True, help="Who asks.")
@click.option("--requirements", is_flag=True, help="Packages are to be installed for it.")
@click.option("--service", is_flag=True, help="It stays up and answers on a port.")
@click.option("--gpus", default=0, show_default=True, help="GPUs that are asked for.")
@click.option("--cpus", default=0.0, show_default=True, help="CPUs that are asked for.")
@click.option("--memory-gb", default=0.0, show_default=True, help="Memory that is asked for.")
@click.option(
    "--deadline", default=0.0, show_default=True, help="Seconds that it may run; 0: none."
)
@home_option
@json_option
def check(
    kind: str,
    publisher: str,
    requirements: bool,
    service: bool,
    gpus: int,
    cpus: float,
    memory_gb: float,
    deadline: float,
    home: Home,
    as_json: bool,
) -> None:
    """Check the file, and what it says to a task: rule by rule.

    Exit code 0: the task would be taken; 1: it would be refused, or the file cannot be used.

    \b
    Examples:
      fedml-agent policy check
      fedml-agent policy check --kind federate --publisher dr-lee --gpus 1
      fedml-agent policy check --json | jq -r '.rules[] | select(.ok | not) | .rule'
    """
    found = policy_file.load_or_refuse(home.policy) if as_json else _load(home)
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
        cannot=sandbox.cannot(),
        commands=kind == "launch",
        installs=requirements,
        gpus=gpus,
        cpus=cpus,
        memory=int(memory_gb * 1e9),
        deadline_s=deadline or None,
        network=kind == "launch",
        serves=service,
    )
    rulings = list(rules.explain(found, request))
    taken = all(one.ok for one in rulings)
    if as_json:
        said = {"taken": taken, "broken": found.broken, "rules": [one._asdict() for one in rulings]}
        click.echo(json.dumps(said))
    else:
        for ruling in rulings:
            click.secho(str(ruling), fg=None if ruling.ok else "red")
    if not taken:
        if not as_json:
            _say_why(next(one for one in rulings if not one.ok), found, request)
        raise SystemExit(1)


def _say_why(refusal: rules.Ruling, policy: rules.Policy, request: rules.Request) -> None:
    click.secho(f"such a task is {refusal}", fg="red", err=True)
    lacks = [name for name in (*policy.require, sandbox.NETWORK) if name in request.cannot]
    if refusal.rule in ("sandbox.require", "network.federated") and lacks:
        click.echo(f"  try: {unlock(lacks[0])}", err=True)


def _load(home: Home) -> rules.Policy:
    try:
        return policy_file.load(home.policy)
    except PolicyError as error:
        raise AgentError(str(error), "until it is mended, the agent refuses every task") from error


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        # Of this user only: an owner's rules are nobody else's business.
        number = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(number, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise HomeUnusable(f"cannot write {path}: {error.strerror}") from error
