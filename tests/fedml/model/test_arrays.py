# SPDX-License-Identifier: Apache-2.0
"""Modules to arrays and back, bit for bit."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedml import model
from fedml.model.arrays import parameter_count, set_arrays, to_arrays, use_arrays


def with_statistics() -> nn.Module:
    """Parameters, running statistics, a counter and a frozen weight."""
    torch.manual_seed(2)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 2)
    )
    net[3].weight.requires_grad_(False)
    net(torch.rand(5, 1, 3, 3))  # moves the statistics
    return net


def test_arrays_hold_buffers_too_in_the_order_of_the_module() -> None:
    arrays = to_arrays(with_statistics())

    assert list(arrays) == list(with_statistics().state_dict())
    assert arrays["1.running_mean"].any()
    assert arrays["1.num_batches_tracked"].dtype == np.int64
    assert arrays["1.num_batches_tracked"].shape == ()
    assert arrays["1.num_batches_tracked"] == 1


@pytest.mark.parametrize("name", ["cnn", "lstm", "resnet20", "transformer", "gin"])
def test_a_model_survives_the_round_trip_bit_for_bit(name: str) -> None:
    source, target = model.create(name, seed=1), model.create(name, seed=2)
    set_arrays(target, to_arrays(source))

    for key, value in to_arrays(source).items():
        assert to_arrays(target)[key].tobytes() == value.tobytes()


@given(st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=6, max_size=6))
def test_every_float_survives(values: list[float]) -> None:
    net = nn.Linear(3, 2, bias=False)
    array = np.asarray(values, np.float32).reshape(2, 3)
    set_arrays(net, {"weight": array})
    assert to_arrays(net)["weight"].tobytes() == array.tobytes()


def test_arrays_are_the_modules_own_memory() -> None:
    net = nn.Linear(3, 2)
    arrays = to_arrays(net)
    with torch.no_grad():
        net.weight.fill_(4.0)
    assert (arrays["weight"] == 4.0).all()
    arrays["weight"][:] = 5.0
    assert (net.weight == 5.0).all()


def test_setting_copies_and_reads_memory_that_is_read_only_or_mapped(tmp_path: Path) -> None:
    net = nn.Linear(3, 2)
    np.save(tmp_path / "weight.npy", np.full((2, 3), 7.0, np.float32))
    mapped = np.load(tmp_path / "weight.npy", mmap_mode="r")
    set_arrays(net, {"weight": mapped, "bias": np.zeros(2, np.float32)})
    assert (net.weight == 7.0).all()
    with torch.no_grad():
        net.weight.fill_(1.0)
    assert (mapped == 7.0).all()


def test_setting_keeps_a_layout_of_its_own() -> None:
    net = nn.Conv2d(3, 4, 3)
    net.weight.data = net.weight.data.contiguous(memory_format=torch.channels_last)
    values = np.arange(108, dtype=np.float32).reshape(4, 3, 3, 3)
    set_arrays(net, {"weight": values, "bias": np.zeros(4, np.float32)})

    assert net.weight.is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(to_arrays(net)["weight"], values)


def test_a_module_can_live_in_given_memory_and_train_there() -> None:
    net = with_statistics()
    own = to_arrays(net)
    memory = {name: array.copy() for name, array in own.items()}
    optimiser = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    use_arrays(net, memory)
    before = {name: array.copy() for name, array in memory.items()}

    (net(torch.rand(5, 1, 3, 3)) ** 2).sum().backward()
    optimiser.step()

    changed = {name for name in memory if not np.array_equal(memory[name], before[name])}
    assert changed == set(memory) - {"3.weight"}  # the frozen one
    assert np.array_equal(to_arrays(net)["0.weight"], memory["0.weight"])
    assert not np.array_equal(own["0.weight"], memory["0.weight"])


def test_using_read_only_memory_is_refused() -> None:
    net = nn.Linear(3, 2)
    arrays = {name: array.copy() for name, array in to_arrays(net).items()}
    arrays["bias"].flags.writeable = False
    with pytest.raises(ValueError, match="bias is read-only"):
        use_arrays(net, arrays)


def test_bfloat16_travels_as_float32_without_loss() -> None:
    source = nn.Linear(5, 4).to(torch.bfloat16)
    target = nn.Linear(5, 4).to(torch.bfloat16)
    arrays = to_arrays(source)
    set_arrays(target, arrays)

    assert arrays["weight"].dtype == np.float32
    assert torch.equal(source.weight, target.weight)
    with pytest.raises(ValueError, match="use set_arrays"):
        use_arrays(target, arrays)


def test_tied_weights_stay_tied() -> None:
    net = nn.ModuleDict({"read": nn.Embedding(4, 3), "write": nn.Linear(3, 4, bias=False)})
    net["write"].weight = net["read"].weight
    arrays = {name: np.ones((4, 3), np.float32) for name in to_arrays(net)}
    use_arrays(net, arrays)

    assert net["write"].weight is net["read"].weight
    assert parameter_count(net) == 12


def test_arrays_that_do_not_fit_are_listed_and_nothing_changes() -> None:
    net = nn.Linear(3, 2)
    before = net.weight.detach().clone()
    good = np.zeros((2, 3), np.float32)
    with pytest.raises(ValueError, match=r"no array for bias; extra is not in the module"):
        set_arrays(net, {"weight": good, "extra": good})
    with pytest.raises(ValueError, match=r"weight is float32\(3, 2\), not float32\(2, 3\)"):
        set_arrays(net, {"weight": good.T, "bias": np.zeros(2, np.float32)})
    with pytest.raises(ValueError, match="bias is float64"):
        set_arrays(net, {"weight": good, "bias": np.zeros(2)})
    assert torch.equal(before, net.weight)
