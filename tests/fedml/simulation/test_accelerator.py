# SPDX-License-Identifier: Apache-2.0
"""Training beside the CPU: which device, what is where, and what happens when memory runs out.

Where there is no GPU, three things stand in for one: torch's device ``meta``, whose tensors hold
nothing but refuse to meet those of the CPU; ``cpu:0``, which is the CPU, but whose name is not
``cpu``; and engines that say that memory has run out. The test at the end needs MPS; `test_cuda.py`
is for CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fedml import model as models
from fedml.errors import ConfigError
from fedml.federate import torch_sgd
from fedml.federate.algorithm import Correction, create
from fedml.federate.cohort import generator
from fedml.federate.local_sgd import LocalSGD
from fedml.model.arrays import to_arrays
from fedml.simulation import accelerator, engine, graphs, simulate
from fedml.simulation.crew import Crew
from fedml.simulation.plan import read
from fedml.simulation.result import ClientFailed, Listener
from fedml.simulation.run import Simulation
from fedml.simulation.stacked import Stacked
from tests.fedml.simulation import apps

SGD = LocalSGD(lr=0.1, batch_size=8, epochs=2)


def plan(folder: Path, text: str = apps.IMAGES, **more: Any) -> dict[str, Any]:
    return {
        "app": apps.write(folder, text).name,
        "workspace": str(folder),
        "rounds": 2,
        "config": {"lr": 0.1},
        "clients": {"count": 5},
        **more,
    }


class Heard(Listener):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def run(source: dict[str, Any], **settings: Any) -> tuple[Any, list[str]]:
    heard = Heard()
    return Simulation(read(source, **settings), debug=True, listener=heard).run(), heard.said


# ---------------------------------------------------------------------- which device


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.usefixtures("two_gpus")
def test_cuda_is_every_gpu_and_auto_takes_them_where_the_engine_can() -> None:
    both = ("cuda:0", "cuda:1")
    assert accelerator.found("auto") == accelerator.found("cuda") == both
    assert accelerator.found("cuda:1") == ("cuda:1",)
    assert accelerator.found("cpu") == ("cpu",)
    assert accelerator.choose("auto", both, "inplace", "") == (both, "torch sees it")
    assert accelerator.choose("auto", both, "closed_form", "")[0] == ("cpu",)
    with pytest.raises(ConfigError, match="no cuda:2: torch sees cuda:0, cuda:1"):
        accelerator.found("cuda:2")


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_auto_is_the_cpu_and_asking_for_one_says_why_not() -> None:
    assert accelerator.found("auto") == ("cpu",)
    for wanted, why in (("cuda", "sees no CUDA device"), ("mps", "sees no MPS")):
        with pytest.raises(ConfigError, match=why) as caught:
            accelerator.found(wanted)
        assert "--device cpu" in str(caught.value.hint)


def test_on_cuda_small_models_are_trained_side_by_side_and_others_one_by_one() -> None:
    def chosen(model: Any, algorithm: str = "fedavg", **more: Any) -> str:
        return engine.choose("auto", SGD, model, create(algorithm), device="cuda:0", **more)[0]

    small, large = models.create("cnn", side=12, classes=3), nn.Sequential(nn.Linear(2000, 600))
    assert chosen(small) == "stacked"
    assert chosen(large) == "inplace"
    assert chosen(small, "scaffold") == "inplace"
    assert chosen(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))) == "inplace"
    assert chosen(models.create("linear")) == "closed_form"
    assert chosen(models.create("linear"), insisted=True) == "stacked"


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("text", "more", "why"),
    [
        (apps.OWN_TRAIN, {}, "the engine exact .* stays on the CPU"),
        (apps.LINEAR, {}, "the engine closed_form .* stays on the CPU"),
        (apps.IMAGES, {"engine": "exact"}, "the engine exact .* stays on the CPU"),
    ],
)
def test_a_device_for_an_engine_of_the_cpu_is_refused_with_the_ways_out(
    text: str, more: dict[str, Any], why: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        run(plan(tmp_path, text), device="cuda", **more)
    assert "--device cpu or auto" in str(caught.value.hint)
    assert "inplace and stacked" in str(caught.value.hint)


def test_an_unknown_device_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no device 'tpu'; there are auto, cpu, cuda, cuda:N"):
        read(plan(tmp_path), device="tpu")
    assert read(plan(tmp_path, simulation={"device": "cuda:1"})).device == "cuda:1"


def test_there_is_a_process_for_each_gpu_unless_said_otherwise(tmp_path: Path) -> None:
    assert read(plan(tmp_path)).processes(("cuda:0", "cuda:1")) == 2
    assert read(plan(tmp_path), workers=3).processes(("cuda:0",)) == 3


@pytest.mark.parametrize(
    ("wanted", "visible", "guessed"),
    [
        ("auto", None, ("cuda:0", "cuda:1")),
        ("cuda", "1", ("cuda:0",)),
        ("auto", "", ("cpu",)),
        ("auto", "-1", ("cpu",)),
        ("cuda:1", None, ("cuda:1",)),
        ("cpu", None, ("cpu",)),
    ],
)
def test_as_many_processes_start_as_there_will_be_devices(
    wanted: str,
    visible: str | None,
    guessed: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert accelerator.guess(wanted, tmp_path) == guessed
    assert accelerator.guess("auto", tmp_path / "none") == accelerator.CPU


@pytest.mark.usefixtures("no_gpu")
def test_a_wrong_guess_is_made_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "guess", lambda wanted: ("cuda:0",))
    seen: list[int] = []
    simulation = Simulation(read(plan(tmp_path)))
    resized = Crew.resize

    def resize(crew: Crew, count: int) -> None:
        seen.append(len(crew.members))
        resized(crew, count)
        seen.append(len(crew.members))

    monkeypatch.setattr(Crew, "resize", resize)
    result = simulation.run()
    assert seen == [1, simulation.plan.processes(accelerator.CPU)]
    assert result.rounds == 2


@pytest.mark.usefixtures("no_gpu")
def test_the_engine_line_says_the_device_and_why(tmp_path: Path) -> None:
    _, said = run(plan(tmp_path))
    assert any(s.startswith("engine inplace") and "no CUDA device" in s for s in said)
    _, said = run(plan(tmp_path), device="cpu")
    assert any("device cpu: as asked" in s for s in said)


# ---------------------------------------------------------------------- what is where


class Elsewhere(TorchFunctionMode):
    """Makes ``meta`` a device like a GPU: nothing there meets anything of the CPU, but in a copy.

    Values that leave it are zeros, for it has none.
    """

    # Indices may come from the CPU, and `Module.to` compares.
    MAY_MEET = ("copy_", "__getitem__", "_has_compatible_shallow_copy_type")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        places = {t.device.type for t in given if t.dim()}
        if given and given[0].device.type == "meta":
            if func is torch.Tensor.__bool__:
                return True
            if func in (torch.Tensor.__float__, torch.Tensor.item):
                return 0.0
            if func is torch.Tensor.cpu:
                return torch.zeros(given[0].shape, dtype=given[0].dtype)
        assert len(places) < 2 or func.__name__ in self.MAY_MEET, f"{func.__name__} of {places}"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def meta() -> Iterator[str]:
    with Elsewhere():
        yield "meta"


DATA = [
    (
        np.random.default_rng(n).standard_normal((n, 1, 12, 12)).astype(np.float32),
        np.random.default_rng(n).integers(0, 3, n),
    )
    for n in (13, 1, 8)
]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", ["inplace", "stacked"])
def test_an_engine_keeps_all_that_it_works_with_on_its_device(
    name: str, momentum: float, meta: str
) -> None:
    trainer = LocalSGD(lr=0.1, batch_size=8, epochs=2, momentum=momentum, weight_decay=0.1)
    start = to_arrays(models.create("cnn", side=12, classes=3))
    made = engine.build(name, trainer, {}, models.create("cnn", side=12, classes=3), meta)
    total = {n: np.full(a.shape, np.nan) for n, a in start.items()}
    made.begin(start)
    rngs = [lambda k=k: generator(7, 2, k) for k in range(len(DATA))]
    for at in range(0, len(DATA), made.chunk):
        part = slice(at, at + made.chunk)
        made.train(range(len(DATA))[part], DATA[part], rngs[part])
    made.finish(total)
    assert not any(np.isnan(array).any() for array in total.values())


def test_the_built_in_training_goes_where_the_module_is(meta: str) -> None:
    module = models.create("cnn", side=12, classes=3)
    arrays = to_arrays(module)
    module.to(meta)
    steps, rng = SGD.steps({}), np.random.default_rng(0)
    correction = Correction(pull=0.1, anchor=arrays, shift=arrays, anchor_gradient=True,
                            momentum=arrays, beta=0.5)  # fmt: skip
    torch_sgd.train(module, *DATA[0], steps, "cross_entropy", rng, correction)
    found, _ = torch_sgd.gradient(module, *DATA[0], "cross_entropy")
    assert found.keys() == arrays.keys()
    assert torch_sgd.evaluate(module, *DATA[0], "cross_entropy", 4)["examples"] == 13


@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold"])
@pytest.mark.parametrize("name", ["inplace", "stacked"])
def test_processes_take_devices_in_turn_and_the_model_is_the_same(
    name: str, algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (name, algorithm) == ("stacked", "scaffold"):
        name = "auto"  # also the device's default
    asked = plan(tmp_path, algorithm=algorithm)
    wanted = simulate(asked, engine="inplace", device="cpu", workers=1).model
    monkeypatch.setattr(accelerator, "found", lambda _: ("cpu:0", "cpu:1"))
    heard = Heard()
    result = Simulation(read(asked, engine=name), listener=heard).run()
    line = next(s for s in heard.said if s.startswith("engine"))
    assert "on 2 processes" in line
    assert "device cpu:0, cpu:1: torch sees it" in line
    for key, array in wanted.items():
        np.testing.assert_allclose(result.model[key], array, rtol=0, atol=1e-5)


def test_examples_are_kept_on_the_device_while_there_is_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(accelerator, "free_bytes", lambda _: 1000.0)
    kept = accelerator.Kept("cpu:0")
    made: list[int] = []

    def make(client: int, rows: int) -> Any:
        made.append(client)
        return torch.zeros(rows, dtype=torch.float32), torch.zeros(0)

    for _ in range(2):
        kept.get(0, lambda: make(0, 100))  # 400 of the 500 bytes that may be taken
        kept.get(1, lambda: make(1, 100))
    assert made == [0, 1, 1]
    kept.forget([0])
    kept.get(1, lambda: make(1, 100))
    kept.get(1, lambda: make(1, 100))
    assert made == [0, 1, 1, 1]
    assert kept.free()
    assert not kept.free()
    kept.get(1, lambda: make(1, 1))
    kept.get(1, lambda: make(1, 1))
    assert made == [0, 1, 1, 1, 1, 1]


def test_updates_that_are_looked_at_one_by_one_are_trained_on_the_device_all_the_same() -> None:
    net = models.create("cnn", side=12, classes=3)

    def chosen(device: str, wanted: str = "auto", model: Any = net) -> str:
        return engine.choose(wanted, SGD, model, create("fedavg"), each=True, device=device)[0]

    assert chosen("cuda:0") == "inplace"
    assert chosen("cuda:0", "stacked") == "inplace"
    assert chosen("cuda:0", "exact") == "exact"
    assert chosen("cuda:0", model={"w": np.zeros((3, 2))}) == "exact"
    assert chosen("cpu") == "exact"


def test_recurrent_networks_are_not_trained_side_by_side() -> None:
    lstm = models.create("lstm", symbols=11, hidden=8)
    assert engine.choose("auto", SGD, lstm, create("fedavg"), device="cuda:0")[0] == "inplace"
    with pytest.raises(ConfigError, match="lstm is recurrent"):
        engine.choose("stacked", SGD, lstm, create("fedavg"))


def test_attention_side_by_side_learns_what_it_learns_alone(tmp_path: Path) -> None:
    text = """
