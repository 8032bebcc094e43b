# SPDX-License-Identifier: Apache-2.0
"""A launched job as it happens: its output as it comes, and where it runs."""

import sys
from collections.abc import Mapping
from typing import Any

import click


def noted(data: Mapping[str, Any]) -> str:
    """What a machine has noted of a task that runs there."""
    who = f"rank {data['rank']}" if "rank" in data else "it"
    return f"{data['name']}: {who} {data['text']}"


class JobView:
    """A launched job: its output, and where it runs."""

    def show(self, item: dict[str, Any]) -> None:
        """One item."""
        if "log" in item:
            stream = sys.stderr if item["log"]["stream"] == "stderr" else sys.stdout
            stream.write(item["log"]["text"])
            stream.flush()
        elif item.get("waiting"):
            click.secho(f"waiting: {item['waiting']}", dim=True, err=True)
        elif "event" in item and item["event"]["kind"] == "started":
            data = item["event"]["data"]
            again = f", attempt {data['epoch']}" if data["epoch"] > 1 else ""
            again += f", as rank {data['rank']}" if "rank" in data else ""
            click.secho(f"runs on {data['name']}{again}", dim=True, err=True)
        elif "event" in item and item["event"]["kind"] in ("answers", "silent"):
            url = item["event"]["data"]["url"]
            if item["event"]["kind"] == "answers":
                click.secho(f"it answers at {url}", fg="green", err=True)
            else:
                click.secho(f"it no longer answers at {url}", fg="yellow", err=True)
        elif "event" in item and item["event"]["kind"] == "again":
            data = item["event"]["data"]
            rank = f"rank {data['rank']} is" if "rank" in data else "it is"
            click.secho(f"{rank} queued again: {data['why']}", fg="yellow", err=True)
        elif "event" in item and item["event"]["kind"] == "without_gpus":
            data = item["event"]["data"]
            wished = f"{data['gpus']} × {data['model'] or 'GPU'}"
            click.secho(f"no machine has {wished}: it runs without GPUs", fg="yellow", err=True)
        elif "event" in item and item["event"]["kind"] == "noted":
            click.secho(noted(item["event"]["data"]), fg="yellow", err=True)
        elif "event" in item and item["event"]["kind"] == "stopping":
            click.echo(f"{item['event']['data']['by']} stops the run", err=True)

    def close(self) -> None:
        """Nothing is kept open."""

    def has_told(self, cause: Mapping[str, Any]) -> bool:
        """A job's own output shows what it raised."""
        return False
