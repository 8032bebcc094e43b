# SPDX-License-Identifier: Apache-2.0
"""What clients keep between their rounds: a file for each turn that a run may go back to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


class States:
    """The files below one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def before(self, client: int, turn: int) -> Path | None:
        """What this client kept after its last turn before this one."""
        turns = [n for n in self._turns(client) if n < turn]
        return self.of(client, max(turns)) if turns else None

    def of(self, client: int, turn: int) -> Path:
        """Where what it keeps in this turn is, if it keeps something."""
        return self._folder / str(client) / f"{turn}.safetensors"

    def keep(self, client: int, turn: int, kept: int, write: Callable[[Path], object]) -> None:
        """Add one, whole or not at all, and remove those that nobody will ask for.

        Args:
            client: Whose.
            turn: Of which.
            kept: The last turn that a checkpoint holds.
            write: Makes the file.
        """
        file = self.of(client, turn)
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_suffix(".new")
        write(beside)
        beside.replace(file)
        # One from before the last checkpoint, should the run be resumed there; the latest one; and
        # the one before it: a checkpoint of that time may be written while this turn is walked.
        turns = sorted(self._turns(client))
        safe = [n for n in turns if n <= kept][-1:] + turns[-2:]
        for old in turns:
            if old not in safe:
                self.of(client, old).unlink()

    def _turns(self, client: int) -> list[int]:
        return [int(file.stem) for file in (self._folder / str(client)).glob("*.safetensors")]
