# SPDX-License-Identifier: Apache-2.0
"""`fedml run list|queue|show|status|logs|priority|stop|wait|download`: runs that exist already."""

import time
from pathlib import Path
from typing import Any

import click

from fedml.cli.following import SilentView, users_part, watch
from fedml.cli.logs import run_logs
from fedml.cli.options import connect, home_option, json_option
from fedml.cli.tables import duration, print_facts, print_json, print_table, size, transfer, when
from fedml.client import Client
from fedml.runs import Run

run_argument = click.argument("run_id", metavar="RUN")


@click.group()
def run() -> None:
    """Look at runs, stop them, get what they made."""


run.add_command(run_logs, "logs")


@run.command("list")
@click.option("--limit", default=20, show_default=True, help="How many, the newest first.")
@home_option
@json_option
def list_runs(limit: int, home: Path, as_json: bool) -> None:
    """List the newest runs."""
    found = connect(home).call("GET", f"/v1/runs?limit={limit}")["runs"]
    if as_json:
        print_json(found)
        return
    rows = [
        (r["id"], r["state"], r["kind"], r["name"], r["user"], when(r["created_at"]), _took(r))
        for r in found
    ]
    columns = ("RUN", "STATE", "KIND", "NAME", "USER", "ASKED FOR", "TOOK")
    print_table(columns, rows, "no runs yet: `fedml launch job.yaml`")


@run.command()
@click.option("--limit", default=20, show_default=True, help="How many, those that go first.")
@home_option
@json_option
def queue(limit: int, home: Path, as_json: bool) -> None:
    """List the runs that wait for machines, in the order in which they go, and why they wait."""
    found = connect(home).call("GET", f"/v1/queue?limit={limit}")["queue"]
    if as_json:
        print_json(found)
        return
    rows = [
        (
            str(r["position"]),
            r["id"],
            r["name"],
            r["user"],
            str(r["priority"]),
            duration(time.time() - r["created_at"]),
            "\n".join(f"{machine}: {why}" for machine, why in r["reasons"].items()),
        )
        for r in found
    ]
    columns = ("", "RUN", "NAME", "USER", "PRIORITY", "WAITS FOR", "WHY")
    print_table(columns, rows, "nothing waits")


@run.command(context_settings={"ignore_unknown_options": True})
@run_argument
@click.argument("number", metavar="PRIORITY")
@home_option
@json_option
def priority(run_id: str, number: str, home: Path, as_json: bool) -> None:
    """Give a run another priority: low, normal, high, or a number from -100 to 100.

    A higher one goes first. Below 0 is open to everybody, above to admins.

    \b
    Examples:
      fedml run priority r-1c0ffee123 high
      fedml run priority r-1c0ffee123 -20
    """
    from fedml.jobfile import PRIORITIES

    try:
        wanted = PRIORITIES.get(number.lower())
        wanted = int(number) if wanted is None else wanted
    except ValueError:
        raise click.UsageError(f"not low, normal, high or a number: {number}") from None
    told = connect(home).call("PUT", f"/v1/runs/{run_id}/priority", {"priority": wanted})
    if as_json:
        print_json(told)
    else:
        click.echo(f"{run_id} has the priority {wanted}", err=True)


@run.command()
@run_argument
@home_option
@json_option
def show(run_id: str, home: Path, as_json: bool) -> None:
    """Show one run: its state and cause, where it runs, its rounds."""
    client = connect(home)
    found = client.call("GET", f"/v1/runs/{run_id}")
    if as_json:
        print_json(found)
        return
    facts = {
        "run": found["id"],
        "name": f"{found['name']} ({found['kind']}) of {found['user']}",
        "state": found["state"]
        + (f", exit code {code}" if (code := found["exit_code"]) else "")
        + (f", stopped by {who}" if (who := found["stopped_by"]) else ""),
    }
    if found["waiting"]:
        facts["waits"] = found["waiting"].replace("; ", "\n")
    if found["cause"]:
        cause = found["cause"]
        lines = (cause["message"], users_part(cause["traceback"]).rstrip())
        facts["cause"] = "\n".join(filter(None, lines))
        facts |= {"try": cause["hint"]} if cause["hint"] else {}
    facts |= _left(found)
    facts |= {"asked for": when(found["created_at"]), "took": _took(found)}
    names = _names(client)
    if "rounds" in found:
        clients = found["clients"]
        devices = [names.get(clients[n], clients[n]) for n in sorted(clients, key=int)]
        facts["clients"] = ", ".join(devices) or "not chosen yet"
        facts |= _failures(client, run_id)
        print_facts(facts)
        # One more than asked for is the last evaluation, which makes no model.
        _print_rounds([r for r in found["rounds"] if r["round"] <= found["spec"]["rounds"]])
    else:
        facts["tasks"] = "\n".join(
            f"{t['id']}: {t['state']} on {names.get(t['device'], t['device'] or 'no machine yet')}"
            + (f", attempt {t['epoch']}" if t["epoch"] > 1 else "")
            for t in found["tasks"]
        )
        print_facts(facts)


