# SPDX-License-Identifier: Apache-2.0
"""Processes by what identifies them, and groups of them: descendants, all of a user.

A pid alone names nobody for long: the kernel gives it again. With the start time, and with the
boot that both belong to, it does.
"""

import contextlib
import os
import signal
from collections.abc import Iterator


def process_start(pid: int) -> int:
    """When a process started, in clock ticks since boot: with the pid, its identity (proc(5)).

    Raises:
        ProcessLookupError: There is no such process, or it is hidden from us (hidepid).
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123 - pathlib costs 5 ms here
            fields = file.read()
    except OSError as gone:
        raise ProcessLookupError(f"no process {pid}") from gone
    # The name, field 2, may hold spaces and brackets: count from behind it.
    return int(fields[fields.rindex(b")") + 2 :].split()[19])


def boot_id() -> str:
    """A name for the time since this machine was booted."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:  # noqa: PTH123
        return file.read().strip()


def ancestors(pid: int) -> Iterator[int]:
    """A process and those above it, as far as /proc shows them."""
    while pid > 0:
        yield pid
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123
                fields = file.read()
        except OSError:  # it has ended, or is not shown to us
            return
        pid = int(fields[fields.rindex(b")") + 2 :].split()[1])


def descendants(ancestor: int) -> list[int]:
    """Every process whose parents lead to `ancestor`, itself left out, in no order."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):  # noqa: PTH208
        if name.isdigit():
            with (
                contextlib.suppress(OSError, ValueError),
                open(f"/proc/{name}/stat", "rb") as file,  # noqa: PTH123
            ):
                fields = file.read()
                parent = int(fields[fields.rindex(b")") + 2 :].split()[1])
                children.setdefault(parent, []).append(int(name))
    found: list[int] = []
    ahead = [ancestor]
    while ahead:
        ours = children.get(ahead.pop(), [])
        found += ours
        ahead += ours
    return found


def count_threads_of_user() -> int:
    """How many threads run as our user, as RLIMIT_NPROC counts them."""
    found = 0
    for name in os.listdir("/proc"):  # noqa: PTH208
        if name.isdigit():
            with contextlib.suppress(OSError):
                if os.stat(f"/proc/{name}").st_uid == os.geteuid():  # noqa: PTH116
                    found += len(os.listdir(f"/proc/{name}/task"))  # noqa: PTH208
    return found


def sweep() -> None:
    """Kill everything that descends from this process, and return when it is all gone.

    It needs `adopt_orphans`: then whatever leaves its group or loses its parent stays below us.
    Without that a process that forks away would be missed.
    """
    options = os.WNOHANG
    while True:
        try:
            os.waitpid(-1, options)
        except ChildProcessError:
            return
        for pid in descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        options = 0
