# SPDX-License-Identifier: Apache-2.0
"""Names out of FedML's configurations lead to data that is at hand, never silently."""

import pytest

from fedml import data
from fedml.data.stand_in import _TABLE, StandIn, stand_in


@pytest.mark.parametrize("entry", _TABLE, ids=lambda entry: entry.named)
def test_every_stand_in_exists_and_says_what_differs(entry: StandIn) -> None:
    assert stand_in(entry.named.upper()) is entry
    assert entry.use in data.names()
    assert entry.named not in data.names()
    assert entry.named in entry.note
    assert entry.use in entry.note


def test_unknown_names_have_none() -> None:
    assert stand_in("my_own_data") is None
