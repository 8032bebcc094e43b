# SPDX-License-Identifier: Apache-2.0
"""`fedml-agent policy show|check`."""

import datetime
import json
import os
from collections.abc import Sequence
from pathlib import Path

import click

from fedml_agent import containers, hardware, policy_file, room, sandbox
from fedml_agent import policy as rules
from fedml_agent.cli.options import home_option, json_option
from fedml_agent.diagnose import unlock
from fedml_agent.errors import AgentError, HomeUnusable, NotLoggedIn
from fedml_agent.home import Home
from fedml_agent.policy_file import PolicyError

_AMOUNT = click.FloatRange(0)


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
@click.option(
    "--publisher",
    default="somebody",
    show_default=True,
    metavar="[TENANT/]USER",
    help="Who asks; of this machine's tenant, if none is named.",
)
@click.option("--requirements", is_flag=True, help="Packages are to be installed for it.")
@click.option("--service", is_flag=True, help="It stays up and answers on a port.")
@click.option(
    "--gpus", default=0, show_default=True, type=click.IntRange(0), help="GPUs that are asked for."
)
@click.option(
    "--cpus", default=0.0, show_default=True, type=_AMOUNT, help="CPUs that are asked for."
)
@click.option(
    "--memory-gb", default=0.0, show_default=True, type=_AMOUNT, help="Memory that is asked for."
)
@click.option(
    "--disk-gb", default=0.0, show_default=True, type=_AMOUNT, help="Disk space that is asked for."
)
@click.option(
    "--deadline",
    default=0.0,
    show_default=True,
    type=_AMOUNT,
    help="Seconds that it may run; 0: none.",
)
@click.option(
    "--network/--no-network", default=None, help="Unless said: jobs have it, federated tasks not."
)
@click.option("--image", default="", help="The container image that it brings.")
@click.option(
    "--mount",
    "mounts",
    multiple=True,
    metavar="PATH[:rw]",
    help="What its container is to see. May be repeated.",
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
    disk_gb: float,
    deadline: float,
    network: bool | None,
    image: str,
    mounts: tuple[str, ...],
    home: Home,
    as_json: bool,
) -> None:
    """Check the file, and what it says to a task: rule by rule.

    Exit code 0: the task would be taken; 1: it would be refused, or the file cannot be used.

    \b
    Examples:
      fedml-agent policy check
      fedml-agent policy check --kind federate --publisher dr-lee --gpus 1
      fedml-agent policy check --image python:3.12 --mount /srv/scans
      fedml-agent policy check --json | jq -r '.rules[] | select(.ok | not) | .rule'
    """
    found = policy_file.load_or_refuse(home.policy) if as_json else _load(home)
    inventory = hardware.inventory(nvml=hardware.nvml_of_this_process())
    tenant, _, user = publisher.rpartition("/")
    try:
        request = rules.Request(
            kind=kind,
            publisher=user,
            tenant=tenant or _tenant(home),
            at=datetime.datetime.now().astimezone().time(),
            held=rules.Held(),
            disk_free=room.disk_free(next(p for p in home.root.parents if p.exists())),
            epsilon_spent=0.0,
            devices=room.all_names(inventory),
            cannot=containers.cannot(found) if image else sandbox.cannot(),
            commands=kind == "launch",
            installs=requirements,
            gpus=gpus,
            cpus=cpus,
            memory=int(memory_gb * 1e9),
            disk=int(disk_gb * 1e9),
            deadline_s=deadline or None,
            serves=service,
            network=kind == "launch" if network is None else network,
            image=containers.full_name(image) if image else "",
            mounts=tuple((one.removesuffix(":rw"), one.endswith(":rw")) for one in mounts),
        )
    except ValueError as error:  # a name with two slashes, an amount that is no number
        raise click.UsageError(str(error)) from error
    rulings = list(rules.explain(found, request))
    taken = all(one.ok for one in rulings)
    engine = str(containers.here(found)) if image else ""
    if as_json:
        said = {"taken": taken, "broken": found.broken, "rules": [one._asdict() for one in rulings]}
        said |= {"engine": engine} if image else {}
        click.echo(json.dumps(said))
    else:
        _show(rulings)
        if image:
            click.echo(f"containers here: {engine}", err=True)
    if not taken:
        if not as_json:
            _say_why(next(one for one in rulings if not one.ok), found, request)
        raise SystemExit(1)
    if not as_json:
        click.secho(f"such a task of {request.tenant}/{user} would be taken", fg="green", err=True)


def _show(rulings: Sequence[rules.Ruling]) -> None:
    rule = max(len(one.rule) for one in rulings) + 2
    asked = max(len(one.asked) for one in rulings) + 2
    click.secho(f"{'RULE':<{rule}}{'SAYS':<9}{'ASKED FOR':<{asked}}MAY BE", bold=True)
    for one in rulings:
        says = click.style(f"{'ok' if one.ok else 'refused':<9}", fg="green" if one.ok else "red")
        click.echo(f"{one.rule:<{rule}}{says}{one.asked:<{asked}}{one.allowed}")


def _tenant(home: Home) -> str:
    try:
        return home.membership().tenant
    except NotLoggedIn:
        return "default"


def _say_why(refusal: rules.Ruling, policy: rules.Policy, request: rules.Request) -> None:
    click.secho(f"such a task is {refusal}", fg="red", err=True)
    lacks = [name for name in (*policy.require, sandbox.NETWORK) if name in request.cannot]
    if refusal.rule in ("sandbox.require", "network.federated") and lacks:
        click.echo(f"  try: {unlock(lacks[0])}", err=True)


def _load(home: Home) -> rules.Policy:
    try:
        return policy_file.load(home.policy)
    except PolicyError as error:
        hint = f"mend it in {home.policy}; until then the agent refuses every task"
        raise AgentError(str(error), hint) from error


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
