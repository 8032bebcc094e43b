# SPDX-License-Identifier: Apache-2.0
"""`fedml-broker doctor`."""

import contextlib
import dataclasses
import json
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from cryptography import x509

from fedml_broker.cli.client import Client, CommandFailed, home_option, json_option
from fedml_broker.cli.tables import when

OK, NOTE, WRONG = "ok", "note", "not ok"
_COLOURS = {OK: "green", NOTE: "yellow", WRONG: "red"}

_DAY_S = 86400.0
# The running broker renews its certificate when a third of its life is left; the CA's is long.
_CERTIFICATE_DAYS, _CA_DAYS = 14, 180
_BACKUP_DAYS = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one look has found; `next` is empty when there is nothing to do."""

    name: str
    state: str
    text: str
    next: str = ""


@click.command()
@home_option
@json_option
def doctor(home: Path, as_json: bool) -> None:
    """Look at everything the broker needs; each line is ok, or says what to do next.

    Home, store, keys, certificates, disk, aggregators, the way in over HTTPS, MQTT, backups,
    machines. Nothing is changed. A note is nothing that keeps the broker from working.

    Exit code 0: no line is `not ok`; 1: one is.

    \b
    Examples:
      fedml-broker doctor
      fedml-broker doctor --json | jq -r '.checks[] | select(.state == "not ok") | .next'
    """
    found: list[Finding] = []
    for finding in _look(home):
        found.append(finding)
        if not as_json:
            _show(finding)
    ok = all(finding.state != WRONG for finding in found)
    if as_json:
        click.echo(json.dumps({"ok": ok, "checks": [dataclasses.asdict(one) for one in found]}))
    if not ok:
        raise SystemExit(1)


def _show(finding: Finding) -> None:
    mark = click.style(f"{finding.state:<8}", fg=_COLOURS[finding.state])
    click.echo(f"{finding.name:<23}{mark}{finding.text}")
    if finding.next:
        click.echo(f"{'':<23}next: {finding.next}")


def _look(home: Path) -> Iterator[Finding]:
    if not (home / "broker.db").exists():
        text, then = f"{home} holds no broker yet", "`fedml-broker up`, or name its --home"
        yield Finding(name="home", state=WRONG, text=text, next=then)
        return
    yield Finding(name="home", state=OK, text=str(home))
    yield _store(home / "broker.db")
    yield _private(home)
    yield from _certificates(home / "identity")
    yield _aggregator()
    yield _walls(home)
    client = status = None
    try:
        client = Client(home)
        status = client.call("GET", "/v1/status")
    except CommandFailed as error:
        yield Finding(name="https", state=WRONG, text=str(error), next=error.hint)
    yield _disk(home, status)
    if client is not None and status is not None:
        yield from _served(client, status)


def _store(path: Path) -> Finding:
    try:
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
            verdict = str(db.execute("PRAGMA quick_check").fetchone()[0])
    except sqlite3.DatabaseError as error:
        verdict = str(error)
    if verdict == "ok":
        return Finding(name="store", state=OK, text=f"{path.stat().st_size / 1e6:.1f} MB, sound")
    text, then = f"damaged: {verdict}", "stop the broker and restore a backup: docs/broker.md"
    return Finding(name="store", state=WRONG, text=text, next=then)


def _private(home: Path) -> Finding:
    secret = [home / "identity", home / "admin.key", *sorted((home / "identity").glob("*.key"))]
    open_ = [str(path) for path in secret if path.exists() and path.stat().st_mode & 0o077]
    if not open_:
        return Finding(name="keys", state=OK, text="only this user can read them")
    text, then = f"others may read {', '.join(open_)}", f"chmod go= {' '.join(open_)}"
    return Finding(name="keys", state=WRONG, text=text, next=then)


def _certificates(identity: Path) -> Iterator[Finding]:
    for name, file, least, then in (
        ("certificate", "server.pem", _CERTIFICATE_DAYS, "restart the broker: it is issued anew"),
        ("CA", "ca.pem", _CA_DAYS, "plan a day: with a new CA, every machine must log in anew"),
    ):
        try:
            end = x509.load_pem_x509_certificate((identity / file).read_bytes()).not_valid_after_utc
        except (OSError, ValueError) as error:
            text, restore = f"{identity / file}: {error}", "restore a backup: docs/broker.md"
            yield Finding(name=name, state=WRONG, text=text, next=restore)
            continue
        days = (end - datetime.now(UTC)).total_seconds() / _DAY_S
        state = OK if days > least else NOTE if days > 0 else WRONG
        text = f"good until {end:%Y-%m-%d}" if days > 0 else f"ended {end:%Y-%m-%d}"
        yield Finding(name=name, state=state, text=text, next="" if state == OK else then)


def _aggregator() -> Finding:
    worker = subprocess.run(
        [sys.executable, "-c", "import fedml.federate.aggregator"], capture_output=True, text=True
    )
    if worker.returncode == 0:
        return Finding(name="aggregators", state=OK, text="they can start")
    last = (worker.stderr.strip().splitlines() or [f"exit code {worker.returncode}"])[-1]
    then = "pip install 'fedml-agent[broker]' in the broker's environment"
    return Finding(name="aggregators", state=WRONG, text=f"they cannot start: {last}", next=then)


def _walls(home: Path) -> Finding:
    facts = json.dumps({"hidden": [str(home)], "show": [], "writable": []})
    walls = subprocess.run(
        [sys.executable, "-m", "fedml_agent.enclosed", facts, "true"],
        capture_output=True,
        text=True,
    )
    lost = " ".join(walls.stderr.split())
    if not lost:
        return Finding(name="aggregators locked in", state=OK, text="from keys, network and files")
    then = "give run rights to people you trust: docs/broker.md"
    return Finding(name="aggregators locked in", state=WRONG, text=lost, next=then)


def _disk(home: Path, status: dict[str, Any] | None) -> Finding:
    free = shutil.disk_usage(home).free
    reserve = status["disk_reserve_bytes"] if status is not None else 1e9
    text = f"{free / 1e9:.1f} GB are free, {reserve / 1e9:g} GB must stay free"
    then = f"make room where {home} lies: `fedml-broker runs remove --older-than 30d`"
    if free < reserve:
        return Finding(name="disk", state=WRONG, text=f"{text}: uploads are refused", next=then)
    if free < reserve + 1e9:
        return Finding(name="disk", state=NOTE, text=text, next=then)
    return Finding(name="disk", state=OK, text=text)


def _served(client: Client, status: dict[str, Any]) -> Iterator[Finding]:
    yield Finding(name="https", state=OK, text=f"{status['url']} answers")
    if status["mqtt_connected"]:
        yield Finding(name="mqtt", state=OK, text=status["mqtt"])
    else:
        then = "is it running, and does it trust the broker's CA? The broker's log says more"
        yield Finding(name="mqtt", state=WRONG, text=f"no link to {status['mqtt']}", next=then)
    newest = client.call("GET", "/v1/audit?action=backup&limit=1")["entries"]
    at = newest[0]["at_ms"] / 1000 if newest else 0.0
    text = f"the last one {when(at)}, {newest[0]['object']}" if newest else "none yet"
    late = time.time() - at > _BACKUP_DAYS * _DAY_S
    then = "`fedml-broker backup FILE`: without one, a lost disk is a lost CA" if late else ""
    yield Finding(name="backup", state=NOTE if late else OK, text=text, next=then)
    silent = status["devices"] - status["online"]
    text = f"{status['online']} of {status['devices']} are online"
    then = "`fedml-broker devices list`; on the machine: `fedml-agent diagnose`" if silent else ""
    yield Finding(name="machines", state=NOTE if silent else OK, text=text, next=then)
    if status["refused_messages"]:
        text = f"{status['refused_messages']} were refused: forged, damaged, or of a stranger"
        then = "the broker's log names them"
        yield Finding(name="messages", state=NOTE, text=text, next=then)
