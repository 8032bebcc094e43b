# SPDX-License-Identifier: Apache-2.0
"""`fedml-broker audit list|verify|head`: from the store's file, whether the broker runs or not."""

import contextlib
import json
import re
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import click
import sqlalchemy as sa
from sqlalchemy import Connection

from fedml_broker import audit as chain
from fedml_broker.cli.client import CommandFailed, home_option, json_option, parse_age
from fedml_broker.cli.tables import Columns, Row, print_list, when


def _details(entry: Row) -> str:
    told = {k: v for k, v in entry["details"].items() if v not in (None, "", {}, [])}
    return " ".join(
        f"{name}={value if isinstance(value, str | int) else json.dumps(value)}"
        for name, value in told.items()
    )


_COLUMNS: Columns = {
    "N": lambda entry: str(entry["n"]),
    "WHEN": lambda entry: when(entry["at_ms"] / 1000),
    "TENANT": lambda entry: entry["tenant"],
    "WHO": lambda entry: entry["actor"],
    "WHAT": lambda entry: entry["action"],
    "TO": lambda entry: entry["object"] or "–",
    "DETAILS": lambda entry: _details(entry) or "–",
}


@click.group()
def audit() -> None:
    """Who did what, and when: a chain in which nothing can be changed unseen.

    \b
    Examples:
      fedml-broker audit list --action run
      fedml-broker audit verify
    """


@audit.command("list")
@click.option("--user", metavar="NAME", help="What this user did.")
@click.option("--action", help="What was done: run.stop, or run for all that was done to runs.")
@click.option("--since", metavar="AGE", help="Not longer ago than this: 12h, 30d, 8w.")
@click.option("--tenant", help="Of this tenant only.")
@click.option("--limit", default=100, show_default=True, help="How many, the newest first.")
@home_option
@json_option
def list_entries(
    user: str | None,
    action: str | None,
    since: str | None,
    tenant: str | None,
    limit: int,
    home: Path,
    as_json: bool,
) -> None:
    """List what was done, the newest first.

    \b
    Examples:
      fedml-broker audit list --since 30d
      fedml-broker audit list --user ann --action run.stop
      fedml-broker audit list --action sign-in --json
    """
    moment = None if since is None else time.time() - parse_age(since, "--since")
    with _reading(home) as tx:
        found = chain.entries(
            tx,
            tenant=tenant,
            actor=None if user is None else chain.user(user),
            action=action,
            since=moment,
            limit=limit,
        )
    print_list(found, _COLUMNS, as_json=as_json, empty="no such entries")


@audit.command()
@home_option
@json_option
def head(home: Path, as_json: bool) -> None:
    """Print the hash of the last entry. Keep it elsewhere: it proves all entries up to it.

    \b
    Examples:
      fedml-broker audit head | ssh elsewhere 'cat >> fedml-heads'
    """
    with _reading(home) as tx:
        found = chain.head(tx)
    if as_json:
        click.echo(json.dumps({"n": found.n, "hash": found.hash}))
        return
    click.echo(found.hash)
    click.echo(f"entry {found.n}", err=True)


@audit.command()
@click.option(
    "--anchor",
    metavar="HASH",
    help="A hash that `audit head` printed earlier and somebody kept elsewhere.",
)
@home_option
def verify(anchor: str | None, home: Path) -> None:
    """Walk the whole chain. Exit code 1, and the first entry that is wrong, if it does not hold.

    The chain alone shows that nothing in it was changed, taken out or moved. That its end was not
    cut off, and that it was not made anew as a whole, shows only --anchor.

    \b
    Examples:
      fedml-broker audit verify
      fedml-broker audit verify --anchor $(ssh elsewhere tail -n1 fedml-heads)
    """
    if anchor is not None and re.fullmatch("[0-9a-f]{64}", anchor) is None:
        raise click.BadParameter("64 digits of 0-9 and a-f, as `audit head` prints them")
    anchored: list[int] = []

    def compare(entry: chain.Head) -> None:
        if entry.hash == anchor:
            anchored.append(entry.n)

    with _reading(home) as tx:
        try:
            last = chain.verify(tx, compare)
        except chain.Broken as broken:
            raise CommandFailed(
                f"the audit does not hold: {broken}",
                "keep the file as it is, and compare it with a backup; "
                "what comes before that entry is as it was written",
            ) from broken
    if anchor is not None and not anchored and anchor != chain.GENESIS:
        raise CommandFailed(
            f"the {last.n} entries fit together, but none of them has the hash {anchor}",
            "the end was cut off or the chain made anew since that hash was noted, "
            "or it is another broker's; a restored backup also looks like this",
        )
    click.echo(f"ok: {last.n} entries, the last one {last.hash}")
    if anchored:
        click.echo(f"entry {anchored[0]} is the anchor: nothing up to it was changed or is missing")


@contextlib.contextmanager
def _reading(home: Path) -> Iterator[Connection]:
    """The store of this home, to be read and not changed."""
    path = home / "broker.db"
    if not path.exists():
        raise CommandFailed(f"there is no broker in {home}", "name its --home")
    address = f"{path.as_uri()}?mode=ro"
    engine = sa.create_engine("sqlite://", creator=lambda: sqlite3.connect(address, uri=True))
    try:
        with engine.connect() as tx:
            yield tx
    except sa.exc.DatabaseError as error:
        if "no such table" in str(error.orig):
            raise CommandFailed(
                "this store is older than the audit", "`fedml-broker up` brings it up to date"
            ) from error
        raise CommandFailed(
            f"the store {path} cannot be read: {error.orig}", "`fedml-broker doctor`"
        ) from error
    finally:
        engine.dispose()
