# SPDX-License-Identifier: Apache-2.0
"""The course of one simulation: enrol, connect, beat, work, leave; and what each part has cost.

Costs are the broker's own account of its process (`/metrics`): CPU seconds do not depend on what
else the machine does, as long as it does not stand still. Times by the clock do.
"""

import asyncio
import contextlib
import gc
import json
import os
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedml_broker.fleet_simulator.desk import Desk, Enrolment, Numbers, SimulationFailed
from fedml_broker.fleet_simulator.fleet import Fleet, Member
from fedml_protocol.keys import LoginKey, Scope, parse_login_key

# For heartbeats alone: so many intervals are looked at.
_BEATS = 3
_LOOK_EVERY_S = 5.0
_SPARE_FILES = 256
_STOP_S = 30.0

Told = Callable[[str, float, float], None]
"""Called with the part, how much of it is done, and how much there is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be simulated.

    Attributes:
        heartbeat_s: Of a broker that is started for it; another one has its own.
        task_s: How long a task takes, on average.
        slots: Tasks that a machine takes at one time.
        duration_s: How long tasks are asked for.
    """

    agents: int
    heartbeat_s: float = 10.0
    tasks_per_second: float = 0.0
    duration_s: float = 60.0
    task_s: float = 2.0
    slots: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What came out. `_cpu_s` is CPU seconds of the broker, `_core` its CPU seconds a second.

    Attributes:
        accept_p50_ms: From the request to the moment at which a machine accepts; and p99, longest.
        unfinished: Tasks that were asked for and have not come to a good end.
        rss_mb: The most that the broker has had.
        simulator_core: What the simulation itself has taken. Near 1, it was the slower of the two.
        refused: Messages of simulated machines that the broker refused.
        troubles: What should not happen, in words, and how often it did.
    """

    agents: int
    heartbeat_s: float
    enrol_s: float
    enrol_cpu_s: float
    connect_s: float
    connect_cpu_s: float
    beats_per_s: float
    beats_core: float
    tasks_per_second: float
    tasks: int
    tasks_core: float
    accept_p50_ms: float | None
    accept_p99_ms: float | None
    accept_max_ms: float | None
    unfinished: int
    messages_in_per_s: float
    messages_out_per_s: float
    rss_idle_mb: float
    rss_mb: float
    simulator_core: float
    refused: int
    troubles: dict[str, int]


def allow_files(wanted: int) -> None:
    """Let this process, and what it starts, have so many open files.

    Raises:
        SimulationFailed: The machine's limit is lower.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise SimulationFailed(
            f"{wanted} open files are needed, this session may have {hard}",
            f"simulate {max(1, hard - _SPARE_FILES)} agents, or raise the limit: `ulimit -Hn "
            f"{wanted}` as root, or LimitNOFILE= of the service",
        )
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@asynccontextmanager
async def own_broker(heartbeat_s: float) -> AsyncIterator[LoginKey]:
    """A broker on loopback with a home of its own; both are gone afterwards. Its admin's key.

    Raises:
        SimulationFailed: It does not start.
    """
    with tempfile.TemporaryDirectory(prefix="fedml-fleet-") as name:
        home = Path(name)
        words = ["up", "--https-port=0", "--mqtt-port=0", "--json", f"--heartbeat={heartbeat_s}"]
        with (home / "broker.log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-c",
                "from fedml_broker.cli import main; main()",
                *words,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "FEDML_HOME": name},
                start_new_session=True,  # Ctrl-C is for us; the broker is ended below
            )
        try:
            assert process.stdout is not None
            line = await process.stdout.readline()
            if not line:
                last = (home / "broker.log").read_text(errors="replace").strip().splitlines()
                raise SimulationFailed("the broker did not start", "\n".join(last[-3:]))
            file = Path(json.loads(line)["admin_key_file"])
            yield parse_login_key(file.read_text(), Scope.USER)
        finally:
            await asyncio.shield(_end(process))


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        async with asyncio.timeout(_STOP_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


async def simulate(plan: Plan, key: LoginKey, told: Told, *, clean_up: bool) -> Figures:
    """One simulation at the broker of an admin's key.

    Raises:
        SimulationFailed: It cannot go on.
    """
    allow_files(plan.agents + _SPARE_FILES)
    async with Desk.of(key) as desk:
        await desk.settle_in(plan.agents)
        try:
            course = _Course(plan, desk, told)
            with tempfile.TemporaryDirectory(prefix="fedml-fleet-") as folder:
                return await course.run(Path(folder))
        finally:
            if clean_up:
                await desk.clean_up(lambda done, of: told("clean up", done, of))


class _Course:
    """One simulation on its way."""

    def __init__(self, plan: Plan, desk: Desk, told: Told) -> None:
        self._plan = plan
        self._desk = desk
        self._told = told
        self._asked_at: dict[str, float] = {}
        self._rss = 0.0

    async def run(self, folder: Path) -> Figures:
        plan, told = self._plan, self._told
        began = await self._look()
        members, common = await self._desk.enrol(
            plan.agents, plan.slots, lambda n: told("enrol", n, plan.agents)
        )
        enrolled = await self._look()
        fleet = self._fleet(members, common, folder)
        try:
            with _as_failure():
                await fleet.connect(lambda n: told("connect", n, plan.agents))
            # The fleet is there to stay: to look through it for garbage would only delay answers.
            gc.collect()
            gc.freeze()
            connected = await self._look()
            beats = fleet.tally.beats
            await self._watch("heartbeats", _BEATS * common.heartbeat_s)
            beaten = await self._look()
            beats = fleet.tally.beats - beats
            if plan.tasks_per_second:
                await self._ask(fleet)
            worked = await self._look()
        finally:
            await fleet.leave()
            gc.unfreeze()
        took = [accepted - self._asked_at[run] for run, accepted in self._accepted(fleet)]
        per = _percentiles(took)
        busy = worked if plan.tasks_per_second else beaten
        before = beaten if plan.tasks_per_second else connected
        return Figures(
            agents=plan.agents,
            heartbeat_s=common.heartbeat_s,
            enrol_s=enrolled.at - began.at,
            enrol_cpu_s=enrolled.numbers.cpu_s - began.numbers.cpu_s,
            connect_s=connected.at - enrolled.at,
            connect_cpu_s=connected.numbers.cpu_s - enrolled.numbers.cpu_s,
            beats_per_s=beats / (beaten.at - connected.at),
            beats_core=_rate(connected, beaten, lambda n: n.cpu_s),
            tasks_per_second=plan.tasks_per_second,
            tasks=len(self._asked_at),
            tasks_core=_rate(beaten, worked, lambda n: n.cpu_s) if plan.tasks_per_second else 0.0,
            accept_p50_ms=per[0],
            accept_p99_ms=per[1],
            accept_max_ms=per[2],
            unfinished=len(self._asked_at)
            - round(worked.numbers.finished - began.numbers.finished),
            messages_in_per_s=_rate(before, busy, lambda n: n.received),
            messages_out_per_s=_rate(before, busy, lambda n: n.sent),
            rss_idle_mb=beaten.numbers.rss_bytes / 1e6,
            rss_mb=self._rss / 1e6,
            simulator_core=(busy.own_cpu_s - before.own_cpu_s) / (busy.at - before.at),
            refused=round(worked.numbers.refused - began.numbers.refused),
            troubles=dict(fleet.tally.troubles.most_common()),
        )

    def _fleet(self, members: list[Member], common: Enrolment, folder: Path) -> Fleet:
        return Fleet(
            members,
            where=common.mqtt,
            ca_pem=self._desk.ca_pem,
            verify_keys=common.verify_keys,
            heartbeat_s=common.heartbeat_s,
            task_s=self._plan.task_s,
            slots=self._plan.slots,
            folder=folder,
        )

    def _accepted(self, fleet: Fleet) -> Iterator[tuple[str, float]]:
        """Ours alone: a run that an earlier simulation has left is no measurement."""
        yield from (
            (run, at) for run, at in fleet.tally.accepted_at.items() if run in self._asked_at
        )

    async def _ask(self, fleet: Fleet) -> None:
        """Ask for tasks at their moments, whether or not earlier ones have been answered."""
        plan, clock, loop = self._plan, fleet.clock, asyncio.get_running_loop()
        total = round(plan.tasks_per_second * plan.duration_s)

        async def one() -> None:
            run = "r-" + secrets.token_hex(8)
            self._asked_at[run] = clock.now()
            try:
                await self._desk.launch(run)
            except SimulationFailed as error:
                fleet.tally.troubles[str(error)] += 1

        looking = asyncio.create_task(self._keep_looking(), name="fleet.look")
        try:
            began = loop.time()
            async with asyncio.TaskGroup() as asking:
                for n in range(total):
                    await asyncio.sleep(began + n / plan.tasks_per_second - loop.time())
                    asking.create_task(one(), name="fleet.ask")
                    self._told("tasks", n + 1, total)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(2 * plan.task_s + 2 * fleet.heartbeat_s):
                    await fleet.all_acknowledged(total)
        finally:
            looking.cancel()

    async def _watch(self, part: str, seconds: float) -> None:
        began = time.monotonic()
        while (gone := time.monotonic() - began) < seconds:
            self._told(part, gone, seconds)
            await asyncio.sleep(min(1.0, seconds - gone))
        self._told(part, seconds, seconds)

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            await self._look()

    async def _look(self) -> "_Look":
        numbers = await self._desk.numbers()
        self._rss = max(self._rss, numbers.rss_bytes)
        return _Look(time.monotonic(), time.process_time(), numbers)


@dataclass(frozen=True, slots=True)
class _Look:
    """The broker's numbers at a moment."""

    at: float
    own_cpu_s: float
    numbers: Numbers


def _rate(before: _Look, after: _Look, what: Callable[[Numbers], float]) -> float:
    return (what(after.numbers) - what(before.numbers)) / (after.at - before.at)


def _percentiles(seconds: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """Median, 99th percentile (nearest rank) and maximum, in milliseconds."""
    if not seconds:
        return None, None, None
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return tuple(1e3 * ordered[round(part * last)] for part in (0.5, 0.99, 1.0))  # type: ignore[return-value]


@contextmanager
def _as_failure() -> Iterator[None]:
    """What the operating system says against connections, for people."""
    try:
        yield
    except* OSError as group:
        first: BaseException = group
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise SimulationFailed(
            f"the machines cannot connect: {first}",
            "see the broker's log; its own limit of open files counts too (`ulimit -n`)",
        ) from first
