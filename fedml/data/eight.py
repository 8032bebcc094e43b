# SPDX-License-Identifier: Apache-2.0
"""The data set of a FedML script: a list of eight, with batches of torch tensors.

[examples, test examples, all training batches, all test batches,
 {client: examples}, {client: training batches}, {client: test batches}, classes]
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from fedml import named, translation
from fedml.data.dataset import Examples
from fedml.data.stand_in import is_here, nearest
from fedml.errors import ConfigError
from fedml.translation.algorithms import Flat, number, whole

Batches = DataLoader[tuple[torch.Tensor, ...]]


class Eight(list[Any]):
    """The list, which knows that it was loaded by name."""


def load(args: Any) -> tuple[Eight, int]:
    """The data set that ``args.dataset`` names or the nearest at hand, and its classes.

    Images come as ``(1, height, width)``, flat for the model `lr`; texts as bags of words or as
    characters. Every client tests on the whole test part, or on what its owner held out.

    Raises:
        ConfigError: There is no such data set for training by name.
        DatasetMissing: Neither it nor anything near it is here.
    """
    flat, notes = Flat(vars(args)), translation.Notes()
    name, note, differs = nearest(str(flat.need("dataset")), is_here)
    if note:
        (notes.instead if differs else notes.no_effect)(f"`dataset`: {note}")
    method = translation.method_of(flat, notes)
    translation.tell(notes.said, "fedml.data.load")
    if name not in named.SHAPES:
        raise ConfigError(
            f"`dataset`: {name} does not come as batches of examples",
            f'fedml.data.load("{name}") has it as it is',
        )
    dataset = named.loaded(name)
    clients = whole(flat, "client_num_in_total")
    seed = whole(flat, "random_seed", 0)
    rows = named.divided(name, method, clients, number(flat, "partition_alpha", 0.5), seed)
    batch = whole(flat, "batch_size", 32)
    as_rows = str(flat.get("model", "")).lower() in ("lr", "mlp")

    def batches(part: Examples, *, shuffle: bool) -> Batches:
        x = part.x.reshape(len(part), -1) if as_rows else part.x
        # Whole sets are read-only and everybody's; what a script gets it may change.
        own = (array if array.flags.writeable else array.copy() for array in (x, part.y))
        tensors = TensorDataset(*map(torch.from_numpy, own))
        return DataLoader(tensors, batch if batch > 0 else max(len(part), 1), shuffle=shuffle)

    train, test = {}, {}
    whole_test = batches(dataset.test, shuffle=False)
    for client, mine in enumerate(rows):
        part = dataset.train.take(mine)
        train[client] = batches(part, shuffle=True)
        test[client] = whole_test
        if part.client is not None and dataset.test.client is not None:
            held = np.flatnonzero(np.isin(dataset.test.client, np.unique(part.client)))
            test[client] = batches(dataset.test.take(held), shuffle=False)
    classes = named.SHAPES[name].classes
    eight = Eight(
        [
            len(dataset.train),
            len(dataset.test),
            batches(dataset.train, shuffle=True),
            whole_test,
            {client: len(mine) for client, mine in enumerate(rows)},
            train,
            test,
            classes,
        ]
    )
    return eight, classes
