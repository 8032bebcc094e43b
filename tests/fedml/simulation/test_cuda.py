# SPDX-License-Identifier: Apache-2.0
"""The simulator on a real GPU: its models, its algorithms, its memory, and how it ends.

Skipped where torch sees no CUDA device. What of this can be tried without one is in
`test_accelerator.py`.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import nn

from fedml.errors import RunFailed
from fedml.simulation import accelerator, simulate
from fedml.simulation.graphs import Graphs
from fedml.simulation.plan import read
from fedml.simulation.result import ClientFailed, Listener
from fedml.simulation.run import Simulation

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")

MIB = 1 << 20

# One file for all models; `config.model` says which, and so what the data looks like.
APP = """
import numpy as np
import torch
from torch import nn

from fedml import model as models
from fedml.federate.local_sgd import Evaluation, LocalSGD

class Graphs(nn.Module):
    "Graphs of twelve nodes, each given as its features beside its matrix."
    def __init__(self):
        super().__init__()
        self.gcn = models.create("gcn", inputs=5, outputs=3, dropout=0.0, seed=1)
    def forward(self, x):
        return self.gcn(x[..., :5], x[..., 5:]).transpose(1, 2)

def model(config):
    # In float64 two ways of adding up stay near each other through the deepest network.
    return made(config).to(getattr(torch, config["dtype"]))

def made(config):
    match config["model"]:
        case "linear":
            return models.create("linear", inputs=144, outputs=3)
        case "cnn":
            return models.create("cnn", side=12, classes=3, seed=1)
        case "resnet20":
            return models.create("resnet20", classes=3, seed=1)
        case "lstm":
            return models.create("lstm", symbols=11, hidden=32, seed=1)
        case "transformer":
            return models.create(
                "transformer", symbols=11, length=16, width=16, heads=2, layers=1, seed=1
            )
        case "gcn":
            return Graphs()

def examples(rng, n, name):
    if name in ("lstm", "transformer"):
        text = rng.integers(0, 11, (n, 17))
        return text[:, :-1], text[:, 1:]
    if name == "gcn":
        edges = np.triu(rng.random((n, 12, 12)) < 0.3, 1)
        matrix = (edges | edges.transpose(0, 2, 1) | np.eye(12, dtype=bool)) / 4
        x = rng.standard_normal((n, 12, 5))
        y = (matrix @ x)[..., :3].argmax(-1)
        return np.concatenate([x, matrix], -1).astype(np.float32), y
    shape = {"resnet20": (3, 16, 16), "linear": (144,)}.get(name, (1, 12, 12))
    x = rng.standard_normal((n, *shape)).astype(np.float32)
    return x, x.reshape(n, 3, -1).mean(2).argmax(1)

def data(client, config):
    rng = np.random.default_rng(client.index)
    return examples(rng, 10 + 3 * client.index, config["model"])

def central(config):
    return examples(np.random.default_rng(1000), 64, config["model"])

