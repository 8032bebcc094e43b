# SPDX-License-Identifier: Apache-2.0
"""The `fedml` command: one file per verb; exit codes are those of `errors.py`, or a job's own.

Data goes to stdout, talk to stderr. `--json` is for scripts.
"""

import difflib
import importlib
import os
import signal
import sys
import warnings

import click

from fedml.errors import FedMLError

# Verb -> module. A command is imported when it is used: most need neither each other nor NumPy.
_VERBS = {
    "login": "account",
    "whoami": "account",
    "logout": "account",
    "launch": "launch",
    "federate": "federate",
    "simulate": "simulate",
    "build": "build",
    "train": "build",
    "run": "run",
    "workflow": "workflow",
    "cluster": "cluster",
    "logs": "logs",
    "device": "device",
    "storage": "storage",
    "data": "data",
    "completion": "completion",
    "env": "env",
    "diagnosis": "diagnosis",
    "version": "env",
}


# FedML spells with underscores: `--dest_folder` is `--dest-folder`, `resource_type` a command.
_AS_FEDML_SPELLS = {"token_normalize_func": lambda token: token.replace("_", "-")}

# FedML's verbs that are not here, and why.
_NOT_HERE = {
    "model": "there are no model cards; a job file with `service` serves one (docs/deploy.md)"
}


class _Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        module = _VERBS.get(cmd_name)
        if module is None:
            return None
        found = getattr(importlib.import_module(f"fedml.cli.{module}"), cmd_name)
        return found if isinstance(found, click.Command) else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does; a verb that is not there gets the nearest one."""
        if args[0] in _NOT_HERE:
            ctx.fail(f"There is no {args[0]!r} here: {_NOT_HERE[args[0]]}.")
        near = difflib.get_close_matches(args[0], _VERBS, n=1)
        if args[0] not in _VERBS and near:
            ctx.fail(f"No such command {args[0]!r}. Did you mean {near[0]!r}?")
        return super().resolve_command(ctx, args)


def _tell_version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        from fedml.environment import ours

        click.echo(f"fedml {ours()}")
        context.exit()


@click.group(
    cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], **_AS_FEDML_SPELLS}
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_tell_version,
    help="Show the version and exit.",
)
def command() -> None:
    """Run jobs and train models on machines you own.

    \b
    First time:
      fedml login KEY          # from `fedml-broker users token NAME`
      fedml launch job.yaml
    """


def main() -> None:
    """The entry point."""
    warnings.showwarning = _warning
    # As an exception, so that a bar gives the terminal back before we go.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        sys.exit(command.main(standalone_mode=False) or 0)
    except FedMLError as error:
        _say(str(error), error.hint)
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
        # Whoever read our output has gone; at exit Python would complain about it once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except ModuleNotFoundError as error:
        if error.name not in ("numpy", "safetensors", "torch"):
            raise
        extra = "train" if error.name == "torch" else "sim"
        _say(f"this needs {error.name}, which is not installed", f"pip install '.[{extra}]'")
        sys.exit(1)
    except OSError as error:
        _say(str(error), "")
        sys.exit(1)


def _warning(message: Warning | str, *_: object, **__: object) -> None:
    """Warnings are for the person, without the line of our code that gives them."""
    click.secho(f"warning: {message}", fg="yellow", err=True)


def _say(text: str, hint: str) -> None:
    click.secho(f"error: {text}", fg="red", err=True)
    if hint:
        click.echo(f"  try: {hint}", err=True)
