# SPDX-License-Identifier: Apache-2.0
"""Jobs that behave badly on a real machine: a clear cause, nothing lost, nothing left running."""

import json
import os
import subprocess
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from tests.end_to_end.test_owner import machine
from tests.fakes import nvml
from tests.place import Place

GPUS = {"driver": "550.54.15", "cuda": 12040, "gpus": [{"uuid": "GPU-1"}, {"uuid": "GPU-2"}]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("place")
    (folder / "gpus").write_text(json.dumps(GPUS))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in nvml.environment(folder / "gpus").items():
            patch.setenv(name, value)
        with Place(folder) as place:
            machine(place, "one")
            machine(place, "other", "resources.gpus = []\n")
            machine(place, "stern", "resources.end_trespassers = true\n")
            yield place


def computing(place: Place, run: str, gpu: str) -> None:
    """A process of this run's job computes on a GPU, says the driver from now on."""
    [task] = place.tasks(run)
    agent = next(one for one in place.agents.values() if one.device == task.device)
    taskdir = agent.home / "agent" / "tasks" / f"{task.id}.{task.epoch}"
    pid = json.loads((taskdir / "shim.json").read_text())["task"]["pid"]
    told: dict[str, Any] = {**GPUS}
    told["gpus"] = [{"uuid": "GPU-1"}, {"uuid": "GPU-2"}]
    next(one for one in told["gpus"] if one["uuid"] == gpu)["processes"] = [[pid, 5]]
    temporary = place.folder / "gpus.new"
    temporary.write_text(json.dumps(told))
    temporary.replace(place.folder / "gpus")


def up(place: Place, command: str, **more: Any) -> str:
    """A job that runs."""
    run = place.launch(f"echo up; {command}", **more)
    place.until(run, lambda item: "up" in item.get("log", {}).get("text", ""), logs=True)
    return run


def test_a_job_on_a_gpu_that_it_does_not_hold_is_named_and_ended_if_its_owner_wants_that(
    place: Place,
) -> None:
    run = up(place, "sleep 100", labels={"who": "one"}, needs={"gpus": 1})
    computing(place, run, "GPU-2")
    found = place.until(run, lambda item: item.get("event", {}).get("kind") == "noted")
    assert found["event"]["data"]["text"] == "computes on GPU-2, which it does not hold"
    place.client.call("POST", f"/v1/runs/{run}/stop")
    assert place.end(run)["state"] == "STOPPED"

    run = up(place, "sleep 100", labels={"who": "stern"}, needs={"gpus": 1})
    computing(place, run, "GPU-2")
    end = place.end(run)
    assert (end["state"], end["cause"]["fault"]) == ("FAILED", "policy")
    assert "resources.end_trespassers" in end["cause"]["message"]


def test_a_flood_of_output_is_kept_in_bounds_and_the_job_goes_on(place: Place) -> None:
    flood = "head -c 100000000 /dev/zero | tr '\\0' x | fold -w 99; echo the end"
    run = place.launch(flood, labels={"who": "other"}, follow=False)
    end = place.finishes(run)
    kept = place.agents["other"].home / "agent"
    sizes = [path.stat().st_size for path in kept.rglob("out.*")]
    assert sum(sizes) <= 64 << 20
    assert end["exit_code"] == 0


def test_a_fork_bomb_ends_with_its_time_and_leaves_nothing(place: Place) -> None:
    bomb = "b() { b | b & }; b; sleep 100"
    run = place.launch(bomb, labels={"who": "other"}, deadline_s=1.0, grace_s=0.2)
    end = place.end(run)
    assert "it ran longer than its 1 s and was ended" in end["cause"]["message"]
    home = str(place.agents["other"].home / "agent" / "tasks")
    # Its shim, which has told of the end, may still be on its way out.
    while any((one.info["cwd"] or "").startswith(home) for one in psutil.process_iter(["cwd"])):
        place.wait(0.1)


def test_a_job_that_ignores_term_is_killed_after_its_grace(place: Place) -> None:
    deaf = "trap '' TERM; while true; do sleep 0.1; done"
    run = up(place, deaf, labels={"who": "other"}, grace_s=0.2)
    place.client.call("POST", f"/v1/runs/{run}/stop")
    assert place.end(run)["state"] == "STOPPED"


def test_the_signal_that_ended_a_job_is_named(place: Place) -> None:
    end = place.end(place.launch("kill -SEGV $$", labels={"who": "other"}))
    assert end["cause"]["message"] == "it was ended by SIGSEGV"
    end = place.end(place.launch("sh -c 'kill -ABRT $$'; exit $?", labels={"who": "other"}))
    assert "exit code 134 (a program in it was ended by SIGABRT)" in end["cause"]["message"]


def test_a_machine_that_vanishes_in_mid_job_is_named_and_the_job_is_lost(place: Place) -> None:
    agent = machine(place, "fleeting")
    run = up(place, "sleep 100", labels={"who": "fleeting"}, retries=0)
    agent.freeze()
    end = place.end(run)
    assert (end["state"], end["cause"]["fault"]) == ("LOST", "machine")
    assert end["cause"]["message"] == "fleeting was not heard of for 3 s"
    agent.wake()
    place.finishes(place.launch("true", labels={"who": "fleeting"}))
    tasks = str(agent.home / "agent" / "tasks")
    while [one for one in place.left_running() if tasks in one]:  # what was lost is ended
        place.wait(0.1)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a small disk")
def test_a_job_that_fills_the_disk_is_ended_and_its_neighbour_goes_on(
    place: Place,
) -> None:
    (place.folder / "small").mkdir()
    small = str(place.folder / "small")
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=90m", "tmpfs", small], check=False)
    if made.returncode:
        pytest.skip("this root cannot mount a file system")
    try:
        policy = "resources.disk_reserve = '24MB'\nresources.gpus = []\n"
        agent = machine(place, "small", policy)
        neighbour = up(place, "while [ ! -e go ]; do sleep 0.1; done", labels={"who": "small"})
        one = place.launch("head -c 200000000 /dev/zero > file", labels={"who": "small"})
        cause = place.end(one)["cause"]
        assert cause["fault"] == "task"
        # By the limit of one file; or, on a busy machine, by the next look at the disk.
        too_large = "ended by SIGXFSZ); it wrote a file of more than the 0.08"
        assert too_large in cause["message"] or "its files grew to 0.08" in cause["message"]
        many = "for i in 1 2 3 4 5 6 7 8; do head -c 10400000 /dev/zero > $i; done; sleep 100"
        cause = place.end(place.launch(many, labels={"who": "small"}))["cause"]
        assert (cause["fault"], "computing.disk" in cause["hint"]) == ("task", True)
        assert "its files grew to 0.0" in cause["message"]
        assert "the machine's disk ran low" in cause["message"]
        (agent.home / "agent" / "tasks" / f"{neighbour}-t.1" / "work" / "go").touch()
        place.finishes(neighbour)
        place.finishes(place.launch("echo room again", labels={"who": "small"}))
    finally:
        place.agents.pop("small").kill()
        for process in psutil.process_iter():
            if any(small in word for word in _words(process)):
                process.kill()
        subprocess.run(["umount", "--lazy", small], check=True)


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
