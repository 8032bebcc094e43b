# SPDX-License-Identifier: Apache-2.0
"""`fedml-broker backup FILE`."""

import contextlib
import json
import os
import sqlite3
import tarfile
import tempfile
from pathlib import Path

import click
import sqlalchemy as sa
from sqlalchemy import Connection

from fedml_broker import audit, tables
from fedml_broker.cli.client import CommandFailed, home_option, json_option
from fedml_broker.store import beside


@click.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--blobs/--no-blobs", default=True, show_default=True, help="Models and packages too."
)
@home_option
@json_option
def backup(file: Path, blobs: bool, home: Path, as_json: bool) -> None:
    """Write everything that the broker knows into FILE (.tar.gz), while it runs or not.

    The file holds the CA's key: keep it as safe as the broker's own disk.

    \b
    Examples:
      fedml-broker backup /backup/fedml-$(date +%F).tar.gz
      tar -xzf /backup/fedml-….tar.gz -C ~/.fedml        # restores, with the broker stopped
    """
    store = home / "broker.db"
    if not store.exists():
        raise CommandFailed(f"there is no broker in {home}")
    if file.exists():
        raise CommandFailed(f"{file} exists already", "choose another name, or delete it")
    part = file.with_name(f".{file.name}.part")
    try:
        part.unlink(missing_ok=True)  # of a backup that was killed
        _archive(home, part, blobs)
        with beside(store) as tx:
            _note(tx, file, part.stat().st_size, blobs)
        # Last, so that under its own name there is no backup that the audit does not know.
        part.rename(file)
    except (OSError, sqlite3.Error, sa.exc.DatabaseError) as error:
        part.unlink(missing_ok=True)
        raise CommandFailed(f"the backup failed: {error}") from error
    size = file.stat().st_size
    if as_json:
        click.echo(json.dumps({"file": str(file.absolute()), "bytes": size, "blobs": blobs}))
    else:
        click.echo(f"{file}: {size / 1e6:.1f} MB", err=True)


def _archive(home: Path, part: Path, blobs: bool) -> None:
    with tempfile.TemporaryDirectory(dir=part.parent) as folder:
        copy = Path(folder) / "broker.db"
        with (
            contextlib.closing(sqlite3.connect(home / "broker.db")) as source,
            contextlib.closing(sqlite3.connect(copy)) as target,
        ):
            source.backup(target)
        number = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with (
            os.fdopen(number, "wb") as raw,
            # Most of it are models, which hardly become smaller, whatever is tried.
            tarfile.open(fileobj=raw, mode="w:gz", compresslevel=1) as archive,
        ):
            archive.add(copy, "broker/broker.db")
            # Not what is still being uploaded, or being deleted.
            kept = ("blobs/sha256",) if blobs else ()
            for name in ("identity", "admin.key", "logs", *kept):
                _add(archive, home / name, f"broker/{name}")


def _add(archive: tarfile.TarFile, path: Path, name: str) -> None:
    """A file, or a folder with all that is in it; the broker may delete it at the same time."""
    with contextlib.suppress(FileNotFoundError):
        archive.add(path, name, recursive=False)
        if path.is_dir():
            for inner in sorted(path.iterdir()):
                _add(archive, inner, f"{name}/{inner.name}")


def _note(tx: Connection, file: Path, size: int, blobs: bool) -> None:
    if not sa.inspect(tx).has_table(tables.audit.name):
        click.echo("the store is older than the audit: this backup is not noted there", err=True)
        return
    facts: dict[str, audit.Detail] = {"bytes": size, "blobs": blobs}
    facts["uid"] = os.getuid()  # containers have users without a name
    thing = str(file.absolute())
    audit.note(tx, tables.DEFAULT_TENANT, audit.CLI, "backup.create", thing, **facts)
