# SPDX-License-Identifier: Apache-2.0
"""`fedml-agent status`."""

import json

import click

from fedml_agent import control, room, sandbox
from fedml_agent.cli.options import home_option, json_option
from fedml_agent.control import NotRunning
from fedml_agent.home import Home
from fedml_agent.policy import Policy
from fedml_agent.policy_file import load_or_refuse


@click.command()
@home_option
@json_option
def status(home: Home, as_json: bool) -> None:
    """Show the link, the tasks, the disk and the policy of the agent on this machine.

    Exit code 0: connected; 3: no agent runs, or this machine has not joined; 5: it is not
    connected.

    \b
    Examples:
      fedml-agent status
      fedml-agent status --json | jq .tasks
    """
    membership = home.membership()
    rules = load_or_refuse(home.policy)
    free = room.disk_free(home.root)
    try:
        found = control.ask(home.control)
        lacks: dict[str, str] = found["sandbox_missing"]
    except NotRunning:
        found, lacks = None, sandbox.cannot()
    if as_json:
        click.echo(
            json.dumps(
                {
                    "device": membership.device,
                    "broker": membership.url,
                    "running": found is not None,
                    "agent": found,
                    "disk_free_bytes": free,
                    "policy": rules.broken or "ok",
                    "sandbox_missing": lacks,
                }
            )
        )
    else:
        _show(home, membership.device, membership.url, found, free, rules)
        _show_sandbox(rules, lacks, found)
    if found is None:
        raise SystemExit(NotRunning.exit_code)
    if found["link"] != "up":
        raise SystemExit(5)


def _show(
    home: Home,
    device: str,
    url: str,
    found: "dict[str, object] | None",
    free: int,
    rules: Policy,
) -> None:
    row = _row
    row("device", device)
    row("broker", url)
    if found is None:
        row("agent", "not running: `fedml-agent run`", "red")
    else:
        row("agent", f"pid {found['pid']}, up for {_time(float(str(found['up_s'])))}")
        up = found["link"] == "up"
        row("link", str(found["link"]), "green" if up else "red")
        tasks = found["tasks"]
        if isinstance(tasks, list):
            for task in tasks:
                gpus = f"  GPUs {', '.join(task['gpus'])}" if task["gpus"] else ""
                row("task", f"{task['task']} (epoch {task['epoch']}) {task['state']}{gpus}")
            if not tasks:
                row("tasks", "none")
        if isinstance(found["sessions"], list) and found["sessions"]:
            row("workers", ", ".join(found["sessions"]))
        if isinstance(found["unleased"], list):
            for use in found["unleased"]:
                text = f"{use['task']} computes on {use['gpu']}, which it does not hold"
                row("GPUs", text, "yellow")
        if isinstance(found["owed"], list) and found["owed"]:
            row("owed", f"{len(found['owed'])} results wait for the broker")
        if found["refusing"]:
            row("refusing", str(found["refusing"]), "yellow")
        if found["draining"]:
            row("draining", "takes no more tasks", "yellow")
        if found["alarms"]:
            row("alarms", f"{found['alarms']}: see the agent's log", "red")
    row("disk", f"{free / 1e9:.1f} GB free")
    where = str(home.policy) if home.policy.exists() else "the defaults"
    row("policy", rules.broken or where, "red" if rules.broken else None)


def _show_sandbox(rules: Policy, lacks: dict[str, str], found: "dict[str, object] | None") -> None:
    for name, why in lacks.items():
        if name in rules.require:
            _row("sandbox", f"no '{name}', so no task is taken: {why}", "red")
        else:
            _row("sandbox", f"tasks run without '{name}': {why}", "yellow")
    can = found["sandbox"] if found is not None else None
    if isinstance(can, dict):
        given = (f"{name} ({can[name]})" for name in sandbox.PROMISED if name in can)
        _row("in force", ", ".join(given))
    elif not lacks:
        _row("sandbox", "every protection is in force")


def _row(name: str, text: str, colour: str | None = None) -> None:
    click.echo(f"{name:<10}" + click.style(text, fg=colour))


def _time(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"
