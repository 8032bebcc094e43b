# SPDX-License-Identifier: Apache-2.0
"""Which engine trains the clients of a simulation, and what an engine is.

    exact         every call that a device makes, and exact sums: the bits of a deployed run
    closed_form   linear models: the gradient written out in NumPy
    inplace       one torch model per process, weights put back in place between clients
    stacked       many clients at once as one batched computation (torch.func.vmap)

`inplace` and `stacked` train on CUDA and MPS too (`accelerator`). All but `exact` need the built-in
training (`federate.local_sgd`). They add up what clients learned
while the next client trains, for algorithms whose clients just train and send the difference
(`averages`); other algorithms walk client by client in any engine, and only their sums differ.
Where the server looks at each update (`federate.treatment`), nothing may be added up before it
does: clients walk one by one, on a device in the way of `inplace`, else in that of `exact`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from fedml.errors import ConfigError
from fedml.federate.algorithm import Algorithm
from fedml.federate.arrays import Array, Arrays
from fedml.federate.fedavg import FedAvg
from fedml.federate.local_sgd import LocalSGD
from fedml.simulation import accelerator

_SMALL = 1_000_000  # parameters; a larger model keeps a GPU busy with one client


class Engine(Protocol):
    """Trains clients in one process, on one device, and adds up what they learned.

    Attributes:
        chunk: How many clients `train` is best given at once; a member that runs out of memory
            makes it smaller.
    """

    chunk: int

    def begin(self, model: Mapping[str, Array]) -> None:
        """Start a sum of ``examples * (trained - model)`` at zero, from this model."""
        ...

    def train(
        self, clients: Sequence[int], data: Sequence[Any], rngs: Sequence[Rng]
    ) -> list[dict[str, float]]:
        """Train these clients and add them to the sum; the numbers of each.

        Raises:
            Exception: A client's training failed; none of these was added.
        """
        ...

    def finish(self, total: Mapping[str, Array]) -> None:
        """Write the sum, float64, over ``total``."""
        ...

    def forget(self, clients: Sequence[int]) -> None:
        """Drop what was prepared for these clients."""
        ...

    def free(self) -> bool:
        """Memory has run out: drop what can be had again; whether that was anything."""
        ...


class Rng(Protocol):
    """A client's generator, made when it is first needed: making one takes microseconds."""

    def __call__(self) -> np.random.Generator: ...


class Diverged(ValueError):
    """A client's training gave NaN or an infinity."""

    def __init__(self) -> None:
        super().__init__("training diverged or the data holds NaN: its update is not finite")


def averages(algorithm: Algorithm) -> bool:
    """Whether a client's part is to train and send the difference, counted by examples."""
    return getattr(type(algorithm), "client_update", None) is FedAvg.client_update


def linear_names(model: Any) -> tuple[str, str | None] | None:
    """Names of weight and bias if ``model`` is nothing but one linear map, else None."""
    if isinstance(model, dict):
        good = set(model) in ({"w"}, {"w", "b"}) and model["w"].ndim == 2
        return ("w", "b" if "b" in model else None) if good else None
    from torch import nn

    from fedml.model.linear import Linear

    layers = [(name, m) for name, m in model.named_modules() if not list(m.children())]
    maps = [(name, m) for name, m in layers if isinstance(m, nn.Linear)]
    others = [m for _, m in layers if not isinstance(m, nn.Linear | nn.Flatten | nn.Identity)]
    # A user's own class around them may compute anything.
    outer = [m for _, m in model.named_modules() if list(m.children())]
    plain = all(isinstance(m, nn.Sequential | Linear) for m in outer)
    flattens = isinstance(model, Linear) or any(isinstance(m, nn.Flatten) for _, m in layers)
    if len(maps) != 1 or others or not plain or not (flattens or isinstance(model, nn.Linear)):
        return None
    name, layer = maps[0]
    stem = f"{name}." if name else ""
    if not all(p.requires_grad for p in layer.parameters()):
        return None
    return f"{stem}weight", f"{stem}bias" if layer.bias is not None else None


