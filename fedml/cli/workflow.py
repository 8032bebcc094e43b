# SPDX-License-Identifier: Apache-2.0
"""`fedml workflow run|show|list|status|logs|wait|stop|resume|delete|init`."""

import time
from pathlib import Path

import click

from fedml import workflows
from fedml.cli.following import follow
from fedml.cli.graph import drawn
from fedml.cli.options import connect, home_option, json_lines_option, json_option
from fedml.cli.tables import duration, print_facts, print_json, print_table, transfer, when
from fedml.cli.workflow_view import rows, watch
from fedml.errors import ConfigError
from fedml.workflows import WorkflowRun
from fedml_protocol.workflow import levels

workflow_argument = click.argument("name", metavar="NAME|ID")
file_argument = click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))


@click.group()
def workflow() -> None:
    """Jobs and federated runs that wait for each other.

    The broker carries a workflow out: it goes on without you.

    \b
    Examples:
      fedml workflow init                    # write a commented workflow.yaml to begin with
      fedml workflow show pipeline.yaml      # check it, draw it; starts nothing
      fedml workflow run pipeline.yaml       # start it, watch it; it goes on without you
      fedml workflow resume pipeline         # what has failed, and what hangs on it, again
    """


@workflow.command()
@file_argument
@click.option("--follow/--detach", "stay", default=True, help="Show the steps until all is over.")
@json_lines_option
@home_option
def run(file: Path, stay: bool, as_json: bool, home: Path) -> None:
    """Submit the workflow in FILE, and show how it goes.

    All that its steps need is sent along: this terminal may be closed then.
    Exits with 0 if it has finished, with 7 if not.

    \b
    Examples:
      fedml workflow run pipeline.yaml            # start it, watch it
      fedml workflow run pipeline.yaml --detach   # start it, print its id
      fedml workflow run pipeline.yaml --json     # one JSON object a line, for scripts
    """
    client = connect(home)
    with transfer("workspaces") as told:
        found = workflows.submit(client, file, told=told)
    if as_json:
        print_json({"workflow": found})
    else:
        click.echo(found, err=stay)
    if stay:
        raise SystemExit(watch(client, found, as_json=as_json))


@workflow.command()
@file_argument
@json_option
def show(file: Path, as_json: bool) -> None:
    """Check the workflow in FILE, and draw it; start nothing.

    The files that it names are checked, too.

    \b
    Examples:
      fedml workflow show pipeline.yaml
    """
    from fedml.workflowfile import graph_of, read_workflow

    name, steps = read_workflow(file)
    by_name = {step.name: step for step in steps}
    order = [step for level in levels(graph_of(steps)) for step in level]
    if as_json:
        told = [
            {
                "name": s.name,
                "kind": s.kind,
                "file": str(s.file),
                "needs": s.needs,
                "when": s.when,
                "inputs": s.inputs,
            }
            for s in steps
        ]
        print_json({"name": name, "steps": told})
        return
    lines = drawn({step: by_name[step].needs for step in order})
    wide = max(len(line) for line, _ in lines)
    names = max(map(len, order))
    click.echo(f"{name}: {len(steps)} step{'s' if len(steps) > 1 else ''}")
    for line, of in lines:
        said = ""
        if of:
            step = by_name[of]
            where = "" if step.file == file else f" {step.file}"
            said = f"{of:<{names}}  {step.kind}{where}"
            said += "" if step.when == "finished" else f"  when {step.when}"
        click.echo(f"{line:<{wide}}  {said}".rstrip())


@workflow.command("list")
@click.option("--limit", default=20, show_default=True, help="How many, the newest first.")
@home_option
@json_option
def list_workflows(limit: int, home: Path, as_json: bool) -> None:
    """List the newest workflows.

    \b
    Examples:
      fedml workflow list
      fedml workflow list --limit 5 --json
    """
    found = workflows.listed(connect(home), limit)
    if as_json:
        print_json(found)
        return
    table = [
        (
            w["id"],
            w["name"],
            w["state"],
            f"{list(w['steps'].values()).count('FINISHED')} of {len(w['steps'])}",
            w["user"],
            when(w["created_at"]),
            duration((w["ended_at"] or time.time()) - w["started_at"]),
        )
        for w in found
    ]
    columns = ("WORKFLOW", "NAME", "STATE", "FINISHED", "USER", "ASKED FOR", "TOOK")
    print_table(columns, table, "no workflows yet: `fedml workflow run pipeline.yaml`")


@workflow.command()
@workflow_argument
@home_option
@json_option
def status(name: str, home: Path, as_json: bool) -> None:
    """Show a workflow and its steps.

    Each with its state, its run, and why it waits or did not finish.

    \b
    Examples:
      fedml workflow status heart
      fedml workflow status w-1c0ffee123 --json
    """
    found = WorkflowRun.find(connect(home), name)
    if as_json:
        print_json(found.details)
        return
    details = found.details
    tries = f", try {details['tries']}" if details["tries"] > 1 else ""
    stopped = f", stopped by {who}" if (who := details["stopped_by"]) else ""
    print_facts(
        {
            "workflow": f"{found.name} ({found.id}) of {details['user']}",
            "state": found.state + tries + stopped,
            "asked for": when(details["created_at"]),
        }
    )
    print_table(("STEP", "STATE", "RUN", "TOOK", "WHY"), rows(found.steps), "no steps")
    if found.ended and found.next_step():
        click.secho(f"to go on: {found.next_step()}", dim=True, err=True)


