# SPDX-License-Identifier: Apache-2.0
"""The aggregator process: it does its work, and users' code in it reaches nothing else."""

import json
import socket
from pathlib import Path

import pytest

from fedml_agent import enclosed
from fedml_agent.namespaces import HIDE, NETWORK, READ_ONLY
from fedml_broker.aggregator import Aggregator, AggregatorDied, AggregatorRefused
from fedml_protocol.federate import MakeModel, ModelMade, OpenRun, RunOpened

SPY = """
import os, socket
from pathlib import Path
import numpy as np

def model(config):
    found = {}
    for what in config["paths"]:
        try:
            Path(what).read_bytes()
            found["read " + what] = np.ones(1)
        except OSError:
            pass
    try:
        Path(config["write"]).write_text("was here")
        found["wrote"] = np.ones(1)
    except OSError:
        pass
    try:
        socket.create_connection(("127.0.0.1", config["port"]), timeout=5).close()
        found["connected"] = np.ones(1)
    except OSError:
        pass
    if config.get("die"):
        os._exit(3)
    return {"w": np.zeros(2), **found}

def data(client, config): ...
def train(model, data, config, rng): ...
"""


class Broker:
    """The directories of a broker that matter here."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "broker"
        self.work = self.home / "work" / "r-1"
        self.blobs = self.home / "blobs"
        self.key = self.home / "identity" / "ca.key"
        for directory in (self.work / "app", self.work / "out", self.blobs, self.key.parent):
            directory.mkdir(parents=True)
        self.key.write_text("secret")
        (self.work / "app" / "app.py").write_text(SPY)

    async def start(self) -> Aggregator:
        return await Aggregator.start(self.work, home=self.home, blobs=self.blobs)

    def opening(self, **config: object) -> OpenRun:
        return OpenRun(
            algorithm="fedavg",
            algorithm_config="{}",
            seed=1,
            app_dir=str(self.work / "app"),
            app="app.py",
            config=json.dumps({"paths": [], "write": "/", "port": 9, **config}),
            central=False,
            clients=1,
        )


@pytest.fixture
def broker(tmp_path: Path) -> Broker:
    return Broker(tmp_path)


async def _names(broker: Broker, opening: OpenRun) -> set[str]:
    from safetensors.numpy import load_file

    aggregator = await broker.start()
    try:
        await aggregator.ask(opening, RunOpened)
        made = await aggregator.ask(MakeModel(out_dir=str(broker.work / "out")), ModelMade)
    finally:
        await aggregator.close()
    return set(load_file(made.model_path))


@pytest.mark.skipif(bool(enclosed.missing()), reason="this kernel gives no Landlock")
async def test_users_code_reads_no_key_writes_nothing_and_calls_nobody(
    broker: Broker, tmp_path: Path
) -> None:
    beside = Path(__file__)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = {"write": str(tmp_path / "outside"), "port": listener.getsockname()[1]}
        opening = broker.opening(paths=[str(broker.key), str(beside)], **config)
        names = await _names(broker, opening)
    # What lies outside of the broker's home may be read: libraries and data sets are there.
    assert names == {"w", f"read {beside}"}
    assert not (tmp_path / "outside").exists()


async def test_an_aggregator_that_dies_says_how(broker: Broker) -> None:
    aggregator = await broker.start()
    await aggregator.ask(broker.opening(die=True), RunOpened)
    with pytest.raises(AggregatorDied, match="ended with exit code 3"):
        await aggregator.ask(MakeModel(out_dir=str(broker.work / "out")), ModelMade)
    await aggregator.close()


async def test_a_file_that_is_no_application_is_refused_with_the_reason(broker: Broker) -> None:
    (broker.work / "app" / "app.py").write_text("def model(config): ...")
    aggregator = await broker.start()
    with pytest.raises(AggregatorRefused, match=r"no function data") as refused:
        await aggregator.ask(broker.opening(), RunOpened)
    assert refused.value.cause.traceback == ""
    await aggregator.close()


def test_what_the_machine_cannot_give_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedml_agent.confine.version", lambda: 0)
    assert set(enclosed.missing()) >= {HIDE, READ_ONLY}
    assert NETWORK not in enclosed.missing()
