# SPDX-License-Identifier: Apache-2.0
"""Algorithms without rounds, on a simulated clock: the server steps with each update that comes.

``clients.per_round`` clients are at work at any time. Each starts from the newest model; when one
answers, the server hears how many versions old its model was, and another one starts. ``rounds``
counts the versions of the model, so FedBuff's are of as many updates as its buffer holds.

What a client sends depends on its start alone, not on when its answer is looked at. So all clients
at work are trained side by side by the crew, whenever the next answer is not there yet.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedml.errors import RunFailed
from fedml.federate import cohort
from fedml.federate.arrays import Arrays
from fedml.federate.layout import BadUpdate
from fedml.federate.round import ServerVersion
from fedml.simulation.devices import online
from fedml.simulation.order import Done, Order, Task

if TYPE_CHECKING:
    from fedml.simulation.run import Simulation

_BARREN = 1000  # answers in a row without a new model, after which nothing is hoped for


@dataclass(frozen=True, slots=True, order=True)
class _Started:
    """A client at work; the earliest end is the smallest."""

    ends: float
    start: int  # how many were started before it; the random numbers hang on it
    client: int
    version: int
    lost: bool


def walk(run: Simulation) -> None:
    """Walk a simulation of an asynchronous algorithm to its last version."""
    _Walk(run).walk()


class _Walk:
    def __init__(self, run: Simulation) -> None:
        self._run = run
        self._version = run.turn
        # Where the arrays of each version that somebody still needs are.
        self._slots: dict[int, int] = {}
        self._working: list[_Started] = []
        self._busy: set[int] = set()
        self._ready: dict[int, Done] = {}
        # After a resume, counting goes on where no start can have been before.
        self._starts = run.turn * 1_000_003
        self._since: list[Done] = []
        self._asked = 0
        self._server = self._new_server()

    def walk(self) -> None:
        """Answer after answer, in the order of the simulated clock."""
        run = self._run
        self._publish()
        barren = 0
        while self._version < run.plan.rounds:
            self._fill()
            first = heapq.heappop(self._working)
            self._busy.discard(first.client)
            run.clock = max(run.clock, first.ends)
            if first.lost:
                continue
            if first.start not in self._ready:
                self._train([first, *(s for s in self._working if not s.lost)])
            barren = 0 if self._step(first, self._ready.pop(first.start)) else barren + 1
            if barren > _BARREN:
                raise RunFailed(
                    f"{barren} updates in a row made no new model",
                    "algorithm_config: a smaller buffer",
                )

    def _fill(self) -> None:
        """Start clients until enough are at work."""
        run, plan = self._run, self._run.plan
        while len(self._working) < plan.per_round:
            free = [c for c in range(plan.clients) if c not in self._busy]
            if plan.devices is not None:
                there, later = online(plan.devices, free, run.clock)
                if not there:
                    if self._working:
                        return  # those at work will answer before somebody new can start
                    if math.isinf(later):
                        raise RunFailed(
                            f"after {run.clock:.0f} s nobody is online any more",
                            "a longer trace in simulation.devices",
                        )
                    run.clock = later
                    continue
                free = there
            client = cohort.choose(plan.seed, self._starts, free, 1)[0]
            lost = plan.devices is not None and plan.devices.drops_out(client, self._starts)
            ends = run.clock + run.duration(client)
            started = _Started(ends, self._starts, client, self._version, lost)
            heapq.heappush(self._working, started)
            self._busy.add(client)
            self._starts += 1
            self._asked += 1

    def _train(self, started: list[_Started]) -> None:
        """What all of these send, as far as it is not there yet; by the version they start from."""
        run = self._run
        todo = [s for s in started if s.start not in self._ready]
        for version in sorted({s.version for s in todo}):
            group = {s.client: s.start for s in todo if s.version == version}
            order = Order(
                task=Task.EACH,
                turn=self._version,
                starts=group,
                clients=tuple(sorted(group)),
                version=self._slots[version],
            )
            run.listener.begins(self._version + 1, len(group))
            shares = run.crew.run(order)
            done = [one for _, each in shares for one in each]
            for one in run.settle(self._version + 1, done, least=len(group)):
                self._ready[group[one.client]] = one

    def _step(self, started: _Started, done: Done) -> bool:
        """The server hears of one answer; whether that made a new model."""
        run = self._run
        path = run.update_file(started.start, started.client)
        given: Arrays | Path = path
        if run.liars is not None:
            own = {started.client: run.treatment.decoded(started.client, path, run.update)}
            given = run.liars.forged(started.start, own).get(started.client, path)
        staleness = self._version - started.version
        try:
            stepped = self._server.add(
                started.client, given, done.weight, done.metrics, staleness=staleness
            )
        except BadUpdate as error:
            raise RunFailed(f"round {self._version + 1}: {error}") from error
        path.unlink()
        run.listener.done(1)
        self._since.append(done)
        if not stepped:
            return False
        made = self._server.finish()
        run.model, run.state = made.model, made.state
        self._version += 1
        run.turn = self._version
        self._server = self._new_server()
        self._publish()
        run.ended(self._version, self._since, self._asked, made.metrics)
        self._since, self._asked = [], 0
        return True

    def _new_server(self) -> ServerVersion:
        run = self._run
        return ServerVersion(
            run.algorithm, run.treatment, run.model, run.state, population=run.plan.clients
        )

    def _publish(self) -> None:
        """The newest model into the first place that nobody needs any more."""
        needed = {s.version for s in self._working}
        self._slots = {v: slot for v, slot in self._slots.items() if v in needed}
        taken = set(self._slots.values())
        slot = next(n for n in range(len(taken) + 1) if n not in taken)
        self._slots[self._version] = slot
        self._run.publish(slot)