train = LocalSGD(batch_size=8, epochs=2)
evaluate = Evaluation()
"""


def plan(folder: Path, model: str = "cnn", dtype: str = "float64", **more: Any) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "app.py").write_text(APP)
    return {
        "app": "app.py",
        "workspace": str(folder),
        "rounds": 3,
        "config": {"model": model, "lr": 0.05, "dtype": dtype},
        "clients": {"count": 5},
        **more,
    }


class Heard(Listener):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def run(source: dict[str, Any], **settings: Any) -> tuple[Any, list[str]]:
    """In this very process, so that what it takes of the GPU is ours to see."""
    heard = Heard()
    return Simulation(read(source, **settings), debug=True, listener=heard).run(), heard.said


def same(one: Any, other: Any, within: float = 1e-9) -> None:
    for name, array in one.model.items():
        np.testing.assert_allclose(other.model[name], array, rtol=0, atol=within, err_msg=name)


# ---------------------------------------------------------------------- models and algorithms


MODELS = ["linear", "cnn", "resnet20", "lstm", "transformer", "gcn"]


@pytest.mark.parametrize(
    ("engine", "model"),
    [(e, m) for e in ("inplace", "stacked") for m in MODELS if (e, m) != ("stacked", "lstm")],
)
def test_each_model_comes_to_what_it_comes_to_on_the_cpu(
    model: str, engine: str, tmp_path: Path
) -> None:
    asked = plan(tmp_path, model)
    wanted, _ = run(asked, engine="inplace", device="cpu")
    found, said = run(asked, engine=engine, device="cuda")
    assert any(s.startswith(f"engine {engine} on 1 process") and "cuda:0" in s for s in said)
    same(wanted, found)
    for name in ("central.loss", "train.loss"):
        assert found.metrics[name] == pytest.approx(wanted.metrics[name], abs=1e-9)


@pytest.mark.parametrize(
    ("algorithm", "more"),
    [
        ("fedavg", {}),
        ("fedadam", {}),
        ("fedprox", {"algorithm_config": {"mu": 0.1}}),
        ("scaffold", {}),
        ("mime", {}),
        ("fedbuff", {"algorithm_config": {"buffer": 3}}),
        ("fedavg", {"treatment": {"robust": {"rule": "median"}}}),
        ("fedavg", {"treatment": {"compression": {"kind": "topk", "fraction": 0.2}}}),
    ],
)
def test_each_algorithm_comes_to_what_it_comes_to_on_the_cpu(
    algorithm: str, more: dict[str, Any], tmp_path: Path
) -> None:
    asked = plan(tmp_path, algorithm=algorithm, **more)
    found, said = run(asked, device="cuda")
    assert "device cuda:0: as asked" in said[0]
    same(run(asked, engine="inplace", device="cpu")[0], found)


def test_a_linear_model_stays_on_the_cpu_unless_a_gpu_is_asked_for(tmp_path: Path) -> None:
    asked = plan(tmp_path, "linear")
    _, said = run(asked)
    assert said[0].startswith("engine closed_form")
    assert "device cpu: closed_form needs no other" in said[0]
    _, said = run(asked, device="cuda:0")
    assert said[0].startswith("engine stacked")


def test_by_itself_a_run_takes_the_gpu_and_says_so(tmp_path: Path) -> None:
    _, said = run(plan(tmp_path))
    assert said[0].startswith("engine stacked on 1 process")
    assert "device cuda:0: torch sees it" in said[0]


@pytest.mark.parametrize(
    ("engine", "model"),
    [
        ("inplace", "cnn"),
        ("inplace", "resnet20"),
        ("inplace", "lstm"),
        ("inplace", "transformer"),
        ("stacked", "cnn"),
        ("stacked", "resnet20"),
        ("stacked", "transformer"),
    ],
)
def test_the_same_seed_gives_the_same_bits(engine: str, model: str, tmp_path: Path) -> None:
    asked = plan(tmp_path, model, "float32")
    one, two = (run(asked, engine=engine, device="cuda", seed=3)[0] for _ in range(2))
    for name, array in one.model.items():
        np.testing.assert_array_equal(two.model[name], array, err_msg=name)
    other, _ = run(asked, engine=engine, device="cuda", seed=4)
    assert any(not np.array_equal(other.model[n], a) for n, a in one.model.items())


# ---------------------------------------------------------------------- graphs


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often each graph is replayed."""
    seen: list[int] = []
    replay = torch.cuda.CUDAGraph.replay

    def counted(graph: torch.cuda.CUDAGraph) -> None:
        seen.append(id(graph))
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    return seen


@pytest.mark.parametrize("config", [{}, {"momentum": 0.9, "weight_decay": 0.01}])
@pytest.mark.parametrize("engine", ["inplace", "stacked"])
def test_steps_are_replayed_and_learn_what_steps_learn(
    engine: str, config: dict[str, Any], replays: list[int], tmp_path: Path
) -> None:
    asked = plan(tmp_path, rounds=6)
    asked["config"] |= config
    wanted, _ = run(asked, engine="exact", device="cpu")
    assert replays == []
    found, _ = run(asked, engine=engine, device="cuda")
    assert len(replays) > 20
    same(wanted, found)
    assert found.metrics["train.loss"] == pytest.approx(wanted.metrics["train.loss"], abs=1e-9)


