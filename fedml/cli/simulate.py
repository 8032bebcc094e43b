# SPDX-License-Identifier: Apache-2.0
"""`fedml simulate run.yaml`."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedml.cli.options import json_lines_option, strict_option
from fedml.cli.tables import worth_showing
from fedml.errors import ConfigError, FedMLError, RunFailed

if TYPE_CHECKING:
    from fedml.simulation.result import Result, Round

_SHOW_EVERY_S = 0.1
_LONG_S = 0.5


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--rounds", type=int, help="Instead of the file's.")
@click.option("--workers", type=int, help="Processes; one per core or GPU unless given.")
@click.option("--engine", metavar="NAME", help="auto, exact, closed_form, inplace or stacked.")
@click.option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.")
@click.option("--seed", type=int, help="Instead of the file's.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
              help="Results, checkpoint and report (simulations/NAME, numbered).")  # fmt: skip
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint.")
@click.option("--sweep", multiple=True, metavar="KEY=V,V", help="Vary a key; may be repeated.")
@click.option("--debug", is_flag=True, help="One process, so that breakpoints work.")
@click.option("--ray", is_flag=False, flag_value="local", metavar="[ADDRESS]",
              help="On a Ray cluster; without ADDRESS one is started here.")  # fmt: skip
@strict_option
@json_lines_option
def simulate(
    file: Path,
    rounds: int | None,
    workers: int | None,
    engine: str | None,
    device: str | None,
    seed: int | None,
    out: Path | None,
    resume: bool,
    sweep: tuple[str, ...],
    debug: bool,
    ray: str | None,
    strict: bool,
    as_json: bool,
) -> None:
    """Run a federated FILE here, all clients simulated.

    The same FILE and application run on agents with `fedml federate`; see docs/simulate.md.
    Ctrl-C keeps a checkpoint. FILE may be a fedml_config.yaml of FedML's; see docs/fedml.md.

    \b
    Examples:
      fedml simulate run.yaml
      fedml simulate run.yaml --rounds 100 --workers 2
      fedml simulate run.yaml --resume                  # go on with the last one
      fedml simulate run.yaml --sweep lr=0.01,0.03,0.1  # a table and one report for all
      fedml simulate run.yaml --engine exact            # the bits of a deployed run
      fedml simulate run.yaml --device cuda:0           # or say why not
      fedml simulate run.yaml --sweep groups.rounds=1,2,5   # rounds within groups of clients
      fedml simulate run.yaml --ray 10.0.0.1:6379       # on several machines
      fedml simulate attack.yaml --sweep simulation.attack.clients=0,1,2   # some clients lie
    """
    # Before NumPy is imported: members have one thread each, and this process may be one of them.
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    from fedml import translation
    from fedml.simulation import report
    from fedml.simulation import sweep as sweeps
    from fedml.simulation.plan import read
    from fedml.simulation.run import Simulation

    settings: dict[str, Any] = {
        "rounds": rounds, "workers": workers, "engine": engine, "device": device, "seed": seed,
        "ray": ray,
    }  # fmt: skip
    source = translation.accept(file, strict=strict)
    plan = read(source, **settings)
    folder = out or _folder(plan.name, resume=resume)
    # What the user's own code prints is talk.
    with (
        ExitStack() as afterwards,
        _shown(as_json) as listener,
        _ends_on_sigterm(),
        redirect_stdout(sys.stderr),
        _users_errors(plan.app),
    ):
        if sweep:
            points = sweeps.parse(sweep)
            done = sweeps.sweep(
                source, points, out=folder, resume=resume,
                listener=lambda changes: listener(sweeps.label(changes)), **settings,
            )  # fmt: skip
        else:
            run = Simulation(plan, folder=folder, resume=resume, debug=debug, listener=listener(""))
            try:
                result = run.run()
            except KeyboardInterrupt:
                if run.kept_turn >= 0:
                    report.write(folder)
                    goes_on = f"fedml simulate {file} --out {folder} --resume"
                    said = f"what was done is kept; {goes_on} goes on"
                    afterwards.callback(click.echo, said, err=True)
                raise
            report.write(folder)
    if sweep:
        _say_table(*sweeps.table(done), as_json=as_json)
    else:
        _say_end(result, as_json=as_json)
    click.echo(f"report: {folder / 'report.html'}", err=True)


def _folder(name: str, *, resume: bool) -> Path:
    """A new folder below `simulations`, or the latest one of this name."""
    name = name.replace("/", "_")
    number = 1
    while (Path("simulations") / f"{name}-{number}").exists():
        number += 1
    if resume:
        if number == 1:
            raise ConfigError(f"there is no simulations/{name}-1 to resume", "--out DIR says where")
        number -= 1
    return Path("simulations") / f"{name}-{number}"


@contextmanager
def _ends_on_sigterm() -> Iterator[None]:
    """As Ctrl-C does: processes end, shared memory is freed, a checkpoint is kept."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _users_errors(app: Path) -> Iterator[None]:
    """What the user's file raises ends the run, and he is shown his part of the traceback."""
    from fedml.federate import blame

    try:
        yield
    except FedMLError:
        raise
    except Exception as error:
        if blame.says_all(error) or not blame.in_users_code(error):
            raise
        text = f"{app.name}: {type(error).__name__}: {error}"
        raise RunFailed(f"{text}\n\n{blame.trace(error)}".rstrip()) from error


