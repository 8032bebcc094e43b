# SPDX-License-Identifier: Apache-2.0
"""Many clients in one machine: the files of a deployed run, simulated.

plan.py     what is simulated        run.py       the server's part of the rounds
crew.py     the worker processes     member.py    the clients' part, in each of them
ray_crew.py the same on several machines       states.py   what clients keep
engine.py   ways to train: exact, closed_form.py, inplace.py, stacked.py
devices.py  how fast and reliable    asynchronous.py   algorithms without rounds
liars.py    clients that lie     grouped.py   groups with rounds of their own
order.py    what the two say to each other   evaluation.py   what models are worth
accelerator.py   CPU, CUDA or MPS
record.py   the results file         checkpoint.py, report.py, sweep.py, entry.py

result = fedml.simulate("run.yaml", rounds=20)
"""

import importlib
from typing import Any

_LAZY = {
    "ClientFailed": "fedml.simulation.result",
    "Listener": "fedml.simulation.result",
    "Result": "fedml.simulation.result",
    "Round": "fedml.simulation.result",
    "Simulation": "fedml.simulation.run",
    "simulate": "fedml.simulation.entry",
}

__all__ = [*_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fedml.simulation' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
