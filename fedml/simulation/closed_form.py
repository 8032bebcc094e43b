# SPDX-License-Identifier: Apache-2.0
"""Linear models without autograd: `federate.linear_sgd` on weights that stay in the cache."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedml.federate import linear_sgd
from fedml.federate.arrays import Array
from fedml.federate.local_sgd import Loss, Steps, examples_of
from fedml.simulation.engine import Diverged, Rng, linear_names


class ClosedForm:
    """See `engine.Engine`."""

    chunk = 1

    def __init__(self, model: Any, steps: Steps, loss: Loss) -> None:
        names = linear_names(model)
        if names is None:
            raise ValueError("the model is not one linear map")
        self._weight, self._bias = names
        self._steps = steps
        if isinstance(model, dict):
            at = model
        else:
            from fedml.model.arrays import to_arrays

            at = to_arrays(model)
        # A dict model stores a row for each input; here it is one for each output, as torch has it.
        self._turned = isinstance(model, dict)
        weight = at[self._weight].T if self._turned else at[self._weight]
        # One stretch of memory for weight and bias, so that what is done to both is one call.
        outputs = 0 if self._bias is None else at[self._bias].size
        self._split = weight.size
        self._all = np.zeros(weight.size + outputs, weight.dtype)
        self._start = np.zeros_like(self._all)
        self._sum = np.zeros(len(self._all))
        self._scratch = np.zeros(len(self._all))
        self._shape = weight.shape
        self._count = 0.0
        self._linear = linear_sgd.Linear(
            self._all[: self._split].reshape(self._shape),
            None if self._bias is None else self._all[self._split :],
            loss,
        )
        self._prepared: dict[int, linear_sgd.Prepared] = {}

    def begin(self, model: Mapping[str, Array]) -> None:
        """See `engine.Engine`."""
        weight = self._start[: self._split].reshape(self._shape)
        weight[...] = model[self._weight].T if self._turned else model[self._weight]
        if self._bias is not None:
            self._start[self._split :] = model[self._bias]
        self._sum.fill(0)
        self._count = 0.0

    def train(
        self, clients: Sequence[int], data: Sequence[Any], rngs: Sequence[Rng]
    ) -> list[dict[str, float]]:
        """See `engine.Engine`."""
        client = clients[0]
        prepared = self._prepared.get(client)
        if prepared is None:
            prepared = self._prepared[client] = self._linear.prepare(*examples_of(data[0]))
        weights = self._all
        np.copyto(weights, self._start)
        rng = None
        if self._steps.shuffle:
            rng = rngs[0]()
            rng.integers(2**31)  # the draw that `Application.train` seeds everything with
        change = linear_sgd.changed(self._linear, self._steps)
        with np.errstate(all="ignore"):
            found = linear_sgd.run(self._linear, prepared, self._steps, rng, change)
            square = float(np.dot(weights, weights))
        if not math.isfinite(square) and not np.isfinite(weights).all():
            raise Diverged
        examples = found["examples"]
        np.multiply(weights, examples, out=self._scratch)
        np.add(self._sum, self._scratch, out=self._sum)
        self._count += examples
        return [found]

    def finish(self, total: Mapping[str, Array]) -> None:
        """See `engine.Engine`."""
        np.multiply(self._start, self._count, out=self._scratch)
        np.subtract(self._sum, self._scratch, out=self._sum)
        weight = self._sum[: self._split].reshape(self._shape)
        total[self._weight][...] = weight.T if self._turned else weight
        if self._bias is not None:
            total[self._bias][...] = self._sum[self._split :]

    def forget(self, clients: Sequence[int]) -> None:
        """See `engine.Engine`."""
        for client in clients:
            self._prepared.pop(client, None)

    def free(self) -> bool:
        """See `engine.Engine`."""
        return False
