# SPDX-License-Identifier: Apache-2.0
"""The built-in training: plain SGD on a client's examples, so that a user file need not write it.

    train = LocalSGD(loss="cross_entropy")      # lr, batch_size and epochs come from `config`
    evaluate = Evaluation(loss="cross_entropy")

in place of the functions of those names. On devices they are just such functions. The simulator
recognises them and runs the same mathematics through faster engines. They do all that an algorithm
may need (`algorithm.Need`): corrections, full gradients, gradients at an anchor.

`model` is a torch module, or a dict ``{"w": (inputs, outputs), "b": (outputs,)}`` for a linear
model that needs no torch. `data` is anything with ``x`` and ``y`` (`fedml.data.Examples`), a
mapping of these names, a pair, or a data set with ``train`` and ``test`` parts of such.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from fedml.federate.algorithm import Correction, Need
from fedml.federate.arrays import Array, Arrays

# In `config`, where a client has only so long: on the clock of `time.monotonic`.
DEADLINE = "deadline"
LOSSES = ("cross_entropy", "logistic", "squared")

Loss: TypeAlias = str | Callable[[Any, Any], Any]


class BadData(ValueError):
    """A client's data cannot be trained on; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """How one client trains, all values settled.

    Attributes:
        lr: Step size, > 0.
        batch_size: Examples in a step, >= 1; the last batch of an epoch may be smaller.
        epochs: Passes over the client's examples, >= 1.
        momentum: As `torch.optim.SGD` has it, in [0, 1).
        weight_decay: Likewise, >= 0.
        shuffle: Draw a new order for each epoch from the client's generator.
        bf16: Matrix products and convolutions in bfloat16; weights and steps stay as they are.
        deadline: On the clock of `time.monotonic`: no epoch but the first begins that would end
            later, if it takes as long as the longest so far.
    """

    lr: float
    batch_size: int
    epochs: int = 1
    momentum: float = 0.0
    weight_decay: float = 0.0
    shuffle: bool = True
    bf16: bool = False
    deadline: float = math.inf

    def __post_init__(self) -> None:
        _check("lr", self.lr, self.lr > 0)
        _check("batch_size", self.batch_size, self.batch_size >= 1)
        _check("epochs", self.epochs, self.epochs >= 1)
        _check("momentum", self.momentum, 0 <= self.momentum < 1)
        _check("weight_decay", self.weight_decay, self.weight_decay >= 0)

    def done(self, examples: int, epochs: int, loss: float) -> dict[str, float]:
        """What a training says; one that its deadline cut short tells how many epochs it had."""
        found = {
            "examples": float(examples),
            "steps": float(epochs * -(-examples // self.batch_size)),
            "lr": self.lr,
            "loss": loss,
        }
        return found if epochs == self.epochs else {**found, "epochs": float(epochs)}

    def orders(
        self, examples: int, rng: np.random.Generator | None
    ) -> Iterator[npt.NDArray[np.int64] | None]:
        """The order of the examples in each epoch; None is the order that they are stored in."""
        longest = 0.0
        for epoch in range(self.epochs):
            began = time.monotonic()
            if epoch and began + longest > self.deadline:
                return
            if self.shuffle and rng is None:
                raise ValueError("shuffling needs a generator")
            yield rng.permutation(examples) if self.shuffle and rng is not None else None
            longest = max(longest, time.monotonic() - began)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalSGD:
    """Some epochs of mini-batch SGD (McMahan et al. 2017, ClientUpdate).

    What is None is taken from the run's ``config``: ``lr``, ``batch_size`` (32), ``epochs`` (1),
    ``momentum`` (0), ``weight_decay`` (0), ``bf16`` (false).

    Attributes:
        loss: ``cross_entropy`` of classes, ``logistic`` of yes and no (one output), ``squared``
            error, or a function of a torch model's outputs and the targets.
        bf16: Compute in bfloat16 what torch's autocast does (a torch model only): half as long on
            processors that know it, and three digits of each product.
        shuffle: Draw a new order for each epoch.
    """

    supports: ClassVar[frozenset[Need]] = frozenset(Need)

    loss: Loss = "cross_entropy"
    lr: float | None = None
    batch_size: int | None = None
    epochs: int | None = None
    momentum: float | None = None
    weight_decay: float | None = None
    bf16: bool | None = None
    shuffle: bool = True

    def __post_init__(self) -> None:
        _check_loss(self.loss)

    def steps(self, config: Mapping[str, Any]) -> Steps:
        """The settled values.

        Raises:
            ValueError: One is missing or out of range.
        """
        lr = self.lr if self.lr is not None else config.get("lr", config.get("learning_rate"))
        if lr is None:
            raise ValueError(
                "LocalSGD has no learning rate: say LocalSGD(lr=…), or config: {lr: …}"
            )
        return Steps(
            lr=float(lr),
            batch_size=int(_given(self.batch_size, config, "batch_size", 32)),
            epochs=int(_given(self.epochs, config, "epochs", 1)),
            momentum=float(_given(self.momentum, config, "momentum", 0.0)),
            weight_decay=float(_given(self.weight_decay, config, "weight_decay", 0.0)),
            bf16=bool(_given(self.bf16, config, "bf16", False)),
            deadline=float(config.get(DEADLINE, math.inf)),
            shuffle=self.shuffle,
        )

    def __call__(
        self,
        model: Any,
        data: Any,
        config: Mapping[str, Any],
        rng: np.random.Generator,
        correction: Correction | None = None,
    ) -> dict[str, float]:
        """Train in place; examples, steps, lr, momentum and the mean loss of the batches."""
        steps = self.steps(config)
        x, y = examples_of(data)
        found: dict[str, float] = self._backend(model).train(
            model, x, y, steps, self.loss, rng, correction
        )
        # Algorithms that read gradients off the path (SCAFFOLD, FedNova) must know.
        return {**found, "momentum": steps.momentum}

    def examples(self, data: Any) -> int:
        """How many examples ``data`` holds."""
        return len(examples_of(data)[0])

    def gradient(self, model: Any, data: Any) -> tuple[Arrays, float]:
        """The gradient over all examples at the model's weights, and the loss."""
        x, y = examples_of(data)
        found: tuple[Arrays, float] = self._backend(model).gradient(model, x, y, self.loss)
        return found

    @staticmethod
    def _backend(model: Any) -> Any:
        if isinstance(model, dict):
            from fedml.federate import linear_sgd

            return linear_sgd
        from fedml.federate import torch_sgd

        return torch_sgd


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Mean loss on all examples, and accuracy where the targets are classes.

    Attributes:
        loss: As in `LocalSGD`.
        batch_size: Examples in one pass through a torch model.
    """

    loss: Loss = "cross_entropy"
    batch_size: int = 1024

    def __post_init__(self) -> None:
        _check_loss(self.loss)

    def __call__(self, model: Any, data: Any, config: Mapping[str, Any]) -> dict[str, float]:
        """``examples``, ``loss`` and, for classes, ``accuracy``."""
        x, y = examples_of(data, "test")
        if not len(x):
            return {"examples": 0.0}
        if isinstance(model, dict):
            from fedml.federate import linear_sgd

            return linear_sgd.evaluate(model, x, y, self.loss)
        from fedml.federate import torch_sgd

        return torch_sgd.evaluate(model, x, y, self.loss, self.batch_size)


def examples_of(data: Any, part: str = "train") -> tuple[Array, Array]:
    """Inputs and targets of a client's data: ``x`` of shape (N, ...) and ``y`` of (N, ...).

    Args:
        data: See the head of this module.
        part: Which part of a data set that has parts.

    Raises:
        BadData: It is none of these, or x and y differ in length.
    """
    if hasattr(data, "train") and hasattr(data, "test"):
        data = getattr(data, part)
    if isinstance(data, Mapping) and {"x", "y"} <= data.keys():
        x, y = data["x"], data["y"]
    elif isinstance(data, tuple | list) and len(data) == 2:
        x, y = data
    elif hasattr(data, "x") and hasattr(data, "y"):
        x, y = data.x, data.y
    else:
        raise BadData(
            f"LocalSGD cannot train on a {type(data).__name__}: let data() return something with "
            "x and y, a pair of arrays, or {'x': …, 'y': …}"
        )
    x, y = np.asarray(x), np.asarray(y)
    if x.dtype == object or y.dtype == object or x.ndim < 1:
        raise BadData("x and y must be arrays of numbers, one row for each example")
    if len(x) != len(y):
        raise BadData(f"x has {len(x)} examples and y has {len(y)}")
    return x, y


def _given(value: Any, config: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    return value if value is not None else config.get(name, otherwise)


def _check(name: str, value: float, good: bool) -> None:
    if not good:
        raise ValueError(f"LocalSGD: {name} is out of range: {value}")


def _check_loss(loss: Loss) -> None:
    if not callable(loss) and loss not in LOSSES:
        raise ValueError(f"no loss is called {loss!r}; there are {', '.join(LOSSES)}")
