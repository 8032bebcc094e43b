# SPDX-License-Identifier: Apache-2.0
"""`fedml.simulate`: a simulation as one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedml.simulation.result import Listener, Result, Round
from fedml.simulation.run import Simulation


def simulate(
    source: Path | str | Mapping[str, Any],
    *,
    out: Path | str | None = None,
    resume: bool = False,
    debug: bool = False,
    changes: Mapping[str, Any] | None = None,
    on_round: Callable[[Round], None] | None = None,
    **settings: Any,
) -> Result:
    """Simulate a federated run; see docs/simulate.md.

    Args:
        source: A run file, or a mapping of its keys; a configuration of FedML's will do.
        out: Where results file, checkpoints and report go; None keeps everything in memory.
        resume: Go on from the checkpoint in ``out``.
        debug: Everything in this process, where breakpoints and profilers work.
        changes: Keys of the run file to set otherwise, such as ``{"lr": 0.1}`` for
            ``config.lr``, or ``{"clients.per_round": 5}``.
        on_round: Called after each round.
        **settings: ``rounds``, ``engine``, ``device``, ``workers``, ``checkpoint_s``, ``seed``;
            ``ray``: the address of a Ray cluster, or ``"local"``.

    Raises:
        ConfigError: The run cannot be; the text says why and the hint what to change.
        RunFailed: It ended badly; `ClientFailed` if a client's code raised.
    """
    from fedml import translation
    from fedml.simulation.plan import read
    from fedml.simulation.report import write

    known = {"rounds", "engine", "device", "workers", "checkpoint_s", "seed", "ray"}
    unknown = settings.keys() - known
    if unknown:
        raise TypeError(f"simulate() has no setting {min(unknown)!r}; it has {sorted(known)}")

    class Heard(Listener):
        def ended(self, round_: Round) -> None:
            if on_round is not None:
                on_round(round_)

    plan = read(translation.accept(source), changes=changes, **settings)
    folder = None if out is None else Path(out)
    run = Simulation(plan, folder=folder, resume=resume, debug=debug, listener=Heard())
    result = run.run()
    if folder is not None:
        write(folder)
    return result
