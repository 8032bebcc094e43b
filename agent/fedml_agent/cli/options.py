# SPDX-License-Identifier: Apache-2.0
"""Options that several verbs share."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from fedml_agent.home import Home

F = TypeVar("F", bound=Callable[..., Any])


def home_option(function: F) -> F:
    """`--home DIR`, handed over as a `Home`."""
    return click.option(
        "--home",
        metavar="DIR",
        envvar="FEDML_HOME",
        callback=lambda _, __, value: Home.find(value),
        help="Where the agent keeps its state (FEDML_HOME; ~/.fedml).",
    )(function)


def json_option(function: F) -> F:
    """`--json`, handed over as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")(
        function
    )
