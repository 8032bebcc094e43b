# SPDX-License-Identifier: Apache-2.0
"""What the members of a crew have added up, as one update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from safetensors.numpy import load_file

from fedml.errors import RunFailed
from fedml.federate.aggregate import PartialSum
from fedml.federate.algorithm import Update
from fedml.federate.arrays import Arrays, rounded
from fedml.simulation.order import Done
from fedml.simulation.result import mean_metrics

if TYPE_CHECKING:
    from fedml.simulation.run import Simulation


def added_up(run: Simulation, number: int, places: Sequence[int], good: Sequence[Done]) -> Update:
    """The mean of what all members added up.

    Args:
        run: With its crew and the layout of its updates.
        number: Of the round, from 1.
        places: Of the members that had something to do.
        good: What came of their clients.

    Raises:
        RunFailed: No client has an example to learn from.
    """
    weight = math.fsum(one.weight for one in good)
    if not weight > 0:
        raise barren(number, len(good))
    metrics = mean_metrics([(one.weight, one.metrics) for one in good])
    if run.engine == "exact":
        whole = PartialSum(run.update)
        for place in places:
            whole.merge(PartialSum.from_arrays(load_file(run.crew.sum_file(place))))
        return Update(arrays=whole.result().arrays, weight=weight, metrics=metrics)
    boards = [run.crew.sum_of(place) for place in places]
    arrays: Arrays = {}
    for name, spec in run.update.tensors.items():
        total = boards[0][name] if len(boards) == 1 else boards[0][name] + boards[1][name]
        for board in boards[2:]:
            total += board[name]
        arrays[name] = rounded(total / weight, spec.dtype)
    return Update(arrays=arrays, weight=weight, metrics=metrics)


def barren(number: int, clients: int) -> RunFailed:
    """The error of a round that learned nothing."""
    return RunFailed(
        f"round {number}: none of its {clients} clients has an example to learn from",
        "give clients data, or choose more of them in clients.per_round",
    )