@run.command()
@run_argument
@home_option
@json_option
def status(run_id: str, home: Path, as_json: bool) -> None:
    """Print the state of a run: QUEUED, RUNNING, FINISHED, FAILED, STOPPED or LOST.

    What it waits for goes to stderr.
    """
    found = connect(home).call("GET", f"/v1/runs/{run_id}")
    if as_json:
        print_json({k: found[k] for k in ("id", "state", "waiting", "exit_code", "cause")})
        return
    click.echo(found["state"])
    if found["waiting"]:
        click.secho(f"waits: {found['waiting']}", dim=True, err=True)


@run.command()
@run_argument
@click.option("--wait", "stay", is_flag=True, help="Until it has ended.")
@home_option
@json_option
def stop(run_id: str, stay: bool, home: Path, as_json: bool) -> None:
    """Stop a run; again is harmless."""
    found = Run.find(connect(home), run_id)
    said = f"{run_id} has ended already: {found.state}"
    if not found.ended:
        found.stop()
        said = f"{run_id} {found.wait().state}" if stay else f"{run_id} is being stopped"
    if as_json:
        print_json({"id": found.id, "state": found.refresh().state})
    else:
        click.echo(said, err=True)


@run.command()
@run_argument
@home_option
@json_option
def wait(run_id: str, home: Path, as_json: bool) -> None:
    """Wait until a run has ended; exit with its exit code."""
    client = connect(home)
    code = watch(client, run_id, SilentView(), logs=False)
    if as_json:
        found = client.call("GET", f"/v1/runs/{run_id}")
        print_json({k: found[k] for k in ("id", "state", "exit_code", "cause")})
    raise SystemExit(code)


@run.command()
@run_argument
@click.argument("into", required=False, type=click.Path(path_type=Path))
@click.option("--round", "of_round", type=click.IntRange(min=0), help="0: the first model.")
@click.option("--force", is_flag=True, help="Replace what is there.")
@home_option
@json_option
def download(
    run_id: str,
    into: Path | None,
    of_round: int | None,
    force: bool,
    home: Path,
    as_json: bool,
) -> None:
    """Write what a run has left: a federated run's model, or the files of a job.

    Of a federated run, INTO is a file (RUN.safetensors): the newest model, or that of a round.
    Of a job, INTO is a folder (RUN) for what it has written into $FEDML_OUTPUT_DIR.

    \b
    Examples:
      fedml run download r-1c0ffee123 model.safetensors
      fedml run download r-1c0ffee123 --round 5
      fedml run download r-0ddba11456 results/
      python -c 'from safetensors.numpy import load_file; print(load_file("model.safetensors"))'
    """
    found = Run.find(connect(home), run_id)
    job = found.kind == "launch"
    into = into or Path(run_id if job else f"{run_id}.safetensors")
    if into.exists() and not force and (not job or not into.is_dir() or any(into.iterdir())):
        raise click.UsageError(f"{into} exists already; --force replaces what is there")
    if job:
        if of_round is not None:
            raise click.UsageError(f"{run_id} is a job: it has no rounds")
        with transfer("files") as told:
            files = found.download_files(into, told=told)
        if as_json:
            print_json({"folder": str(into), "files": [str(f.relative_to(into)) for f in files]})
        else:
            click.echo(f"{into}: {len(files)} file{'s' if len(files) > 1 else ''}", err=True)
        return
    with transfer("model") as told:
        number = found.download(into, of_round=of_round, told=told)
    if as_json:
        print_json({"file": str(into), "round": number})
    else:
        click.echo(f"{into}: the model of round {number}", err=True)


def _left(found: dict[str, Any]) -> dict[str, str]:
    """What a job has left for others."""
    if found["kind"] != "launch" or "outputs" not in found:
        return {}
    lines = [f"{name}={value}" for name, value in found["outputs"]["values"].items()]
    lines += [f"{file['path']} ({size(file['size'])})" for file in found["outputs"]["files"]]
    return {"left": "\n".join(lines)} if lines else {}


def _took(found: dict[str, Any]) -> str:
    if found["started_at"] is None and found["ended_at"] is None:
        return "–"
    return duration((found["ended_at"] or time.time()) - found["created_at"])


def _names(client: Client) -> dict[str, str]:
    """What people call each device."""
    return {d["id"]: d["name"] for d in client.call("GET", "/v1/devices")["devices"]}


def _failures(client: Client, run: str) -> dict[str, str]:
    """Which client failed in which round; the newest few."""
    told = [i["event"] for i in client.follow(run, logs=False, stay=False) if "event" in i]
    lines = [
        f"round {e['data']['round']}, {e['data']['name']}: {e['data']['cause']['message']}"
        for e in told
        if e["kind"] == "client_failed"
    ]
    more = [f"… and {len(lines) - 5} before"] if len(lines) > 5 else []
    return {"failed": "\n".join(more + lines[-5:])} if lines else {}


def _print_rounds(rounds: list[dict[str, Any]]) -> None:
    names = sorted({n for r in rounds for n in r["metrics"] if not n.endswith(".examples")})
    rows = []
    for row in rounds:
        ended, metrics = row["ended_at"], row["metrics"]
        took = duration(None if ended is None else ended - row["started_at"])
        numbers = [f"{metrics[n]:.4g}" if n in metrics else "–" for n in names]
        rows.append((str(row["round"]), *numbers, took, str(len(row["clients"]))))
    print_table(("ROUND", *names, "TOOK", "ASKED"), rows, "no rounds yet")
