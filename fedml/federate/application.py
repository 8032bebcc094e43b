# SPDX-License-Identifier: Apache-2.0
"""The user's own file: a model, data, and how to train and evaluate.

    def model(config): ...                      # a torch.nn.Module, or a dict of NumPy arrays
    def data(client, config): ...               # this client's data, whatever `train` understands
    def train(model, data, config, rng): ...    # changes the model in place; returns metrics
    def evaluate(model, data, config): ...      # optional: metrics of a model on this client's data
    def central(config): ...                    # optional: data that the broker evaluates on

`train` and `evaluate` return a mapping of numbers; `examples` among them is how much the client
counts. The same file runs in the simulator and on devices.
"""

from __future__ import annotations

import importlib.util
import inspect
import random
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from fedml.federate.algorithm import (
    Correction,
    Need,
    NothingToLearn,
    Trained,
    UnsupportedByTraining,
)
from fedml.federate.arrays import Arrays
from fedml.federate.local_sgd import DEADLINE


class ApplicationError(Exception):
    """The user's file cannot be used; the text says what to change in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """One participant, as the user's `data` function sees it.

    Attributes:
        index: From 0; with `count`, enough to take one part of a divided data set.
        labels: Those of its device (empty in a simulation).
        paths: Where the machine's owner keeps data sets, by name (his policy's ``[data]``). A name
            that is not there raises `ApplicationError`.
    """

    index: int
    count: int
    labels: Mapping[str, str] = field(default_factory=dict)
    paths: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "paths", _Paths(self.paths))


class _Paths(dict[str, str]):
    """Says what to do about a name that is not there."""

    def __missing__(self, name: str) -> str:
        listed = ", ".join(sorted(self)) or "none"
        raise ApplicationError(
            f"this machine lists no data called {name!r} (listed: {listed}). Its owner does so "
            f'in policy.toml, `[data]`, as {name} = "/path"; a simulation in the run file, '
            f"simulation.data"
        )


class Application:
    """The functions of one user file, with its model taken apart into arrays."""

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        """Import the file.

        Raises:
            ApplicationError: It is not there, or lacks a function. What the file itself raises
                while it is imported is not caught: its traceback is the user's.
        """
        self._take(_import(path), path, config)

    @classmethod
    def of(cls, functions: object, path: Path, config: Mapping[str, Any]) -> Application:
        """One whose functions are attributes of an object; ``path`` is for errors."""
        made = cls.__new__(cls)
        made._take(functions, path, config)
        return made

    def _take(self, functions: object, path: Path, config: Mapping[str, Any]) -> None:
        self.config = dict(config)
        self._model = _function(functions, path, "model", required=True)
        self._data = _function(functions, path, "data", required=True)
        self._train = _function(functions, path, "train", required=True)
        self._evaluate = _function(functions, path, "evaluate")
        self._central = _function(functions, path, "central")

    @property
    def evaluates(self) -> bool:
        """Whether the file can evaluate a model."""
        return self._evaluate is not None

    @property
    def trainer(self) -> Any:
        """What the file calls ``train``: a function, or a `local_sgd.LocalSGD`."""
        return self._train

    @property
    def evaluator(self) -> Any:
        """What the file calls ``evaluate``, None where it does not."""
        return self._evaluate

    @property
    def takes_correction(self) -> bool:
        """Whether its `train` understands a `correction`."""
        return "correction" in inspect.signature(self._train or _nothing).parameters

    def first_model(self, seed: int) -> Arrays:
        """The model's arrays as the user's code makes them, under a seed."""
        return _to_arrays(self.new_model(seed))

    def new_model(self, seed: int) -> Any:
        """A model as the user's code makes it."""
        knew_torch = "torch" in sys.modules
        seed_everything(seed)
        made = (self._model or _nothing)(self.config)
        if not knew_torch and "torch" in sys.modules:
            # It was imported within: what was drawn of it came before there was a seed.
            seed_everything(seed)
            made = (self._model or _nothing)(self.config)
        if made is None:
            raise ApplicationError("model() returned nothing; return a torch module or a dict")
        return made

    def data(self, client: Client) -> Any:
        """One client's data."""
        return (self._data or _nothing)(client, self.config)

    def central(self) -> Any | None:
        """The central data, if the file has some."""
        return None if self._central is None else self._central(self.config)

    def train(
        self,
        model: Any,
        data: Any,
        rng: np.random.Generator,
        correction: Correction | None,
        changed: Mapping[str, Any] | None = None,
    ) -> dict[str, float]:
        """Train in place; `changed` is what this client's `config` has instead of the run's."""
        config = {**self.config, **changed} if changed else self.config
        seed_everything(int(rng.integers(2**31)))
        extra = {} if correction is None else {"correction": correction}
        found = (self._train or _nothing)(model, data, config, rng, **extra)
        return _numbers("train", found)

    def evaluate(self, model: Any, data: Any) -> dict[str, float]:
        """Metrics of a model; empty when the file does not evaluate."""
        if self._evaluate is None:
            return {}
        found = _numbers("evaluate", self._evaluate(model, data, self.config))
        return {"examples": float(_size(data)), **found}


