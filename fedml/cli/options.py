# SPDX-License-Identifier: Apache-2.0
"""Options that several verbs share, and the broker that they ask."""

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import urlencode

import click

from fedml import session
from fedml.cli import remembered
from fedml.client import Client
from fedml.errors import BrokerRefused

F = TypeVar("F", bound=Callable[..., Any])


_KEY = "fedml.api_key"


def home_option(function: F) -> F:
    """`--home DIR`, handed over as the path of this home; and what FedML's commands all take.

    Of these `-k KEY` is for `connect`, and for this command alone. Whoever types it shows it to all
    who list processes: it is understood, and not offered. Its platforms and their versions have no
    effect.
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
    one = "there is one platform, the broker that you are logged in at"
    version = no_effect("-v", "--version", why=one)
    return home(key(version(no_effect("-pf", "--platform", why=one)(function))))


def no_effect(*names: str, why: str) -> Callable[[F], F]:
    """An option of FedML's that is understood, not offered, and named in a warning."""

    def warn(_: click.Context, __: click.Parameter, value: str | None) -> None:
        if value is not None:
            warnings.warn(f"{names[-1]} has no effect: {why}", UserWarning, stacklevel=2)

    return click.option(*names, hidden=True, expose_value=False, callback=warn, help="No effect.")


def cluster_option(function: F) -> F:
    """`-c NAME`."""
    return click.option(
        "-c",
        "--cluster",
        default="",
        metavar="NAME",
        shell_complete=remembered.clusters,
        help="On the machines of this cluster.",
    )(function)


def run_argument(function: F) -> F:
    """RUN, handed over as `run_id`; or `-r RUN`, or `-n NAME` for the newest so called, as FedML
    has it.
    """

    @functools.wraps(function)
    def command(
        *args: Any, run_id: str | None, run_option: str | None, run_name: str | None, **rest: Any
    ) -> Any:
        given = [one for one in (run_id, run_option, run_name) if one is not None]
        if len(given) != 1:
            raise click.UsageError("RUN twice" if given else "Missing argument 'RUN'.")
        found = given[0] if run_name is None else _newest(connect(rest["home"]), run_name)
        return function(*args, run_id=found, **rest)

    argument = click.argument(
        "run_id", metavar="RUN", required=False, shell_complete=remembered.runs
    )
    option = click.option("-r", "--run-id", "run_option", hidden=True, help="RUN.")
    name = click.option("-n", "--run-name", hidden=True, help="The newest run so called.")
    return cast("F", argument(option(name(command))))


def _newest(client: Client, name: str) -> str:
    """The newest run of this name."""
    query = urlencode({"name": name, "limit": 1000})
    for found in client.call("GET", f"/v1/runs?{query}")["runs"]:
        if found["name"] == name:
            return str(found["id"])
    raise BrokerRefused(f"no run is called {name!r}", "`fedml run list`")


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
