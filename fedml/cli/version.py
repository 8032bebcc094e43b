# SPDX-License-Identifier: Apache-2.0
"""`fedml version`."""

import importlib.metadata
import platform

import click

from fedml.cli.options import json_option
from fedml.cli.tables import print_facts, print_json

# What a report of a problem should say: of those that are installed.
_LIBRARIES = ("numpy", "torch", "click", "urllib3")


@click.command()
@json_option
def version(as_json: bool) -> None:
    """Show the versions of fedml and its libraries."""
    found = {"fedml": ours(), "python": platform.python_version()}
    found |= {name: text for name in _LIBRARIES if (text := _version(name))}
    if as_json:
        print_json(found)
    else:
        print_facts(found)


def ours() -> str:
    """The installed version, or that of a source tree."""
    return _version("fedml-agent") or "0+source"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