class UserTraining:
    """One client's `Local`: the user's `train` on the user's data."""

    def __init__(
        self,
        application: Application,
        module: Any,
        data: Any,
        epochs: int | None = None,
        deadline: float | None = None,
    ) -> None:
        """
        Args:
            epochs: Of who has no time for as many as `config` says.
            deadline: Until when to be through, on the clock of `time.monotonic`.
        """
        self._application = application
        self._module = module
        self._data = data
        self._deadline = deadline
        self._changed = {
            name: value
            for name, value in (("epochs", epochs), (DEADLINE, deadline))
            if value is not None
        }
        # How many epochs it came to, where these were not all.
        self.partial: float | None = epochs

    @property
    def examples(self) -> int:
        """How many examples there are, as far as can be told before training."""
        count = getattr(self._application.trainer, "examples", None)
        return _size(self._data) if count is None else int(count(self._data))

    @property
    def supports(self) -> frozenset[Need]:
        """A correction only if the user's train takes one; the built-in training does it all."""
        built_in: frozenset[Need] | None = getattr(self._application.trainer, "supports", None)
        if built_in is not None:
            return built_in
        takes = self._application.takes_correction
        return frozenset({Need.CORRECTION}) if takes else frozenset()

    def train(
        self, model: Arrays, correction: Correction | None = None, *, rng: np.random.Generator
    ) -> Trained:
        """Set the weights, let the user's code train, read the weights."""
        if correction is not None and not self._application.takes_correction:
            raise UnsupportedByTraining("train() takes no `correction` argument")
        set_weights(self._module, model)
        found = self._application.train(self._module, self._data, rng, correction, self._changed)
        if self._deadline is not None:
            self.partial = found.pop("epochs", self.partial)
        examples = found.pop("examples", float(_size(self._data)))
        if examples < 0:
            raise ApplicationError(f"train() says that it saw {examples:g} examples")
        momentum = found.pop("momentum", None)
        if momentum is not None and not 0 <= momentum < 1:
            raise ApplicationError(f"train() says that its momentum is {momentum:g}, not in [0, 1)")
        trained = _trained(self._module)
        _check_same(trained, model)
        if not int(examples):
            raise NothingToLearn
        return Trained(
            model=trained,
            examples=int(examples),
            steps=int(found.pop("steps", 1)),
            lr=found.pop("lr", None),
            momentum=momentum,
            metrics=found,
        )

    def gradient(self, model: Arrays) -> tuple[Arrays, float]:
        """That of the built-in training; a train function of the user's own offers none."""
        found = getattr(self._application.trainer, "gradient", None)
        if found is None:
            raise UnsupportedByTraining(
                "this file offers no full gradient; choose fedavg or fedopt"
            )
        set_weights(self._module, model)
        gradient: tuple[Arrays, float] = found(self._module, self._data)
        return gradient


def _check_same(trained: Arrays, given: Arrays) -> None:
    """A model comes back with the names and shapes that it went in with."""
    for name, values in given.items():
        if name not in trained:
            raise ApplicationError(f"train() took the tensor {name!r} out of the model")
        if trained[name].shape != values.shape:
            raise ApplicationError(
                f"train() changed the shape of {name!r}: {values.shape} to {trained[name].shape}"
            )


def set_weights(module: Any, arrays: Arrays) -> None:
    """Put arrays into a model that the user's code made."""
    if isinstance(module, dict):
        for name, values in arrays.items():
            # A copy: the user's code may change it in place, and the given model must stay.
            module[name] = np.array(values, copy=True)
    else:
        from fedml.model.arrays import set_arrays

        set_arrays(module, arrays)


def seed_everything(seed: int) -> None:
    """Seed what user code usually draws from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(seed)


def _trained(module: Any) -> Arrays:
    """The arrays of a model that was trained.

    A dict's are not copied: the next `set_weights` puts others in their place.
    """
    return dict(_checked(module)) if isinstance(module, dict) else _to_arrays(module)


def _checked(module: dict[str, Any]) -> dict[str, Any]:
    for name, values in module.items():
        if not isinstance(values, np.ndarray):
            raise ApplicationError(f"model()[{name!r}] is a {type(values).__name__}, no array")
    return module


def _to_arrays(module: Any) -> Arrays:
    if isinstance(module, dict):
        return {name: np.array(values, copy=True) for name, values in _checked(module).items()}
    if not hasattr(module, "state_dict"):
        raise ApplicationError(
            f"model() returned a {type(module).__name__}; return a torch module or a dict of arrays"
        )
    from fedml.model.arrays import to_arrays

    return {name: np.array(values, copy=True) for name, values in to_arrays(module).items()}


def _import(path: Path) -> ModuleType:
    if not path.is_file():
        raise ApplicationError(f"there is no {path.name} in the workspace")
    spec = importlib.util.spec_from_file_location("fedml_application", path)
    if spec is None or spec.loader is None:
        raise ApplicationError(f"{path.name} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.parent))
    spec.loader.exec_module(module)
    return module


def _function(
    functions: object, path: Path, name: str, *, required: bool = False
) -> Callable[..., Any] | None:
    found = getattr(functions, name, None)
    if callable(found):
        function: Callable[..., Any] = found
        return function
    if required:
        raise ApplicationError(f"{path.name} has no function {name}(…); see `docs/federate.md`")
    return None


def _numbers(where: str, found: Any) -> dict[str, float]:
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise ApplicationError(
            f"{where}() returned a {type(found).__name__}, no mapping of numbers"
        )
    try:
        return {str(name): float(value) for name, value in found.items()}
    except (TypeError, ValueError) as error:
        raise ApplicationError(f"{where}() returned a value that is no number: {error}") from error


def _size(data: Any) -> int:
    try:
        return len(data)
    except TypeError:
        return 1


def _nothing(*_: Any) -> None:
    return None