def test_a_module_that_decides_in_python_is_not_replayed(
    replays: list[int], tmp_path: Path
) -> None:
    asked = plan(tmp_path)
    text = APP.replace(
        "def model(config):",
        """
class Wavers(nn.Module):
    "Every other step is another function."
    def __init__(self):
        super().__init__()
        self.inner, self.steps = nn.Linear(144, 3), 0
    def forward(self, x):
        self.steps += 1
        return self.inner(x.flatten(1)) * (1 if self.steps % 2 else -1)

def model(config):
    return Wavers().to(torch.float64)

def other(config):""",
        1,
    ).replace("evaluate = Evaluation()", "")
    (tmp_path / "app.py").write_text(text)
    asked["evaluate"] = {"central": False}
    wanted, _ = run(asked, engine="inplace", device="cpu")
    found, _ = run(asked, engine="inplace", device="cuda")
    assert replays == []
    same(wanted, found)


def test_dropout_draws_anew_in_each_replay_and_the_same_from_the_same_seed() -> None:
    out = torch.zeros(1000, device="cuda")

    def step(x: torch.Tensor) -> None:
        out.copy_(nn.functional.dropout(x, 0.5))

    drops = Graphs(step, record=True)
    ones = torch.ones(1000, device="cuda")
    for _ in range(3):
        drops(ones)
    drawn = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        for _ in range(2):
            drops(ones)
            drawn.append(out.clone())
    assert all(400 < int((one > 0).sum()) < 600 for one in drawn)
    assert torch.equal(drawn[0], drawn[2])
    assert torch.equal(drawn[1], drawn[3])
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[4])


def test_a_step_that_cannot_be_recorded_goes_on_as_it_was(replays: list[int]) -> None:
    total = torch.zeros(4, device="cuda")
    stream = torch.cuda.current_stream()

    def step(x: torch.Tensor) -> None:
        total.add_(x * float(x.sum()))  # asks the processor

    asks = Graphs(step, record=True)
    for n in range(1, 7):
        asks(torch.ones(4, device="cuda"))
        assert total.tolist() == [4.0 * n] * 4
    assert replays == []
    assert torch.cuda.current_stream() == stream
    # ... and nothing of the attempt is left, as torch would have it after one that failed.
    before = torch.cuda.memory_reserved()
    del asks
    torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before


# ---------------------------------------------------------------------- processes, files


@pytest.mark.parametrize("engine", ["inplace", "stacked"])
def test_processes_share_a_gpu_and_write_it_down(engine: str, tmp_path: Path) -> None:
    asked = plan(tmp_path)
    wanted = simulate(asked, engine="inplace", device="cpu", workers=1)
    found = simulate(asked, engine=engine, device="cuda", workers=2, out=tmp_path / "out")
    same(wanted, found)
    with contextlib.closing(sqlite3.connect(tmp_path / "out/results.sqlite")) as file:
        kept = dict(file.execute("select key, value from run").fetchall())
        rounds = file.execute("select round, answered from rounds").fetchall()
    assert json.loads(kept["device"]) == "cuda:0"
    assert json.loads(kept["engine"]) == engine
    assert json.loads(kept["workers"]) == 2
    assert [answered for number, answered in rounds if number] == [5, 5, 5]


def test_a_resumed_run_goes_on_to_the_model_of_one_that_was_not_broken_off(tmp_path: Path) -> None:
    asked = plan(tmp_path, algorithm="scaffold")
    whole = simulate(asked, device="cuda", rounds=4)
    simulate(asked, device="cuda", rounds=2, out=tmp_path / "out")
    same(whole, simulate(asked, device="cuda", rounds=4, out=tmp_path / "out", resume=True))


# ---------------------------------------------------------------------- memory


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Half a gigabyte for this process: what is beyond fails as it does on a GPU that is full."""
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(512 * MIB / whole)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


BIG = """
import numpy as np
from torch import nn
from fedml.federate.local_sgd import LocalSGD

def model(config):
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, 3),
    )

def data(client, config):
    rng = np.random.default_rng(client.index)
    x = rng.standard_normal((16, 1, config["side"], config["side"])).astype(np.float32)
    return x, rng.integers(0, 3, 16)

