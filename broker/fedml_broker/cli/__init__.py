# SPDX-License-Identifier: Apache-2.0
"""The `fedml-broker` command: one file per verb or noun; exit codes are decided here.

Data goes to stdout, talk to stderr. Exit codes: 0 done, 1 something else went wrong, 2 the command
was typed wrongly, 5 the broker does not answer, 6 it answered no.
"""

import difflib
import errno
import importlib
import os
import sys
from typing import NoReturn

import click

from fedml_broker.cli.client import CommandFailed

# What the extra brings; without it the agent's package is there and this command cannot work.
_BROUGHT = (
    "aiohttp",
    "alembic",
    "joserfc",
    "msgspec",
    "mqtt5",
    "numpy",
    "prometheus_client",
    "safetensors",
    "sqlalchemy",
)

# Verb -> module. A command is imported when it is used.
_VERBS = (
    "up",
    "status",
    "keys",
    "devices",
    "runs",
    "users",
    "audit",
    "backup",
    "doctor",
    "simulate-fleet",
)


class _Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _VERBS:
            return None
        name = cmd_name.replace("-", "_")
        found = getattr(importlib.import_module(f"fedml_broker.cli.{name}"), name)
        return found if isinstance(found, click.Command) else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does; a verb that is not there gets the nearest one."""
        near = difflib.get_close_matches(args[0], _VERBS, n=1)
        if args[0] not in _VERBS and near:
            ctx.fail(f"No such command {args[0]!r}. Did you mean {near[0]!r}?")
        return super().resolve_command(ctx, args)


def _tell_version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        from fedml_broker.app import our_version

        click.echo(f"fedml-broker {our_version()}")
        context.exit()


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_tell_version,
    help="Show the version and exit.",
)
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
        _end(error)
    except click.exceptions.Abort:
        click.echo("stopped", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # Whoever read our output has gone; at exit Python would complain about it once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "make room on the disk" if full else "are the home and its files this user's?"
        _end(CommandFailed(str(error), hint))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _BROUGHT:
            raise
        _end(
            CommandFailed(
                f"the broker's part is not installed: no {error.name}",
                "pip install 'fedml-agent[broker]', or '.[broker]' in a checkout",
            )
        )


def _end(error: CommandFailed) -> NoReturn:
    click.secho(f"error: {error}", fg="red", err=True)
    if error.hint:
        click.echo(f"  try: {error.hint}", err=True)
    sys.exit(error.exit_code)
