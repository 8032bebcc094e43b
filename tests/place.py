# SPDX-License-Identifier: Apache-2.0
"""A place to break: a broker and its agents as real processes, each killed, frozen and restarted.

    with Place(tmp_path) as place:
        one = place.agent("one")
        run = place.federate(APP, rounds=5)
        place.until(run, lambda item: ended_round(item) == 2)
        one.kill()                       # SIGKILL; its shims and workers go on
        one.start()
        assert place.end(run)["state"] == "FINISHED"

Everything lives below the folder, ports are chosen by the system, and what is left running there
(shims outlive agents) is killed at the end. With `mosquitto=True` the messages go through a private
Mosquitto instead of the broker's own endpoint.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import psutil
import pytest
import sqlalchemy as sa

from fedml import session
from fedml.client import Client
from fedml.parts import send
from fedml_broker.identity import Identity
from fedml_broker.mqtt.mosquitto import Mosquitto

# One step of gradient descent a stage, on data made from the client's number: the final model is
# known to the bit whatever happens on the way.
APP = """
import time
import numpy as np

def model(config):
    return {"w": np.zeros(64), "seen": np.zeros(1)}

def data(client, config):
    rng = np.random.default_rng(client.index)
    x = rng.normal(size=(40, 64))
    return x, x @ np.linspace(-1, 1, 64)

def train(model, data, config, rng):
    x, y = data
    model["w"] -= 0.1 * x.T @ (x @ model["w"] - y) / len(x)
    model["seen"] += 1
    time.sleep(config.get("train_s", 0.0))
    return {"examples": len(x)}

def evaluate(model, data, config):
    x, y = data
    return {"loss": float(np.mean((x @ model["w"] - y) ** 2)), "examples": len(x)}
