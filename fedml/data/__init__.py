# SPDX-License-Identifier: Apache-2.0
"""Real data sets, read out of packages that Debian and the Python index carry.

    heart = data.load("heart", fetch=True)
    heart.of_client("Hungary").train.x.shape

Nothing here touches the network unless told to (`fetch`, or ``fetch=True``), and no data is part
of this package: a provider names a file in somebody else's package and its SHA-256 (`packages`).
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
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
from fedml.data.dataset import Dataset
from fedml.data.errors import DatasetMissing, UnknownDataset
from fedml.data.packages import Told, bring, find, home_folder
from fedml.data.provider import Provider

if TYPE_CHECKING:
    from argparse import Namespace

    from fedml.arguments import Arguments

__all__ = ["About", "Dataset", "describe", "fetch", "load", "names"]

_MODULES = (bible, graphs, health, heart, images, molecules, ratings, sensors, text, words)
_PROVIDERS: dict[str, Provider] = {
    provider.name: provider for module in _MODULES for provider in module.PROVIDERS
}


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


def describe(name: str, *, home: Path | None = None) -> About:
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
        how_to_get=_how_to_get(provider),
    )


def fetch(name: str, *, home: Path | None = None, told: Told | None = None) -> None:
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
def load(name: str, *, home: Path | None = None, fetch: bool = False) -> Dataset[Any]: ...
@overload
def load(name: Arguments | Namespace) -> tuple[list[Any], int]: ...
def load(
    name: str | Arguments | Namespace, *, home: Path | None = None, fetch: bool = False
) -> Dataset[Any] | tuple[list[Any], int]:
    """Read a data set from an installed package or from an archive fetched before.

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
    return provider.read(_bytes_of(provider, home_folder(home), fetch=fetch))


def _provider(name: str) -> Provider:
    if name in _PROVIDERS:
        return _PROVIDERS[name]
    near = get_close_matches(name, _PROVIDERS, n=3, cutoff=0.5) or names()
    raise UnknownDataset(f"no data set is called {name!r}", hint=f"try {', '.join(near)}")


def _how_to_get(provider: Provider) -> tuple[str, ...]:
    installs = dict.fromkeys(file.command for file in provider.files.values())
    return (f"fedml data fetch {provider.name}", *installs)


def _bytes_of(
    provider: Provider, home: Path, *, fetch: bool, told: Told | None = None
) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for role, file in provider.files.items():
        content = find(file, home)
        if content is None and fetch:
            content = bring(file, home, told)
        if content is None:
            ways = " or: ".join(_how_to_get(provider))
            raise DatasetMissing(f"{provider.name} is not on this machine", hint=f"run: {ways}")
        found[role] = content
    return found
