# SPDX-License-Identifier: Apache-2.0
"""Fault rows E, F and G: an agent is killed, restarted, or frozen past its lease."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fedml_protocol.tasks import TaskState
from tests.place import APP, Agent, Place, began_round

CONFIG = {"train_s": 0.4}


@pytest.fixture(params=["embedded", "mosquitto"])
def place(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Place]:
    with Place(tmp_path, mosquitto=request.param == "mosquitto") as place:
        for name in ("one", "two"):
            place.agent(name, label=f"machine={name}")
        yield place


def _expected(place: Place, rounds: int) -> str:
    run = place.federate(rounds=rounds)
    place.finishes(run)
    return place.model(run)


def _processes(agent: Agent, marker: str) -> list[psutil.Process]:
    """Processes of one agent's tasks whose command line has the marker."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            if process.cwd().startswith(str(agent.home)) and any(marker in w for w in words):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_stage_that_ends_while_its_agent_is_dead_counts_once(place: Place) -> None:
    """Fault E: the worker goes on without the agent, and is asked for its answer later."""
    expected = _expected(place, 3)
    one = place.agents["one"]
    run = place.federate(rounds=3, config=CONFIG)
    place.until(run, lambda item: began_round(item) == 2)
    one.kill()
    one.start()
    place.finishes(run)
    assert place.model(run) == expected
    rows = place.tasks(run)
    assert {r.state for r in rows if r.round <= 3} == {int(TaskState.FINISHED)}
    # Nobody trained twice: the worker of the killed agent was adopted.
    assert {r.epoch for r in rows} == {1}


def test_a_job_outlives_its_agent_and_its_log_and_code_arrive(place: Place) -> None:
    one = place.agents["one"]
    run = place.launch("echo before; sleep 1; echo after; exit 5", labels={"machine": "one"})
    place.until(run, lambda item: "before" in item.get("log", {}).get("text", ""), logs=True)
    one.kill()
    one.start()
    end = place.end(run)
    assert (end["state"], end["exit_code"]) == ("FAILED", 5)
    assert place.stdout(run) == "before\nafter\n"
    assert [r.epoch for r in place.tasks(run)] == [1]


def test_a_restarted_agent_is_the_same_machine_at_once(place: Place) -> None:
    """Fault F: certificate, key and journal are on its disk."""
    one = place.agents["one"]

    def on_one() -> str:
        run = place.launch("echo $FEDML_CURRENT_EDGE_ID", labels={"machine": "one"})
        place.finishes(run)
        return place.stdout(run).strip()

    device, boot = on_one(), one.boot
    for _ in range(3):
        one.kill()
        one.start()
        assert on_one() == device
    assert one.boot == boot + 3
    names = [d["name"] for d in place.client.call("GET", "/v1/devices")["devices"]]
    assert sorted(names) == ["one", "two"]


def test_a_worker_that_is_killed_is_started_again_and_its_stage_too(place: Place) -> None:
    expected = _expected(place, 3)
    one = place.agents["one"]
    run = place.federate(rounds=3, config=CONFIG)
    place.until(run, lambda item: began_round(item) == 2)
    for worker in _processes(one, "fedml.federate.worker"):
        worker.kill()
    place.finishes(run)
    assert place.model(run) == expected


@pytest.mark.parametrize("place", ["embedded"], indirect=True)
def test_a_worker_that_always_dies_ends_its_run_with_how_and_its_last_words(place: Place) -> None:
    dies = (
        "import os, sys\n    print('so be it', file=sys.stderr)\n    os.kill(os.getpid(), 9)\n    "
    )
    run = place.federate(APP.replace("x, y = data", dies + "x, y = data", 1), rounds=2)
    end = place.end(run)
    assert end["state"] == "FAILED"
    message = end["cause"]["message"]
    assert "its worker died 5 times: it was ended by SIGKILL" in message
    assert "so be it" in message


def test_agent_shim_and_worker_killed_together_lose_nothing(place: Place) -> None:
    """What a power cut leaves: the disk."""
    expected = _expected(place, 3)
    one = place.agents["one"]
    run = place.federate(rounds=3, config=CONFIG)
    place.until(run, lambda item: began_round(item) == 2)
    one.kill()
    for process in _processes(one, ""):
        with contextlib.suppress(psutil.NoSuchProcess):  # killed with the one before it
            process.kill()
    one.start()
    place.finishes(run)
    assert place.model(run) == expected


def test_the_late_result_of_a_frozen_agent_is_refused_and_the_offer_made_again(
    place: Place,
) -> None:
    """Fault G, a stage: it is bound to its machine, which must train it anew."""
    expected = _expected(place, 2)
    one = place.agents["one"]
    run = place.federate(rounds=2, config={"train_s": 1.0})
    place.until(run, lambda item: began_round(item) == 1)
    one.freeze()
    # Past the lease the broker takes the task back, and says whom it waits for.
    place.until(run, lambda item: "one (offline)" in item.get("waiting", ""))
    place.wait(4)
    one.wake()
    place.finishes(run)
    assert place.model(run) == expected
    rows = {(r.round, r.device): r for r in place.tasks(run)}
    assert rows[1, one.device].epoch > 1
    assert rows[1, one.device].state == TaskState.FINISHED


def test_a_job_of_a_frozen_agent_goes_elsewhere_and_counts_once(place: Place) -> None:
    """Fault G, a job: another machine takes it; the first one's end is not counted."""
    run = place.launch("echo ran-on $FEDML_CURRENT_EDGE_ID; sleep 1.5; echo end")
    began = place.until(run, lambda item: item.get("event", {}).get("kind") == "started")
    first = next(a for a in place.agents.values() if a.device == began["event"]["data"]["device"])
    other = next(a for a in place.agents.values() if a is not first)
    first.freeze()
    place.finishes(run)
    first.wake()
    # Its own end, reported late, changes nothing; and it forgets the task.
    again = place.launch("echo and it works again")
    place.finishes(again)
    (row,) = place.tasks(run)
    assert (row.epoch, row.device) == (2, other.device)
    ends = place.query("SELECT data FROM events WHERE run = :r AND kind = 'state'", r=run)
    states = [json.loads(e.data)["state"] for e in ends]
    assert states == ["QUEUED", "RUNNING", "FINISHED"]
