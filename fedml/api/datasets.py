# SPDX-License-Identifier: Apache-2.0
"""Data sets by name. NumPy comes only when one of these is called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedml.api.account import Home, home_of

if TYPE_CHECKING:
    from fedml.data import About


def data_list(*, home: Home = None) -> list[About]:
    """Every data set that `data_load` knows."""
    from fedml import data

    return [data.describe(name, home=home_of(home)) for name in data.names()]


def data_show(name: str, *, home: Home = None) -> About:
    """Licence, source, size, and whether it is here."""
    from fedml import data

    return data.describe(name, home=home_of(home))


def data_fetch(name: str, *, home: Home = None) -> None:
    """Bring a data set, unless it is here already."""
    from fedml import data

    data.fetch(name, home=home_of(home))


def data_load(name: str, *, fetch: bool = False, home: Home = None) -> Any:
    """Read a data set: a `fedml.data.Dataset`."""
    from fedml import data

    return data.load(name, home=home_of(home), fetch=fetch)
