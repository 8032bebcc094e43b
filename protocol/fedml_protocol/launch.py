# SPDX-License-Identifier: Apache-2.0
"""What a launched job is, as the agent is told it."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from fedml_protocol.errors import MalformedMessage
from fedml_protocol.ids import check_port

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


# What a registry takes (the OCI distribution specification). No reference begins with a dash: it
# becomes a word of the engine's command line.
_REFERENCE = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._:/@-]{0,500}")
# Of a URL, as RFC 3986 has it, with a query perhaps: it becomes a line of a request.
_PATH = re.compile(r"/[A-Za-z0-9._~!$&'()*+,;=:@%/?-]{0,500}")
_REGISTRY = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9.:/_-]{0,250}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """A directory or file of the machine that a container sees, if the machine's owner lets it.

    Attributes:
        source: On the machine, absolute.
        target: In the container, absolute.
        writable: Whether the job may change it.
    """

    source: str
    target: str
    writable: bool = False

    def __post_init__(self) -> None:
        for path in (self.source, self.target):
            if not path.startswith("/") or ".." in path.split("/"):
                raise MalformedMessage(f"a mount needs absolute paths without `..`: {path[:200]!r}")
            if any(sign in path for sign in "\0\n:,"):
                raise MalformedMessage(f"a mount cannot have {path[:200]!r}: no colon, no comma")


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """The container in which a job runs.

    Attributes:
        image: As Docker and Podman name it.
        registry: Where user and password are good for; empty: where the image comes from.
        username, password: For a registry that asks for them; both or none.
        mounts: What of the machine it sees beside its workspace.
    """

    image: str
    registry: str = ""
    username: str = ""
    password: str = field(default="", repr=False)
    mounts: tuple[Mount, ...] = ()

    def __post_init__(self) -> None:
        if not _REFERENCE.fullmatch(self.image):
            raise MalformedMessage(f"not the name of an image: {self.image[:200]!r}")
        if self.registry and not _REGISTRY.fullmatch(self.registry):
            raise MalformedMessage(f"not a registry: {self.registry[:200]!r}")
        if bool(self.username) != bool(self.password):
            raise MalformedMessage("a registry wants a user and a password, not one of them")
        if any(sign in self.username + self.password for sign in "\0\n"):
            raise MalformedMessage("a registry's user and password are one line each")


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A job that stays up and answers on a port of its machine.

    Attributes:
        port: Where; 0: the machine chooses one that is free. The job finds it in PORT.
        path: What `GET` on this machine answers with 200 once it is ready, such as `/ready`; empty:
            it is ready once it takes connections.
        within_s: Seconds in which it must be ready for the first time.
    """

    port: int = 0
    path: str = ""
    within_s: float = 600.0

    def __post_init__(self) -> None:
        check_port(self.port)
        if self.path and _PATH.fullmatch(self.path) is None:
            raise MalformedMessage(f"not the path of a URL, such as /ready: {self.path[:200]!r}")
        if not 0 < self.within_s < math.inf:
            raise MalformedMessage(f"a service is ready within some seconds, not {self.within_s}")


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
        offline: It has no network.
        container: What it runs in; None: the machine itself.
        service: How it answers others; None: it does its work and ends.
    """

    command: str
    bootstrap: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    requirements: str = ""
    secrets: tuple[str, ...] = ()
    offline: bool = False
    container: Container | None = None
    service: Service | None = None

    def __post_init__(self) -> None:
        if self.service is not None and self.offline:
            raise MalformedMessage("a service needs the network, and this job is to have none")
        if not self.command.strip():
            raise MalformedMessage("a job needs a command")
        for name, value in self.env.items():
            if not name or "=" in name or "\0" in name + value:
                raise MalformedMessage(f"not an environment variable: {name[:60]!r}")
        if unknown := sorted(set(self.secrets) - self.env.keys()):
            raise MalformedMessage(f"a secret that is no variable of the job: {unknown[0][:60]!r}")
        if "\0" in self.command + self.bootstrap + self.requirements:
            raise MalformedMessage("commands and requirements cannot hold a NUL")
