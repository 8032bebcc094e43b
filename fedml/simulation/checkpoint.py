# SPDX-License-Identifier: Apache-2.0
"""Where a simulation can be taken up again: one safetensors file, replaced as a whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.numpy import save_file

from fedml.errors import ConfigError
from fedml.federate.arrays import Arrays, tagged, untagged
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
        save_file(arrays, beside, metadata={"about": json.dumps(about)})
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
