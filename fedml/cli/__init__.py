# SPDX-License-Identifier: Apache-2.0
"""The `fedml` command; exit codes are those of `errors.py`, and a job's own for `launch`.

Data goes to stdout, talk to stderr. `--json` is for scripts.
"""

import sys

import click

from fedml.cli.account import login, logout
from fedml.cli.federate import federate
from fedml.cli.launch import launch
from fedml.cli.run import run
from fedml.errors import FedMLError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fedml-agent")
def command() -> None:
    """Run jobs and train models on machines you own.

    \b
    First time:
      fedml login KEY          # from `fedml-broker users token NAME`
      fedml launch job.yaml
    """


for _verb in (login, logout, launch, federate, run):
    command.add_command(_verb)


def main() -> None:
    """The entry point."""
    try:
        sys.exit(command.main(standalone_mode=False) or 0)
    except FedMLError as error:
        click.secho(f"error: {error}", fg="red", err=True)
        if error.hint:
            click.echo(f"  try: {error.hint}", err=True)
        sys.exit(error.exit_code)
    except click.exceptions.Abort:
        click.echo("stopped", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.exit(141)