def choose(
    wanted: str,
    trainer: Any,
    model: Any,
    algorithm: Algorithm,
    config: Mapping[str, Any] | None = None,
    *,
    each: bool = False,
    device: str = "cpu",
    insisted: bool = False,
) -> tuple[str, str]:
    """The engine's name and why.

    Args:
        wanted: One of `plan.ENGINES`.
        trainer: What the user's file calls ``train``.
        model: A model as the user's file makes it.
        algorithm: What is to be run.
        config: The run's, which the built-in training reads.
        each: Whether the server wants the updates one by one, so that nothing is added up.
        device: Where torch could train (`accelerator.found`).
        insisted: That device was asked for by name, so that `closed_form` will not do.

    Raises:
        ConfigError: The engine asked for cannot do this; with the ways out.
    """
    if wanted == "exact":
        return "exact", "as asked: the bits of a deployed run"
    if each:
        why = "the server looks at each update, so clients walk one by one"
        elsewhere = device != "cpu" and isinstance(trainer, LocalSGD)
        return "inplace" if elsewhere and not isinstance(model, dict) else "exact", why
    if not isinstance(trainer, LocalSGD):
        if wanted != "auto":
            raise ConfigError(
                f"the engine {wanted} needs the built-in training, and `train` is your own code",
                "write `train = LocalSGD(…)` (fedml.federate.local_sgd), or use engine: exact",
            )
        return "exact", "`train` is your own code"
    bf16 = bool(trainer.bf16 if trainer.bf16 is not None else (config or {}).get("bf16", False))
    if wanted == "auto":
        return _automatic(trainer, model, algorithm, bf16, device, insisted)
    why_not = _objection(wanted, trainer, model, algorithm, bf16)
    if why_not:
        other = _automatic(trainer, model, algorithm, bf16, device, insisted)[0]
        raise ConfigError(f"the engine {wanted} cannot run this: {why_not}", f"engine: {other}")
    return wanted, "as asked"


def _automatic(
    trainer: LocalSGD,
    model: Any,
    algorithm: Algorithm,
    bf16: bool,
    device: str,
    insisted: bool,
) -> tuple[str, str]:
    linear = not _objection("closed_form", trainer, model, algorithm, bf16)
    if linear and (not insisted or isinstance(model, dict)):
        return "closed_form", "the model is linear"
    if isinstance(model, dict):
        return "exact", f"{algorithm.name} walks client by client"
    if device.startswith("cuda") and not _objection("stacked", trainer, model, algorithm, bf16):
        count = sum(p.numel() for p in model.parameters())
        if count < _SMALL:
            return "stacked", f"a model of {count:,} parameters, many clients at once"
    return "inplace", "the built-in training of a torch model"


def _objection(wanted: str, trainer: LocalSGD, model: Any, algorithm: Algorithm, bf16: bool) -> str:
    """Why an engine cannot run this; empty if it can."""
    if isinstance(model, dict) and wanted != "closed_form":
        return "the model is a dict of arrays, not a torch module"
    if wanted == "inplace":
        return ""
    if not averages(algorithm):
        return f"clients of {algorithm.name} do more than train and send the difference"
    if callable(trainer.loss):
        return "the loss is a function of your own"
    if bf16:
        return "bf16 is for torch models client by client"
    if wanted == "closed_form":
        if linear_names(model) is None:
            return "the model is not one linear map"
        return ""
    from torch import nn
    from torch.nn.modules.batchnorm import _BatchNorm
    from torch.nn.modules.dropout import _DropoutNd

    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            return f"{name} keeps running statistics, which clients side by side cannot"
        if isinstance(module, _DropoutNd):
            return f"{name} draws random numbers, which clients side by side share"
        if isinstance(module, nn.RNNBase):
            return f"{name} is recurrent, and torch does not batch those over clients"
    if not all(p.requires_grad for p in model.parameters()):
        return "some parameters are frozen"
    return ""


def build(
    name: str, trainer: Any, config: Mapping[str, Any], model: Any, device: str = "cpu"
) -> Engine:
    """The engine; `exact` is none, it only walks.

    Args:
        name: As `choose` says.
        trainer: The built-in training.
        config: The run's.
        model: A model of its own to work in.
        device: Where to train; `closed_form` trains on the CPU.
    """
    accelerator.prepare(device)
    steps = trainer.steps(config)
    if name == "closed_form":
        from fedml.simulation.closed_form import ClosedForm

        return ClosedForm(model, steps, trainer.loss)
    if name == "stacked":
        from fedml.simulation.stacked import Stacked

        return Stacked(model, steps, trainer.loss, device)
    from fedml.simulation.inplace import InPlace

    return InPlace(model, steps, trainer.loss, device)


__all__ = ["Arrays", "Diverged", "Engine", "Rng", "averages", "build", "choose", "linear_names"]
