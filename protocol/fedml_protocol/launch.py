# SPDX-License-Identifier: Apache-2.0
"""What a launched job is, as the agent is told it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedml_protocol.errors import MalformedMessage


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchSpec:
    """Shell lines to run in the unpacked workspace.

    Attributes:
        bootstrap: Run first; the command runs only if it ends with 0. May be empty.
        command: The job itself.
        env: Added to the clean environment of the task.
        requirements: What a virtual environment of the job has, as lines of a requirements file;
            relative paths are those of the workspace. Empty: it has none.
    """

    command: str
    bootstrap: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    requirements: str = ""

    def __post_init__(self) -> None:
        if not self.command.strip():
            raise MalformedMessage("a job needs a command")
        for name, value in self.env.items():
            if not name or "=" in name or "\0" in name + value:
                raise MalformedMessage(f"not an environment variable: {name[:60]!r}")
        if "\0" in self.command + self.bootstrap + self.requirements:
            raise MalformedMessage("commands and requirements cannot hold a NUL")
