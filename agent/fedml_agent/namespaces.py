# SPDX-License-Identifier: Apache-2.0
"""The walls of a sandbox: Linux namespaces and process flags, called through ctypes.

Two user namespaces, one inside the other (user_namespaces(7), mount_namespaces(7)):

shim            the machine's own namespaces
└─ guard        user namespace 1, which owns the mount, pid and network namespaces; pid 1 in there
   └─ task      user namespace 2: may unshare further, but every mount it was given is locked
                (it belongs to namespace 1), and nothing outside can be traced by it

The guard makes the mounts, the task only lives among them. A task that ran in namespace 1 could
undo them: it would hold CAP_SYS_ADMIN over the mount namespace.

A shim must start in no time and stay small, so nothing that runs in one imports `typing`,
`dataclasses` or `pathlib`.
"""

import contextlib
import ctypes
import os
import signal
from collections.abc import Callable, Sequence

# The protections, by the names that specifications and reasons use.
HIDE = "hide"  # directories covered, kernel and control interfaces out of reach
READ_ONLY = "read_only"  # nothing but its own directories can be written
NETWORK = "network"  # no network but loopback
PIDS = "pids"  # its own process numbers: it sees no other process and none of it survives
PROCESSES = "processes"  # user 0 only: a limit on their number, which the kernel gives others
CGROUPS = "cgroups"  # limits of the task as a whole, see cgroups.py
USER_NAMESPACES = "user_namespaces"  # without which there is none of the others
PROTECTIONS = (HIDE, READ_ONLY, NETWORK, PIDS, PROCESSES)

_CLONE_NEWNS = 0x00020000
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWPID = 0x20000000
_CLONE_NEWNET = 0x40000000
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4
_PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38

libc = ctypes.CDLL(None, use_errno=True)


class SandboxError(Exception):
    """This machine cannot give a protection, or the task asked for an impossible one.

    Attributes:
        protection: What is missing, one of `PROTECTIONS` or `USER_NAMESPACES`, or "" when it is
            about the task itself.
    """

    def __init__(self, protection: str, why: str) -> None:
        super().__init__(why)
        self.protection = protection