import numpy as np
from fedml import model as models
from fedml.federate.local_sgd import LocalSGD

def model(config):
    sizes = {"symbols": 11, "length": 16, "width": 16, "heads": 2, "layers": 1}
    return models.create("transformer", **sizes, seed=1).double()

def data(client, config):
    text = np.random.default_rng(client.index).integers(0, 11, (5 + client.index, 17))
    return text[:, :-1], text[:, 1:]

train = LocalSGD(batch_size=4)
"""
    alone, _ = run(plan(tmp_path, text), engine="inplace")
    beside, _ = run(plan(tmp_path, text), engine="stacked")
    for key, array in alone.model.items():
        np.testing.assert_allclose(beside.model[key], array, rtol=0, atol=1e-12)


def test_a_model_that_cannot_be_trained_side_by_side_is_told_the_engine_that_can(
    tmp_path: Path,
) -> None:
    asks = """
class Asks(nn.Sequential):
    def forward(self, x):
        z = super().forward(x)
        return z if z.sum().item() < 1e9 else -z

"""
    text = apps.IMAGES.replace("\ndef model", f"{asks}def model", 1)
    text = text.replace("return nn.Sequential(", "return Asks(")
    run(plan(tmp_path, text), engine="inplace")
    with pytest.raises(ClientFailed, match=r"side by side, --engine inplace does without: .*vmap"):
        run(plan(tmp_path, text), engine="stacked")


def test_only_modules_known_to_decide_nothing_in_python_are_recorded() -> None:
    class Own(nn.Linear):
        """It might."""

    def recorded(module: nn.Module, device: str = "cuda:0") -> bool:
        return graphs.can_record(module, device)

    assert recorded(models.create("cnn"))
    assert recorded(nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.Tanh()))
    assert not recorded(models.create("cnn"), "cpu")
    assert not recorded(nn.Sequential(Own(4, 2)))
    assert not recorded(models.create("lstm"))
    hooked = nn.Linear(4, 2)
    hooked.register_forward_hook(lambda *_: None)
    assert not recorded(hooked)


def test_a_shape_is_recorded_at_its_third_step_and_none_after_memory_ran_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    total, done = torch.zeros(()), []

    class Replayed:
        """What a graph does, as far as this can be had on the CPU: the step, on kept tensors."""

        def __init__(self, places: Any) -> None:
            self.places = places

        def replay(self) -> None:
            done.append("replayed")
            step(*self.places)

    def step(x: torch.Tensor) -> None:
        total.add_(x.sum())

    def record(self: Any, inputs: Any) -> Any:
        places = tuple(torch.empty_like(tensor) for tensor in inputs)
        return graphs._Recorded(Replayed(places), places)  # type: ignore[arg-type]

    def is_fit(take: Any) -> bool:
        take()
        return True

    monkeypatch.setattr(graphs, "_is_fit", is_fit)
    monkeypatch.setattr(graphs.Graphs, "_record", record)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    steps = graphs.Graphs(step, record=True)
    for n in range(1, 6):
        steps(torch.full((2,), float(n)))
        steps(torch.full((n,), 1.0))  # each but one of a shape that is not met again
    assert float(total) == 2 * 15 + 15
    assert done == ["replayed"] * 4  # the third to the sixth of two
    assert steps.free()
    assert not steps.free()
    for _ in range(4):
        steps(torch.ones(2))
    assert float(total) == 45 + 8
    assert len(done) == 4


# ---------------------------------------------------------------------- memory runs out


def tight(monkeypatch: pytest.MonkeyPatch, most: int, error: Exception) -> list[int]:
    """Training of more than ``most`` clients at once fails; how many each try was of."""
    tries: list[int] = []
    train = Stacked.train

    def tried(self: Stacked, clients: Any, data: Any, rngs: Any) -> Any:
        tries.append(len(clients))
        if len(clients) > most:
            raise error
        return train(self, clients, data, rngs)

    monkeypatch.setattr(Stacked, "train", tried)
    return tries


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("MPS backend out of memory")],
)
def test_out_of_memory_the_chunk_is_halved_and_the_run_goes_on(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = plan(tmp_path, clients={"count": 9})
    wanted, _ = run(asked, engine="stacked")
    tries = tight(monkeypatch, 2, error)
    found, said = run(asked, engine="stacked")
    # 9, a half of it, a half of that; from then on as many as have fitted.
    assert tries == [9, 4, 2, 2, 4, 2, 2, 1, 2, 2, 2, 2, 1]
    assert "round 1: out of memory on cpu with 9 clients at once: on with 4" in "\n".join(said)
    for key, array in wanted.model.items():
        np.testing.assert_allclose(found.model[key], array, rtol=0, atol=1e-6)


def test_out_of_memory_with_one_client_names_it_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tight(monkeypatch, 0, torch.OutOfMemoryError("CUDA out of memory."))
    monkeypatch.setattr(accelerator, "found", lambda _: ("cpu:0",))
    with pytest.raises(ClientFailed) as caught:
        run(plan(tmp_path), engine="stacked")
    assert str(caught.value) == (
        "client 0 failed in round 1: out of memory on cpu:0 with this client alone: "
        "a smaller batch_size, or --device cpu"
    )


def test_out_of_memory_kept_examples_go_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerator, "found", lambda _: ("cpu:0",))
    asked = plan(tmp_path)
    train, tries = Stacked.train, []

    def tried(self: Stacked, clients: Any, data: Any, rngs: Any) -> Any:
        tries.append(len(clients))
        found = train(self, clients, data, rngs)
        if len(tries) == 2:  # in the second round; nothing was kept before
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return found

    monkeypatch.setattr(Stacked, "train", tried)
    _, said = run(asked, engine="stacked")
    assert tries == [5, 5, 5]
    assert "round 2: out of memory on cpu:0: no examples are kept there any more" in said


def test_out_of_memory_in_code_of_the_users_own_keeps_its_traceback(tmp_path: Path) -> None:
    text = apps.OWN_TRAIN.replace(
        "    model.train()\n", '    raise torch.OutOfMemoryError("CUDA out of memory.")\n'
    )
    with pytest.raises(ClientFailed, match="Traceback"):
        run(plan(tmp_path, text))


# ---------------------------------------------------------------------- on the hardware itself


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason="torch sees no MPS device here")
@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold", "mime"])
@pytest.mark.parametrize("name", ["inplace", "stacked"])
def test_mps_comes_to_the_model_of_the_cpu(name: str, algorithm: str, tmp_path: Path) -> None:
    if algorithm != "fedavg":
        name = "inplace"
    asked = plan(tmp_path, algorithm=algorithm, rounds=3)
    wanted = simulate(asked, engine=name, device="cpu", workers=1)
    found = simulate(asked, engine=name, device="mps")
    for key, array in wanted.model.items():
        np.testing.assert_allclose(found.model[key], array, rtol=0, atol=1e-4)
