# SPDX-License-Identifier: Apache-2.0
"""Options that several verbs share, and the broker that they ask."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from fedml import session
from fedml.cli import remembered
from fedml.client import Client

F = TypeVar("F", bound=Callable[..., Any])


_KEY = "fedml.api_key"


def home_option(function: F) -> F:
    """`--home DIR`, handed over as the path of this home; and FedML's `-k KEY`, for `connect`.

    The key is for this command alone. Whoever types it shows it to all who list processes: it is
    understood, and not offered.
    """
    home = click.option(
        "--home",
        metavar="DIR",
        callback=lambda _, __, value: session.find_home(value),
        help="Where your login and fetched data are kept (FEDML_HOME; ~/.fedml).",
    )
    key = click.option(
        "-k",
        "--api-key",
        hidden=True,
        expose_value=False,
        callback=lambda context, _, value: context.find_root().meta.__setitem__(_KEY, value),
        help="A user's key, for this command alone.",
    )
    return home(key(function))


def run_argument(function: F) -> F:
    """RUN, handed over as `run_id`; or `-r RUN`, as FedML has it."""

    @functools.wraps(function)
    def command(*args: Any, run_id: str | None, run_option: str | None, **rest: Any) -> Any:
        if (run_id is None) == (run_option is None):
            raise click.UsageError("Missing argument 'RUN'." if run_id is None else "RUN twice")
        return function(*args, run_id=run_id or run_option, **rest)

    argument = click.argument(
        "run_id", metavar="RUN", required=False, shell_complete=remembered.runs
    )
    option = click.option("-r", "--run-id", "run_option", hidden=True, help="RUN.")
    return cast("F", argument(option(command)))


def json_option(function: F) -> F:
    """`--json`, handed over as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")(
        function
    )


def json_lines_option(function: F) -> F:
    """`--json` of a command that goes on for a while, handed over as `as_json`."""
    text = "Print one JSON object a line, for scripts."
    return click.option("--json", "as_json", is_flag=True, help=text)(function)


def package_option(function: F) -> F:
    """`--package WHAT`, handed over as `package`."""
    text = (
        "In place of the workspace: a file of `fedml build`, the name of a stored folder, or the "
        "hash of a package."
    )
    return click.option("--package", default="", metavar="FILE|NAME|HASH", help=text)(function)


def strict_option(function: F) -> F:
    """`--strict`, handed over as `strict`."""
    text = "Of a FedML file: refuse whatever would be done otherwise than it asks for."
    return click.option("--strict", is_flag=True, help=text)(function)


def connect(home: Path) -> Client:
    """The broker that this home is logged in at.

    Raises:
        NotLoggedIn: It is not.
    """
    context = click.get_current_context(silent=True)
    key = None if context is None else context.find_root().meta.get(_KEY)
    return Client(session.of_key(key) if key else session.load(home))