"""


def command(package: str, *words: str) -> list[str]:
    """One of our commands, run by this Python."""
    return [sys.executable, "-c", f"from {package}.cli import main; main()", *words]


class Process:
    """One process that may die and come back."""

    def __init__(self, words: list[str], home: Path, log: Path) -> None:
        self.home = home
        self.log = log
        self._words = words
        self._process: subprocess.Popen[str] | None = None

    @property
    def pid(self) -> int:
        """Of the present incarnation."""
        assert self._process is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> dict[str, Any]:
        """Start it (again); what it says on its first line, if that is JSON."""
        assert not self.alive
        with self.log.open("a") as log:
            self._process = subprocess.Popen(
                self._words,
                env={**os.environ, "FEDML_HOME": str(self.home)},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        return {}

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """SIGTERM, and wait; the exit code."""
        return self._end(signal.SIGTERM)

    def freeze(self) -> None:
        """SIGSTOP."""
        os.kill(self.pid, signal.SIGSTOP)

    def wake(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def _end(self, number: signal.Signals) -> int:
        process, self._process = self._process, None
        if process is None:
            return 0
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        try:
            code = process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait(10)
        if process.stdout is not None:
            process.stdout.close()
        return code

    def read_line(self) -> dict[str, Any]:
        """The next line of its output, which is JSON."""
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"it ended before it said anything:\n{self.log.read_text()[-3000:]}"
        said: dict[str, Any] = json.loads(line)
        return said


class Agent(Process):
    """One machine."""

    def __init__(self, name: str, home: Path, log: Path) -> None:
        super().__init__(command("fedml_agent", "run"), home, log)
        self.name = name

    @property
    def device(self) -> str:
        """Its id at the broker."""
        membership = json.loads((self.home / "agent/private/membership.json").read_text())
        return str(membership["device"])

    @property
    def boot(self) -> int:
        """How often it was started."""
        return int((self.home / "agent/private/boot").read_text())


class Place:
    """A broker with its agents; see the module."""

    def __init__(
        self,
        folder: Path,
        *,
        mosquitto: bool = False,
        heartbeat_s: float = 0.5,
        lease_s: float = 3.0,
        more: Sequence[str] = (),
    ) -> None:
        """
        Args:
            more: Further options of `fedml-broker up`.
        """
        self.folder = folder
        self.home = folder / "broker-home"
        self.agents: dict[str, Agent] = {}
        self.client: Client
        self.login_key = ""
        self._mosquitto = _PrivateMosquitto(folder, self.home) if mosquitto else None
        words = ["up", "--https-port=0", "--mqtt-port=0", "--json"]
        words += [f"--heartbeat={heartbeat_s}", f"--lease={lease_s}"]
        if self._mosquitto is not None:
            words.append(f"--mqtt=mqtts://localhost:{self._mosquitto.port}")
        self.broker = Process(
            command("fedml_broker", *words, *more), self.home, folder / "broker.log"
        )

    # ------------------------------------------------------------------ life

    def __enter__(self) -> Self:
        if self._mosquitto is not None:
            self._mosquitto.start()
        self.login_key = self.start_broker()["login_key"]
        token = (self.home / "broker" / "admin.key").read_text()
        self.client = Client(session.login(self.folder / "me", token))
        return self

    def __exit__(self, *exc: object) -> None:
        for process in (*self.agents.values(), self.broker):
            process.kill()
        if self._mosquitto is not None:
            self._mosquitto.kill()
        left = [p for p in psutil.process_iter() if self.is_ours(p)]
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended by itself
                process.kill()
        psutil.wait_procs(left, timeout=10)

    def is_ours(self, process: psutil.Process) -> bool:
        """Shims, guards and tasks run in directories below the folder."""
        try:
            return process.cwd().startswith(str(self.folder)) or any(
                str(self.folder) in word for word in process.cmdline()
            )
        except psutil.Error:
            return False

    def left_running(self) -> list[str]:
        """Command lines of everything that runs here."""
        found = []
        for process in psutil.process_iter():
            if self.is_ours(process):
                found.append(" ".join(process.cmdline()))
        return found

    def start_broker(self) -> dict[str, Any]:
        """Start the broker (again); returns when it serves."""
        self.broker.start()
        return self.broker.read_line()

    def replace_mqtt(self, *, while_away: Callable[[], None] = lambda: None) -> None:
        """The MQTT broker dies and comes back with an empty memory."""
        if self._mosquitto is not None:
            self._mosquitto.kill()
            self._mosquitto.forget()
            while_away()
            self._mosquitto.start()
            return
        self.broker.kill()
        for file in (self.home / "broker").glob("mqtt.db*"):
            file.unlink()
        while_away()
        self.start_broker()

    @property
    def mosquitto(self) -> bool:
        """Whether messages go through Mosquitto."""
        return self._mosquitto is not None

    def wait(self, seconds: float) -> None:
        """Let time pass: for faults that are a length of time, and for nothing else."""
        threading.Event().wait(seconds)

    def agent(self, name: str, *, policy: str = "", label: str = "", run: bool = True) -> Agent:
        """A machine that has joined and runs. `label`: NAME=VALUE."""
        home = self.folder / name
        (home / "agent").mkdir(parents=True, mode=0o700)
        if policy:
            (home / "agent" / "policy.toml").write_text(policy)
        agent = Agent(name, home, self.folder / f"{name}.log")
        login = ["login", self.login_key, "--name", name, *(["--label", label] if label else [])]
        subprocess.run(
            command("fedml_agent", *login),
            env={**os.environ, "FEDML_HOME": str(home)},
            check=True,
            capture_output=True,
        )
        self.agents[name] = agent
        if run:
            agent.start()
        return agent

    # ------------------------------------------------------------------ runs

    def launch(self, text: str, **more: Any) -> str:
        """Submit a job; the run."""
        return self.client.submit("launch", {"command": text, **more})

    def federate(self, app: str = APP, **more: Any) -> str:
        """Submit a federated run of all agents; the run."""
        folder = self.folder / "app"
        folder.mkdir(exist_ok=True)
        (folder / "app.py").write_text(app)
        request = {
            "app": "app.py",
            "package": send(self.client, folder, cache=self.folder / "cache"),
            "clients": {"count": len(self.agents)},
            "rounds": 5,
            "seed": 7,
            **more,
        }
        if isinstance(request.get("config"), dict):
            request["config"] = json.dumps(request["config"])
        return self.client.submit("federate", request)

    def until(
        self, run: str, wanted: Callable[[dict[str, Any]], object], *, logs: bool = False
    ) -> dict[str, Any]:
        """Follow a run until an item fits; that item."""
        for item in self.client.follow(run, logs=logs):
            if wanted(item):
                return item
        raise AssertionError(f"{run} ended before that")

    def follow(self, run: str) -> Iterator[dict[str, Any]]:
        """Everything of a run as it happens."""
        return self.client.follow(run)

    def end(self, run: str) -> dict[str, Any]:
        """Wait for the end of a run; the run."""
        end: dict[str, Any] = self.until(run, lambda item: "end" in item)["end"]
        return end

    def finishes(self, run: str) -> dict[str, Any]:
        """Wait for the end of a run, which must be a good one; the run."""
        end = self.end(run)
        assert end["state"] == "FINISHED", end["cause"]
        return end

    def stdout(self, run: str, epoch: int | None = None) -> str:
        """What a run's tasks have printed; of all attempts, or of one."""
        logs = [item["log"] for item in self.client.follow(run) if "log" in item]
        return "".join(
            log["text"]
            for log in logs
            if log["stream"] == "stdout" and epoch in (None, log["epoch"])
        )

    def model(self, run: str) -> str:
        """The hash of a federated run's last model."""
        rounds = self.client.call("GET", f"/v1/runs/{run}")["rounds"]
        return str([r for r in rounds if r["model"]][-1]["model"]["sha256"])

    def tasks(self, run: str) -> Sequence[Any]:
        """The rows of a run's tasks, out of the broker's store."""
        return self.query(
            "SELECT id, state, epoch, device, round, client FROM tasks WHERE run = :run", run=run
        )

    def query(self, text: str, **values: Any) -> Sequence[Any]:
        """Rows of the broker's store."""
        engine = sa.create_engine(f"sqlite:///{self.home}/broker/broker.db")
        try:
            with engine.connect() as tx:
                return tx.execute(sa.text(text), values).all()
        finally:
            engine.dispose()


