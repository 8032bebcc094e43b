# SPDX-License-Identifier: Apache-2.0
"""Every engine ends where the plain loop ends: torch's own optimiser, client after client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedml import model as models
from fedml.errors import ConfigError
from fedml.federate.algorithm import create
from fedml.federate.cohort import generator
from fedml.federate.local_sgd import Evaluation, LocalSGD
from fedml.model.arrays import set_arrays, to_arrays
from fedml.simulation import engine, simulate
from tests.fedml.simulation import apps

SIZES = (13, 1, 8, 0, 21)  # a single example, a full batch, nothing at all


def clients(inputs: tuple[int, ...], classes: int = 3) -> list[tuple[Any, Any]]:
    rng = np.random.default_rng(3)
    return [
        (
            rng.standard_normal((n, *inputs)).astype(np.float32),
            rng.integers(0, classes, n),
        )
        for n in SIZES
    ]


def plain_loop(
    module: nn.Module, data: Sequence[tuple[Any, Any]], trainer: LocalSGD, loss: Any
) -> dict[str, Any]:
    """FedAvg's sum of ``n_k (w_k - w)``, as anybody would write it with torch.optim."""
    start = {n: a.copy() for n, a in to_arrays(module).items()}
    total = {n: np.zeros(a.shape) for n, a in start.items()}
    steps = trainer.steps({})
    for k, (x, y) in enumerate(data):
        set_arrays(module, start)
        module.train()
        optimiser = torch.optim.SGD(
            module.parameters(),
            lr=steps.lr,
            momentum=steps.momentum,
            weight_decay=steps.weight_decay,
        )
        rng = generator(7, 2, k)
        rng.integers(2**31)
        for _ in range(steps.epochs):
            order = rng.permutation(len(x)) if steps.shuffle else np.arange(len(x))
            for at in range(0, len(x), steps.batch_size):
                rows = order[at : at + steps.batch_size]
                optimiser.zero_grad()
                loss(module(torch.from_numpy(x[rows])), torch.from_numpy(y[rows])).backward()
                optimiser.step()
        for name, array in to_arrays(module).items():
            total[name] += len(x) * (array.astype(np.float64) - start[name])
    set_arrays(module, start)
    return total


