# SPDX-License-Identifier: Apache-2.0
"""The `fedml-agent` command: one file per verb; exit codes are decided here.

Data goes to stdout, talk to stderr. `--json` is for scripts. Exit codes: 0 done, 1 something else
went wrong, 2 the command was typed wrongly, and those of `errors.py`.
"""

import difflib
import importlib
import os
import sqlite3
import sys
from typing import NoReturn

import click

from fedml_agent.errors import AgentError, HomeUnusable

# Verb -> module. A command is imported when it is used: `run` must stay small.
_VERBS = {
    "login": "login",
    "run": "run",
    "status": "status",
    "hardware": "hardware",
    "policy": "policy",
    "diagnose": "diagnose",
    "logout": "logout",
}


class _Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        module = _VERBS.get(cmd_name)
        if module is None:
            return None
        found = importlib.import_module(f"fedml_agent.cli.{module}")
        command = getattr(found, module)
        return command if isinstance(command, click.Command) else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does; a verb that is not there gets the nearest one."""
        near = difflib.get_close_matches(args[0], _VERBS, n=1)
        if args[0] not in _VERBS and near:
            ctx.fail(f"No such command {args[0]!r}. Did you mean {near[0]!r}?")
        return super().resolve_command(ctx, args)


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fedml-agent")
def command() -> None:
    """Lets this machine work for a fedml broker: it takes tasks, and says no when you say no.

    \b
    First time:
      fedml-agent login KEY     # the key is printed by `fedml-broker keys create`
      fedml-agent run           # until Ctrl-C; as a service: see docs/agent.md
    """


def main() -> None:
    """The entry point."""
    try:
        sys.exit(command.main(standalone_mode=False) or 0)
    except AgentError as error:
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
    except OSError as error:  # of a disk, as a rule: what goes over the network says so itself
        _end(HomeUnusable(str(error), "`fedml-agent diagnose` looks at the home and its disk"))
    except sqlite3.OperationalError as error:
        _end(HomeUnusable(f"the journal: {error}", "`fedml-agent diagnose` looks at its disk"))


def _end(error: AgentError) -> NoReturn:
    click.secho(f"error: {error}", fg="red", err=True)
    if error.hint:
        click.secho(f"  try: {error.hint}", err=True)
    sys.exit(error.exit_code)
