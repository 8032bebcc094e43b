# SPDX-License-Identifier: Apache-2.0
"""What models are worth: on central data, by the server, and on the clients', as they report."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fedml.federate.application import Application, set_weights
from fedml.federate.arrays import Arrays
from fedml.simulation.order import Done
from fedml.simulation.result import mean_metrics


class Central:
    """The server's own evaluation."""

    def __init__(self, application: Application, model: Any) -> None:
        """Load the data.

        Args:
            application: Whose `central` and `evaluate` to call.
            model: One to work in, wherever it is.
        """
        self._application, self._model = application, model
        self._data = application.central()

    def metrics(self, arrays: Arrays) -> dict[str, float]:
        """Of a model; empty where there are no data."""
        if self._data is None:
            return {}
        set_weights(self._model, arrays)
        with _all_cores():
            found = self._application.evaluate(self._model, self._data)
        return {f"central.{name}": value for name, value in found.items()}


def of_clients(done: Sequence[Done]) -> dict[str, float]:
    """What clients found of a model, in the mean."""
    reports = [one.metrics for one in done]
    weighted = [(report.get("eval.examples", 0.0), _only_eval(report)) for report in reports]
    means = mean_metrics(weighted)
    if means:
        means["examples"] = math.fsum(weight for weight, _ in weighted)
    return {f"devices.{name}": value for name, value in means.items()}


def _only_eval(metrics: Mapping[str, float]) -> dict[str, float]:
    return {
        name[5:]: value
        for name, value in metrics.items()
        if name.startswith("eval.") and name != "eval.examples"
    }


@contextmanager
def _all_cores() -> Iterator[None]:
    """The members wait while the server evaluates: it may use their cores."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(1)
