# SPDX-License-Identifier: Apache-2.0
"""Models by name: published sizes, seeds, and errors that help."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedml import model
from fedml.model.arrays import parameter_count, to_arrays
from fedml.model.graph import adjacency

# Name, sizes, number of parameters, where the number is published (or follows from).
PUBLISHED: list[tuple[str, dict[str, Any], int]] = [
    ("linear", {}, 784 * 10 + 10),
    ("mlp", {}, 199_210),  # McMahan et al. 2017, the 2NN
    ("cnn", {}, 1_663_370),  # McMahan et al. 2017
    ("lenet", {}, 44_426),  # Li et al. 2022, on 28x28 images
    ("lenet", {"padding": 2}, 61_706),  # LeNet-5 on 32x32
    ("resnet20", {}, 269_722),  # He et al. 2016, table 6: 0.27 M
    ("resnet56", {}, 853_018),  # He et al. 2016, table 6: 0.85 M
    ("resnet18_gn", {"classes": 1000}, 11_689_512),  # He et al. 2016
    ("lstm", {}, 820_522 + 2 * 4 * 256),  # Reddi et al. 2021, and torch's second biases
    ("gcn", {}, 1433 * 16 + 16 + 16 * 7 + 7),  # Kipf and Welling 2017, on Cora
    ("unet", {"channels": 3, "classes": 1}, 31_037_633),  # the width of Ronneberger et al. 2015
    ("matrix_factorisation", {"width": 8}, (943 + 1682) * 9 + 1),
]

IMAGE = {"cnn": (1, 28), "lenet": (1, 28), "resnet20": (3, 32), "resnet56": (3, 32)}
IMAGE |= {"resnet18_gn": (3, 32), "unet": (1, 32)}
SMALL: dict[str, dict[str, Any]] = {"unet": {"width": 8, "depth": 2}}


def inputs(name: str) -> tuple[Tensor, ...]:
    """A few examples that a model of default size takes."""
    torch.manual_seed(5)
    match name:
        case "linear" | "mlp":
            return (torch.rand(3, 1, 28, 28),)
        case "lstm" | "transformer":
            return (torch.randint(90, (3, 12)),)
        case "matrix_factorisation":
            return (torch.stack([torch.arange(943), torch.randint(1682, (943,))], dim=1),)
        case "gcn" | "graphsage" | "gin":
            weighting = {"gcn": "gcn", "graphsage": "mean", "gin": "sum"}[name]
            ring = np.stack([np.arange(9), (np.arange(9) + 1) % 9])
            return (torch.rand(9, 1433), adjacency(ring, 9, weighting))  # type: ignore[arg-type]
    channels, side = IMAGE[name]
    return (torch.rand(3, channels, side, side),)


@pytest.mark.parametrize(("name", "sizes", "parameters"), PUBLISHED)
def test_models_have_their_published_number_of_parameters(
    name: str, sizes: dict[str, Any], parameters: int
) -> None:
    assert parameter_count(model.create(name, **sizes)) == parameters


def test_at_gpt2s_sizes_the_transformer_is_gpt2() -> None:
    with torch.device("meta"):  # no memory for half a gigabyte of weights
        gpt2 = model.create(
            "transformer", symbols=50_257, length=1024, width=768, heads=12, layers=12
        )
    assert parameter_count(gpt2) == 124_439_808


def test_the_unet_has_the_23_convolutions_of_the_paper() -> None:
    layers = [*model.create("unet", width=8).modules()]
    assert sum(isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) for layer in layers) == 23


@pytest.mark.parametrize("name", model.names())
def test_outputs_have_the_documented_shape(name: str) -> None:
    net = model.create(name, **SMALL.get(name, {})).eval()
    given = inputs(name)
    shape = tuple(net(*given).shape)

    expected = {
        "lstm": (3, 90, 12),
        "transformer": (3, 97, 12),
        "matrix_factorisation": (943,),
        "gcn": (9, 7),
        "graphsage": (9, 7),
        "gin": (9, 7),
        "unet": (3, 2, 32, 32),
    }
    assert shape == expected.get(name, (3, 10))


@pytest.mark.parametrize("name", model.names())
def test_gradient_reaches_every_parameter(name: str) -> None:
    net = model.create(name, **SMALL.get(name, {}))
    (net(*inputs(name)) ** 2).sum().backward()

    unreached = [
        key
        for key, parameter in net.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().sum() > 0
    ]
    assert unreached == []


@pytest.mark.parametrize("name", model.names())
def test_a_seed_decides_every_weight(name: str) -> None:
    small = SMALL.get(name, {})
    one, same, other = (to_arrays(model.create(name, seed=seed, **small)) for seed in (1, 1, 2))

    assert all(np.array_equal(one[key], same[key]) for key in one)
    assert any(not np.array_equal(one[key], other[key]) for key in one)


def test_building_a_model_leaves_torchs_random_state_alone() -> None:
    torch.manual_seed(9)
    before = torch.get_rng_state()
    model.create("cnn", seed=3)
    assert torch.equal(before, torch.get_rng_state())


def test_names_have_the_spellings_that_fedml_configurations_use() -> None:
    for name in ("lr", "cnn", "lenet", "rnn", "resnet18_gn", "resnet20", "resnet56", "gcn"):
        assert isinstance(model.create(name), nn.Module)
    for name in ("sage", "graphsage", "gin", "GIN", "unet"):
        assert model.sizes(name)


def test_an_unknown_name_gets_the_nearest_ones() -> None:
    with pytest.raises(model.UnknownModel, match="resnet56"):
        model.create("resnet55")
    with pytest.raises(model.UnknownModel, match="transformer"):
        model.create("xyzzy")


def test_an_unknown_size_gets_the_known_ones() -> None:
    with pytest.raises(TypeError, match="channels, side, classes"):
        model.create("cnn", num_classes=10)


def test_sizes_are_those_of_the_name() -> None:
    assert model.sizes("resnet56")["depth"] == 56
    assert model.sizes("lr") == {"inputs": 784, "outputs": 10}


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("cnn", {"side": 30}),
        ("lenet", {"side": 8}),
        ("resnet20", {"depth": 21}),
        ("transformer", {"width": 10, "heads": 3}),
        ("unet", {"width": 10}),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused(name: str, sizes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be|leaves nothing|no multiple"):
        model.create(name, **sizes)


def test_inputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 16"):
        model.create("unet", width=8)(torch.rand(1, 1, 24, 30))
    with pytest.raises(ValueError, match="takes 128"):
        model.create("transformer")(torch.zeros(1, 129, dtype=torch.int64))


def test_the_page_lists_every_family_with_its_sizes_and_other_spellings() -> None:
    page = (Path(__file__).parents[3] / "docs" / "models.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \| ([\d,]+) \|$", page, re.M)
    shown = {name: (sizes.strip(), int(count.replace(",", ""))) for name, sizes, count in rows}
    with torch.device("meta"):  # sizes only
        made = {
            name: (
                ", ".join(f"`{size}={value}`" for size, value in model.sizes(name).items()),
                parameter_count(model.create(name)),
            )
            for name in model.names()
        }
    assert shown == made
    also = page[page.index("Also understood") :].partition("\n\n")[0]
    for spelling, name in model._ALIASES.items():
        assert re.search(rf"`{spelling}`[^)]*\(`{name}`\)", also), spelling
    assert set(re.findall(r"`(\w+)`", also)) == {*model._ALIASES, *model._ALIASES.values()}


def test_torch_is_imported_only_when_a_model_is_built() -> None:
    script = (
        "import sys, fedml.model as m; m.names(); print('torch' in sys.modules);"
        "m.create('lr'); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "True"]
