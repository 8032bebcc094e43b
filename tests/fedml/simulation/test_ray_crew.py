# SPDX-License-Identifier: Apache-2.0
"""Members as actors of Ray: the bits of the local crew, lost actors, and nothing left behind."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner

from fedml.cli import command
from fedml.errors import ConfigError, RunFailed
from fedml.simulation import ClientFailed, simulate
from tests.fedml.simulation import apps
from tests.fedml.simulation.bits import same_bits
from tests.fedml.simulation.test_crew import left_behind, plan

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install '.[ray]'"
)
# Starting Ray takes seconds on an idle machine. Its own sockets and files warn when they go.
slow = [
    needs_ray,
    pytest.mark.timeout(180),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:ray.*"),
]


def marked(function: Any) -> Any:
    for mark in slow:
        function = mark(function)
    return function


@pytest.fixture(scope="module")
def nodes() -> Iterator[str]:
    """The address of a cluster of two nodes with one CPU each, on this machine."""
    pytest.importorskip("ray", reason="Ray is not installed")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        yield cluster.address
    finally:
        cluster.shutdown()


def linear(folder: Path) -> dict[str, Any]:
    return {**plan(folder), "app": apps.write(folder, apps.LINEAR).name}


@marked
@pytest.mark.parametrize(
    ("algorithm", "engine"),
    [("fedavg", "closed_form"), ("fedavg", "exact"), ("scaffold", "exact"), ("fedbuff", "exact")],
)
def test_two_nodes_give_the_bits_of_two_processes(
    algorithm: str, engine: str, nodes: str, tmp_path: Path
) -> None:
    asked = {
        **linear(tmp_path),
        "rounds": 4,
        "algorithm": algorithm,
        "clients": {"count": 5, "per_round": 4},
        "evaluate": {"every": 2},
    }
    near = simulate(asked, engine=engine, workers=2)
    far = simulate(asked, engine=engine, workers=2, ray=nodes)
    assert same_bits(near.model, far.model)
    assert near.metrics == pytest.approx(far.metrics)
    assert left_behind() == []


@marked
def test_what_clients_keep_is_there_after_a_resume(nodes: str, tmp_path: Path) -> None:
    asked = {**linear(tmp_path), "algorithm": "scaffold"}
    whole = simulate(asked, engine="exact", rounds=4, workers=2)
    simulate(asked, rounds=2, workers=2, ray=nodes, out=tmp_path / "out")
    rest = simulate(asked, rounds=4, workers=2, ray=nodes, out=tmp_path / "out", resume=True)
    assert same_bits(whole.model, rest.model)


# Where actors import the file is not where the test looks.
DIES = """
import os, pathlib, signal
from fedml.federate.local_sgd import LocalSGD
sgd = LocalSGD(batch_size=5)

def train(model, data, config, rng, correction=None):
    if len(data[0]) == 17 and "dies" in config:     # client 2
        deaths = pathlib.Path(config["here"]) / "deaths"
        with deaths.open("a") as file:
            file.write("x")
        if len(deaths.read_text()) <= config["dies"]:
            os.kill(os.getpid(), signal.SIGKILL)
    return sgd(model, data, config, rng, correction)
"""


def dying(folder: Path, **config: Any) -> dict[str, Any]:
    asked = plan(folder, here=str(folder), **config)
    (folder / asked["app"]).write_text(apps.LINEAR + DIES)
    return {**asked, "algorithm": "scaffold"}


@marked
def test_a_lost_actor_is_replaced_and_its_clients_are_run_again(nodes: str, tmp_path: Path) -> None:
    calm = simulate(dying(tmp_path / "calm"), workers=2)
    killed = simulate(dying(tmp_path / "killed", dies=1), workers=2, ray=nodes)
    assert (tmp_path / "killed" / "deaths").read_text() == "xxx"  # died, run again, second round
    assert same_bits(calm.model, killed.model)


@marked
def test_an_actor_that_is_lost_twice_over_the_same_clients_ends_the_run(
    nodes: str, tmp_path: Path
) -> None:
    # What an actor had said just before it died may be lost with it: then an earlier one is named.
    with pytest.raises(RunFailed, match=r"died twice.*at client [0-2]"):
        simulate(dying(tmp_path, dies=9), workers=2, ray=nodes)


@marked
def test_what_users_code_raises_is_theirs_to_read(nodes: str, tmp_path: Path) -> None:
    with pytest.raises(ClientFailed, match="client 2 failed in round 1: RuntimeError: the dog"):
        simulate(plan(tmp_path, raises=True), workers=2, ray=nodes)


@marked
def test_more_workers_than_the_cluster_has_cpus_are_refused(nodes: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="3 workers are asked for, and the Ray cluster has 2"):
        simulate(plan(tmp_path), workers=3, ray=nodes)


@marked
def test_a_workspace_that_ray_does_not_ship_is_named(
    nodes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray._private.runtime_env import packaging

    monkeypatch.setattr(packaging, "GCS_STORAGE_MAX_SIZE", 100)  # it is 512 MiB
    (tmp_path / "notes.txt").write_text("not what another test has shipped")
    with pytest.raises(ConfigError, match="Ray does not ship") as refused:
        simulate(plan(tmp_path), workers=2, ray=nodes)
    assert ".rayignore" in refused.value.hint


@marked
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_simulation_ends_the_ray_that_it_started(
    number: signal.Signals, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(json.dumps(plan(tmp_path)))
    words = ("simulate", "run.yaml", "--out", "out", "--json", "--rounds", "100000")
    run = subprocess.Popen(
        [sys.executable, "-c", "from fedml.cli import main; main()", *words, "--workers", "2",
         "--ray"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert run.stdout is not None
    first = run.stdout.readline()
    assert first, run.communicate()
    children = psutil.Process(run.pid).children(recursive=True)
    assert children
    run.send_signal(number)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 130, said
    _, alive = psutil.wait_procs(children, timeout=20)
    assert alive == []
    assert left_behind() == []
    assert (tmp_path / "out" / "checkpoint.safetensors").exists()


@marked
@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:10001/", "somewhere"])
def test_an_address_where_no_cluster_is_is_refused_at_once(address: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        simulate(plan(tmp_path), ray=address)
    assert "ray start --head" in refused.value.hint


def test_without_ray_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What Python then says at an import of it.
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="Ray, which is not installed") as refused:
        simulate(plan(tmp_path), ray="local")
    assert "fedml-agent[ray]" in refused.value.hint
    assert refused.value.exit_code == 2


def test_debug_and_ray_exclude_each_other(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(json.dumps(plan(tmp_path)))
    words = ["simulate", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "out"), "--debug"]
    done = CliRunner().invoke(command, [*words, "--ray"])
    assert isinstance(done.exception, ConfigError)
