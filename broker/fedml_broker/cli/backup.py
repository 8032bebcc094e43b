# SPDX-License-Identifier: Apache-2.0
"""`fedml-broker backup FILE`."""

import contextlib
import os
import sqlite3
import tarfile
import tempfile
from pathlib import Path

import click

from fedml_broker.cli.client import CommandFailed, home_option


@click.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--blobs/--no-blobs", default=True, show_default=True, help="Models and packages too."
)
@home_option
def backup(file: Path, blobs: bool, home: Path) -> None:
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
    try:
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            copy = Path(folder) / "broker.db"
            with (
                contextlib.closing(sqlite3.connect(store)) as source,
                contextlib.closing(sqlite3.connect(copy)) as target,
            ):
                source.backup(target)
            number = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(number, "wb") as raw, tarfile.open(fileobj=raw, mode="w:gz") as archive:
                archive.add(copy, "broker/broker.db")
                for name in ("identity", "admin.key", "logs", *(("blobs",) if blobs else ())):
                    if (home / name).exists():
                        archive.add(home / name, f"broker/{name}")
    except (OSError, sqlite3.Error) as error:
        file.unlink(missing_ok=True)
        raise CommandFailed(f"the backup failed: {error}") from error
    click.echo(f"{file}: {file.stat().st_size / 1e6:.1f} MB", err=True)
