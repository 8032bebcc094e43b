# SPDX-License-Identifier: Apache-2.0
"""From a login key to a finished job and a trained model: real processes, TLS, loopback."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedml import session
from fedml.client import Client
from fedml.package import build

APP = """
import numpy as np

def model(config):
    return {"w": np.zeros(4)}

def data(client, config):
    rng = np.random.default_rng(client.index)
    x = rng.normal(size=(50, 4))
    return x, x @ np.array([1.0, -2.0, 3.0, 0.5])

def train(model, data, config, rng):
    x, y = data
    for _ in range(config["epochs"]):
        model["w"] -= config["lr"] * x.T @ (x @ model["w"] - y) / len(x)
    return {"examples": len(x)}

def evaluate(model, data, config):
    x, y = data
    return {"loss": float(np.mean((x @ model["w"] - y) ** 2)), "examples": len(x)}
"""


def _command(package: str, *words: str) -> list[str]:
    return [sys.executable, "-c", f"from {package}.cli import main; main()", *words]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[tuple[Client, Path]]:
    """A broker and two agents in homes of their own; gone with the test."""
    running: list[subprocess.Popen[str]] = []
    env = {**os.environ, "FEDML_HOME": str(tmp_path / "broker-home")}
    words = ("up", "--https-port", "0", "--mqtt-port", "0", "--heartbeat", "1", "--json")
    with (tmp_path / "broker.log").open("w") as log:
        broker = subprocess.Popen(
            _command("fedml_broker", *words), env=env, stdout=subprocess.PIPE, stderr=log, text=True
        )
        running.append(broker)
        assert broker.stdout is not None
        told = json.loads(broker.stdout.readline())
        key = Path(told["admin_key_file"]).read_text()
        client = Client(session.login(tmp_path / "me", key))
        for name in ("one", "two"):
            mine = {**os.environ, "FEDML_HOME": str(tmp_path / name)}
            login = _command("fedml_agent", "login", told["login_key"], "--name", name)
            subprocess.run(login, env=mine, check=True, capture_output=True)
            agent = subprocess.Popen(_command("fedml_agent", "run"), env=mine, stderr=log)
            running.append(agent)
        try:
            yield client, tmp_path
        finally:
            for process in reversed(running):
                process.terminate()
            for process in running:
                process.wait(20)
                if process.stdout is not None:
                    process.stdout.close()


def _follow(client: Client, run: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    items = list(client.follow(run))
    return items, items[-1]["end"]


def test_a_job_runs_on_a_machine_and_its_log_and_exit_code_come_back(
    place: tuple[Client, Path],
) -> None:
    client, folder = place
    hidden = folder / "one" / "agent" / "private" / "device.key"
    command = f"echo to-out; echo to-err >&2; test -r {hidden} && echo LEAKED; exit 3"
    run = client.call("POST", "/v1/launch", {"command": command})["run"]

    items, end = _follow(client, run)

    text = {
        stream: "".join(i["log"]["text"] for i in items if i.get("log", {}).get("stream") == stream)
        for stream in ("stdout", "stderr")
    }
    assert text == {"stdout": "to-out\n", "stderr": "to-err\n"}
    assert (end["state"], end["exit_code"]) == ("FAILED", 3)


def test_the_same_seed_trains_the_same_model_twice(place: tuple[Client, Path]) -> None:
    client, folder = place
    (folder / "app").mkdir()
    (folder / "app" / "app.py").write_text(APP)
    build(folder / "app", folder / "app.tar.gz")
    request = {
        "app": "app.py",
        "package": client.upload(folder / "app.tar.gz"),
        "clients": {"count": 2},
        "rounds": 3,
        "seed": 7,
        "config": json.dumps({"lr": 0.3, "epochs": 5}),
    }
    models, losses = [], []
    for _ in range(2):
        run = client.call("POST", "/v1/federate", request)["run"]
        _, end = _follow(client, run)
        assert end["state"] == "FINISHED", end["cause"]
        rounds = client.call("GET", f"/v1/runs/{run}")["rounds"]
        models.append(rounds[3]["model"]["sha256"])
        losses.append([r["metrics"]["devices.loss"] for r in rounds[:4]])

    assert models[0] == models[1]
    assert losses[0][3] < 0.05 * losses[0][0]
