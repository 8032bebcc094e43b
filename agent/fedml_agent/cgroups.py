# SPDX-License-Identifier: Apache-2.0
"""A control group (cgroups(7), version 2) for each task, below one that was delegated to the agent.

The kernel gives controllers only to groups beside which no process lives. So the agent sits in a
leaf called `agent`, and its tasks beside it:

delegated group         `Delegate=yes` of the service; in a container, the root of what it sees
├─ agent                `DelegateSubgroup=agent`; in a container the agent moves there by itself
├─ task-PID-BOOT        of the shim PID
└─ …

What the group gives, and limits of processes cannot: memory of a task as a whole, with the word of
the kernel when it ran out; a number of processes that also holds for user 0; processors that a
task cannot take back; and an end (`cgroup.kill`, Linux 5.14) that nothing outruns.
"""

import contextlib
import os
from collections.abc import Mapping

from fedml_agent.namespaces import SandboxError, write_text

LEAF = "agent"
_NEEDED = frozenset({"memory", "pids"})
_PERIOD_US = 100_000
_PREFIX = "task-"


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:  # noqa: PTH123 - pathlib costs 5 ms in a shim
        return file.read()


def delegated(*, proc: str = "/proc/self") -> str:
    """Find the control group in which this agent may make one for each task. Changes nothing.

    Raises:
        SandboxError: There is none; the text says what is missing.
    """
    mounts = [line.split() for line in _read(f"{proc}/mounts").splitlines()]
    roots = [mount[1] for mount in mounts if mount[2] == "cgroup2"]
    if not roots:
        raise SandboxError("", "control groups (version 2) are not mounted")
    lines = _read(f"{proc}/cgroup").splitlines()
    own = next((line[3:] for line in lines if line.startswith("0::")), "/")
    group = roots[0] + own.rstrip("/")
    if group.endswith(f"/{LEAF}"):
        group = group.removesuffix(f"/{LEAF}")
    elif own != "/":
        why = f"the agent does not live in a leaf of its own of {group} (DelegateSubgroup={LEAF})"
        raise SandboxError("", why)
    if not os.access(group, os.W_OK) or not os.access(f"{group}/cgroup.procs", os.W_OK):
        raise SandboxError("", f"the control group {group} is not delegated to this user")
    if missing := _NEEDED - set(_read(f"{group}/cgroup.controllers").split()):
        raise SandboxError("", f"the control group {group} lacks {', '.join(sorted(missing))}")
    return group


def prepare() -> str:
    """Make the delegated control group ready for tasks, and remove what dead shims left there.

    Raises:
        SandboxError: There is none, or its controllers cannot be passed on.
    """
    group = delegated()
    control = f"{group}/cgroup.subtree_control"
    try:
        if not set(_read(control).split()) >= _NEEDED:
            _pass_on(group, "+memory +pids")
        with contextlib.suppress(OSError):  # without it, tasks keep to processors by affinity
            write_text(control, "+cpu")
    except OSError as error:
        raise SandboxError("", f"{group} cannot pass controllers on: {error}") from error
    for name in os.listdir(group):  # noqa: PTH208
        if name.startswith(_PREFIX):
            with contextlib.suppress(OSError):  # a task lives in it
                os.rmdir(f"{group}/{name}")  # noqa: PTH106
    return group


def _pass_on(group: str, controllers: str) -> None:
    control = f"{group}/cgroup.subtree_control"
    with contextlib.suppress(OSError):
        write_text(control, controllers)
        return
    # Processes live beside the groups to be: in a container all of them are ours to move.
    os.makedirs(f"{group}/{LEAF}", exist_ok=True)  # noqa: PTH103
    for pid in _read(f"{group}/cgroup.procs").split():
        with contextlib.suppress(OSError):  # a kernel's thread, or gone
            write_text(f"{group}/{LEAF}/cgroup.procs", pid)
    write_text(control, controllers)


class Cgroup:
    """The control group of one task.

    Attributes:
        path: Where it is, while it is there.
    """

    def __init__(self, parent: str, limits: Mapping[str, int], name: str) -> None:
        """Make it.

        Raises:
            SandboxError: `parent` is not ours, or does not have the controllers for the limits.
        """
        self.path = f"{parent.rstrip('/')}/{_PREFIX}{name}"
        try:
            os.mkdir(self.path)  # noqa: PTH102
            if (memory := limits.get("memory_bytes")) is not None:
                self._set("memory.max", memory)
                with contextlib.suppress(OSError):  # a kernel without swap
                    self._set("memory.swap.max", 0)
                self._set("memory.oom.group", 1)
            if (processes := limits.get("processes")) is not None:
                self._set("pids.max", processes + 1)  # and the guard
            if (cpus := limits.get("cpus")) is not None:
                with contextlib.suppress(OSError):  # no such controller: there is its affinity
                    self._set("cpu.max", f"{cpus * _PERIOD_US} {_PERIOD_US}")
        except OSError as error:
            self.remove()
            raise SandboxError("", f"the control group cannot be used: {error}") from error

    def _set(self, name: str, value: object) -> None:
        write_text(f"{self.path}/{name}", str(value))

    def take(self, pid: int) -> None:
        """Move a process in; what it forks from now on is in it too."""
        self._set("cgroup.procs", pid)

    def kill(self) -> None:
        """End everything in it at once, also what forks without end."""
        kill(self.path)

    def count(self, file: str, event: str) -> int:
        """How often an event has happened, as `memory.events` and `pids.events` count it."""
        with contextlib.suppress(OSError):
            for line in _read(f"{self.path}/{file}").splitlines():
                name, _, number = line.partition(" ")
                if name == event:
                    return int(number)
        return 0

    def remove(self) -> None:
        """Take it away. Call it when its processes are gone; one that still has some stays."""
        with contextlib.suppress(OSError):
            os.rmdir(self.path)  # noqa: PTH106


def kill(path: str) -> None:
    """End everything in a control group, where the kernel can do that (Linux 5.14)."""
    with contextlib.suppress(OSError):
        write_text(f"{path}/cgroup.kill", "1")