def summed(
    made: engine.Engine, start: Mapping[str, Any], data: Sequence[Any]
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    total = {name: np.full(array.shape, np.nan) for name, array in start.items()}
    found: list[dict[str, float]] = []
    made.begin(start)
    everybody = list(range(len(data)))
    for at in range(0, len(data), made.chunk):
        part = everybody[at : at + made.chunk]
        rngs = [lambda k=k: generator(7, 2, k) for k in part]
        found += made.train(part, [data[k] for k in part], rngs)
    made.finish(total)
    return total, found


def assert_close(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_allclose(found[name] / 43, wanted[name] / 43, rtol=0, atol=1e-6)


VARIANTS = {
    "plain": LocalSGD(lr=0.1, batch_size=8),
    "epochs": LocalSGD(lr=0.1, batch_size=5, epochs=3),
    "in order": LocalSGD(lr=0.1, batch_size=5, epochs=2, shuffle=False),
    "momentum": LocalSGD(lr=0.05, batch_size=4, epochs=2, momentum=0.9, weight_decay=0.01),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["closed_form", "inplace", "stacked"])
def test_softmax_regression_ends_where_the_plain_loop_ends(name: str, variant: str) -> None:
    trainer, data = VARIANTS[variant], clients((2, 3))
    module = models.create("linear", inputs=6, outputs=3, seed=1)
    wanted = plain_loop(module, data, trainer, nn.functional.cross_entropy)
    made = engine.build(name, trainer, {}, models.create("linear", inputs=6, outputs=3))
    start = {n: a.copy() for n, a in to_arrays(module).items()}
    total, found = summed(made, start, data)
    assert_close(total, wanted)
    assert [each["examples"] for each in found] == list(SIZES)
    # A second round from the same start adds up to the same: nothing of the first one is left.
    assert_close(summed(made, start, data)[0], wanted)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_dict_model_ends_where_torch_ends(variant: str) -> None:
    trainer, data = VARIANTS[variant], clients((6,))
    module = models.create("linear", inputs=6, outputs=3, seed=1)
    wanted = plain_loop(module, data, trainer, nn.functional.cross_entropy)
    start = {
        "w": module.linear.weight.detach().numpy().T.copy(),
        "b": module.linear.bias.detach().numpy().copy(),
    }
    made = engine.build("closed_form", trainer, {}, {n: a.copy() for n, a in start.items()})
    total, _ = summed(made, start, data)
    assert_close({"linear.weight": total["w"].T, "linear.bias": total["b"]}, wanted)


@pytest.mark.parametrize("name", ["inplace", "stacked"])
@pytest.mark.parametrize("variant", ["epochs", "momentum"])
def test_a_convolutional_net_ends_where_the_plain_loop_ends(name: str, variant: str) -> None:
    trainer, data = VARIANTS[variant], clients((1, 12, 12))
    sizes = {"side": 12, "classes": 3}
    module = models.create("cnn", **sizes, seed=1)
    wanted = plain_loop(module, data, trainer, nn.functional.cross_entropy)
    made = engine.build(name, trainer, {}, models.create("cnn", **sizes))
    total, _ = summed(made, {n: a.copy() for n, a in to_arrays(module).items()}, data)
    assert_close(total, wanted)


@pytest.mark.parametrize("name", ["closed_form", "inplace", "stacked"])
@pytest.mark.parametrize("loss", ["logistic", "squared"])
def test_the_other_losses_end_where_the_plain_loop_ends(name: str, loss: str) -> None:
    trainer = LocalSGD(lr=0.1, batch_size=5, epochs=2, loss=loss)
    data = [(x, (y > 0).astype(np.float32)) for x, y in clients((4,))]

    def torch_loss(z: Any, y: Any) -> Any:
        y = y.reshape(z.shape)
        if loss == "squared":
            return nn.functional.mse_loss(z, y)
        return nn.functional.binary_cross_entropy_with_logits(z, y)

    module = models.create("linear", inputs=4, outputs=1, seed=1)
    wanted = plain_loop(module, data, trainer, torch_loss)
    made = engine.build(name, trainer, {}, models.create("linear", inputs=4, outputs=1))
    total, _ = summed(made, {n: a.copy() for n, a in to_arrays(module).items()}, data)
    assert_close(total, wanted)


def test_running_statistics_are_averaged_by_inplace_too() -> None:
    trainer, data = VARIANTS["epochs"], [d for d in clients((4,)) if len(d[0]) != 1]
    trainer = LocalSGD(lr=0.1, batch_size=50, epochs=3)  # batch normalisation needs two examples
    data = [d for d in data if len(d[0])]

    def build() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))

    module = build()
    wanted = plain_loop(module, data, trainer, nn.functional.cross_entropy)
    made = engine.build("inplace", trainer, {}, build())
    total, _ = summed(made, {n: a.copy() for n, a in to_arrays(module).items()}, data)
    assert_close(total, wanted)
    assert total["1.num_batches_tracked"] == sum(3 * len(x) for x, _ in data)


@pytest.mark.parametrize(("app", "engines"), [
    (apps.LINEAR, ["closed_form"]),
    (apps.IMAGES, ["inplace", "stacked"]),
])  # fmt: skip
def test_whole_runs_agree_with_exact_to_a_millionth(
    app: str, engines: list[str], tmp_path: Path
) -> None:
    plan = {
        "app": apps.write(tmp_path, app).name,
        "workspace": str(tmp_path),
        "rounds": 3,
        "config": {"lr": 0.05},
        "clients": {"count": 6, "per_round": 4},
        "evaluate": {"every": 2},
    }
    exact = simulate(plan, engine="exact", debug=True)
    for name in engines:
        other = simulate(plan, engine=name, debug=True)
        for tensor, array in exact.model.items():
            np.testing.assert_allclose(other.model[tensor], array, rtol=0, atol=2e-6)
        for metric, value in exact.metrics.items():
            assert other.metrics[metric] == pytest.approx(value, abs=1e-5), metric


