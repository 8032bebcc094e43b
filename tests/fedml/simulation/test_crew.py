# SPDX-License-Identifier: Apache-2.0
"""Worker processes: who gets which clients, and what happens when user code or a process fails."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedml.errors import RunFailed
from fedml.simulation import ClientFailed, Listener, Simulation, simulate
from fedml.simulation.arena import Arena
from fedml.simulation.crew import divide
from fedml.simulation.plan import read
from tests.fedml.simulation import apps

# A linear model whose client 2 does something else, as `config` says.
ODD = (
    apps.LINEAR
    + """
import os, pathlib, signal, time
sgd = LocalSGD(batch_size=5)

def train(model, data, config, rng):
    here = pathlib.Path(__file__).parent
    odd = len(data[0]) == 17        # client 2
    if odd and config.get("raises"):
        raise RuntimeError("the dog ate the gradient")
    if odd and config.get("nan"):
        model["w"][0, 0] = np.nan
    if odd and config.get("shape"):
        model["w"] = model["w"][:2]
    if odd and config.get("dies"):
        deaths = here / "deaths"
        with deaths.open("a") as file:
            file.write(f"{os.getpid()}\\n")
        if len(deaths.read_text().split()) <= config["dies"]:
            os.kill(os.getpid(), signal.SIGKILL)
    if config.get("slow") and not (here / "hurry").exists():
        (here / f"slow-{os.getpid()}").touch()
        time.sleep(config["slow"])
    return sgd(model, data, config, rng)
