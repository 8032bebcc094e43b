# SPDX-License-Identifier: Apache-2.0
"""The `fedml-broker` command: one file per verb or noun; exit codes are decided here.

Data goes to stdout, talk to stderr. Exit codes: 0 done, 1 something else went wrong, 2 the command
was typed wrongly, 5 the broker does not answer, 6 it answered no.
"""

import importlib
import sys

import click

from fedml_broker.cli.client import CommandFailed

# Verb -> module. A command is imported when it is used.
_VERBS = ("up", "status", "keys", "devices", "runs", "users", "backup", "doctor")


class _Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _VERBS:
            return None
        found = getattr(importlib.import_module(f"fedml_broker.cli.{cmd_name}"), cmd_name)
        return found if isinstance(found, click.Command) else None


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fedml-agent")
def command() -> None:
    """Decides and remembers: schedules tasks, aggregates models, keeps what machines send.

    \b
    First time:
      fedml-broker up                 # prints a login key and where the admin token is
      fedml-agent login KEY           # on each machine
    """


def main() -> None:
    """The entry point."""
    try:
        sys.exit(command.main(standalone_mode=False) or 0)
    except CommandFailed as error:
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
