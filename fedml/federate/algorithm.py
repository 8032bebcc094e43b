# SPDX-License-Identifier: Apache-2.0
"""What every federated algorithm is: five pure functions over named arrays.

One round of a synchronous algorithm, as the simulator, the deployed worker and the deployed
aggregator all run it::

    state = algorithm.start(model)                                    # once
    sent = algorithm.sent(model, state)                               # to every client
    update = algorithm.client_update(model, sent, mine, local, rng)   # on each client
    combined = aggregate.combine(updates)                             # weighted mean
    model, state = algorithm.server_update(model, state, combined, facts)

An asynchronous algorithm differs in two ways only: ``server_update`` is called with each
update as it comes (``facts.staleness`` says how many versions old its model was), and it returns
the very ``model`` object it was given when it took no step.

Everything is NumPy arrays by name, so the state is a blob that can be stored, sent and resumed.
`client_state` is what one client keeps for itself between rounds; it never leaves the client.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

import numpy as np

from fedml.federate.arrays import Arrays, rounded, scaled
from fedml.federate.layout import Layout


class Kind(StrEnum):
    """When the server takes a step: once per cohort, or with each update that comes."""

    SYNCHRONOUS = "synchronous"
    ASYNCHRONOUS = "asynchronous"


class Need(StrEnum):
    """What an algorithm needs of a client's own training beyond "train and give the model"."""

    CORRECTION = "correction"
    ANCHOR_GRADIENT = "anchor_gradient"
    GRADIENT = "gradient"


class UnknownAlgorithm(ValueError):
    """No algorithm goes by this name."""


class BadParameter(ValueError):
    """A hyperparameter is unknown, of the wrong type, or out of range."""


class UnsupportedByTraining(TypeError):
    """The client's training cannot do what the algorithm needs (see `require_support`)."""


class NobodyLearned(ValueError):
    """No client of a round has an example, so there is nothing to make a model of."""

    def __init__(self, clients: int) -> None:
        super().__init__(f"none of {clients} clients has an example to learn from")


class NothingToLearn(Exception):
    """The client has no example: `client_part` makes of it an update that counts for nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """How one local step differs from plain SGD.

    With ``g`` the gradient of the batch at the current weights ``w``, one step is::

        c = g - g_anchor (if anchor_gradient) + pull * (w - anchor) + shift
        w <- w - lr * ((1 - beta) * c + beta * momentum)

    Attributes:
        pull: Strength of the pull back to `anchor`, >= 0 (FedProx's mu, FedDyn's alpha).
        anchor: Weights that are pulled to; None means the model that training started from.
        shift: Added to every gradient, same names and shapes as the model's trainable arrays
            (SCAFFOLD's ``c - c_i``); names that are absent are not shifted.
        anchor_gradient: Subtract the gradient of the same batch taken at the anchor (MIME).
        momentum: A direction that is held fixed while the client trains (MIME); None is none.
        beta: Its share, in [0, 1).
    """

    pull: float = 0.0
    anchor: Arrays | None = None
    shift: Arrays | None = None
    anchor_gradient: bool = False
    momentum: Arrays | None = None
    beta: float = 0.0

    def direction(
        self, gradient: Arrays, at: Arrays, start: Arrays, gradient_at_anchor: Arrays | None = None
    ) -> Arrays:
        """The vector that ``lr`` multiplies: the formula above, in the gradient's dtypes.

        Args:
            gradient: Gradient of the batch at ``at``.
            at: The current weights.
            start: The weights that training started from, the anchor unless one is set.
            gradient_at_anchor: Gradient of the same batch at the anchor, for `anchor_gradient`.
        """
        if self.anchor_gradient and gradient_at_anchor is None:
            raise ValueError("this correction needs the gradient of the batch at the anchor too")
        anchor = start if self.anchor is None else self.anchor
        out: Arrays = {}
        for name, g in gradient.items():
            step = g.astype(np.float64)
            if gradient_at_anchor is not None and self.anchor_gradient:
                step = step - gradient_at_anchor[name]
            if self.pull:
                step = step + self.pull * (at[name].astype(np.float64) - anchor[name])
            if self.shift is not None and name in self.shift:
                step = step + self.shift[name]
            if self.momentum is not None and name in self.momentum:
                step = (1 - self.beta) * step + self.beta * self.momentum[name]
            out[name] = rounded(step, g.dtype)
        return out

    @property
    def needs(self) -> frozenset[Need]:
        """What a training loop must be able to do to honour this correction."""
        if self.anchor_gradient:
            return frozenset({Need.CORRECTION, Need.ANCHOR_GRADIENT})
        return frozenset({Need.CORRECTION})


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What one client's training gave.

    Attributes:
        model: All arrays of the model after training, names and shapes of the model sent.
        examples: Examples that the client trained on, >= 0; its weight in most algorithms.
        steps: Optimiser steps taken (the tau_i of FedNova, the K of SCAFFOLD), >= 0.
        lr: Mean learning rate over those steps; None when the training does not say. SCAFFOLD,
            FedNova and MIME divide by it and refuse None.
        momentum: Of the local optimiser, in [0, 1), as `torch.optim.SGD` has it; None when the
            training does not say. SCAFFOLD and FedNova refuse None.
        metrics: Named numbers, averaged over clients by weight.
    """

    model: Arrays
    examples: int
    steps: int
    lr: float | None = None
    momentum: float | None = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)

    def plain_steps(self, algorithm: str) -> float:
        """``||a||_1``, the steps of plain SGD that the local path amounts to.

        Raises:
            UnsupportedByTraining: The training did not report its momentum.
        """
        if self.momentum is None:
            raise UnsupportedByTraining(
                f"{algorithm} divides by the length of the local path, which momentum makes up to "
                "1 / (1 - momentum) times as long, and the training did not report one: return "
                "`momentum` from it, 0 for plain SGD"
            )
        return plain_steps(self.steps, self.momentum)

    def travel(self, algorithm: str) -> float:
        """``plain_steps * lr``, the length of the local path that an algorithm divides by.

        Raises:
            UnsupportedByTraining: As `rate` does.
        """
        return self.rate(algorithm) * self.plain_steps(algorithm)

    def rate(self, algorithm: str) -> float:
        """The local learning rate, for an algorithm that cannot do without.

        Raises:
            UnsupportedByTraining: The training did not report its learning rate or took no step.
        """
        if self.lr is None:
            raise UnsupportedByTraining(
                f"{algorithm} divides by the local learning rate, but the training did not report "
                "one; return `lr=` from it, or choose fedavg, fedprox or fedopt"
            )
        if self.steps < 1 or not self.lr > 0:
            raise UnsupportedByTraining(
                f"{algorithm} needs at least one local step with lr > 0, "
                f"the training reported steps={self.steps}, lr={self.lr}"
            )
        return self.lr


