# SPDX-License-Identifier: Apache-2.0
"""How many clients there are to learn from, the N of the papers.

SCAFFOLD's ``c`` and FedDyn's ``h`` are means over all N clients. Those without an example keep
nothing and are none of them, but nobody says beforehand who they are: they are asked, and answer
with an update that counts for nothing. So the server remembers whom it saw without, in its state;
until it has asked a client, it counts it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedml.federate.algorithm import Facts
from fedml.federate.arrays import Arrays, tagged, untagged

CENSUS = "census"  # the tag of what is remembered, beside the algorithm's state
_WITHOUT = "without"


def facts_of(state: Arrays, weights: Mapping[int, float], population: int) -> tuple[Facts, Arrays]:
    """What a round makes known.

    Args:
        state: The server's, with what was remembered before.
        weights: How much the update of each client of the round counts; one at least does.
        population: How many clients there are in all.

    Returns:
        The facts for `Algorithm.server_update`, and what is to be remembered in the next state.
    """
    known = untagged(CENSUS, state).get(_WITHOUT)
    before = set() if known is None else set(known.tolist())
    learned = {client for client, weight in weights.items() if weight > 0}
    without = (before | weights.keys()) - learned
    everybody = max(population, len(weights))
    facts = Facts(
        clients=len(learned),
        population=max(everybody - len(without), len(learned)),
        counted=max(everybody - len(before), len(learned)),
    )
    remembered = {_WITHOUT: np.array(sorted(without), np.int64)} if without else {}
    return facts, tagged(CENSUS, remembered)
