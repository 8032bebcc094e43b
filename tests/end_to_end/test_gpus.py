# SPDX-License-Identifier: Apache-2.0
"""GPUs on a real broker and a real agent: leased by UUID, waited for, and used by those alone.

The tests at the end need a GPU and a torch that can use it; the one before them has a scripted one
(`tests/fakes/nvml.py`).
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.fakes.nvml import environment
from tests.place import Place, command

HOLD = "echo begun; while [ ! -e {} ]; do read -t 0.1 <> <(:); done; echo done"


def said(words: str) -> Any:
    """Whether an item of a follow stream is output with these words."""
    return lambda item: words in item.get("log", {}).get("text", "")


def noted(item: dict[str, Any]) -> str:
    """What a machine has noted, if an item is that."""
    event = item.get("event", {})
    return str(event["data"]["text"]) if event.get("kind") == "noted" else ""


def running(first_word: str) -> list[int]:
    """Processes by what they call themselves."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            found += [process.pid] if process.cmdline()[:1] == [first_word] else []
    return found


def agent(place: Place, name: str, *words: str) -> "subprocess.CompletedProcess[str]":
    """One of the agent's commands, on one of the machines."""
    return subprocess.run(
        command("fedml_agent", *words),
        env={**os.environ, "FEDML_HOME": str(place.agents[name].home)},
        capture_output=True,
        text=True,
    )


def test_a_job_that_computes_on_a_gpu_it_does_not_hold_is_named(tmp_path: Path) -> None:
    file = tmp_path / "gpus.json"

    def gpus(of_b: list[int]) -> None:
        two = [{"uuid": "GPU-a"}, {"uuid": "GPU-b", "processes": [[pid, None] for pid in of_b]}]
        beside = file.with_suffix(".new")
        beside.write_text(json.dumps({"gpus": two}))
        beside.replace(file)

    gpus([])
    (tmp_path / "place").mkdir()
    with Place(tmp_path / "place") as place, pytest.MonkeyPatch.context() as patch:
        for name, value in environment(file).items():
            patch.setenv(name, value)
        place.agent("box")
        flag = tmp_path / "go"
        honest = place.launch(HOLD.format(flag), needs={"gpus": 1})
        place.until(honest, said("begun"), logs=True)
        child = f"thief-{os.getpid()}"
        thief = place.launch(f"(exec -a {child} sleep 600) & {HOLD.format(flag)}")
        place.until(thief, said("begun"), logs=True)
        while not (pids := running(child)):
            os.sched_yield()
        (pid,) = pids
        gpus([pid, 1])
        item = place.until(thief, noted)
        assert noted(item) == "computes on GPU-b, which it does not hold"
        assert item["event"]["data"]["name"] == "box"
        shown = agent(place, "box", "status").stdout
        assert "computes on GPU-b, which it does not hold" in shown
        assert "computes on GPU-b, which it does not hold" in place.agents["box"].log.read_text()
        flag.touch()
        place.finishes(thief)
        place.finishes(honest)
        assert not [i for i in place.follow(honest) if noted(i)]
        seen = subprocess.run(
            command("fedml", "run", "logs", thief),
            env={**os.environ, "FEDML_HOME": str(place.folder / "me")},
            capture_output=True,
            text=True,
        )
        assert "box: it computes on GPU-b, which it does not hold" in seen.stderr


# ---------------------------------------------------------------------- with a GPU


@pytest.fixture(scope="module")
def torch() -> Any:
    """torch, with a CUDA device."""
    found = pytest.importorskip("torch")
    if not found.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    return found