def ended_round(item: dict[str, Any]) -> int | None:
    """The number of the round that an item of a follow stream ends."""
    event = item.get("event", {})
    return event["data"]["round"] if event.get("kind") == "round_ends" else None


def began_round(item: dict[str, Any]) -> int | None:
    """The number of the round that an item of a follow stream begins."""
    event = item.get("event", {})
    return event["data"]["round"] if event.get("kind") == "round_begins" else None


class _PrivateMosquitto:
    """A Mosquitto of this place, with the certificates of its broker."""

    def __init__(self, folder: Path, broker_home: Path) -> None:
        self._program = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")
        if self._program is None:
            pytest.skip("Mosquitto is not installed")
        self._folder = folder / "mosquitto"
        identity = Identity.open(broker_home / "broker" / "identity", names=["localhost"])
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        certificate, key = identity.server_files
        self._config = Mosquitto(
            port=self.port, ca_file=identity.ca_file, cert_file=certificate, key_file=key
        ).write(self._folder)
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start it, and return once it listens."""
        assert self._program is not None
        self._process = subprocess.Popen(
            [self._program, "-c", str(self._config)], stderr=subprocess.PIPE, text=True
        )
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if " running" in line:
                break
        else:
            raise AssertionError("Mosquitto did not start")
        # Nobody reads on: without a reader its next line would end it.
        self._drain = subprocess.Popen(["cat"], stdin=self._process.stderr, stdout=-3)

    def kill(self) -> None:
        """SIGKILL: whatever it had not saved is gone."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        assert self._process.stderr is not None
        self._process.stderr.close()
        self._drain.wait()
        self._process = None

    def forget(self) -> None:
        """Sessions, queues and retained messages, gone."""
        (self._folder / "mosquitto.db").unlink(missing_ok=True)
