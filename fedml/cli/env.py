# SPDX-License-Identifier: Apache-2.0
"""`fedml env` and `fedml version`."""

from pathlib import Path

import click

from fedml import environment
from fedml.cli.options import home_option, json_option
from fedml.cli.tables import print_facts, print_json, size


@click.command()
@home_option
@json_option
def env(home: Path, as_json: bool) -> None:
    """Show versions, this machine, and who is signed in where: for reports of problems.

    Nothing of it is secret, and nothing is sent to anybody but your broker, which is asked who
    you are. `fedml diagnosis` says what is wrong and what to do.

    \b
    Examples:
      fedml env
      fedml env --json | jq .broker.version
    """
    versions, here = environment.versions(), environment.machine()
    broker = environment.account(home)
    if as_json:
        print_json({"versions": versions, "machine": here, "home": str(home), "broker": broker})
        return
    gpus = [f"{gpu['name']}, {size(gpu['memory_bytes'])}" for gpu in here["gpus"] or ()]
    memory = f"{size(here['memory_bytes'])}, {size(here['memory_free_bytes'])} of it free"
    who = f"{broker['name']}, {broker['role']} of {broker['tenant']}" if "name" in broker else ""
    url = ", version ".join(broker[name] for name in ("url", "version") if name in broker)
    print_facts(
        {
            **versions,
            "system": f"{here['os']}, {here['architecture']}",
            "interpreter": here["python"],
            "cpus": str(here["cpus"]),
            "memory": memory,
            "gpus": "\n".join(gpus) or "none that NVML knows",
            "home": str(home),
            "broker": url or "none",
            "signed in": who or broker["error"],
        }
    )


@click.command()
@json_option
def version(as_json: bool) -> None:
    """Show the versions of fedml and its libraries.

    \b
    Examples:
      fedml version
      fedml version --json | jq -r .fedml
    """
    found = environment.versions()
    if as_json:
        print_json(found)
    else:
        print_facts(found)
