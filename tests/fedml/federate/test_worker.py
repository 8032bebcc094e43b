# SPDX-License-Identifier: Apache-2.0
"""The warm worker as the agent sees it: a real process and its socket."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fedml_protocol.blob import Blob
from fedml_protocol.codec import parse
from fedml_protocol.federate import (
    StageCancel,
    StageDone,
    StageKind,
    StageOrder,
    StageSpec,
    WorkerFrame,
    WorkerReady,
)
from fedml_protocol.frames import HEAD_BYTES, frame, frame_length

APP = """
import time
from pathlib import Path
import numpy as np

def model(config):
    return {"w": np.zeros(3)}

def data(client, config):
    Path("loaded").open("a").write(f"{client.index} of {client.count}\\n")
    return np.ones(5)

def train(model, data, config, rng):
    Path("trained").open("a").write("x")
    if config.get("hang"):
        open("gate", "w").close()  # waits until the test reads
        try:
            time.sleep(3600)
        except Exception:
            pass
    for _ in range(config.get("epochs", 0)):
        Path("epochs").open("a").write("x")
        time.sleep(0.02)
    if config.get("raise"):
        raise KeyError("my own mistake")
    model["w"] += 1.0
    return {"examples": len(data), "loss": 0.5}

def evaluate(model, data, config):
    return {"sum": float(model["w"].sum())}
"""


class Warm:
    """One worker and the connections to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "package").mkdir()
        (folder / "package" / "app.py").write_text(APP)
        save_file({"w": np.zeros(3)}, folder / "model.safetensors")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fedml.federate.worker", "r-1"],
            cwd=folder,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        assert "is ready" in self.process.stderr.readline()

    def connect(self) -> "Agent":
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(30)
        connection.connect(str(self.folder / "worker.sock"))
        agent = Agent(connection)
        assert agent.hear() == WorkerReady(session="r-1")
        return agent

    def order(self, number: int = 1, config: str = "{}", **more: object) -> StageOrder:
        out = self.folder / f"out-{number}"
        out.mkdir(exist_ok=True)
        spec = StageSpec(
            session="r-1",
            kind=StageKind.TRAIN,
            round=number,
            client=0,
            clients=2,
            seed=3,
            app="app.py",
            config=config,
            algorithm="fedavg",
            algorithm_config="{}",
            model=Blob(sha256="0" * 64, size=1),
        )
        return StageOrder(
            task=f"r-1-{number}-0",
            epoch=1,
            spec=replace(spec, **more),  # type: ignore[arg-type]
            model_path=str(self.folder / "model.safetensors"),
            out_dir=str(out),
        )

    def lines(self, name: str) -> str:
        return (self.folder / name).read_text()


class Agent:
    """One connection, as an agent holds it."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._stream = connection.makefile("rb")

    def say(self, body: StageOrder | StageCancel) -> None:
        self._connection.sendall(frame(WorkerFrame(body=body)))

    def hear(self) -> object:
        head = self._stream.read(HEAD_BYTES)
        return parse(WorkerFrame, self._stream.read(frame_length(head))).body

    def ask(self, order: StageOrder) -> StageDone:
        self.say(order)
        done = self.hear()
        assert isinstance(done, StageDone)
        return done

    def close(self) -> None:
        self._stream.close()
        self._connection.close()


@pytest.fixture
def warm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Warm]:
    worker = Warm(tmp_path)
    monkeypatch.chdir(tmp_path)
    try:
        yield worker
    finally:
        worker.process.kill()
        worker.process.wait()
        assert worker.process.stderr is not None
        worker.process.stderr.close()


def test_a_stage_leaves_its_update_and_says_how_it_went(warm: Warm) -> None:
    with closing(warm.connect()) as agent:
        order = warm.order(evaluate=True)
        done = agent.ask(order)
    assert (done.cause, done.files, done.weight) == (None, ("update",), 5.0)
    assert done.metrics == {"eval.examples": 5.0, "eval.sum": 0.0, "loss": 0.5}
    update = load_file(Path(order.out_dir) / "update.safetensors")
    np.testing.assert_array_equal(update["w"], np.ones(3))


def test_a_stage_that_is_asked_for_again_is_not_trained_again(warm: Warm) -> None:
    with closing(warm.connect()) as agent:
        first = agent.ask(warm.order())
    with closing(warm.connect()) as agent:
        assert agent.ask(warm.order()) == first
    assert warm.lines("trained") == "x"


def test_an_update_that_the_agent_has_deleted_is_written_over(warm: Warm) -> None:
    with closing(warm.connect()) as agent:
        orders = [warm.order(number) for number in (1, 2, 3)]
        updates = [Path(order.out_dir) / "update.safetensors" for order in orders]
        agent.ask(orders[0])
        first = updates[0].stat()
        agent.ask(orders[1])
        # The broker does not have it yet.
        assert updates[0].stat().st_mtime_ns == first.st_mtime_ns
        second = updates[1].stat().st_ino
        assert second != first.st_ino
        updates[1].unlink()
        agent.ask(orders[2])
    assert updates[2].stat().st_ino == second
    for update in (updates[0], updates[2]):
        np.testing.assert_array_equal(load_file(update)["w"], np.ones(3))


def test_data_are_loaded_once_for_many_rounds(warm: Warm) -> None:
    with closing(warm.connect()) as agent:
        for number in (1, 2, 3):
            assert agent.ask(warm.order(number)).cause is None
    assert warm.lines("loaded") == "0 of 2\n"
    assert warm.lines("trained") == "xxx"


def test_what_the_users_code_raises_comes_back_with_its_traceback(warm: Warm) -> None:
    with closing(warm.connect()) as agent:
        done = agent.ask(warm.order(config='{"raise": true}'))
        assert done.cause is not None
        assert done.cause.message == "KeyError: 'my own mistake'"
        assert 'raise KeyError("my own mistake")' in done.cause.traceback
        assert agent.ask(warm.order(2)).cause is None  # and the worker lives


def _hang(warm: Warm, agent: Agent) -> StageOrder:
    """Give the worker a stage that never ends by itself; on return it is in the user's code."""
    gate = warm.folder / "gate"
    os.mkfifo(gate)
    order = warm.order(config='{"hang": true}')
    agent.say(order)
    gate.read_bytes()
    return order


