# SPDX-License-Identifier: Apache-2.0
"""MNIST as FedML's scripts with a model of their own load it: flat, in a part for each client."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from fedml.data import eight


def download_mnist(data_cache_dir: str) -> None:
    """Nothing is fetched here: data sets are read out of packages (docs/data.md)."""


def load_partition_data_mnist(
    args: Any, batch_size: int, train_path: str = "", test_path: str = ""
) -> tuple[Any, ...]:
    """The number of clients, and the list of eight (`fedml.data.eight`) of the digits.

    FedML's files have 1000 clients; here they are divided among as many as the configuration asks
    for, in its way. The paths have no effect.

    Raises:
        DatasetMissing: Neither the digits nor anything near them is here.
    """
    asked = {**vars(args), "dataset": "mnist", "model": "lr", "batch_size": batch_size}
    dataset, _ = eight.load(SimpleNamespace(**asked))
    return args.client_num_in_total, *dataset
