# SPDX-License-Identifier: Apache-2.0
"""A simulated fleet meets a real broker, does all it is asked, and leaves nothing behind."""

import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from fedml_broker.fleet_simulator import simulation
from fedml_broker.fleet_simulator.desk import TENANT, SimulationFailed
from fedml_broker.fleet_simulator.simulation import Plan, allow_files, own_broker, simulate
from fedml_protocol.keys import Scope, parse_login_key
from tests.place import Place, command

PLAN = Plan(agents=12, heartbeat_s=0.3, tasks_per_second=40.0, duration_s=0.5, task_s=0.1, slots=4)


async def test_every_machine_connects_and_every_task_ends_well() -> None:
    parts: dict[str, float] = {}
    async with own_broker(PLAN.heartbeat_s) as key:
        found = await simulate(
            PLAN, key, lambda part, done, of: parts.update({part: done / of}), clean_up=False
        )
    assert parts == {"enrol": 1.0, "connect": 1.0, "heartbeats": 1.0, "tasks": 1.0}
    assert (found.tasks, found.unfinished, found.refused, found.troubles) == (20, 0, 0, {})
    assert found.beats_per_s > 0.5 * PLAN.agents / PLAN.heartbeat_s
    assert found.accept_p50_ms is not None
    assert found.accept_max_ms is not None
    assert 0 < found.accept_p50_ms <= found.accept_max_ms
    assert found.rss_mb >= found.rss_idle_mb > 10


async def test_at_a_running_broker_it_keeps_to_itself_and_cleans_up(tmp_path: Path) -> None:
    seen: list[list[str]] = []
    with Place(tmp_path, heartbeat_s=0.3) as place:
        key = (place.home / "broker" / "admin.key").read_text()

        def told(part: str, done: float, of: float) -> None:
            if part == "tasks" and done == of:
                seen.append(
                    [row["name"] for row in place.client.call("GET", "/v1/devices")["devices"]]
                )

        found = await simulate(PLAN, parse_login_key(key, Scope.USER), told, clean_up=True)

        assert (found.tasks, found.unfinished) == (20, 0)
        assert seen == [[]], "the machines of others are not seen"
        for table in ("devices", "runs", "tasks", "events"):
            assert place.query(f"SELECT count(*) FROM {table}")[0][0] == 0, table
        assert place.query("SELECT name FROM users WHERE tenant = :t", t=TENANT) == [(TENANT,)]


def test_ctrl_c_leaves_neither_processes_nor_files(tmp_path: Path) -> None:
    words = ["simulate-fleet", "--agents=5", "--heartbeat=30"]
    with subprocess.Popen(
        command("fedml_broker", *words),
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("connect"):
                break
        assert any(tmp_path.iterdir())
        children = psutil.Process(process.pid).children(recursive=True)
        assert children, "its broker runs"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    assert not any(child.is_running() for child in children)
    assert not any(tmp_path.iterdir())


def test_too_low_a_limit_of_open_files_is_said_before_anything_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(simulation.resource, "getrlimit", lambda _: (256, 1024))
    with pytest.raises(SimulationFailed, match=r"5000 open files are needed.* 1024") as failed:
        allow_files(5000)
    assert "ulimit -Hn 5000" in failed.value.hint


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--broker", "https://localhost:8443"], "not a user's key: one starts with fedml1u_"),
        (["--agents", "0"], "at least one machine"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_do(words: list[str], said: str) -> None:
    done = subprocess.run(
        command("fedml_broker", "simulate-fleet", *words), capture_output=True, text=True
    )
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
