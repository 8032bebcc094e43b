# SPDX-License-Identifier: Apache-2.0
"""`fedml storage upload|download|list|delete|metadata`."""

import json
from pathlib import Path
from typing import Any

import click

from fedml import storage as stored
from fedml.cli import remembered
from fedml.cli.options import connect, home_option, json_option
from fedml.cli.tables import print_facts, print_json, print_table, size, transfer, when


@click.group()
def storage() -> None:
    """Files and folders kept at the broker, by name.

    What the broker has already is not sent again. A transfer that was cut off goes on where it
    stopped when the same command is given again.

    \b
    Examples:
      fedml storage upload train.csv data/train.csv
      fedml storage list data/
    """


def _pairs(_: click.Context, __: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    wrong = [pair for pair in given if not pair.partition("=")[1] or pair.startswith("=")]
    if wrong:
        raise click.BadParameter(f"{wrong[0]!r} is not NAME=VALUE")
    return {pair.partition("=")[0]: pair.partition("=")[2] for pair in given}


def _object(_: click.Context, __: click.Parameter, given: str | None) -> dict[str, Any]:
    try:
        found = json.loads(given or "{}")
    except ValueError as error:
        raise click.BadParameter(f"not JSON: {error}") from error
    if not isinstance(found, dict):
        raise click.BadParameter("not a JSON object")
    return found


@storage.command()
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.argument("name", default="")
@click.option("-n", "--name", "name_option", default="", hidden=True, help="NAME, as FedML has it.")
@click.option(
    "--metadata", multiple=True, metavar="NAME=VALUE", callback=_pairs, help="Kept beside it."
)
@click.option(
    "-um",
    "--user-metadata",
    "given",
    metavar="JSON",
    callback=_object,
    help="The same as one JSON object.",
)
@home_option
@json_option
def upload(
    path: Path,
    name: str,
    name_option: str,
    metadata: dict[str, str],
    given: dict[str, Any],
    home: Path,
    as_json: bool,
) -> None:
    """Store the file or folder PATH under NAME (its own name). What was there is replaced.

    Of a folder goes what `fedml launch` would send: ignore files count.

    \b
    Examples:
      fedml storage upload train.csv
      fedml storage upload train.csv data/train.csv --metadata from="ward 3"
      fedml storage upload results/ results/first
    """
    if name and name_option:
        raise click.UsageError("the name is given twice")
    client = connect(home)
    with transfer(path.name) as told:
        found = stored.upload(
            client, path, name or name_option, metadata={**given, **metadata}, told=told
        )
    if as_json:
        print_json(found)
    else:
        click.echo(f"{found['name']}: {size(found['size'])} stored", err=True)


@storage.command()
@click.argument("name", shell_complete=remembered.objects)
@click.argument("into", required=False, type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace the file INTO if it is there.")
@home_option
@json_option
def download(name: str, into: Path | None, force: bool, home: Path, as_json: bool) -> None:
    """Write the object NAME into the file or new folder INTO (the end of its name).

    \b
    Examples:
      fedml storage download data/train.csv
      fedml storage download data/train.csv /tmp/mine.csv --force
    """
    target = into or Path(name.rpartition("/")[2])
    if target.exists() and not force:
        raise click.UsageError(f"{target} exists already; name another, or --force replaces a file")
    with transfer(name) as told:
        found = stored.download(connect(home), name, target, told)
    if as_json:
        print_json({**found, "path": str(target)})
    else:
        click.echo(f"{target}: {size(found['size'])}", err=True)


@storage.command("list")
@click.argument("prefix", default="")
@home_option
@json_option
def list_objects(prefix: str, home: Path, as_json: bool) -> None:
    """List what is stored: everything, or what begins with PREFIX.

    \b
    Examples:
      fedml storage list
      fedml storage list data/
    """
    found = list(stored.listed(connect(home), prefix))
    if as_json:
        print_json(found)
        return
    rows = [
        (o["name"] + "/" * o["folder"], size(o["size"]), o["user"], when(o["created_at"]))
        for o in found
    ]
    print_table(("NAME", "SIZE", "BY", "STORED"), rows, "nothing is stored")


@storage.command()
@click.argument("name", shell_complete=remembered.objects)
@home_option
@json_option
def delete(name: str, home: Path, as_json: bool) -> None:
    """Delete an object of yours. Admins may delete those of others.

    \b
    Examples:
      fedml storage delete data/train.csv
    """
    freed = stored.delete(connect(home), name)
    if as_json:
        print_json({"name": name, "freed_bytes": freed})
    else:
        what = f"{size(freed)} are free" if freed else "others need its bytes, which stay"
        click.echo(f"{name} is gone; {what}", err=True)


@storage.command()
@click.argument("name", shell_complete=remembered.objects)
@click.option("--user", "own", is_flag=True, help="Only what was given with --metadata, as JSON.")
@home_option
@json_option
def metadata(name: str, own: bool, home: Path, as_json: bool) -> None:
    """Show what is known of an object. FedML: `get-metadata`, `get-user-metadata`.

    \b
    Examples:
      fedml storage metadata data/train.csv
      fedml storage metadata data/train.csv --user | jq -r .from
    """
    found = stored.show(connect(home), name)
    if own or as_json:
        print_json(found["metadata"] if own else found)
        return
    print_facts(
        {
            "name": found["name"],
            "is": "a folder" if found["folder"] else "a file",
            "size": size(found["size"]),
            "sha256": found["sha256"] + (" (of its list of files)" if found["folder"] else ""),
            "stored": f"{when(found['created_at'])} by {found['user']}",
            **{f"  {key}": str(value) for key, value in found["metadata"].items()},
        }
    )


@storage.command("get-metadata", hidden=True)
@click.argument("name", shell_complete=remembered.objects)
@home_option
def get_metadata(name: str, home: Path) -> None:
    """Show what is known of an object, as FedML spells it. See `fedml storage metadata`."""
    print_json(stored.show(connect(home), name))


@storage.command("get-user-metadata", hidden=True)
@click.argument("name", shell_complete=remembered.objects)
@home_option
def get_user_metadata(name: str, home: Path) -> None:
    """Show the metadata given with an object, as FedML spells it. See `fedml storage metadata`."""
    print_json(stored.show(connect(home), name)["metadata"])
