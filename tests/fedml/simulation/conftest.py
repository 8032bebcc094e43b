# SPDX-License-Identifier: Apache-2.0
"""What several tests of simulations set up."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As members have it: where this process trains as well, threads would change the bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