@pytest.fixture(scope="module")
def place(torch: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A broker, and this machine as it is."""
    with Place(tmp_path_factory.mktemp("place")) as place:
        place.agent("box")
        yield place


def hardware(place: Place) -> dict[str, Any]:
    """What the agent's command tells of this machine."""
    told: dict[str, Any] = json.loads(agent(place, "box", "hardware", "--json").stdout)
    return told


def uuid_of(place: Place) -> str:
    """That of the first GPU."""
    return str(hardware(place)["inventory"]["accelerators"]["gpus"][0]["uuid"])


def python(text: str) -> str:
    """A job's command that runs this."""
    return f"cat > p.py <<'END'\n{text}\nEND\n{sys.executable} p.py"


def test_hardware_tells_of_a_gpu_what_torch_tells_of_it(torch: Any, place: Place) -> None:
    ballast = torch.ones(1 << 28, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    told = hardware(place)
    one = torch.cuda.get_device_properties(0)
    accelerators = told["inventory"]["accelerators"]
    assert accelerators["absent"] is None
    assert len(accelerators["gpus"]) == torch.cuda.device_count()
    assert accelerators["driver"].split(".")[0].isdigit()
    gpu = next(g for g in accelerators["gpus"] if g["uuid"] == f"GPU-{one.uuid}")
    assert gpu["name"] == one.name
    # The driver keeps a part of it for itself.
    assert one.total_memory <= gpu["memory"] <= 1.1 * one.total_memory
    assert gpu["compute_capability"] == f"{one.major}.{one.minor}"
    assert gpu["mig"] in (False, None)
    assert gpu["fault"] is None
    reading = told["readings"]["gpus"][gpu["index"]]
    assert reading["uuid"] == gpu["uuid"]
    assert ballast.numel() < reading["memory_used"] <= gpu["memory"]
    assert 0 <= reading["utilisation"] <= 100
    assert 10 < reading["temperature"] < 110
    assert 10 < reading["power"] < 1500
    mine = next(p for p in reading["processes"] if p["pid"] == os.getpid())
    assert mine["memory"] is None or mine["memory"] >= ballast.numel()
    shown = agent(place, "box", "hardware").stdout
    assert f"{one.name}, {gpu['memory'] / 1e9:.0f} GB, {gpu['uuid']}" in shown
    assert f"process {os.getpid()}" in shown
    del ballast


def test_a_job_sees_the_gpu_that_it_holds_and_no_other(place: Place) -> None:
    run = place.launch(
        'echo "$CUDA_VISIBLE_DEVICES $NVIDIA_VISIBLE_DEVICES"\n'
        + python(
            "import torch\n"
            "x = torch.ones(512, 512, device='cuda')\n"
            "print(torch.cuda.device_count(), torch.cuda.get_device_properties(0).uuid,"
            " (x @ x).sum().item())"
        ),
        needs={"gpus": 1},
    )
    place.finishes(run)
    uuid = uuid_of(place)
    first, second = place.stdout(run).splitlines()
    assert first == f"{uuid} {uuid}"
    assert second == f"1 {uuid.removeprefix('GPU-')} {512.0**3}"


def test_a_job_with_a_limit_of_memory_can_use_its_gpu(place: Place) -> None:
    text = python("import torch\nprint(torch.ones(8, device='cuda').sum().item())")
    run = place.launch(text, needs={"gpus": 1, "memory_bytes": 16 << 30})
    place.finishes(run)
    assert place.stdout(run) == "8.0\n"


def test_a_job_that_asks_for_no_gpu_sees_none(place: Place) -> None:
    run = place.launch(
        'echo "<$CUDA_VISIBLE_DEVICES> $NVIDIA_VISIBLE_DEVICES"\n'
        + python("import torch\nprint(torch.cuda.is_available(), torch.cuda.device_count())")
    )
    place.finishes(run)
    assert place.stdout(run) == "<> void\nFalse 0\n"


def test_a_second_job_waits_for_the_gpu_and_says_so(place: Place, tmp_path: Path) -> None:
    count = len(hardware(place)["inventory"]["accelerators"]["gpus"])
    flag = tmp_path / "go"
    first = place.launch(HOLD.format(flag), needs={"gpus": count})
    place.until(first, said("begun"), logs=True)
    second = place.launch("echo mine", needs={"gpus": 1})
    waiting = place.until(second, lambda item: item.get("waiting"))["waiting"]
    assert f"0 of {count} GPUs are free" in waiting
    assert "box" in waiting
    flag.touch()
    place.finishes(first)
    place.finishes(second)


def test_a_job_that_helps_itself_to_a_gpu_is_named(place: Place, tmp_path: Path) -> None:
    flag = tmp_path / "go"
    text = (
        "import os, time, torch\n"
        "x = torch.ones(512, 512, device='cuda')\n"
        f"while not os.path.exists({str(flag)!r}):\n"
        "    x = (x @ x).clamp(max=1)\n"
        "    torch.cuda.synchronize()"
    )
    run = place.launch(f"export CUDA_VISIBLE_DEVICES=0\n{python(text)}")
    item = place.until(run, noted)
    assert noted(item) == f"computes on {uuid_of(place)}, which it does not hold"
    status = json.loads(agent(place, "box", "status", "--json").stdout)
    assert [use["gpu"] for use in status["agent"]["unleased"]] == [uuid_of(place)]
    flag.touch()
    place.finishes(run)


ON_GPU = """
import numpy as np
import torch
from torch import nn
from fedml.federate.local_sgd import Evaluation, LocalSGD

sgd = LocalSGD(batch_size=16)
evaluate = Evaluation()

def model(config):
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 2))

def data(client, config):
    rng = np.random.default_rng(client.index)
    x = rng.normal(size=(64, 64)).astype(np.float32)
    return x, (x[:, 0] > 0).astype(np.int64)

def train(model, data, config, rng):
    model.to("cuda")
    found = sgd(model, data, config, rng)
    return {**found, "gpus": torch.cuda.device_count(), "peak": torch.cuda.max_memory_allocated()}
"""


# The built-in training; the evaluation is the user's own, and knows of no GPU.
BUILT_IN = (
    ON_GPU.split("sgd = ")[0]
    + """
train = LocalSGD(batch_size=16)

def evaluate(model, data, config):
    x, y = data
    found = (model(torch.from_numpy(x)).argmax(1).numpy() == y).mean()
    return {"accuracy": found, "peak": torch.cuda.max_memory_allocated(), "examples": len(y)}

"""
    + ON_GPU[ON_GPU.index("def model") : ON_GPU.index("def train")]
)


@pytest.mark.parametrize(("app", "peak"), [(ON_GPU, "train.peak"), (BUILT_IN, "devices.peak")])
def test_a_federated_run_trains_on_the_gpu_that_it_holds(app: str, peak: str, place: Place) -> None:
    run = place.federate(app, rounds=4, needs={"gpus": 1}, config={"lr": 0.5}, clients={"count": 1})
    place.finishes(run)
    rounds = place.client.call("GET", f"/v1/runs/{run}")["rounds"]
    metrics = [r["metrics"] for r in rounds if "train.loss" in r["metrics"]]
    assert metrics[-1][peak] > 0
    assert metrics[-1]["train.loss"] < metrics[0]["train.loss"]
    assert metrics[-1]["devices.accuracy"] > 0.9
    assert not [i for i in place.follow(run) if noted(i)]
