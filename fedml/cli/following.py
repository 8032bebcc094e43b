# SPDX-License-Identifier: Apache-2.0
"""Showing a run as it happens."""

import json
import sys
from typing import Any

import click

from fedml import session
from fedml.client import Client


def connect(home: str | None) -> Client:
    """The broker that this home is logged in at."""
    return Client(session.load(session.find_home(home)))


def follow(client: Client, run: str, *, as_json: bool) -> int:
    """Show the run until it ends; its exit code. Ctrl-C stops the run and waits for its end."""
    try:
        return _show(client, run, as_json=as_json)
    except KeyboardInterrupt:
        click.echo(f"\nstopping {run}; Ctrl-C again leaves it running", err=True)
        client.call("POST", f"/v1/runs/{run}/stop")
        return _show(client, run, as_json=as_json)


def _show(client: Client, run: str, *, as_json: bool) -> int:
    for item in client.follow(run):
        if as_json:
            click.echo(json.dumps(item))
        elif "log" in item:
            stream = sys.stderr if item["log"]["stream"] == "stderr" else sys.stdout
            stream.write(item["log"]["text"])
            stream.flush()
        elif item.get("waiting") and not item["waiting"].startswith("round "):
            click.secho(f"waiting: {item['waiting']}", dim=True, err=True)
        elif "event" in item:
            _event(item["event"])
        if "end" in item:
            return _code(item["end"])
    return 1


def _event(event: dict[str, Any]) -> None:
    kind, data = event["kind"], event["data"]
    if kind == "round_ends" and data["round"]:
        numbers = "  ".join(f"{k} {v:.4f}" for k, v in sorted(data["metrics"].items()))
        refused = f", {data['refused']} refused" if data["refused"] else ""
        click.echo(
            f"round {data['round']:>3}: {data['replies']} replies{refused}  {numbers}", err=True
        )
    elif kind == "metrics":
        numbers = "  ".join(f"{k} {v:.4f}" for k, v in sorted(data["metrics"].items()))
        click.echo(f"  model of round {data['round']}: {numbers}", err=True)
    elif kind == "client_failed":
        click.secho(f"  {data['name']}: {data['cause']['message']}", fg="yellow", err=True)
    elif kind == "started":
        click.secho(f"runs on {data['name']}", dim=True, err=True)


def _code(end: dict[str, Any]) -> int:
    good = end["state"] == "FINISHED"
    click.secho(f"{end['id']} {end['state']}", fg="green" if good else "red", err=True)
    cause = end["cause"]
    if cause and not good:
        click.echo(f"  {cause['message']}", err=True)
        if cause["traceback"]:
            click.echo(cause["traceback"], err=True)
    if good:
        return 0
    return int(end["exit_code"] or 7)