def test_a_stage_that_is_given_up_ends_at_once_and_the_worker_stays_warm(warm: Warm) -> None:
    with closing(warm.connect()) as agent:
        order = _hang(warm, agent)
        agent.say(StageCancel(task=order.task, epoch=order.epoch))
        done = agent.hear()
        assert isinstance(done, StageDone)
        assert done.cause is not None
        assert "given up" in done.cause.message
        assert list(Path(order.out_dir).iterdir()) == []
        assert agent.ask(warm.order(2)).cause is None
    assert warm.process.poll() is None


def test_a_stage_is_given_up_before_it_begins(warm: Warm) -> None:
    with closing(warm.connect()) as agent:
        running, waiting = _hang(warm, agent), warm.order(2)
        agent.say(waiting)
        agent.say(StageCancel(task=waiting.task, epoch=waiting.epoch))
        agent.say(StageCancel(task=running.task, epoch=running.epoch))
        answers = [agent.hear(), agent.hear()]
    assert [a.task for a in answers if isinstance(a, StageDone)] == [running.task, waiting.task]
    assert warm.lines("trained") == "x"


def test_a_cancel_of_what_is_over_disturbs_nothing(warm: Warm) -> None:
    with closing(warm.connect()) as agent:
        done = agent.ask(warm.order())
        agent.say(StageCancel(task=done.task, epoch=done.epoch))
        assert agent.ask(warm.order(2)).cause is None


def test_an_agent_that_was_restarted_is_heard_while_a_stage_runs(warm: Warm) -> None:
    with closing(warm.connect()) as agent:
        order = _hang(warm, agent)
    with closing(warm.connect()) as agent:
        agent.say(StageCancel(task=order.task, epoch=order.epoch))
        assert agent.ask(warm.order(2)).cause is None


def test_who_has_a_deadline_trains_as_many_epochs_as_fit(warm: Warm) -> None:
    config = '{"epochs": 10}'  # each takes 0.02 s or more
    with closing(warm.connect()) as agent:
        first = agent.ask(warm.order(config=config))
        done = agent.ask(replace(warm.order(2, config), deadline_s=0.1))
    assert "partial.epochs" not in first.metrics
    assert 1 <= done.metrics["partial.epochs"] <= 5
    assert warm.lines("epochs") == "x" * int(10 + done.metrics["partial.epochs"])


def test_of_a_data_set_only_what_the_client_took_stays_in_memory(
    warm: Warm, data_home: Path, real: Callable[[str], object]
) -> None:
    real("mnist-5k")
    loading = APP.replace(
        "    return np.ones(5)\n",
        "    import weakref\n"
        "    from fedml import data as sets\n"
        '    train = sets.load("mnist-5k", home=config["home"]).train\n'
        "    global whole\n"
        "    whole = weakref.ref(train.x)\n"
        "    return train.take(np.arange(5))\n",
    ).replace('"sum": float(model["w"].sum())', '"kept": whole() is not None')
    (warm.folder / "package" / "app.py").write_text(loading)
    with closing(warm.connect()) as agent:
        done = agent.ask(warm.order(config=json.dumps({"home": str(data_home)}), evaluate=True))
    assert done.cause is None
    assert done.weight == 5
    assert done.metrics["eval.kept"] == 0
