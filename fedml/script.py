# SPDX-License-Identifier: Apache-2.0
"""A FedML script's own parts (trainer, aggregator, data, model) as the functions of an application.

In a simulation they are used as they are, in the script's own process; `packed_script.py` brings
them to machines.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from fedml.core import ClientTrainer, ServerAggregator, weighted_mean
from fedml.federate.algorithm import Algorithm, Correction, Facts, Update
from fedml.federate.application import ApplicationError, Client
from fedml.federate.arrays import Arrays, difference
from fedml.federate.local_sgd import Evaluation, LocalSGD

CENTRAL = object()  # the data that the server tests on

_TEST_GLOBAL, _NUMBERS, _TRAIN, _TEST = 3, 4, 5, 6  # places in the list of eight


@dataclasses.dataclass(frozen=True, slots=True)
class Silo:
    """One client's data, as the script made it."""

    index: int
    train: Any
    test: Any
    examples: int

    def __len__(self) -> int:
        return self.examples

    def __reduce__(self) -> Any:
        # A simulation would keep a copy in shared memory; loaders had better stay whole.
        raise TypeError("a script's data stays in its process")


@dataclasses.dataclass(slots=True)
class Script:
    """What a script gave to its runner.

    Attributes:
        args: Its arguments; `round_idx` is kept up to date.
        first: The parameters that it began with.
        heard: Of this round: each client's number, examples and parameters.
    """

    args: Any
    device: Any
    dataset: Any
    net: Any
    trainer: ClientTrainer | None = None
    aggregator: ServerAggregator | None = None
    first: Any = None
    heard: list[tuple[int, float, Any]] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        if not isinstance(self.dataset, list | tuple) or len(self.dataset) < 8:
            raise ApplicationError(
                "the dataset of FedMLRunner is a list of eight: examples, test examples, training "
                "and test batches, {client: examples}, {client: training batches}, {client: test "
                "batches}, classes"
            )
        if self.trainer is None and not hasattr(self.net, "state_dict"):
            raise ApplicationError(
                f"the model is a {type(self.net).__name__}, no torch module: give a client_trainer"
            )
        own = self.trainer.get_model_params() if self.trainer is not None else self.net
        self.first = copy.deepcopy(own)
        self.args.round_idx = 0

    # ------------------------------------------------------------------ the five functions

    def functions(self, config: Mapping[str, Any], *, each: bool = False) -> SimpleNamespace:
        """The application of this script.

        Args:
            config: The run's, which the built-in training reads.
            each: Keep every client's parameters, for an aggregator that wants to see them.
        """
        train: Any = self.train_own if self.trainer is not None else _built_in(config)
        if self.trainer is None and each:
            built_in = train

            def train(
                model: Any, data: Any, config: Any, rng: Any, correction: Correction | None = None
            ) -> Any:
                found = built_in(model, data, config, rng, correction)
                params = {n: t.detach().clone() for n, t in model.state_dict().items()}
                self.heard.append((data.index, float(found["examples"]), params))
                return found

        return SimpleNamespace(
            model=self.model,
            data=self.data,
            train=train,
            evaluate=self.evaluate,
            central=lambda config: CENTRAL if self.dataset[_TEST_GLOBAL] is not None else None,
        )

    def model(self, config: Mapping[str, Any]) -> Any:
        """The script's model: arrays by name, or the torch module that the built-in trains."""
        if self.trainer is None:
            return copy.deepcopy(self.first)
        return to_arrays(self.first)

    def data(self, client: Client, config: Mapping[str, Any]) -> Any:
        """One client's part of the list of eight."""
        train, test = _of(self.dataset[_TRAIN], client), _of(self.dataset[_TEST], client)
        if train is None:
            raise ApplicationError(f"the dataset has no training data for client {client.index}")
        count = _of(self.dataset[_NUMBERS], client)
        if self.trainer is None:
            x, y = as_arrays(train)
            xt, yt = as_arrays(test) if test is not None else (x[:0], y[:0])
            return _Arrays(client.index, SimpleNamespace(x=x, y=y), SimpleNamespace(x=xt, y=yt))
        return Silo(client.index, train, test, int(count if count is not None else len(train)))

    def train_own(
        self, model: dict[str, Any], data: Silo, config: Mapping[str, Any], rng: Any
    ) -> Mapping[str, Any]:
        """The script's trainer on one client's data."""
        trainer, args = self._trainer(), self.args
        trainer.set_id(data.index)
        trainer.update_dataset(data.train, data.test, data.examples)
        trainer.set_model_params(self.to_params(model))
        trainer.on_before_local_training(data.train, self.device, args)
        trainer.train(data.train, self.device, args)
        trainer.on_after_local_training(data.train, self.device, args)
        params = trainer.get_model_params()
        model.update(to_arrays(params))
        if self.aggregator is not None:
            self.heard.append((data.index, float(data.examples), copy.deepcopy(params)))
        return {"examples": data.examples}

    def evaluate(self, model: Any, data: Any, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The aggregator's test on the server's data, the trainer's on a client's."""
        if data is CENTRAL:
            if self.aggregator is not None:
                return self._test_aggregate(self.to_params(_arrays_of(model)))
            data = Silo(-1, None, self.dataset[_TEST_GLOBAL], 0)
        if self.trainer is not None:
            self.trainer.set_model_params(self.to_params(model))
            return numbers(self.trainer.test(data.test, self.device, self.args))
        if isinstance(data, Silo):
            x, y = as_arrays(data.test)
            data = {"x": x, "y": y}
        return Evaluation(loss="cross_entropy")(model, data, config)

    def _test_aggregate(self, params: Any) -> Mapping[str, Any]:
        aggregator = self.aggregator
        if aggregator is None:
            raise RuntimeError("there is no aggregator")
        aggregator.set_model_params(params)
        dataset, device, args = self.dataset, self.device, self.args
        whole = aggregator.test_all(dataset[_TRAIN], dataset[_TEST], device, args)
        if whole:
            return numbers(whole)
        return numbers(aggregator.test(dataset[_TEST_GLOBAL], device, args))

    def _trainer(self) -> ClientTrainer:
        if self.trainer is None:
            raise RuntimeError("there is no trainer")
        return self.trainer

    # ------------------------------------------------------------------ parameters

    def to_params(self, arrays: Mapping[str, Any]) -> Any:
        """Arrays as the script has its parameters."""
        like = self.first.state_dict() if hasattr(self.first, "state_dict") else self.first
        return _like(like, arrays, "")


@dataclasses.dataclass(frozen=True, slots=True)
class _Arrays:
    """One client's data for the built-in training; `local_sgd.examples_of` knows the two parts."""

    index: int
    train: Any
    test: Any

    def __len__(self) -> int:
        return len(self.train.x)


class Hooked:
    """An algorithm whose server lets a script's aggregator look at each round's models.

    What the script does not override is left to the algorithm.
    """

    def __init__(self, inner: Algorithm, script: Script) -> None:
        self.inner = inner
        self._script = script

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def server_update(
        self, model: Arrays, state: Arrays, combined: Update, facts: Facts
    ) -> tuple[Arrays, Arrays]:
        """The algorithm's step, between the script's hooks."""
        script, aggregator = self._script, self._script.aggregator
        if aggregator is None:
            raise RuntimeError("there is no aggregator")
        if sees_each(aggregator):
            given = [(n, params) for _, n, params in sorted(script.heard, key=lambda one: one[0])]
            kept = aggregator.on_before_aggregation(given)
            # Some releases of FedML also return which clients they are.
            kept = kept[0] if isinstance(kept, tuple) else kept
            whole = aggregator.aggregate if overrides(aggregator, "aggregate") else weighted_mean
            delta = difference(to_arrays(whole(kept)), model)
            combined = dataclasses.replace(combined, arrays={**combined.arrays, **delta})
        script.heard.clear()
        model, state = self.inner.server_update(model, state, combined, facts)
        params = aggregator.on_after_aggregation(script.to_params(model))
        aggregator.set_model_params(params)
        aggregator.assess_contribution()
        script.args.round_idx += 1
        return {**model, **to_arrays(params)}, state


def _built_in(config: Mapping[str, Any]) -> Any:
    if "client_optimizer" in config:
        from fedml.named import optimizer

        return optimizer.train
    return LocalSGD(loss="cross_entropy")


# What a script may do to a round's models, in this order.
HOOKS = ("on_before_aggregation", "aggregate", "on_after_aggregation")


def overrides(aggregator: ServerAggregator, name: str) -> bool:
    """Whether the script says how."""
    return getattr(type(aggregator), name, None) is not getattr(ServerAggregator, name)


def sees_each(aggregator: ServerAggregator) -> bool:
    """Whether it looks at single clients' models."""
    return any(overrides(aggregator, name) for name in HOOKS[:2])


def own_hooks(aggregator: ServerAggregator | None) -> str:
    """Why an aggregator cannot serve on machines; empty: it can."""
    hooks = [name for name in HOOKS if aggregator is not None and overrides(aggregator, name)]
    if not hooks:
        return ""
    return (
        f"the ServerAggregator has its own {', '.join(hooks)}: on machines a script trains and "
        "tests, and the broker combines"
    )


def numbers(found: Any) -> dict[str, float]:
    """What a test returned: FedML's counts as `accuracy` and mean `loss`, other numbers as is."""
    if not isinstance(found, Mapping):
        return {}
    told = {str(k): float(v) for k, v in found.items() if isinstance(v, int | float | np.number)}
    total = told.pop("test_total", 0.0)
    if not total > 0:
        return told
    for theirs, ours in (("test_correct", "accuracy"), ("test_loss", "loss")):
        if theirs in told:
            told[ours] = told.pop(theirs) / total
    return {"examples": total, **told}


def to_arrays(params: Any, name: str = "") -> Arrays:
    """Parameters of any shape (mappings in mappings, lists, tensors) as arrays by name.

    Raises:
        ApplicationError: Something among them is neither a tensor nor an array.
    """
    stem = f"{name}." if name else ""
    if isinstance(params, Mapping):
        return {k: a for n, v in params.items() for k, a in to_arrays(v, f"{stem}{n}").items()}
    if isinstance(params, list | tuple):
        named = {str(n): v for n, v in enumerate(params)}
        return to_arrays(named, name)
    if hasattr(params, "detach"):
        plain = params.detach().cpu()
        plain = plain.float() if str(plain.dtype) == "torch.bfloat16" else plain
        return {name: np.array(plain.numpy(), copy=True)}
    array = np.array(params, copy=True)
    if array.dtype == object:
        raise ApplicationError(f"get_model_params(): {name!r} is a {type(params).__name__}")
    return {name: array}


def _like(like: Any, arrays: Mapping[str, Any], name: str) -> Any:
    """Arrays by name in the shape that parameters had."""
    stem = f"{name}." if name else ""
    if isinstance(like, Mapping):
        made = {n: _like(v, arrays, f"{stem}{n}") for n, v in like.items()}
        kind: Any = type(like)  # JAX has mappings of its own
        return made if isinstance(like, dict) else kind(made)
    if isinstance(like, list | tuple):
        return type(like)(_like(v, arrays, f"{stem}{n}") for n, v in enumerate(like))
    if hasattr(like, "detach"):
        import torch

        return torch.tensor(arrays[name]).to(like)
    return np.array(arrays[name], copy=True)


def _arrays_of(model: Any) -> Arrays:
    return model if isinstance(model, dict) else to_arrays(model.state_dict())


def as_arrays(batches: Any) -> tuple[Any, Any]:
    """All batches of a loader as two arrays, in the order of its data set where it has one.

    Raises:
        ApplicationError: A batch is no pair of inputs and targets.
    """
    tensors = getattr(getattr(batches, "dataset", None), "tensors", None)
    pairs = [tensors] if tensors is not None else list(batches)
    try:
        parts = [tuple(np.asarray(part) for part in pair) for pair in pairs]
        x = np.concatenate([x for x, _ in parts])
        y = np.concatenate([y for _, y in parts])
    except (TypeError, ValueError) as error:
        raise ApplicationError(
            f"the built-in training needs batches of inputs and classes ({error}): give a "
            "client_trainer"
        ) from error
    return x, y


def _of(by_client: Any, client: Client) -> Any:
    """A client's entry; a script that loads its own part alone may give it any key."""
    if not isinstance(by_client, Mapping):
        return None
    if client.index in by_client:
        return by_client[client.index]
    return next(iter(by_client.values())) if len(by_client) == 1 else None