@contextmanager
def _shown(as_json: bool) -> Iterator[Any]:
    """Makes listeners that show progress on stderr, and rounds as JSON lines on stdout."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    from fedml.simulation.result import Listener

    console = Console(stderr=True, highlight=False)
    results = sys.stdout
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )

    class Shown(Listener):
        def __init__(self, label: str) -> None:
            self._label = f"{label} " if label else ""
            self._bar = progress.add_task(self._label, total=None, rate="")
            self._next = self._next_line = 0.0
            self._clients, self._since = 0, time.monotonic()
            self._in_round = self._of_round = 0
            self._round_began = self._since
            self._held: Round | None = None
            listeners.append(self)

        def say(self, text: str) -> None:
            console.print(f"{self._label}{text}", style="dim", markup=False, soft_wrap=True)

        def begins(self, number: int, clients: int) -> None:
            self._in_round, self._of_round = 0, clients
            self._round_began = time.monotonic()

        def done(self, clients: int) -> None:
            self._clients += clients
            self._in_round += clients
            now = time.monotonic()
            # Within a round only where a round takes its time.
            if now - self._round_began > _LONG_S and self._of_round:
                task = progress.tasks[self._bar]
                part = min(self._in_round / self._of_round, 1.0)
                progress.update(self._bar, completed=int(task.completed) + 0.99 * part)

        def ended(self, round_: Round) -> None:
            self.tell()
            self._held = round_
            if not round_.follows:
                self.tell()
            now = time.monotonic()
            last = round_.number == round_.rounds
            if now < self._next and not last:
                return
            rate = self._clients / max(now - self._since, 1e-9)
            progress.update(
                self._bar,
                total=round_.rounds,
                completed=round_.number,
                description=f"{self._label}round {round_.number}/{round_.rounds}",
                rate=f"{rate:,.{0 if rate >= 100 else 1}f} clients/s",
            )
            self._next = now + _SHOW_EVERY_S

        def evaluated(self, number: int, metrics: Mapping[str, float]) -> None:
            held = self._held
            if held is not None and held.number == number:
                self._held = dataclasses.replace(held, metrics={**held.metrics, **metrics})
                self.tell()

        def tell(self) -> None:
            """The line of the round that has ended, with all that is known of it."""
            round_, self._held = self._held, None
            if round_ is None:
                return
            now = time.monotonic()
            if as_json:
                results.write(_json_line(round_, self._label))
                results.flush()
            elif not console.is_terminal and (
                now >= self._next_line or round_.number == round_.rounds
            ):
                self._next_line = now + 10 * _SHOW_EVERY_S
                console.print(f"{self._label}{_line(round_)}", markup=False, soft_wrap=True)

    listeners: list[Shown] = []
    with progress:
        try:
            yield Shown
        finally:  # of a round that was stopped, too
            for each in listeners:
                each.tell()


def _line(round_: Round) -> str:
    numbers = "  ".join(
        f"{name} {value:.4f}"
        for name, value in sorted(round_.metrics.items())
        if worth_showing(name)
    )
    return f"round {round_.number}/{round_.rounds}  {numbers}"


def _json_line(round_: Round, label: str) -> str:
    from fedml.simulation.record import sayable

    said = {
        "round": round_.number,
        "metrics": sayable(round_.metrics),
        "clients": round_.answered,
        "wall_s": round(round_.wall_s, 6),
        "simulated_s": round_.simulated_s,
    }
    return json.dumps({"sweep": label.strip(), **said} if label else said) + "\n"


def _say_end(result: Result, *, as_json: bool) -> None:
    if as_json:
        from fedml.simulation.record import sayable

        metrics = sayable(result.metrics)
        end = {"rounds": result.rounds, "engine": result.engine, "metrics": metrics}
        click.echo(json.dumps({"end": end}))
        return
    rate = result.clients_per_s
    time_text = "" if result.simulated_s is None else f", {result.simulated_s:,.0f} s simulated"
    click.echo(f"{result.rounds} rounds, {rate:,.{0 if rate >= 100 else 1}f} clients/s{time_text}")
    for name, value in sorted(result.metrics.items()):
        click.echo(f"  {name:<24}{value:.6g}")


def _say_table(heads: list[str], rows: list[list[str]], *, as_json: bool) -> None:
    if as_json:
        for row in rows:
            click.echo(json.dumps({"end": dict(zip(heads, row, strict=True))}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*heads, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