"""
)


def plan(folder: Path, **config: Any) -> dict[str, Any]:
    return {
        "app": apps.write(folder, ODD).name,
        "workspace": str(folder),
        "rounds": 2,
        "config": {"lr": 0.1, **config},
        "clients": {"count": 5},
        "evaluate": {"devices": False},
    }


def left_behind() -> list[str]:
    """Folders in shared memory that a simulation which has ended did not remove."""
    left = []
    for folder in Path("/dev/shm").glob("fedml-simulation-*"):
        with suppress(FileNotFoundError), (folder / "lock").open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # of a simulation that runs beside these tests
            left.append(folder.name)
    return left


@given(
    sizes=st.dictionaries(st.integers(0, 50), st.integers(0, 1000), min_size=1),
    unknown=st.sets(st.integers(51, 60)),
    members=st.integers(1, 8),
)
def test_everybody_is_given_to_one_member_and_the_longest_come_first(
    sizes: dict[int, int], unknown: set[int], members: int
) -> None:
    clients = [*sizes, *unknown]
    shares = divide(clients, sizes, members)
    assert sorted(client for share in shares for client in share) == sorted(clients)
    for share in shares:
        known = [sizes[client] for client in share if client in sizes]
        assert known == sorted(known, reverse=True)
    if not unknown:
        # A client counts as one example more than it has.
        loads = [sum(sizes[client] + 1 for client in share) for share in shares]
        assert max(loads) - min(loads) <= max(sizes.values()) + 1
    assert shares == divide(list(reversed(clients)), sizes, members)


def test_a_client_that_raises_is_named_with_round_and_traceback(tmp_path: Path) -> None:
    with pytest.raises(ClientFailed) as failed:
        simulate(plan(tmp_path, raises=True), workers=2)
    error = failed.value
    assert (error.client, error.round) == (2, 1)
    assert "client 2 failed in round 1: RuntimeError: the dog ate the gradient" in str(error)
    assert 'raise RuntimeError("the dog ate the gradient")' in error.traceback
    assert "fedml/simulation" not in error.traceback  # the user's own lines alone
    assert left_behind() == []


def test_a_round_goes_on_without_a_failed_client_where_the_minimum_allows_it(
    tmp_path: Path,
) -> None:
    asked = plan(tmp_path, raises=True)
    asked["clients"]["minimum"] = 4
    assert [row["answered"] for row in simulate(asked, workers=1).history] == [0, 4, 4]


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"nan": True}, "client 2 failed in round 1: tensor 'w' holds NaN; training diverged"),
        ({"shape": True}, "client 2 failed in round 1"),
    ],
)
def test_a_bad_update_is_refused_and_its_client_named(
    config: dict[str, Any], text: str, tmp_path: Path
) -> None:
    with pytest.raises(ClientFailed) as failed:
        simulate(plan(tmp_path, **config), debug=True)
    assert text in str(failed.value)
    assert failed.value.client == 2


def test_a_killed_worker_is_replaced_and_its_clients_are_run_again(tmp_path: Path) -> None:
    calm = simulate(plan(tmp_path / "calm"), workers=2)
    heard: list[str] = []

    class Ears(Listener):
        def say(self, text: str) -> None:
            heard.append(text)

    asked = read(plan(tmp_path / "killed", dies=1), workers=2)
    killed = Simulation(asked, listener=Ears()).run()
    said = "round 1: a worker process died (killed by signal 9); its clients are run once more"
    assert heard.count(said) == 1
    assert all(np.array_equal(calm.model[n], killed.model[n]) for n in calm.model)
    assert left_behind() == []


def test_a_worker_that_dies_twice_over_the_same_clients_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"died twice.*killed by signal 9.*at client 2"):
        simulate(plan(tmp_path, dies=9), workers=2)
    assert left_behind() == []


def test_a_file_that_cannot_be_imported_is_the_users_to_read(tmp_path: Path) -> None:
    asked = plan(tmp_path)
    (tmp_path / "app.py").write_text("import there_is_no_such_module\n")
    with pytest.raises(ModuleNotFoundError, match="there_is_no_such_module"):
        simulate(asked, workers=1)
    assert left_behind() == []


def start(folder: Path, *words: str, **config: Any) -> subprocess.Popen[str]:
    """`fedml simulate` in a process of its own."""
    (folder / "run.yaml").write_text(json.dumps(plan(folder, **config)))
    words = ("simulate", "run.yaml", "--out", "out", "--json", *words)
    return subprocess.Popen(
        [sys.executable, "-c", "from fedml.cli import main; main()", *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_simulation_keeps_a_checkpoint_and_nothing_else(
    number: signal.Signals, tmp_path: Path
) -> None:
    run = start(tmp_path, "--rounds", "1000", "--workers", "2", slow=0.05)
    assert run.stdout is not None
    assert json.loads(run.stdout.readline())["round"] == 1
    children = psutil.Process(run.pid).children(recursive=True)
    assert len(children) == 2
    run.send_signal(number)
    _, said = run.communicate(timeout=30)
    assert run.returncode == 130, said
    assert "fedml simulate run.yaml --out out --resume goes on" in said
    assert (tmp_path / "out" / "report.html").exists()
    psutil.wait_procs(children, timeout=10)
    assert not any(child.is_running() for child in children)
    assert left_behind() == []
    # ... and the next one goes on from there.
    (tmp_path / "hurry").touch()
    again = start(tmp_path, "--rounds", "30", "--workers", "2", "--resume", slow=0.05)
    out, said = again.communicate(timeout=60)
    assert again.returncode == 0, said
    assert "going on after round" in said
    first = json.loads(out.splitlines()[0])["round"]
    assert 1 < first <= 31


def test_when_the_simulation_itself_is_killed_no_process_and_no_memory_is_left(
    tmp_path: Path,
) -> None:
    run = start(tmp_path, "--rounds", "1000", "--workers", "2", slow=30)
    psutil_run = psutil.Process(run.pid)
    while len(list(tmp_path.glob("slow-*"))) < 2:
        assert run.poll() is None
        os.sched_yield()
    children = psutil_run.children(recursive=True)
    run.kill()
    run.communicate()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []
    assert left_behind() == []


def test_what_a_killed_simulation_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    code = "import os; from fedml.simulation.arena import Arena; Arena(); os._exit(9)"
    subprocess.run([sys.executable, "-c", code], check=False)
    assert len(left_behind()) == 1
    with Arena() as mine, Arena() as other:
        assert left_behind() == []
        assert mine.folder.exists()
        assert other.folder.exists()
    assert not mine.folder.exists()
    assert not other.folder.exists()
