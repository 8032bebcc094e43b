# SPDX-License-Identifier: Apache-2.0
"""`fedml-broker doctor`."""

import contextlib
import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from fedml_broker.cli.client import Client, CommandFailed, home_option


@click.command()
@home_option
def doctor(home: Path) -> None:
    """Look at everything the broker needs; each line is ok, or says what to do.

    Exit code 0: all is well; 1: something is not.

    \b
    Examples:
      fedml-broker doctor
    """
    bad = 0
    for name, trouble in _checks(home):
        bad += bool(trouble)
        mark = click.style("not ok", fg="red") if trouble else click.style("ok", fg="green")
        click.echo(f"{name:<22}{mark}{': ' + trouble if trouble else ''}")
    if bad:
        raise SystemExit(1)


def _checks(home: Path) -> Iterator[tuple[str, str]]:
    there = (home / "broker.db").exists()
    yield "home", "" if there else f"{home} holds no broker yet: `fedml-broker up`"
    if not there:
        return
    yield "store", _store(home / "broker.db")
    mode = (home / "identity").stat().st_mode & 0o077
    yield "keys are private", f"chmod 700 {home / 'identity'}" if mode else ""
    free = shutil.disk_usage(home).free
    yield "disk", "" if free > 2e9 else f"{free / 1e9:.1f} GB are free: make room"
    worker = subprocess.run(
        [sys.executable, "-c", "import fedml.federate.aggregator"], capture_output=True, text=True
    )
    lines = worker.stderr.strip().splitlines()
    yield "aggregator", "" if worker.returncode == 0 else f"it cannot start: {lines[-1]}"
    facts = json.dumps({"hidden": [str(home)], "show": [], "writable": []})
    walls = subprocess.run(
        [sys.executable, "-m", "fedml_agent.enclosed", facts, "true"],
        capture_output=True,
        text=True,
    )
    lost = " ".join(walls.stderr.split())
    yield "aggregators locked in", f"{lost}; give run rights to people you trust" if lost else ""
    try:
        found = Client(home).call("GET", "/v1/status")
    except CommandFailed as error:
        yield "https", f"{error}; {error.hint}"
        return
    yield "https", ""
    silent = found["devices"] - found["online"]
    yield "machines", f"{silent} of {found['devices']} are silent: `devices list`" if silent else ""


def _store(path: Path) -> str:
    try:
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
            verdict = str(db.execute("PRAGMA quick_check").fetchone()[0])
    except sqlite3.DatabaseError as error:
        verdict = str(error)
    return "" if verdict == "ok" else f"damaged ({verdict}): restore a backup"
