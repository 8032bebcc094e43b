# SPDX-License-Identifier: Apache-2.0
"""The `fedml` command as a person types it: real processes, a real broker, two real agents.

One broker serves all tests of this folder; each test looks at its own runs only.
"""

import os
import pty
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.place import Place, command


class Terminal:
    """A command on a terminal of 120 columns; what it shows, and keys to press."""

    def __init__(self, words: list[str], env: dict[str, str]) -> None:
        self.text = ""
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            words,
            # As a shell does: the terminal is the command's own, so that Ctrl-C reaches it.
            preexec_fn=lambda: os.login_tty(theirs),
            env={**env, "COLUMNS": "120", "LINES": "40", "TERM": "xterm"},
        )
        os.close(theirs)

    def until(self, wanted: str) -> str:
        """Read until `wanted` (a pattern) has been shown; everything so far."""
        while not re.search(wanted, self.text):
            data = self._read()
            assert data, f"it ended without {wanted!r}:\n{self.text}"
        return self.text

    def press(self, keys: str) -> None:
        """Type something; Ctrl-C is ``\\x03``."""
        os.write(self._ours, keys.encode())

    def end(self) -> int:
        """Read to the end; the exit code."""
        while self._read():
            pass
        os.close(self._ours)
        return self.process.wait(20)

    def _read(self) -> str:
        try:
            data = os.read(self._ours, 65536).decode(errors="replace")
        except OSError:  # how a terminal says that nobody is left on the other side
            return ""
        self.text += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", data)
        return data


class Fedml:
    """Runs `fedml` as the admin of a place."""

    def __init__(self, place: Place, folder: Path) -> None:
        self.place = place
        self.folder = folder
        self.env = {**os.environ, "FEDML_HOME": str(place.folder / "me")}

    def __call__(
        self, *words: str, code: int = 0, home: Path | None = None
    ) -> "subprocess.CompletedProcess[str]":
        """Run it without a terminal, and check how it ends."""
        done = subprocess.run(
            command("fedml", *words),
            cwd=self.folder,
            env=self.env if home is None else {**self.env, "FEDML_HOME": str(home)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def on_terminal(self, *words: str) -> Terminal:
        """Run it on a terminal."""
        return Terminal(command("fedml", *words), self.env)

    def start(self, *words: str) -> "subprocess.Popen[str]":
        """Start it without a terminal."""
        return subprocess.Popen(
            command("fedml", *words),
            cwd=self.folder,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def file(self, name: str, text: str) -> str:
        """Write a file; its path."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return str(path)


@pytest.fixture(scope="package")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A broker with the agents `one` and `two`."""
    with Place(tmp_path_factory.mktemp("place")) as place:
        place.agent("one")
        place.agent("two")
        place.finishes(place.launch("true", nodes=2))  # both are there
        yield place


@pytest.fixture
def fedml(place: Place, tmp_path: Path) -> Fedml:
    """The command, in a working directory of its own."""
    return Fedml(place, tmp_path)
