# SPDX-License-Identifier: Apache-2.0
"""Model families by name, built from their published descriptions.

    net = model.create("cnn", classes=62, seed=7)

The same name, sizes and seed give the same weights, bit for bit. Sizes that are not given are
those of the paper. torch is imported by the family's own module and only when one of its models
is built.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = ["UnknownModel", "create", "names", "sizes"]


class UnknownModel(LookupError):
    """No family has this name."""


@dataclass(frozen=True, slots=True)
class _Family:
    """Where a model is: ``fedml.model.<module>.<build>``, and sizes that its name implies."""

    module: str
    build: str
    implied: Mapping[str, Any]


def _family(module: str, build: str, **implied: Any) -> _Family:
    return _Family(module, build, implied)


_FAMILIES: Mapping[str, _Family] = {
    "linear": _family("linear", "Linear"),
    "mlp": _family("mlp", "Perceptron"),
    "cnn": _family("cnn", "FedAvgCNN"),
    "lenet": _family("lenet", "LeNet"),
    "resnet20": _family("resnet", "CifarResNet", depth=20),
    "resnet56": _family("resnet", "CifarResNet", depth=56),
    "resnet18_gn": _family("resnet", "ResNet18"),
    "lstm": _family("lstm", "CharacterLSTM"),
    "transformer": _family("transformer", "Transformer"),
    "gcn": _family("graph", "GCN"),
    "graphsage": _family("graph", "GraphSAGE"),
    "gin": _family("graph", "GIN"),
    "unet": _family("unet", "UNet"),
    "matrix_factorisation": _family("factorisation", "MatrixFactorisation"),
}
# Other spellings, those of FedML's configuration files among them.
_ALIASES: Mapping[str, str] = {
    "lr": "linear",
    "logistic": "linear",
    "softmax": "linear",
    "2nn": "mlp",
    "rnn": "lstm",
    "sage": "graphsage",
    "resnet18": "resnet18_gn",
    "gpt": "transformer",
    "mf": "matrix_factorisation",
    "matrix_factorization": "matrix_factorisation",
}


def names() -> tuple[str, ...]:
    """Every family, sorted; `create` also takes common other spellings of them."""
    return tuple(sorted(_FAMILIES))


def sizes(name: str) -> dict[str, Any]:
    """The sizes that a family takes and their values where `create` is not told.

    Raises:
        UnknownModel: No family has this name.
    """
    family = _find(name)
    parameters = inspect.signature(_builder(family)).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters} | dict(family.implied)


def create(name: Any, output_dim: int | None = None, *, seed: int = 0, **sizes: Any) -> nn.Module:
    """Build a model and initialise it from ``seed`` alone.

    torch's own random state is left as it was. With the arguments of a FedML script, it is the
    model that they name for the data set that they name, initialised as `fedml.init` seeded.

    Args:
        name: One of `names`, or a common other spelling; or what `fedml.init` returns.
        output_dim: With a script's arguments: its classes.
        seed: Of the initial weights.
        **sizes: What differs from the published model; see `sizes`.

    Raises:
        UnknownModel: No family has this name; the nearest names are in the message.
        TypeError: The family has no such size; the ones that it has are in the message.
        ValueError: The sizes do not fit together.
    """
    if not isinstance(name, str):
        from fedml import named

        of_script: nn.Module = named.of_arguments(name, output_dim)
        return of_script
    family = _find(name)
    build = _builder(family)
    known = inspect.signature(build).parameters
    for size in sizes:
        if size not in known:
            raise TypeError(f"{name} has no size {size!r}; it has {', '.join(known)}")
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made: nn.Module = build(**{**family.implied, **sizes})
    return made


def _find(name: str) -> _Family:
    key = name.lower().replace("-", "_")
    key = _ALIASES.get(key, key)
    if key in _FAMILIES:
        return _FAMILIES[key]
    known = [*_FAMILIES, *_ALIASES]
    near = get_close_matches(key, known, n=3, cutoff=0.5) or names()
    raise UnknownModel(f"no model is called {name!r}; try {', '.join(near)}")


def _builder(family: _Family) -> Any:
    return getattr(importlib.import_module(f"fedml.model.{family.module}"), family.build)
