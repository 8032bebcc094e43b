# SPDX-License-Identifier: Apache-2.0
"""Commands for runs that exist already: `fedml run list|queue|show|logs|metrics|stop|download` …"""

import itertools
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import click

from fedml.cli import remembered
from fedml.cli.following import SilentView, users_part, watch
from fedml.cli.logs import run_logs
from fedml.cli.options import connect, home_option, json_option, run_argument
from fedml.cli.tables import (
    duration,
    print_facts,
    print_json,
    print_table,
    size,
    transfer,
    when,
)
from fedml.client import Client
from fedml.errors import BrokerRefused
from fedml.runs import Run


@click.group()
def run() -> None:
    """Look at runs, stop them, get what they made.

    \b
    Examples:
      fedml run list
      fedml run logs -f r-1c0ffee123
      fedml run stop r-1c0ffee123 --wait
    """


run.add_command(run_logs, "logs")


_STATES = ("QUEUED", "RUNNING", "FINISHED", "FAILED", "STOPPED", "LOST")


@run.command("list")
@click.option(
    "--limit",
    default=20,
    show_default=True,
    type=click.IntRange(1, 1000),
    help="How many, the newest first.",
)
@click.option(
    "--state",
    "states",
    multiple=True,
    type=click.Choice(_STATES, case_sensitive=False),
    help="Only these; repeatable.",
)
@click.option("-n", "--name", metavar="TEXT", default="", help="Only whose names hold this.")
@click.option("--user", metavar="NAME", default="", help="Only of this user.")
@click.option(
    "--before", metavar="RUN", default="", shell_complete=remembered.runs, help="Only older ones."
)
@click.option("-r", "--run-id", default="", hidden=True, help="Only this run.")
@click.option("--run-name", default="", hidden=True, help="--name.")
@home_option
@json_option
def list_runs(
    limit: int,
    states: tuple[str, ...],
    name: str,
    user: str,
    before: str,
    run_id: str,
    run_name: str,
    home: Path,
    as_json: bool,
) -> None:
    """List the newest runs, or those asked for.

    \b
    Examples:
      fedml run list --limit 100
      fedml run list --state QUEUED --state RUNNING --user lee
      fedml run list --name train --before r-1c0ffee123    # the page after that run
      fedml run list --state FAILED --json | jq -r '.[].id'
    """
    part = name or run_name or run_id
    asked = {"state": ",".join(states), "name": part, "user": user, "before": before}
    asked["limit"] = str(min(limit + 1, 1000))  # one more tells whether there are more
    query = urlencode({key: value for key, value in asked.items() if value})
    found = connect(home).call("GET", f"/v1/runs?{query}")["runs"]
    found, more = found[:limit], found[limit:]
    if as_json:
        print_json(found)
        return
    rows = [
        (r["id"], r["state"], r["kind"], r["name"], r["user"], when(r["created_at"]), _took(r))
        for r in found
    ]
    columns = ("RUN", "STATE", "KIND", "NAME", "USER", "ASKED FOR", "TOOK")
    some = any((states, name, user, before, run_name, run_id))
    print_table(columns, rows, "no such runs" if some else "no runs yet: `fedml launch job.yaml`")
    if more:
        click.secho(f"older ones: --before {found[-1]['id']}", dim=True, err=True)


