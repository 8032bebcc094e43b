# SPDX-License-Identifier: Apache-2.0
"""Real data for the tests: fetched once into pytest's own cache, kept there for later runs."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedml import data
from fedml.data.errors import FetchFailed

Load = Callable[[str], data.Dataset[Any]]


@pytest.fixture(scope="session")
def data_home(pytestconfig: pytest.Config) -> Path:
    """Where fetched archives stay between runs."""
    return Path(pytestconfig.cache.mkdir("fedml-data"))


@pytest.fixture(scope="session")
def real(data_home: Path) -> Load:
    """Load a data set by name. Without a network its test is skipped, except in CI."""

    def load(name: str) -> data.Dataset[Any]:
        try:
            return data.load(name, home=data_home, fetch=True)
        except FetchFailed as problem:
            if os.environ.get("CI"):
                raise
            pytest.skip(str(problem))

    return load


@pytest.fixture(autouse=True, scope="session")
def _own_places(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whoever runs the tests finds nothing new in his home, and what he has there changes none.

    The data sets that he has fetched would decide what a configuration of FedML's trains on.
    """
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["FEDML_HOME"] = str(tmp_path_factory.mktemp("home"))
