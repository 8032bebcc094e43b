# SPDX-License-Identifier: Apache-2.0
"""Real data sets, read out of packages that Debian and the Python index carry.

    heart = data.load("heart", fetch=True)
    heart.of_client("Hungary").train.x.shape

Nothing here touches the network unless told to (`fetch`, or ``fetch=True``), and no data is part
of this package: a provider names a file in somebody else's package and its SHA-256 (`packages`).

What `load` has read it keeps, for a simulation asks once for every client. So its arrays are
read-only; `take` copies.
"""

from __future__ import annotations

import shlex
from collections import OrderedDict
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, overload

from fedml.data import (
    bible,
    graphs,
    health,
    heart,
    images,
    molecules,
    ratings,
    sensors,
    text,
    words,
)
from fedml.data.dataset import Dataset, seal
from fedml.data.errors import DatasetMissing, UnknownDataset
from fedml.data.packages import DEFAULT_HOME, Told, bring, find, home_folder
from fedml.data.provider import Provider

if TYPE_CHECKING:
    from argparse import Namespace

    from fedml.arguments import Arguments

__all__ = ["About", "Dataset", "describe", "fetch", "forget", "load", "names"]

_MODULES = (bible, graphs, health, heart, images, molecules, ratings, sensors, text, words)
_PROVIDERS: dict[str, Provider] = {
    provider.name: provider for module in _MODULES for provider in module.PROVIDERS
}

# Read already, the latest last. The largest, Fashion-MNIST, takes 220 MB.
_KEEP = 4
_kept: OrderedDict[tuple[str, Path], Dataset[Any]] = OrderedDict()
_keeping = Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What is known about a data set without reading it.

    Attributes:
        licence: Of the data, as far as its makers state one.
        source: Who made it, where it was published, which package carries it.
        size: Rows in train and test part.
        download_mb: What fetching it downloads, in megabytes.
        present: Whether `load` would find it on this machine now.
        how_to_get: The commands that bring it, any one of which will do.
    """

    name: str
    title: str
    licence: str
    source: str
    size: str
    download_mb: float
    present: bool
    how_to_get: tuple[str, ...]


def names() -> tuple[str, ...]:
    """Every data set that `load` knows, sorted."""
    return tuple(sorted(_PROVIDERS))


def describe(name: str, *, home: Path | str | None = None) -> About:
    """Licence, source, size, and whether it is here.

    Raises:
        UnknownDataset: No provider has this name.
    """
    provider = _provider(name)
    folder = home_folder(home)
    return About(
        name=name,
        title=provider.title,
        licence=provider.licence,
        source=provider.source,
        size=provider.size,
        download_mb=provider.download_mb,
        present=all(find(file, folder) is not None for file in provider.files.values()),
        how_to_get=_how_to_get(provider, folder),
    )


def fetch(name: str, *, home: Path | str | None = None, told: Told | None = None) -> None:
    """Bring the packages that carry this data set, unless it is here already.

    Archives are kept under ``home/data``; nothing is installed. `told` is called with the bytes
    that have come and the bytes in all, where the package client says so.

    Raises:
        UnknownDataset: No provider has this name.
        FetchFailed: The package client could not bring it.
        DamagedData: What came is not the pinned data.
    """
    _bytes_of(_provider(name), home_folder(home), fetch=True, told=told)


@overload
def load(name: str, *, home: Path | str | None = None, fetch: bool = False) -> Dataset[Any]: ...
@overload
def load(name: Arguments | Namespace) -> tuple[list[Any], int]: ...
def load(
    name: str | Arguments | Namespace, *, home: Path | str | None = None, fetch: bool = False
) -> Dataset[Any] | tuple[list[Any], int]:
    """A data set out of an installed package or an archive fetched before.

    The last four that were read stay in memory and are given again, so that asking for one in
    every client's `data` costs nothing. Their arrays cannot be written to; copy, or `take` rows.

    With the arguments of a FedML script, it is the list of eight and the number of classes
    (`fedml.data.eight`).

    Args:
        name: One of `names`, or what `fedml.init` returns.
        home: Where fetched archives are kept; ``$FEDML_HOME`` or ``~/.fedml`` unless given.
        fetch: Download what is missing instead of raising.

    Raises:
        UnknownDataset: No provider has this name.
        DatasetMissing: It is not here; the error names the command that brings it.
        FetchFailed: Fetching was asked for and failed.
        DamagedData: The bytes found are not the pinned ones.
    """
    if not isinstance(name, str):
        from fedml.data import eight  # brings torch

        return eight.load(name)
    provider = _provider(name)
    folder = home_folder(home)
    key = (name, folder)
    with _keeping:
        if key in _kept:
            _kept.move_to_end(key)
            return _kept[key]
    found = provider.read(_bytes_of(provider, folder, fetch=fetch))
    seal(found)
    with _keeping:
        _kept[key] = found
        while len(_kept) > _KEEP:
            _kept.popitem(last=False)
    return found


def forget() -> None:
    """Let go of what `load` keeps, where memory matters more than the next `load`."""
    with _keeping:
        _kept.clear()


def _provider(name: str) -> Provider:
    if name in _PROVIDERS:
        return _PROVIDERS[name]
    near = get_close_matches(name, _PROVIDERS, n=3, cutoff=0.5) or names()
    raise UnknownDataset(f"no data set is called {name!r}", hint=f"try {', '.join(near)}")


def _how_to_get(provider: Provider, home: Path) -> tuple[str, ...]:
    installs = dict.fromkeys(file.command for file in provider.files.values())
    fetch = f"fedml data fetch {provider.name}"
    if home != home_folder(DEFAULT_HOME):
        # Said of another folder, or by a worker, whose home is not that of who reads it.
        fetch += f" --home {shlex.quote(str(home))}"
    return (fetch, *installs)


def _bytes_of(
    provider: Provider, home: Path, *, fetch: bool, told: Told | None = None
) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for role, file in provider.files.items():
        content = find(file, home)
        if content is None and fetch:
            content = bring(file, home, told)
        if content is None:
            ways = ", or: ".join(_how_to_get(provider, home))
            raise DatasetMissing(f"{provider.name} is not on this machine", hint=f"run: {ways}")
        found[role] = content
    return found