train = LocalSGD(batch_size=16)
"""


def big(folder: Path, side: int) -> dict[str, Any]:
    (folder / "big.py").write_text(BIG)
    return {
        "app": "big.py",
        "workspace": str(folder),
        "rounds": 2,
        "config": {"lr": 0.05, "side": side},
        "clients": {"count": 16},
        "evaluate": {"devices": False, "central": False},
    }


@pytest.mark.usefixtures("little_memory")
def test_where_memory_runs_out_the_chunk_is_halved_and_the_model_is_the_same(
    tmp_path: Path,
) -> None:
    asked = big(tmp_path, 128)
    found, said = run(asked, engine="stacked", device="cuda")
    halved = [s for s in said if "clients at once: on with" in s]
    assert halved, said
    assert "out of memory on cuda:0 with 16 clients at once: on with 8" in halved[0]
    assert not any(s.startswith("round 2") for s in said)  # it has learned how many fit
    same(run(asked, engine="inplace", device="cpu")[0], found, 1e-5)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("engine", ["inplace", "stacked"])
def test_a_client_that_does_not_fit_is_named_with_what_would_help(
    engine: str, tmp_path: Path
) -> None:
    with pytest.raises(ClientFailed) as caught:
        run(big(tmp_path, 512), engine=engine, device="cuda")
    assert str(caught.value) == (
        "client 0 failed in round 1: out of memory on cuda:0 with this client alone: "
        "a smaller batch_size, or --device cpu"
    )


@pytest.mark.parametrize(
    ("left", "words"),
    [
        (1200 * MIB, "client 0 failed in round 1: out of memory on cuda:0 with this client alone"),
        (50 * MIB, "could not start: cuda:0 has no memory for it: is it full of others"),
    ],
)
def test_a_gpu_that_others_have_filled_ends_the_run_and_what_would_help_is_said(
    left: int, words: str, tmp_path: Path
) -> None:
    torch.cuda.empty_cache()
    ballast = (
        "import torch; torch.zeros(1, device='cuda'); free, _ = torch.cuda.mem_get_info(); "
        f"x = torch.empty(free - {left}, dtype=torch.uint8, device='cuda'); print('full'); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-u", "-c", ballast],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "full\n"
        try:
            with pytest.raises(RunFailed, match=words) as caught:
                simulate(big(tmp_path, 512), engine="inplace", device="cuda", workers=1)
        finally:
            other.kill()
    assert "--device cpu" in str(caught.value)


# ---------------------------------------------------------------------- how it ends


def on_gpu() -> dict[int, int]:
    """Processes that hold memory of any GPU, and how much, as the driver says."""
    import pynvml

    pynvml.nvmlInit()
    try:
        return {
            one.pid: one.usedGpuMemory or 0
            for index in range(pynvml.nvmlDeviceGetCount())
            for one in pynvml.nvmlDeviceGetComputeRunningProcesses(
                pynvml.nvmlDeviceGetHandleByIndex(index)
            )
        }
    finally:
        pynvml.nvmlShutdown()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_simulation_that_is_stopped_leaves_no_process_and_no_memory_on_the_gpu(
    number: signal.Signals, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(json.dumps(plan(tmp_path, rounds=100_000)))
    words = ["simulate", "run.yaml", "--out", "out", "--json", "--device", "cuda", "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-c", "from fedml.cli import main; main()", *words],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert json.loads(process.stdout.readline() or process.communicate()[1])["round"] == 1
    members = psutil.Process(process.pid).children(recursive=True)
    ours = {process.pid, *(member.pid for member in members)}
    assert len(members) == 2
    assert {member.pid for member in members} <= set(on_gpu())
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == (130 if number != signal.SIGKILL else -9), said
    _, alive = psutil.wait_procs(members, timeout=15)
    assert alive == []
    assert not ours & set(on_gpu())


def test_a_simulation_in_ones_own_process_gives_its_memory_back(tmp_path: Path) -> None:
    asked = plan(tmp_path)
    run(asked, device="cuda")  # what CUDA itself keeps is there from now on
    accelerator.let_go("cuda:0")
    before = torch.cuda.memory_reserved()
    run(asked, device="cuda")
    accelerator.let_go("cuda:0")
    assert torch.cuda.memory_reserved() <= before
