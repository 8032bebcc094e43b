# SPDX-License-Identifier: Apache-2.0
"""Options that several verbs share, and the broker that they ask."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from fedml import session
from fedml.client import Client

F = TypeVar("F", bound=Callable[..., Any])


# For commands that FedML spells with underscores: `--dest_folder` is `--dest-folder`.
AS_FEDML_SPELLS = {"token_normalize_func": lambda token: token.replace("_", "-")}


def home_option(function: F) -> F:
    """`--home DIR`, handed over as the path of this home."""
    return click.option(
        "--home",
        metavar="DIR",
        callback=lambda _, __, value: session.find_home(value),
        help="Where your login and fetched data are kept (FEDML_HOME; ~/.fedml).",
    )(function)


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
    return Client(session.load(home))
