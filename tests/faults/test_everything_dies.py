# SPDX-License-Identifier: Apache-2.0
"""Fault row L: tasks under random SIGKILL of everything of ours: broker, agents, shims, guards.

Each task is one effect at the broker: one final state, reported in one transaction, with one log.
"""

import contextlib
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.place import Place


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with Place(tmp_path) as place:
        for name in ("one", "two", "three"):
            place.agent(name, policy="[tasks]\nat_once = 6\n")
        yield place


class _Reaper:
    """Kills something at random, and starts what does not come back by itself."""

    def __init__(self, place: Place, seed: int) -> None:
        self.killed: dict[str, int] = {}
        self._next: list[str] = []
        self._place = place
        self._random = random.Random(seed)

    def strike(self) -> None:
        """One kill."""
        if not self._next:
            self._next = ["broker", "agent", "agent", "shim", "shim", "shim"]
            self._random.shuffle(self._next)
        what = self._next.pop()
        if what == "broker":
            self._place.broker.kill()
            self._place.start_broker()
        elif what == "agent":
            agent = self._random.choice(list(self._place.agents.values()))
            agent.kill()
            agent.start()
        else:
            ours = [p for p in psutil.process_iter() if self._place.is_ours(p)]
            victims = [p for p in ours if self._is_shim(p)]
            if not victims:
                return
            with contextlib.suppress(psutil.NoSuchProcess):
                self._random.choice(victims).kill()
        self.killed[what] = self.killed.get(what, 0) + 1

    @staticmethod
    def _is_shim(process: psutil.Process) -> bool:
        """A shim, or the guard that it forks. A command that is killed has ended, and says so."""
        try:
            line = [process, *process.parents()]
            depth = sum(any("shim.py" in w for w in p.cmdline()) for p in line)
            return depth in (1, 2) and any("shim.py" in w for w in process.cmdline())
        except psutil.Error:
            return False


@pytest.mark.parametrize(
    ("tasks", "pause_s"),
    [
        pytest.param(40, 0.5, id="40 tasks", marks=pytest.mark.timeout(120)),
        pytest.param(400, 0.5, id="400 tasks", marks=[pytest.mark.long, pytest.mark.timeout(900)]),
    ],
)
def test_every_task_has_one_effect_whatever_is_killed(
    place: Place, tasks: int, pause_s: float
) -> None:
    done = threading.Event()
    reaper = _Reaper(place, seed=tasks)

    def one(n: int) -> str:
        # A machine that is shot at all the time may lose one job many times over.
        command = f"echo effect-{n}; sleep 0.3"
        run = place.launch(command, follow=False, retries=1000, name=f"job-{n}")
        place.end(run)
        return run

    def reap() -> None:
        while not done.wait(pause_s):
            reaper.strike()

    with ThreadPoolExecutor(9) as people:
        reaping = people.submit(reap)
        try:
            found = list(people.map(one, range(tasks)))
        finally:
            done.set()
        reaping.result()

    ends = [place.client.call("GET", f"/v1/runs/{run}") for run in found]
    assert len({*found}) == tasks
    assert [e["cause"] for e in ends if e["state"] != "FINISHED"] == []
    assert set(reaper.killed) == {"broker", "agent", "shim"}
    for n, run in enumerate(found):
        (row,) = place.tasks(run)
        # A result does not wait for its log: an agent that was just shot may owe it still.
        while not (text := place.stdout(run, row.epoch)):
            place.wait(0.2)
        assert text == f"effect-{n}\n"
    finals = place.query(
        "SELECT run, count(*) AS n FROM events WHERE kind = 'state'"
        " AND json_extract(data, '$.state') = 'FINISHED' GROUP BY run"
    )
    assert {(f.run, f.n) for f in finals} == {(run, 1) for run in found}
