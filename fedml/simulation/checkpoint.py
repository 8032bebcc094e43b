# SPDX-License-Identifier: Apache-2.0
"""Where a simulation can be taken up again: one safetensors file, replaced as a whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from fedml.errors import ConfigError
from fedml.federate.algorithm import Algorithm, Kind
from fedml.federate.arrays import Arrays, tagged, untagged
from fedml.federate.tensor_file import write
from fedml.simulation.plan import Plan
from fedml.simulation.record import NAME as RESULTS

NAME = "checkpoint.safetensors"
STATES = "state"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Everything that the rounds after it depend on.

    Attributes:
        turn: How many turns are done (rounds, or more where a round has several stages).
        model: Of the last of them.
        state: The algorithm's.
        simulated_s: The simulated clock.
        sizes: Examples of each client met so far; who adds up whom depends on them.
        identity: `Plan.identity` of the run.
        engine: That it ran on.
    """

    turn: int
    model: Arrays
    state: Arrays
    simulated_s: float
    sizes: Mapping[int, int]
    identity: str
    engine: str

    def save(self, folder: Path) -> None:
        """Write it; what was there stays until this one is whole."""
        about = {
            "turn": self.turn,
            "simulated_s": self.simulated_s,
            "sizes": list(self.sizes.items()),
            "identity": self.identity,
            "engine": self.engine,
        }
        beside = folder / f"{NAME}.new"
        arrays = tagged("model", self.model) | tagged("state", self.state)
        write(beside, arrays, metadata={"about": json.dumps(about)})
        beside.replace(folder / NAME)

    @classmethod
    def load(cls, folder: Path) -> Checkpoint | None:
        """The one in this folder, if there is one.

        Raises:
            ConfigError: It is damaged.
        """
        path = folder / NAME
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="numpy") as file:
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                about: dict[str, Any] = json.loads(file.metadata()["about"])
        except Exception as error:  # safetensors raises a type of its own
            raise ConfigError(
                f"{path} cannot be read: {error}", "start the run anew with another --out"
            ) from error
        return cls(
            turn=about["turn"],
            model=untagged("model", arrays),
            state=untagged("state", arrays),
            simulated_s=about["simulated_s"],
            sizes=dict(about["sizes"]),
            identity=about["identity"],
            engine=about["engine"],
        )


def prepare(
    folder: Path,
    plan: Plan,
    algorithm: Algorithm,
    *,
    passes: int,
    resume: bool,
    say: Callable[[str], None],
) -> Checkpoint | None:
    """Make the folder ready for a run, and return what to go on from.

    Args:
        folder: Of the run; made, if it is not there.
        plan: What is to be run.
        algorithm: Of that plan, as the server walks it.
        passes: How often clients are asked in one turn of it.
        resume: Whether to go on with what is there.
        say: Hears that there was nothing.

    Raises:
        ConfigError: There is a run that was not asked for, or one of something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = Checkpoint.load(folder)
    if not resume:
        if found is not None:
            done = found.turn // algorithm.stages
            raise ConfigError(
                f"{folder} holds a run of {done} rounds",
                "--resume goes on with it, another --out starts anew",
            )
    elif found is None:
        say(f"nothing to resume in {folder}: starting with round 1")
    if found is None:
        clear(folder)
        return None
    if found.identity != plan.identity():
        raise ConfigError(
            f"{folder} holds a run of another configuration",
            "only rounds, workers, engine and device may differ; another --out starts anew",
        )
    if algorithm.kind is Kind.SYNCHRONOUS:
        drop_states_after(folder, found.turn * passes)
    return found


def drop_states_after(folder: Path, turn: int) -> None:
    """Remove what clients kept in turns from this one on: they are run again."""
    for client in (folder / STATES).glob("*"):
        for file in client.glob("*.safetensors"):
            if int(file.stem) >= turn:
                file.unlink()
        for file in client.glob("*.new"):
            file.unlink()


def clear(folder: Path) -> None:
    """Remove what a run left here that was killed before its first checkpoint."""
    for file in folder.glob(f"{RESULTS}*"):
        file.unlink()
    shutil.rmtree(folder / STATES, ignore_errors=True)
