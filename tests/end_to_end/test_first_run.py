# SPDX-License-Identifier: Apache-2.0
"""From a login key to a finished job and a trained model: real processes, TLS, loopback.

Everything here holds on the broker's own MQTT endpoint and on Mosquitto alike.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.place import Place


@pytest.fixture(params=["embedded", "mosquitto"])
def place(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Place]:
    with Place(tmp_path, mosquitto=request.param == "mosquitto") as place:
        for name in ("one", "two"):
            place.agent(name)
        yield place


def test_a_job_runs_on_a_machine_and_its_log_and_exit_code_come_back(place: Place) -> None:
    hidden = place.agents["one"].home / "agent" / "private" / "device.key"
    command = f"echo to-out; echo to-err >&2; test -r {hidden} && echo LEAKED; exit 3"
    run = place.launch(command)

    items = list(place.follow(run))

    text = {
        stream: "".join(i["log"]["text"] for i in items if i.get("log", {}).get("stream") == stream)
        for stream in ("stdout", "stderr")
    }
    assert text == {"stdout": "to-out\n", "stderr": "to-err\n"}
    end = items[-1]["end"]
    assert (end["state"], end["exit_code"]) == ("FAILED", 3)


def test_the_same_seed_trains_the_same_model_twice(place: Place) -> None:
    models, losses = [], []
    for _ in range(2):
        run = place.federate(rounds=3)
        place.finishes(run)
        rounds = place.client.call("GET", f"/v1/runs/{run}")["rounds"]
        models.append(rounds[3]["model"]["sha256"])
        losses.append([r["metrics"]["devices.loss"] for r in rounds[:4]])

    assert models[0] == models[1]
    assert losses[0][3] < 0.9 * losses[0][0]


def test_a_run_is_stopped_by_whom_it_says_and_nothing_stays_behind(place: Place) -> None:
    job = place.launch("echo begun; sleep 600")
    place.until(job, lambda item: "begun" in item.get("log", {}).get("text", ""), logs=True)
    training = place.federate(rounds=1000, config={"train_s": 0.1})
    place.until(training, lambda item: item.get("event", {}).get("kind") == "round_ends")
    for run in (job, training):
        place.client.call("POST", f"/v1/runs/{run}/stop")
        end = place.end(run)
        assert (end["state"], end["stopped_by"]) == ("STOPPED", "admin")
        assert "stopped" in end["cause"]["message"]
    # The machines are free again: a job that needs all of them runs.
    place.finishes(place.launch("true"))
    for agent in place.agents.values():
        agent.stop()
    place.broker.stop()
    assert [line for line in place.left_running() if "mosquitto" not in line] == []


def test_a_machine_that_is_revoked_is_shut_out_at_once(place: Place) -> None:
    place.finishes(place.launch("true"))
    place.client.call("POST", "/v1/devices/one/revoke")
    run = place.federate(rounds=1, clients={"count": 1})
    place.finishes(run)
    (row,) = {r.device for r in place.tasks(run)}
    assert row == place.agents["two"].device