def check(result: int, what: str) -> None:
    """Raise the OSError of a call of `libc` that failed."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def prctl(option: int, value: int) -> None:
    """Set one flag of this process (prctl(2))."""
    check(libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0), f"prctl({option})")


def harden_process() -> None:
    """Keep other processes of this user out of this one's memory, environment and files.

    /proc/PID/{mem,environ,root,fd,cwd} then belong to root, and no core is dumped (prctl(2),
    PR_SET_DUMPABLE). It does not survive an exec.
    """
    prctl(_PR_SET_DUMPABLE, 0)


def unshare(flags: int) -> None:
    """Leave the namespaces named by flags for new ones (unshare(2))."""
    check(libc.unshare(flags), "unshare")


def adopt_orphans() -> None:
    """Become the parent of every descendant that loses its own (PR_SET_CHILD_SUBREAPER)."""
    prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _identity(path: str) -> str:
    """The map that gives every id that this process knows its own number again."""
    with open(path, encoding="ascii") as file:  # noqa: PTH123
        firsts = [(line.split()[0], line.split()[2]) for line in file]
    return "".join(f"{first} {first} {count}\n" for first, count in firsts)


def write_maps(pid: int) -> None:
    """Give a process that has just unshared its user namespace the ids that we have.

    Root maps every id it knows, so that `chown` and `tar` work as they do outside. Anyone else
    may only map himself (user_namespaces(7)): other owners look like `nobody` to the task.
    """
    if os.geteuid() == 0:
        uids, gids = _identity("/proc/self/uid_map"), _identity("/proc/self/gid_map")
    else:
        uids, gids = f"{os.geteuid()} {os.geteuid()} 1", f"{os.getegid()} {os.getegid()} 1"
        write_text(f"/proc/{pid}/setgroups", "deny")
    write_text(f"/proc/{pid}/uid_map", uids)
    write_text(f"/proc/{pid}/gid_map", gids)


def write_text(path: str, text: str) -> None:
    """Write to a file of the kernel, in one call; an error names the file."""
    number = os.open(path, os.O_WRONLY)
    try:
        os.write(number, text.encode())
    except OSError as error:
        raise OSError(error.errno, f"{path}: {error.strerror}") from error
    finally:
        os.close(number)


class _Steps:
    """A pipe each way between two processes, for taking turns; EOF means the other is dead."""

    def __init__(self) -> None:
        self._mine = os.pipe()
        self._theirs = os.pipe()

    def as_child(self) -> None:
        os.close(self._mine[1])
        os.close(self._theirs[0])
        self._read, self._wrote = self._mine[0], self._theirs[1]

    def as_parent(self) -> None:
        os.close(self._mine[0])
        os.close(self._theirs[1])
        self._read, self._wrote = self._theirs[0], self._mine[1]

    def tell(self, word: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # hear() will tell
            os.write(self._wrote, word.encode() + b"\n")

    def hear(self) -> str:
        """One word, or "" when the other side is gone."""
        word = b""
        while not word.endswith(b"\n"):
            piece = os.read(self._read, 1)
            if not piece:
                return ""
            word += piece
        return word[:-1].decode()

    def close(self) -> None:
        os.close(self._read)
        os.close(self._wrote)


def _leave_all(protections: Sequence[str]) -> None:
    """Unshare one by one, so that a refusal can be laid at the right door."""
    prctl(_PR_SET_DUMPABLE, 1)  # else /proc/self/uid_map belongs to root and stays unwritten
    try:
        unshare(_CLONE_NEWUSER | _CLONE_NEWNS)
    except OSError as error:
        raise SandboxError(
            USER_NAMESPACES, f"no user namespaces here ({error.strerror})"
        ) from error
    for protection, flag in ((PIDS, _CLONE_NEWPID), (NETWORK, _CLONE_NEWNET)):
        if protection in protections:
            try:
                unshare(flag)
            except OSError as error:
                raise SandboxError(protection, f"refused: {error.strerror}") from error


def fork_guard(protections: Sequence[str], inside: Callable[[], None]) -> int:
    """Fork the first process of new namespaces, and run `inside` in it.

    The process is killed when its parent dies, and it leaves with status 0 after `inside`. With no
    protections it is a plain fork, of which a sweep must then be made. The caller has called
    `adopt_orphans`, runs one thread only, and waits for the process in the end.

    Returns:
        Its pid, as the caller sees it.

    Raises:
        SandboxError: This machine refuses the namespaces.
    """
    steps = _Steps()
    first = os.fork()
    if first == 0:
        try:
            steps.as_child()
            _first(protections, inside, steps)
        finally:
            os._exit(70)
    steps.as_parent()
    try:
        guard = first
        if protections:
            _expect(steps, "unshared")
            try:
                write_maps(first)
            except OSError as error:
                raise SandboxError(
                    USER_NAMESPACES, f"no user namespaces here ({error.strerror})"
                ) from error
            steps.tell("mapped")
            guard = int(_expect(steps, "guard"))
            # Only when it is gone is the guard our child: then its parent's death is ours.
            os.waitpid(first, 0)
            steps.tell("adopted")
        _expect(steps, "bound")
        steps.tell("go")
    except SandboxError:
        with contextlib.suppress(ProcessLookupError):
            os.kill(first, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(first, 0)
        raise
    finally:
        steps.close()
    return guard


def _expect(steps: _Steps, word: str) -> str:
    kind, _, rest = steps.hear().partition(" ")
    if kind == "refused":
        protection, _, why = rest.partition(" ")
        raise SandboxError(protection, why)
    if kind != word:
        raise SandboxError("", "the first process of the sandbox died before it began")
    return rest


def _first(protections: Sequence[str], inside: Callable[[], None], steps: _Steps) -> None:
    if protections:
        try:
            _leave_all(protections)
        except SandboxError as refusal:
            steps.tell(f"refused {refusal.protection} {refusal}")
            os._exit(71)
        steps.tell("unshared")
        if steps.hear() != "mapped":
            os._exit(70)
        guard = os.fork()  # into the new pid namespace, which the caller of unshare stays out of
        if guard:
            steps.tell(f"guard {guard}")
            os._exit(0)
        if steps.hear() != "adopted":
            os._exit(70)
    # Outside a pid namespace of its own the guard gets a chance to sweep (see its handler).
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL if PIDS in protections else signal.SIGTERM)
    steps.tell("bound")
    if steps.hear() != "go":  # the parent died before it was bound to its life
        os._exit(70)
    steps.close()
    inside()
    os._exit(0)


def enter_second_namespace(fork: Callable[[], int]) -> int:
    """Fork the task's process into a user namespace below this one; returns twice, as fork does.

    Raises:
        SandboxError: In the parent: the namespace was refused.
    """
    steps = _Steps()
    pid = fork()
    if pid == 0:
        steps.as_child()
        try:
            unshare(_CLONE_NEWUSER)
            steps.tell("unshared")
            if steps.hear() != "mapped":
                os._exit(70)
        except OSError as error:
            steps.tell(f"refused {USER_NAMESPACES} {error}")
            os._exit(71)
        steps.close()
        return 0
    steps.as_parent()
    try:
        _expect(steps, "unshared")
        write_maps(pid)
        steps.tell("mapped")
    finally:
        steps.close()
    return pid


def seal_task() -> None:
    """The last flags before the task's program: no set-user-id program gives it anything."""
    prctl(PR_SET_NO_NEW_PRIVS, 1)
