# SPDX-License-Identifier: Apache-2.0
"""`fedml-broker simulate-fleet`."""

import asyncio
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fedml_broker.cli.client import CommandFailed, json_option
from fedml_broker.cli.tables import Columns, print_thing
from fedml_broker.fleet_simulator.desk import SimulationFailed
from fedml_broker.fleet_simulator.simulation import Figures, Plan, Told, own_broker, simulate
from fedml_protocol.errors import BadKey
from fedml_protocol.keys import LoginKey, Scope, parse_login_key

_FACTS: Columns = {
    "machines": lambda f: f"{f['agents']}, a heartbeat every {f['heartbeat_s']:g} s each",
    "enrolled": lambda f: f"in {f['enrol_s']:.1f} s, {_each(f['enrol_cpu_s'], f['agents'])}",
    "connected": lambda f: f"in {f['connect_s']:.1f} s, {_each(f['connect_cpu_s'], f['agents'])}",
    "heartbeats": lambda f: f"{f['beats_per_s']:.0f} a second, {f['beats_core']:.0%} of a core",
    "tasks": lambda f: _tasks(f) if f["tasks"] else "",
    "submit to accept": lambda f: (
        f"p50 {f['accept_p50_ms']:.0f} ms, p99 {f['accept_p99_ms']:.0f} ms, "
        f"longest {f['accept_max_ms']:.0f} ms"
        if f["accept_p50_ms"] is not None
        else ""
    ),
    "messages": lambda f: (
        f"{f['messages_in_per_s']:.0f} in and {f['messages_out_per_s']:.0f} out a second"
    ),
    "memory": lambda f: f"{f['rss_idle_mb']:.0f} MB with heartbeats, {f['rss_mb']:.0f} MB at most",
    "this simulation": lambda f: f"{f['simulator_core']:.0%} of a core",
    "refused": lambda f: f"{f['refused']} messages",
    "troubles": lambda f: "\n".join(f"{n} × {what}" for what, n in f["troubles"].items()) or "none",
}


@click.command("simulate-fleet")
@click.option("--agents", default=1000, show_default=True, help="How many machines.")
@click.option(
    "--broker",
    "key_text",
    metavar="KEY",
    help="An admin's key of a running broker; - reads it. Without: one of its own, on loopback.",
)
@click.option(
    "--heartbeat",
    default=10.0,
    show_default=True,
    help="Seconds between heartbeats, at a broker of its own.",
)
@click.option(
    "--tasks-per-second", "rate", default=0.0, show_default=True, help="Tasks to ask for; 0: none."
)
@click.option("--duration", default=60.0, show_default=True, help="Seconds of asking for tasks.")
@click.option("--task-seconds", default=2.0, show_default=True, help="How long a task takes.")
@click.option("--slots", default=1, show_default=True, help="Tasks at one time on each machine.")
@json_option
def simulate_fleet(
    agents: int,
    key_text: str | None,
    heartbeat: float,
    rate: float,
    duration: float,
    task_seconds: float,
    slots: int,
    as_json: bool,
) -> None:
    """Simulate a fleet of machines, and show what it costs the broker.

    Real identities, TLS, MQTT, signatures and messages; only the work is not done. Figures are of
    the broker: look at CPU and memory first, times by the clock are those of this machine.

    \b
    Examples:
      fedml-broker simulate-fleet
      fedml-broker simulate-fleet --agents 10000 --tasks-per-second 200
      fedml-broker simulate-fleet --agents 500 --broker - < ~/.fedml/broker/admin.key
    """
    if agents < 1 or slots < 1 or rate < 0 or min(heartbeat, duration, task_seconds) <= 0:
        raise CommandFailed(
            "a fleet has at least one machine and one slot, and times are above 0", exit_code=2
        )
    plan = Plan(
        agents=agents,
        heartbeat_s=heartbeat,
        tasks_per_second=rate,
        duration_s=duration,
        task_s=task_seconds,
        slots=slots,
    )
    key = _key(sys.stdin.read() if key_text == "-" else key_text) if key_text else None
    try:
        with _progress() as told:
            figures = asyncio.run(_simulate(plan, key, told))
    except SimulationFailed as error:
        raise CommandFailed(str(error), error.hint) from error
    except asyncio.CancelledError:
        raise click.Abort from None
    print_thing(asdict(figures), _FACTS, as_json=as_json)


async def _simulate(plan: Plan, key: LoginKey | None, told: Told) -> Figures:
    this = asyncio.current_task()
    assert this is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, this.cancel)
    if key is not None:
        return await simulate(plan, key, told, clean_up=True)
    click.echo("a broker of its own is started on loopback, and gone afterwards", err=True)
    async with own_broker(plan.heartbeat_s) as own:
        return await simulate(plan, own, told, clean_up=False)


def _key(text: str) -> LoginKey:
    try:
        return parse_login_key(text, Scope.USER)
    except BadKey as error:
        raise CommandFailed(
            f"--broker: {error}",
            "the key of an admin of the first tenant: `fedml-broker users token admin`",
            2,
        ) from error


@contextmanager
def _progress() -> Iterator[Told]:
    """A bar for each part on a terminal; in a log, a line when one is done."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _line
        return
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    ) as bars:
        known: dict[str, int] = {}

        def told(part: str, done: float, of: float) -> None:
            if part not in known:
                known[part] = bars.add_task(part, total=round(of))
            bars.update(known[part], completed=round(done), total=round(of))  # type: ignore[arg-type]

        yield told


def _line(part: str, done: float, of: float) -> None:
    if done >= of:
        click.echo(f"{part}: {of:g}", err=True)


def _each(cpu_s: float, count: int) -> str:
    return f"{cpu_s:.1f} s of CPU ({1e3 * cpu_s / count:.1f} ms each)"


def _tasks(f: object) -> str:
    assert isinstance(f, dict)
    return (
        f"{f['tasks']} at {f['tasks_per_second']:g} a second, {f['unfinished']} unfinished, "
        f"{f['tasks_core']:.0%} of a core with heartbeats"
    )