def test_bfloat16_is_asked_for_and_learns_as_well() -> None:
    data = clients((1, 12, 12))
    module = models.create("cnn", side=12, classes=3, seed=1)
    start = {n: a.copy() for n, a in to_arrays(module).items()}
    losses = {}
    for bf16 in (False, True):
        trainer = LocalSGD(lr=0.05, batch_size=8, epochs=4, bf16=bf16)
        _, found = summed(engine.build("inplace", trainer, {}, module), start, data)
        losses[bf16] = [each["loss"] for each in found]
    assert losses[True] != losses[False]
    assert losses[True] == pytest.approx(losses[False], rel=0.02)
    linear = models.create("linear")
    assert engine.choose("auto", LocalSGD(bf16=True), linear, create("fedavg"))[0] == "inplace"
    said = {"bf16": True}
    assert engine.choose("auto", LocalSGD(), linear, create("fedavg"), said)[0] == "inplace"


def test_an_engine_is_chosen_by_model_and_training_and_says_why() -> None:
    fedavg, scaffold = create("fedavg"), create("scaffold")
    sgd, linear, cnn = LocalSGD(), models.create("linear"), models.create("cnn")
    assert engine.choose("auto", sgd, linear, fedavg)[0] == "closed_form"
    assert engine.choose("auto", sgd, nn.Linear(3, 2), create("fedadam"))[0] == "closed_form"
    assert engine.choose("auto", sgd, cnn, fedavg)[0] == "inplace"
    assert engine.choose("auto", sgd, linear, scaffold)[0] == "inplace"
    assert engine.choose("auto", lambda: None, linear, fedavg) == (
        "exact",
        "`train` is your own code",
    )
    hidden = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    assert engine.linear_names(hidden) is None


@pytest.mark.parametrize(("wanted", "model", "algorithm", "why"), [
    ("closed_form", models.create("cnn"), "fedavg", "not one linear map"),
    ("stacked", nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), "fedavg", "running statistics"),
    ("stacked", nn.Sequential(nn.Linear(2, 2), nn.Dropout()), "fedavg", "random numbers"),
    ("stacked", models.create("linear"), "scaffold", "do more than train"),
    ("inplace", {"w": np.zeros((2, 2)), "b": np.zeros(2)}, "fedavg", "not a torch module"),
])  # fmt: skip
def test_an_engine_that_cannot_run_it_is_refused_with_a_way_out(
    wanted: str, model: Any, algorithm: str, why: str
) -> None:
    with pytest.raises(ConfigError, match=why) as refused:
        engine.choose(wanted, LocalSGD(), model, create(algorithm))
    assert refused.value.hint.startswith("engine: ")


def test_a_fast_engine_for_a_train_function_of_ones_own_names_both_ways_out() -> None:
    with pytest.raises(ConfigError, match="`train` is your own code") as refused:
        engine.choose("inplace", lambda: None, models.create("linear"), create("fedavg"))
    assert "LocalSGD" in refused.value.hint
    assert "engine: exact" in refused.value.hint


@pytest.mark.parametrize("name", ["closed_form", "inplace", "stacked"])
def test_nan_in_the_data_is_found_and_adds_nothing(name: str) -> None:
    data = clients((6,))
    data[1][0][0, 0] = np.nan
    module = models.create("linear", inputs=6, outputs=3)
    start = {n: a.copy() for n, a in to_arrays(module).items()}
    made = engine.build(name, LocalSGD(lr=0.1), {}, module)
    made.begin(start)
    with pytest.raises(engine.Diverged):
        made.train([1], [data[1]], [lambda: generator(0, 0, 1)])
    total = {n: np.empty(a.shape) for n, a in start.items()}
    made.finish(total)
    assert not any(array.any() for array in total.values())


def test_evaluation_is_the_same_for_a_dict_and_a_module() -> None:
    x, y = clients((6,))[4]
    module = models.create("linear", inputs=6, outputs=3, seed=1)
    weight, bias = (p.detach() for p in module.parameters())
    arrays = {"w": weight.numpy().T, "b": bias.numpy()}
    a, b = Evaluation()(module, (x, y), {}), Evaluation()(arrays, (x, y), {})
    assert a == pytest.approx(b)
    z = torch.from_numpy(x) @ weight.T + bias
    assert a["loss"] == pytest.approx(nn.functional.cross_entropy(z, torch.from_numpy(y)).item())