@workflow.command()
@workflow_argument
@click.argument("step", required=False)
@click.option("-f", "--follow", "stay", is_flag=True, help="Go on until the step has ended.")
@home_option
@json_lines_option
def logs(name: str, step: str | None, stay: bool, home: Path, as_json: bool) -> None:
    """Show what a STEP has printed, or all steps.

    \b
    Examples:
      fedml workflow logs pipeline
      fedml workflow logs pipeline train -f
    """
    client = connect(home)
    found = WorkflowRun.find(client, name)
    if step is not None and step not in found.steps:
        raise ConfigError(f"{found.name} has no step {step}", ", ".join(found.steps))
    if stay and step is None:
        raise click.UsageError(f"name the STEP to follow: {', '.join(found.steps)}")
    if stay and step is not None:
        _until_it_runs(found, step)
    chosen = found.steps if step is None else {step: found.steps[step]}
    code = 0
    for title, its in chosen.items():
        if step is None:
            click.secho(f"== {title} {its['state']}", bold=True, err=True)
        # Of a step that waits or was skipped, its run of an earlier try.
        if not its["runs"] or its["state"] == "STARTING":
            click.echo(f"{title} has not run: {its['cause'] or its['state']}", err=True)
            continue
        code = follow(client, its["runs"][-1], as_json=as_json, logs=True, stay=stay)
    raise SystemExit(code if stay else 0)


def _until_it_runs(found: WorkflowRun, step: str) -> None:
    """Until a step has a run to be followed, or will have none."""
    if found.steps[step]["state"] not in ("WAITING", "STARTING"):
        return
    for item in found.follow():
        data = item.get("event", {}).get("data", {})
        if data.get("step") == step and data["state"] != "STARTING":
            break
    found.refresh()


@workflow.command()
@workflow_argument
@home_option
@json_lines_option
def wait(name: str, home: Path, as_json: bool) -> None:
    """Watch a workflow until it has ended.

    Exits as `fedml workflow run` does.

    \b
    Examples:
      fedml workflow wait heart && echo all is done
    """
    client = connect(home)
    found = WorkflowRun.find(client, name)
    raise SystemExit(watch(client, found.id, as_json=as_json))


@workflow.command()
@workflow_argument
@click.option("--wait", "stay", is_flag=True, help="Until it has ended.")
@home_option
@json_option
def stop(name: str, stay: bool, home: Path, as_json: bool) -> None:
    """Stop a workflow and its runs; again is harmless.

    \b
    Examples:
      fedml workflow stop heart
      fedml workflow stop w-1c0ffee123 --wait   # until it has ended
    """
    found = WorkflowRun.find(connect(home), name)
    said = f"{found.id} has ended already: {found.state}"
    if not found.ended:
        found.stop()
        said = f"{found.id} {found.wait().state}" if stay else f"{found.id} is being stopped"
    if as_json:
        print_json({"workflow": found.id, "state": found.refresh().state})
    else:
        click.echo(said, err=True)


@workflow.command()
@workflow_argument
@click.argument(
    "file", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@click.option("--follow/--detach", "stay", default=True, help="Show the steps until all is over.")
@json_lines_option
@home_option
def resume(name: str, file: Path | None, stay: bool, as_json: bool, home: Path) -> None:
    """Run again what has not finished, and what hangs on it.

    Steps that have finished are kept, with what they left. With FILE, those of
    which something was changed there (a line, a file in the workspace) run
    again, too.

    \b
    Examples:
      fedml workflow resume pipeline                  # the newest of this name, as it was
      fedml workflow resume w-1c0ffee123 pipeline.yaml
    """
    client = connect(home)
    with transfer("workspaces") as told:
        found = workflows.resume(client, name, file, told=told)
    again = found["again"]
    if as_json:
        print_json(found)
    elif not again:
        click.echo("every step has finished, and none was changed: nothing runs again", err=True)
    else:
        click.echo(f"{found['workflow']} runs again: {', '.join(again)}", err=True)
    if stay and again:
        raise SystemExit(watch(client, found["workflow"], as_json=as_json))


@workflow.command()
@workflow_argument
@home_option
@json_option
def delete(name: str, home: Path, as_json: bool) -> None:
    """Forget a workflow that has ended; admins only.

    What its steps have left goes with it, unless their runs still have it.

    \b
    Examples:
      fedml workflow delete w-1c0ffee123
    """
    freed = workflows.delete(connect(home), name)
    if as_json:
        print_json({"workflow": name, "freed_bytes": freed})
    else:
        click.echo(f"{name} is forgotten", err=True)


@workflow.command()
@click.argument(
    "file", default="workflow.yaml", type=click.Path(dir_okay=False, writable=True, path_type=Path)
)
def init(file: Path) -> None:
    """Write a commented workflow that runs as it stands.

    Into FILE, or workflow.yaml. What is there already is never replaced.

    \b
    Examples:
      fedml workflow init
      fedml workflow init heart.yaml
    """
    from fedml.workflowfile import EXAMPLE

    try:
        with file.open("x") as new:
            new.write(EXAMPLE)
    except FileExistsError:
        raise click.UsageError(f"{file} exists already; name another file") from None
    click.echo(f"{file}: run it with `fedml workflow run {file}`", err=True)