@run.command()
@click.option("--limit", default=20, show_default=True, help="How many, those that go first.")
@home_option
@json_option
def queue(limit: int, home: Path, as_json: bool) -> None:
    """List the runs that wait for machines, in the order in which they go, and why they wait.

    \b
    Examples:
      fedml run queue
      fedml run queue --json | jq '.[0].reasons'
    """
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
    from fedml.jobkeys import PRIORITIES

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
    """Show one run: its state and cause, where it runs, its rounds.

    \b
    Examples:
      fedml run show r-1c0ffee123
      fedml run show r-1c0ffee123 --json | jq .cause
    """
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
    if found["ended_at"] is None and "endpoint" in found:
        facts["service"] = _answers(found)
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

    What it waits for, and where a service answers, goes to stderr.

    \b
    Examples:
      fedml run status r-1c0ffee123
      fedml run status r-1c0ffee123 --json | jq -r .endpoint.url   # of a service
      test $(fedml run status r-1c0ffee123) = FINISHED && echo done
    """
    found = connect(home).call("GET", f"/v1/runs/{run_id}")
    if as_json:
        told = ("id", "state", "waiting", "exit_code", "cause")
        print_json({k: found[k] for k in (*told, *(k for k in ("endpoint",) if k in found))})
        return
    click.echo(found["state"])
    if found["ended_at"] is None and "endpoint" in found:
        click.secho(_answers(found), dim=True, err=True)
    if found["waiting"]:
        click.secho(f"waits: {found['waiting']}", dim=True, err=True)


@run.command()
@click.argument("named", metavar="RUN...", nargs=-1, shell_complete=remembered.runs)
@click.option("-r", "--run-id", "more", multiple=True, hidden=True, help="RUN.")
@click.option("--wait", "stay", is_flag=True, help="Until they have ended.")
@home_option
@json_option
def stop(
    named: tuple[str, ...], more: tuple[str, ...], stay: bool, home: Path, as_json: bool
) -> None:
    """Stop runs; again is harmless. One that is not there keeps none of the others.

    \b
    Examples:
      fedml run stop r-1c0ffee123
      fedml run stop r-1c0ffee123 r-2c0ffee456 --wait   # until both have ended
      fedml run stop $(fedml run list --state QUEUED --json | jq -r '.[].id')
    """
    client, runs = connect(home), dict.fromkeys((*named, *more))
    if not runs:
        raise click.UsageError("Missing argument 'RUN...'.")
    told, refused = [], []
    for run_id in runs:
        try:
            found = Run.find(run_id, at=client)
            said = f"has ended already: {found.state}" if found.ended else ""
            if not found.ended:
                found.stop()
            told.append((found, said))
        except BrokerRefused as error:
            refused.append(error)
    for found, said in told:
        state = (found.wait() if stay else found.refresh()).state
        if not as_json:
            click.echo(f"{found.id} {said or (state if stay else 'is being stopped')}", err=True)
    if as_json:
        print_json([{"id": found.id, "state": found.state} for found, _ in told])
    if refused:
        raise BrokerRefused("\n".join(map(str, refused)), refused[0].hint)


@run.command()
@run_argument
@home_option
@json_option
def wait(run_id: str, home: Path, as_json: bool) -> None:
    """Wait until a run has ended; exit with its exit code.

    \b
    Examples:
      fedml run wait r-1c0ffee123 && echo it finished
      fedml run wait r-1c0ffee123 --json | jq -r .cause.message
    """
    client = connect(home)
    code = watch(client, run_id, SilentView(), logs=False)
    if as_json:
        found = client.call("GET", f"/v1/runs/{run_id}")
        print_json({k: found[k] for k in ("id", "state", "exit_code", "cause")})
    raise SystemExit(code)


@run.command()
@run_argument
@click.argument("what", metavar="[NAME]", required=False)
@click.option("--round", "of_round", type=click.IntRange(min=0), help="0: the first model.")
@click.option(
    "--into",
    type=click.Path(file_okay=False, path_type=Path),
    help="Directory for artifacts; RUN by default.",
)
@click.option("--force", is_flag=True, help="Replace what is there.")
@home_option
@json_option
def download(
    run_id: str,
    what: str | None,
    of_round: int | None,
    into: Path | None,
    force: bool,
    home: Path,
    as_json: bool,
) -> None:
    """Get what a run has made: the files of a job, or a federated run's model.

    A job's files are those that it logged and those that it left in $FEDML_OUTPUT_DIR. NAME is one
    of them, or a directory of them; all of them by default. Of a federated run it may also be the
    FILE for its model (RUN.safetensors): the newest, or that of a round. A download that was cut
    goes on where it stopped when you ask again.

    \b
    Examples:
      fedml run download r-1c0ffee123                      # a job: into r-1c0ffee123/
      fedml run download r-1c0ffee123 plots/roc.png --into .
      fedml run download r-1c0ffee123 model.safetensors    # a federated run: its model
      fedml run download r-1c0ffee123 --round 5
      python -c 'from safetensors.numpy import load_file; print(load_file("model.safetensors"))'
    """
    found = Run.find(run_id, at=connect(home))
    federated = found.kind == "federate"
    chosen = [] if of_round is not None else _chosen(found, what, model=federated)
    if federated and not chosen:
        _download_model(found, Path(what or f"{run_id}.safetensors"), of_round, force, as_json)
        return
    if of_round is not None:
        raise click.UsageError(f"{run_id} is a {found.kind} run: it has no rounds")
    folder = Path(run_id) if into is None else into
    there = [str(folder / a["name"]) for a in chosen if (folder / a["name"]).exists()]
    if there and not force:
        raise click.UsageError(f"{', '.join(there)} exists already; --force replaces it")
    files = []
    for artifact in chosen:
        with transfer(artifact["name"]) as told:
            files.append(str(found.download_artifact(artifact, folder, told=told)))
        if not as_json:
            click.echo(f"{files[-1]}: {size(artifact['size'])}", err=True)
    if as_json:
        print_json({"files": files})


def _chosen(found: Run, what: str | None, *, model: bool) -> list[dict[str, Any]]:
    """The artifacts that are meant; none, where the model of a federated run is."""
    if model and what is None:
        return []
    named = found.files()
    chosen = [a for a in named if what in (None, a["name"]) or a["name"].startswith(f"{what}/")]
    if not chosen and not model:
        if what is None:
            raise BrokerRefused(
                f"{found.id} has left no files" if found.ended else f"{found.id} has not ended",
                "a job leaves what it writes into $FEDML_OUTPUT_DIR, or logs with `fedml.mlops`",
            )
        names = ", ".join(a["name"] for a in named[:10]) or "it has none"
        raise BrokerRefused(f"{found.id} has no file {what!r}", names)
    # Several may have logged the same name.
    double = {a["name"] for a in chosen if [b["name"] for b in chosen].count(a["name"]) > 1}
    return [
        {**a, "name": f"{a['source']}/{a['name']}"} if a["name"] in double else a for a in chosen
    ]


def _download_model(
    found: Run, into: Path, of_round: int | None, force: bool, as_json: bool
) -> None:
    if into.exists() and not force:
        raise click.UsageError(f"{into} exists already; --force replaces it")
    with transfer("model") as told:
        number = found.download(into, of_round=of_round, told=told)
    if as_json:
        print_json({"file": str(into), "round": number})
    else:
        click.echo(f"{into}: the model of round {number}", err=True)


@run.command()
@run_argument
@click.argument("name", required=False)
@click.option(
    "--points",
    default=1000,
    show_default=True,
    type=click.IntRange(2, 100_000),
    help="Of each series at most; of longer ones the extremes are kept.",
)
@home_option
@json_option
def metrics(run_id: str, name: str | None, points: int, home: Path, as_json: bool) -> None:
    """Show what a run has logged of itself: each metric's last, least and greatest value.

    \b
    Examples:
      fedml run metrics r-1c0ffee123
      fedml run metrics r-1c0ffee123 loss       # this one alone
      fedml run metrics r-1c0ffee123 --json | jq '.series[0].points'
    """
    client = connect(home)
    query = f"points={points}" + ("" if name is None else f"&name={quote(name, safe='')}")
    found = client.call("GET", f"/v1/runs/{run_id}/metrics?{query}")
    if as_json:
        print_json(found)
        return
    columns = ("METRIC", "STEP", "LAST", "LEAST", "GREATEST", "COUNT", "")
    rows = [_series_row(series) for series in found["series"]]
    print_table(columns, rows, f"{run_id} has logged no metrics" + (f" {name!r}" if name else ""))
    for count, text in (
        (found["refused"], "lines were no records and are left out"),
        (found["lost"], "records were lost where they were made: the disk or the file was full"),
    ):
        if count:
            click.secho(f"{count} {text}", fg="yellow", err=True)


_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 24


def _series_row(series: dict[str, Any]) -> tuple[str, ...]:
    step, last, _ = series["points"][-1]
    numbers = [p[1] for p in series["points"] if p[1] is not None]
    least, greatest = (f"{f(numbers):.5g}" if numbers else "–" for f in (min, max))
    name = series["name"] + (f" ({series['source']})" if series["source"] else "")
    shown = "nan" if last is None else f"{last:.5g}"
    return name, str(step), shown, least, greatest, str(series["count"]), _plot(numbers)


def _plot(numbers: list[float]) -> str:
    """A line of bars, each the mean of its stretch."""
    if len(numbers) < 2:
        return ""
    width = min(_WIDTH, len(numbers))
    edges = [i * len(numbers) // width for i in range(width + 1)]
    means = [sum(numbers[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)


def _left(found: dict[str, Any]) -> dict[str, str]:
    """What a job has left for others."""
    if found["kind"] != "launch" or "outputs" not in found or found["ended_at"] is None:
        return {}
    lines = [f"{name}={value}" for name, value in found["outputs"]["values"].items()]
    lines += [f"{file['path']} ({size(file['size'])})" for file in found["outputs"]["files"]]
    return {"left": "\n".join(lines)} if lines else {}


def _answers(found: dict[str, Any]) -> str:
    """Where a service is."""
    endpoint = found["endpoint"]
    if endpoint is None:
        return "it does not answer (yet)"
    return f"answers at {endpoint['url']} since {when(endpoint['since'])}"


def _took(found: dict[str, Any]) -> str:
    """How long it ran, or has been running: without the time that it waited."""
    if found["started_at"] is None:
        return "–"
    return duration((found["ended_at"] or time.time()) - found["started_at"])


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
