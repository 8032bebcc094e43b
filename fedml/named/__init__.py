# SPDX-License-Identifier: Apache-2.0
"""Training by two names, a data set's and a model's: what a FedML configuration asks for.

`sgd.py` and `optimizer.py` beside this are user files as anybody would write them, of which
`fedml.translation` chooses one. This directory is their workspace: it goes to agents as it is. All
that they need to know stands in `config`::

    dataset   one of `SHAPES`             partition, alpha   how it is divided
    model     one of `MODELS`             local_test         clients hold test data too
    exact     FedML's sigmoid under `lr`  partition_seed     of the division
    torch     a torch module in any case
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedml import data as sets
from fedml import model as models
from fedml.data import partition
from fedml.data.bible import ALPHABET, characters
from fedml.data.dataset import Dataset, Examples
from fedml.data.errors import DataError
from fedml.data.stand_in import is_here, nearest
from fedml.data.text import bag_of_words
from fedml.federate.application import ApplicationError, Client

IMAGES, FEATURES, CHARACTERS = "images", "features", "characters"
_WORDS = 4096  # buckets of a bag of words
_TEXT = 80  # characters in a window, as in the federated papers
_WINDOW, _STEP = 100, 50  # samples of a recording


@dataclass(frozen=True, slots=True)
class Shape:
    """What a model must know of a data set before it has been read.

    Attributes:
        kind: Images, features or characters.
        inputs: Numbers in an example; the length of a text.
        classes: Symbols, where it is text.
        side: Of an image.
    """

    kind: str
    inputs: int
    classes: int
    side: int = 0


SHAPES: Mapping[str, Shape] = {
    "mnist-5k": Shape(IMAGES, 784, 10, 28),
    "fashion-mnist": Shape(IMAGES, 784, 10, 28),
    "digits": Shape(IMAGES, 64, 10, 8),
    "heart": Shape(FEATURES, 35, 2),
    "breast-cancer": Shape(FEATURES, 30, 2),
    "20news": Shape(FEATURES, _WORDS, 20),
    "reuters-r8": Shape(FEATURES, _WORDS, 8),
    "reuters-r52": Shape(FEATURES, _WORDS, 52),
    "watch": Shape(FEATURES, 6 * _WINDOW, 7),
    "king-james": Shape(CHARACTERS, _TEXT, len(ALPHABET)),
}


@dataclass(frozen=True, slots=True)
class Family:
    """What a model's name means here.

    Attributes:
        build: The name that `fedml.model.create` knows.
        kinds: Of data that it takes.
        note: What differs from the model that was named; empty where nothing does.
    """

    build: str
    kinds: tuple[str, ...] = (IMAGES,)
    note: str = ""


# What `optimizer.py` takes as `client_optimizer`.
OPTIMIZERS = ("sgd", "adam", "adamw", "adagrad", "rmsprop")

_SMALL = "it is not here; resnet20 (0.27 M parameters) is used instead"
_LARGE = "it is not here; resnet56 (0.85 M parameters) is used instead"

MODELS: Mapping[str, Family] = {
    "lr": Family("linear", (IMAGES, FEATURES)),
    "mlp": Family("mlp", (IMAGES, FEATURES)),
    "cnn": Family("cnn"),
    "lenet": Family("lenet"),
    "resnet18": Family("resnet18_gn"),
    "resnet18_gn": Family("resnet18_gn"),
    "resnet20": Family("resnet20"),
    "resnet56": Family("resnet56"),
    "rnn": Family("lstm", (CHARACTERS,)),
    "transformer": Family("transformer", (CHARACTERS,)),
    "mobilenet": Family("resnet20", note=_SMALL),
    "mobilenet_v3": Family("resnet20", note=_SMALL),
    "efficientnet": Family("resnet20", note=_SMALL),
    "densenet": Family("resnet56", note=_LARGE),
    "vgg11": Family("resnet56", note=_LARGE),
}


def model(config: Mapping[str, Any]) -> Any:
    """The model; softmax regression as plain arrays, unless its training needs torch."""
    shape, family = SHAPES[config["dataset"]], MODELS[config["model"]]
    exact = bool(config.get("exact"))
    if family.build == "linear" and not exact and not config.get("torch"):
        zeros = {"w": (shape.inputs, shape.classes), "b": (shape.classes,)}
        return {name: np.zeros(size, np.float32) for name, size in zeros.items()}
    return _module(family.build, sizes(family.build, shape), exact=exact)


def of_arguments(args: Any, classes: int | None = None) -> Any:
    """The torch module that a FedML script's arguments name.

    Raises:
        ApplicationError: No model by name fits its data.
    """
    flat, name = vars(args), str(args.model).lower()
    dataset = str(flat.get("dataset"))
    with suppress(DataError):  # it may be the script's own
        dataset, _, _ = nearest(dataset, is_here)
    if dataset in SHAPES:
        family = check(dataset, name)
        wanted = sizes(family.build, SHAPES[dataset])
    else:  # the script's own data, which it may say the size of
        family = MODELS.get(name) or Family(name)
        wanted = {"inputs": int(flat["input_dim"])} if flat.get("input_dim") else {}
    if classes is not None:
        known = ("outputs", "classes", "symbols")
        wanted |= {size: classes for size in known if size in models.sizes(family.build)}
    if family.note:
        warnings.warn(f"`model`: {name}: {family.note}", stacklevel=3)
    exact = family.build == "linear" and flat.get("fedml_compat") == "exact"
    return _module(family.build, wanted, exact=exact)


def _module(build: str, wanted: Mapping[str, Any], *, exact: bool) -> Any:
    import torch

    # Of what the run was seeded with, which `create` would set aside. Not torch's own state: where
    # the import above was the first, nobody has seeded that.
    seed = int(np.random.randint(2**31))
    made = models.create(build, seed=seed, **wanted)
    # FedML's `lr`: a sigmoid before the cross-entropy, which costs it some points.
    return torch.nn.Sequential(made, torch.nn.Sigmoid()) if exact else made


def sizes(build: str, shape: Shape) -> dict[str, Any]:
    """What `fedml.model.create` must be told for data of this shape."""
    match build:
        case "linear" | "mlp":
            return {"inputs": shape.inputs, "outputs": shape.classes}
        case "cnn" | "lenet":
            return {"channels": 1, "side": shape.side, "classes": shape.classes}
        case "lstm":
            return {"symbols": shape.classes}
        case "transformer":
            return {"symbols": shape.classes, "length": shape.inputs}
    return {"channels": 1, "classes": shape.classes}


def data(client: Client, config: Mapping[str, Any]) -> Any:
    """One client's part: training examples, and what it tests on where clients do."""
    whole = loaded(config["dataset"])
    rows = divided(
        config["dataset"],
        config.get("partition", "hetero"),
        client.count,
        config.get("alpha", 0.5),
        config.get("partition_seed", 0),
    )[client.index]
    mine = whole.train.take(rows)
    if not config.get("local_test"):
        return mine
    test = whole.test
    if mine.client is not None and test.client is not None and len(mine):
        test = test.take(np.flatnonzero(np.isin(test.client, np.unique(mine.client))))
    return Dataset(name=whole.name, train=mine, test=test)


