# SPDX-License-Identifier: Apache-2.0
"""What a launched job is, as the agent is told it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from fedml_protocol.errors import MalformedMessage

# How the artifacts of a job's result are called: lines NAME=VALUE, and what is below the folder.
OUTPUT_VALUES = "values"
OUTPUT_FILES = "files"

# A shorter value would be found in every other line of a log.
SHORTEST_SECRET = 4

_SECRET = re.compile(
    r".*(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|APIKEY|_KEY|CREDENTIAL)S?", re.IGNORECASE
)


def looks_secret(name: str) -> bool:
    """Whether a variable that nobody has declared is one to hide, by its name."""
    return _SECRET.fullmatch(name) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchSpec:
    """Shell lines to run in the unpacked workspace.

    Attributes:
        bootstrap: Run first; the command runs only if it ends with 0. May be empty.
        command: The job itself.
        env: Added to the clean environment of the task.
        requirements: What a virtual environment of the job has, as lines of a requirements file;
            relative paths are those of the workspace. Empty: it has none.
        secrets: Names of variables in `env` whose values no log may show.
    """

    command: str
    bootstrap: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    requirements: str = ""
    secrets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.command.strip():
            raise MalformedMessage("a job needs a command")
        for name, value in self.env.items():
            if not name or "=" in name or "\0" in name + value:
                raise MalformedMessage(f"not an environment variable: {name[:60]!r}")
        if unknown := sorted(set(self.secrets) - self.env.keys()):
            raise MalformedMessage(f"a secret that is no variable of the job: {unknown[0][:60]!r}")
        if "\0" in self.command + self.bootstrap + self.requirements:
            raise MalformedMessage("commands and requirements cannot hold a NUL")