def plain_steps(steps: int, momentum: float) -> float:
    """How many steps of plain SGD so many steps with momentum amount to.

    With momentum ``rho`` a gradient goes on in all later steps, so the local path is a sum of
    gradients whose coefficients add up to ``||a||_1`` (Wang et al. 2020, FedNova, section 3)::

        [tau - rho (1 - rho^tau) / (1 - rho)] / (1 - rho)
    """
    rho = momentum
    return (steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)


@runtime_checkable
class Local(Protocol):
    """One client's own training on its own data; the engine (deployed, simulated) provides it."""

    @property
    def examples(self) -> int:
        """How many examples this client holds."""
        ...

    @property
    def supports(self) -> frozenset[Need]:
        """What this training can do; a user's plain train function supports nothing more."""
        ...

    def train(
        self, model: Arrays, correction: Correction | None = None, *, rng: np.random.Generator
    ) -> Trained:
        """Train from ``model`` for this round's local work; ``model`` is left as it is.

        Raises:
            UnsupportedByTraining: A correction was given and the train function takes none.
            NothingToLearn: There was no example.
        """
        ...

    def gradient(self, model: Arrays) -> tuple[Arrays, float]:
        """The gradient over all local data at ``model`` (trainable names only) and the loss.

        Raises:
            UnsupportedByTraining: The user's code offers no gradient.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What one client, or a group of clients as one, contributes to a round.

    Updates average: ``a + b`` is the update of both, its arrays the mean of theirs counted by
    weight. `scale` and `weigh` are the other two laws. Clipping, noise and compression are
    functions from an update to an update, so they compose with every algorithm. Where bits must
    not depend on how updates are grouped, use `aggregate.PartialSum`, which is exact.

    Attributes:
        arrays: By name; most algorithms send deltas under the model's own names.
        weight: >= 0, usually examples; only ratios count.
        metrics: Named numbers.
        client_state: Kept by the client for its next round, never sent; None keeps nothing.
    """

    arrays: Arrays
    weight: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    client_state: Arrays | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"an update's weight must be a finite number >= 0, got {self.weight}")

    def __add__(self, other: Update) -> Update:
        """Both updates as one: mean counted by weight, weights added, client states dropped."""
        from fedml.federate.aggregate import combine  # aggregate builds on this module

        return combine([self, other])

    def scale(self, factor: float) -> Update:
        """The same update with every array multiplied by ``factor``."""
        return dataclasses.replace(self, arrays=scaled(self.arrays, factor))

    def weigh(self, factor: float) -> Update:
        """The same update counted ``factor`` times as much."""
        return dataclasses.replace(self, weight=self.weight * factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the server knows about the updates it has combined.

    Attributes:
        clients: How many clients with examples are in the combined update, >= 1 (the |S| of the
            papers).
        population: How many clients there are in all to learn from, >= clients (their N); see
            `census`.
        staleness: Asynchronous only: model versions published since this client got its own.
        counted: What `population` was for the last server update; 0 is the same.
    """

    clients: int = 1
    population: int = 1
    staleness: int = 0
    counted: int = 0

    def __post_init__(self) -> None:
        if self.clients < 1 or self.population < self.clients:
            raise ValueError(
                f"need 1 <= clients <= population, got {self.clients} and {self.population}"
            )
        if self.staleness < 0:
            raise ValueError(f"staleness counts versions, it cannot be {self.staleness}")


class Algorithm(Protocol):
    """One federated algorithm; a frozen dataclass whose fields are its hyperparameters.

    Attributes:
        name: As `create` spells it.
        kind: Synchronous or asynchronous.
        needs: What `Local` must support; checked before a run starts by `require_support`.
        stages: Rounds in a row that the same cohort serves (full MIME: 2, others: 1).
        deltas: Whether the arrays of an update are small changes, so that clipping, noise and
            top-k apply to them; FedAsync sends whole models.
        partial: Whether a client that runs out of time sends the epochs that it had time for.
    """

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> Kind: ...
    @property
    def needs(self) -> frozenset[Need]: ...
    @property
    def stages(self) -> int: ...
    @property
    def deltas(self) -> bool: ...
    @property
    def partial(self) -> bool: ...

    def layout(self, model: Arrays) -> Layout:
        """What `client_update` sends for such a model; `aggregate.Fold` refuses anything else."""
        ...

    def start(self, model: Arrays) -> Arrays:
        """The server's state before the first round, ``{}`` where there is none."""
        ...

    def sent(self, model: Arrays, state: Arrays) -> Arrays:
        """What clients get beyond the model, ``{}`` for most."""
        ...

    def client_update(
        self,
        model: Arrays,
        sent: Arrays,
        client_state: Arrays | None,
        local: Local,
        rng: np.random.Generator,
    ) -> Update:
        """One client's part of a round; ``client_state`` is None the first time."""
        ...

    def server_update(
        self, model: Arrays, state: Arrays, combined: Update, facts: Facts
    ) -> tuple[Arrays, Arrays]:
        """The next model and server state; the arguments are left as they are."""
        ...


class Asynchronous(Algorithm, Protocol):
    """An algorithm that steps with each update, or with every few.

    Attributes:
        buffer: How many updates make a new model.
    """

    @property
    def buffer(self) -> int: ...


def client_part(
    algorithm: Algorithm,
    model: Arrays,
    sent: Arrays,
    client_state: Arrays | None,
    local: Local,
    rng: np.random.Generator,
) -> Update:
    """One client's part of a round; of a client without examples, one that counts for nothing.

    That is zeros of weight 0, and the client keeps what it kept before. Without this a division of
    the data that leaves somebody with nothing would end a run of SCAFFOLD and be counted by FedDyn.
    """
    try:
        return algorithm.client_update(model, sent, client_state, local, rng)
    except NothingToLearn:
        return nothing(algorithm.layout(model))


def nothing(layout: Layout) -> Update:
    """An update that counts for nothing."""
    arrays = {name: np.zeros(spec.shape, spec.dtype) for name, spec in layout.tensors.items()}
    return Update(arrays=arrays, weight=0.0)


def require_support(algorithm: Algorithm, local: Local, training: str = "the training") -> None:
    """Refuse a training that cannot do what the algorithm needs, before any round is run.

    Args:
        algorithm: What is to be run.
        local: One client's training.
        training: How to call it in the error, e.g. "train() in task.py".

    Raises:
        UnsupportedByTraining: With the need that is not met and the ways out.
    """
    lacking = algorithm.needs - local.supports
    if not lacking:
        return
    asks = {
        Need.CORRECTION: "changes every local step, and {0} takes no `correction` argument",
        Need.ANCHOR_GRADIENT: "needs each batch's gradient at the global model, and {0} gives none",
        Need.GRADIENT: "needs a full gradient of the local data, and {0} offers no `gradient`",
    }
    first = min(lacking, key=list(Need).index)
    raise UnsupportedByTraining(
        f"{algorithm.name} {asks[first].format(training)}; "
        "add it, use the built-in training loop, or choose fedavg or a fedopt algorithm, "
        "which work with any training"
    )


# Where each algorithm lives; modules are imported only when asked for.
_ALGORITHMS: Mapping[str, tuple[str, str]] = {
    "fedsgd": ("fedsgd", "FedSGD"),
    "fedavg": ("fedavg", "FedAvg"),
    "fedavgm": ("fedavg", "FedAvgM"),
    "fedprox": ("fedprox", "FedProx"),
    "fedadagrad": ("fedopt", "FedAdagrad"),
    "fedadam": ("fedopt", "FedAdam"),
    "fedyogi": ("fedopt", "FedYogi"),
    "scaffold": ("scaffold", "Scaffold"),
    "fednova": ("fednova", "FedNova"),
    "feddyn": ("feddyn", "FedDyn"),
    "mime": ("mime", "Mime"),
    "mimelite": ("mime", "MimeLite"),
    "qfedavg": ("qfedavg", "QFedAvg"),
    "ditto": ("ditto", "Ditto"),
    "fedasync": ("fedasync", "FedAsync"),
    "fedbuff": ("fedbuff", "FedBuff"),
}

# FedML's `federated_optimizer` values, and common spellings, that mean one of the above.
_ALSO_CALLED: Mapping[str, str] = {
    "fedavgseq": "fedavg",
    "fedavgrobust": "fedavg",
    "fedlocalsgd": "fedavg",
    "hierarchicalfl": "fedavg",
    "fedopt": "fedadam",
    "fedoptseq": "fedadam",
    "asyncfedavg": "fedasync",
    "qffl": "qfedavg",
}

# FedML's FedOpt chooses by `server_optimizer`.
_SERVER_OPTIMIZERS: Mapping[str, str] = {
    "sgd": "fedavgm",
    "adam": "fedadam",
    "adagrad": "fedadagrad",
    "yogi": "fedyogi",
}


def names() -> list[str]:
    """Every algorithm that `create` knows, sorted."""
    return sorted(_ALGORITHMS)


def create(name: str, parameters: Mapping[str, Any] | None = None) -> Algorithm:
    """Build an algorithm from its name and hyperparameters.

    Args:
        name: As in `names`; case, ``-`` and ``_`` do not matter, and FedML's values of
            ``federated_optimizer`` are understood.
        parameters: The algorithm's fields; those left out keep their defaults.

    Raises:
        UnknownAlgorithm: With the nearest name there is.
        BadParameter: A parameter is unknown (with the nearest there is) or out of range.
    """
    given = dict(parameters or {})
    key = _ALSO_CALLED.get(_plain(name), _plain(name))
    if _plain(name) in {"fedopt", "fedoptseq"} and "server_optimizer" in given:
        optimizer = str(given.pop("server_optimizer")).lower()
        if optimizer not in _SERVER_OPTIMIZERS:
            raise BadParameter(
                f"server_optimizer {optimizer!r} is none of {', '.join(_SERVER_OPTIMIZERS)}"
            )
        key = _SERVER_OPTIMIZERS[optimizer]
    if key not in _ALGORITHMS:
        raise UnknownAlgorithm(
            f"no algorithm is called {name!r}{_nearest(key, [*_ALGORITHMS, *_ALSO_CALLED])}; "
            f"there are {', '.join(names())}"
        )
    module, class_name = _ALGORITHMS[key]
    cls = getattr(importlib.import_module(f"fedml.federate.{module}"), class_name)
    fields = [f.name for f in dataclasses.fields(cls)]
    spellings: Mapping[str, str] = getattr(cls, "SPELLINGS", {})
    settings: dict[str, Any] = {}
    for parameter, value in given.items():
        known = spellings.get(parameter, parameter)
        if known not in fields:
            raise BadParameter(
                f"{key} has no parameter {parameter!r}{_nearest(parameter, fields)}; "
                f"it has {', '.join(fields) or 'none'}"
            )
        if known in settings:
            raise BadParameter(f"{key}: {parameter!r} and {known!r} are the same parameter")
        settings[known] = value
    algorithm: Algorithm = cls(**settings)
    return algorithm


def number(
    algorithm: str,
    name: str,
    value: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> None:
    """Check one hyperparameter; the error says the algorithm, the parameter and the range.

    Raises:
        BadParameter: ``value`` is no finite number, or lies outside the bounds given.
    """
    bounds = {">": above, ">=": at_least, "<": below, "<=": at_most}
    asked = " and ".join(f"{sign} {bound:g}" for sign, bound in bounds.items() if bound is not None)
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if good:
        good = (
            (above is None or value > above)
            and (at_least is None or value >= at_least)
            and (below is None or value < below)
            and (at_most is None or value <= at_most)
        )
    if not good:
        raise BadParameter(
            f"{algorithm}: {name} must be a number{' ' + asked if asked else ''}, got {value!r}"
        )


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", "").replace("_", "").replace(" ", "")


def _nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.4)
    return f", did you mean {near[0]!r}?" if near else ""