def central(config: Mapping[str, Any]) -> Examples:
    """The test part."""
    return loaded(config["dataset"]).test


@functools.cache
def loaded(name: str) -> Dataset[Examples]:
    """A data set as arrays, one row an example; read once a process."""
    found = sets.load(name)
    convert = _CONVERTED.get(name)
    if convert is None:
        return found
    return Dataset(
        name=name, train=convert(found.train), test=convert(found.test), clients=found.clients
    )


@functools.cache
def divided(name: str, method: str, clients: int, alpha: float, seed: int) -> partition.Partition:
    """The rows of each client.

    ``hetero`` means its natural owners where the data names enough of them, else a Dirichlet draw
    over the classes; running text without owners is cut evenly.
    """
    whole = loaded(name)
    if method == "hetero":
        if 0 < clients <= len(whole.clients):
            method = "natural"
        elif whole.train.y.ndim > 1:
            method = "iid"
    return partition.divide(whole.train, method, clients, alpha=alpha, seed=seed)


def _words(part: Any) -> Examples:
    return Examples(x=bag_of_words(part.x, _WORDS), y=part.y, client=part.client)


_CONVERTED: Mapping[str, Any] = {
    "20news": _words,
    "reuters-r8": _words,
    "reuters-r52": _words,
    "king-james": lambda part: characters(part, _TEXT),
    "watch": lambda part: part.windows(_WINDOW, _STEP),
}


def check(dataset: str, name: str) -> Family:
    """The family of a model's name, if there is training by name of it on this data.

    Raises:
        ApplicationError: There is none; the text says what there is.
    """
    write = "write it as a file of your own: docs/federate.md"
    if dataset not in SHAPES:
        raise ApplicationError(f"{dataset} cannot be trained on by name; {write}")
    family = MODELS.get(name)
    if family is None:
        raise ApplicationError(
            f"no model is called {name!r}; there are {', '.join(MODELS)}; {write}"
        )
    if SHAPES[dataset].kind not in family.kinds:
        takes = " or ".join(family.kinds)
        raise ApplicationError(
            f"{name} takes {takes}, and {dataset} holds {SHAPES[dataset].kind}; {write}"
        )
    return family
