# SPDX-License-Identifier: Apache-2.0
"""What a task is locked into: its limits, its environment, and what this machine can enforce.

How the locks work is in namespaces.py and view.py, and in confine.py for machines without
namespaces. What each of them gives:

hide        directories are empty to the task: the agent's keys and journal, the shim's files, the
            sockets through which a process of this user could start another one outside
read_only   outside its own directory and /tmp the task changes nothing, so it cannot leave
            something behind that runs later without a sandbox
network     off means loopback only (without namespaces: not even that)
pids        the task sees and signals its own processes only, and none of them survives it
cgroups     memory, processes and processors are limited for the task as a whole (cgroups.py)

An agent that runs as root gives its tasks user 0 of the machine, without capabilities outside
their namespaces. That is weaker than an ordinary user: whatever belongs to root can be read,
unless it is hidden.
"""

import dataclasses
import functools
import json
import logging
import os
import pwd
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedml_agent import cgroups, view
from fedml_agent.namespaces import (
    CGROUPS,
    HIDE,
    NETWORK,
    PIDS,
    PROCESSES,
    PROTECTIONS,
    READ_ONLY,
    SandboxError,
    harden_process,
)

__all__ = [
    "CGROUPS",
    "HIDE",
    "NETWORK",
    "PIDS",
    "PROCESSES",
    "PROMISED",
    "PROTECTIONS",
    "READ_ONLY",
    "Capability",
    "Limits",
    "SandboxError",
    "cannot",
    "capabilities",
    "cgroup_of_tasks",
    "clean_env",
    "harden_process",
    "optional",
]

log = logging.getLogger(__name__)

# What owners may require and people are told of. PROCESSES is asked for by no task.
PROMISED = (HIDE, READ_ONLY, NETWORK, PIDS, CGROUPS)
_PASSED_ON = ("PATH", "LANG", "LANGUAGE", "TZ")
_DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much one task may use. None means: as much as the agent itself may.

    Attributes:
        memory_bytes: With a control group, of the whole task, caches included. Without one, the
            private data of each of its processes (RLIMIT_DATA). RLIMIT_AS is not used: CUDA
            reserves far more addresses than memory.
        processes: Processes and threads together.
        open_files: Descriptors of each process.
        file_bytes: Size of each file that it writes.
        nice: Added to the agent's own niceness, 0 to 19. Core dumps are always off.
        cpus: How many of the processors it runs on; the same ones for every task. A program may
            undo this.
    """

    memory_bytes: int | None = None
    processes: int | None = None
    open_files: int | None = None
    file_bytes: int | None = None
    nice: int = 0
    cpus: int | None = None

    def __post_init__(self) -> None:
        for name in ("memory_bytes", "processes", "open_files", "file_bytes", "cpus"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be > 0 or None, got {value}")
        if not 0 <= self.nice <= 19:
            raise ValueError(f"nice must be from 0 to 19, got {self.nice}")

    def to_dict(self) -> dict[str, int]:
        """Give the limits that are set."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}


def clean_env(base: Mapping[str, str], extra: Mapping[str, str], *, home: Path) -> dict[str, str]:
    """Make a task's whole environment: of the agent's own, it gets only how to find programs.

    Args:
        base: The agent's environment; PATH, the language and the time zone are taken from it.
        extra: What the task asked for and what the agent adds. It wins.
        home: The task's own directory. Caches and temporary files go there.
    """
    env = {"PATH": _DEFAULT_PATH, "LANG": "C.UTF-8"}
    env |= {key: value for key, value in base.items() if key in _PASSED_ON or key[:3] == "LC_"}
    return env | {"HOME": str(home), "TMPDIR": str(home / "tmp")} | dict(extra)


@dataclass(frozen=True, slots=True)
class Capability:
    """Whether this machine can do something for a task, by what means, and why not."""

    works: bool
    why_not: str = ""
    by: str = ""


@functools.cache
def capabilities() -> dict[str, Capability]:
    """Find out what this machine can do for tasks, by trying, in a process of its own.

    Keys: `user_namespaces`, each of `PROTECTIONS` (`processes`: whether their number can be limited
    without control groups) and `cgroups`. It takes about 0.1 s the first time.
    """
    command = [sys.executable, "-I", "-S", view.__file__]
    tried = subprocess.run(command, capture_output=True, text=True, env={}, check=False)
    if tried.returncode:
        why = tried.stderr.strip().rpartition("\n")[2] or f"status {tried.returncode}"
        names = ("user_namespaces", *PROTECTIONS)
        found = {name: Capability(False, f"it could not be tried: {why}") for name in names}
    else:
        said: dict[str, tuple[str, str]] = json.loads(tried.stdout)
        found = {name: Capability(not why, why, by) for name, (why, by) in said.items()}
    try:
        cgroups.delegated()
        found[CGROUPS] = Capability(True, by="control groups")
    except SandboxError as missing:
        found[CGROUPS] = Capability(False, str(missing))
    return found


@functools.cache
def cgroup_of_tasks() -> str | None:
    """The control group in which tasks get their own, made ready once; None: limits by process."""
    try:
        return cgroups.prepare()
    except SandboxError as missing:
        log.info("limits hold for each process of a task, not for all together: %s", missing)
        return None


def ids_of(user: str) -> tuple[int, int]:
    """User and group of a task whose owner gives tasks a user of their own.

    Raises:
        SandboxError: There is no such user, or this agent cannot become it.
    """
    try:
        found = pwd.getpwnam(user)
    except KeyError:
        why = f"there is no user {user!r} (sandbox.user in policy.toml): `useradd --system {user}`"
        raise SandboxError("", why) from None
    if os.geteuid() not in (0, found.pw_uid):
        why = f"an agent that is not root cannot run tasks as {user!r} (sandbox.user)"
        raise SandboxError("", why)
    if found.pw_uid == 0:
        raise SandboxError("", "sandbox.user in policy.toml: root is no user for tasks")
    return found.pw_uid, found.pw_gid


def give_to(user: tuple[int, int], *folders: Path, readable: Sequence[Path]) -> None:
    """Let a task of another user work in its directories, and read what lies beside them for it."""
    for path in readable:
        path.chmod(0o644)
    for folder in folders:
        folder.parent.chmod(0o711)  # the agent's home, above, is closed to everybody
        for base, _, files in os.walk(folder):
            for path in (Path(base), *(Path(base) / name for name in files)):
                os.chown(path, *user, follow_symlinks=False)


def optional(require: Sequence[str], *, network: bool = True) -> tuple[str, ...]:
    """The protections that a task may do without, when its machine's owner requires some.

    A task that is to have no network does not run where it cannot be cut off.
    """
    needed = {*require} if network else {*require, NETWORK}
    return tuple(name for name in PROTECTIONS if name not in needed)


def cannot() -> dict[str, str]:
    """The protections of tasks that this machine cannot give, each with its reason."""
    found = capabilities()
    return {name: found[name].why_not for name in PROMISED if not found[name].works}
