# SPDX-License-Identifier: Apache-2.0
"""What a process can take from itself where there are no namespaces: files, network, capabilities.

Landlock (landlock(7), Linux 5.13) leaves it the files that it is told of, and a filter of system
calls (seccomp(2)) its Unix sockets. Neither needs a privilege, neither can be undone, and whatever
the process starts inherits both. So this works in containers and on machines that forbid user
namespaces. It is the second choice, because less is hidden:

    names, sizes and modes of hidden files can be seen, their content cannot be read or changed
    without the network there is no loopback either
    what somebody puts beside the agent's directory later is closed to the task too

A process that runs in here may ptrace nobody outside, which also closes /proc/PID/root, mem and
environ of others (landlock(7)). It can connect to Unix sockets by their path, though. Where one of
those gives more than this user has (Docker's, systemd's), nothing can be hidden this way.
"""

import contextlib
import ctypes
import os
import stat
import struct
from collections.abc import Callable, Iterable, Sequence

from fedml_agent.namespaces import (
    HIDE,
    NETWORK,
    PR_SET_NO_NEW_PRIVS,
    READ_ONLY,
    SandboxError,
    check,
    libc,
    prctl,
)

# What this can give, and from which version of Landlock on (0: without it).
GIVES = {HIDE: 1, READ_ONLY: 3, NETWORK: 0}

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture
_CREATE_RULESET_VERSION, _RULE_PATH_BENEATH = 1, 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_TRUNCATE = 1 << 14
_LOOK = _EXECUTE | _READ_FILE | _READ_DIR
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE
# Rights to files by version: 1 has thirteen, 2 adds REFER, 3 TRUNCATE. (5 adds IOCTL_DEV, which is
# left alone: it would take the GPU from the task.)
_HANDLED = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1}
_SCOPE_ABSTRACT_SOCKETS, _SCOPE_SIGNALS = 1, 2  # since version 6
_PR_CAPBSET_DROP = 24
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_CAPABILITY_VERSION_3 = 0x20080522

# (AUDIT_ARCH, socket, io_uring_setup); elsewhere there is no filter. io_uring opens sockets too.
_ARCHITECTURES = {
    "x86_64": (0xC000003E, 41, 425),
    "aarch64": (0xC00000B7, 198, 425),
    "riscv64": (0xC00000F3, 198, 425),
}
_AF_UNIX, _AF_NETLINK = 1, 16
# Writable in any case: libraries expect these to be.
_SCRATCH = ("/dev/shm", "/dev/pts", "/dev/mqueue", "/tmp", "/var/tmp")  # noqa: S108
_ERRNO, _ALLOW = 0x00050000, 0x7FFF0000
_EPERM, _EACCES, _ENOSYS = 1, 13, 38


def version() -> int:
    """The version of Landlock that this kernel speaks; 0: none, or a filter forbids it."""
    nothing = ctypes.c_void_p(None)
    found: int = libc.syscall(
        ctypes.c_long(_CREATE_RULESET), nothing, ctypes.c_size_t(0), _CREATE_RULESET_VERSION
    )
    return max(found, 0)


def why_not(protection: str, controls: Iterable[str]) -> str:
    """Why a process cannot take this from itself here; "": it can.

    Args:
        protection: One of `namespaces.PROTECTIONS`.
        controls: Unix sockets through which this user could start a process outside.
    """
    least = GIVES.get(protection)
    if least is None:
        return "only namespaces can do that"
    if protection == NETWORK:
        machine = os.uname().machine
        if machine not in _ARCHITECTURES:
            return f"no filter of system calls is known for {machine}"
        if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, None) == -1:
            # EFAULT: filters are there, and ours at address 0 is not.
            return "" if ctypes.get_errno() == 14 else "the kernel takes no system call filters"
    if version() < least:
        return f"the kernel has no Landlock (landlock(7), version {least} or later), or forbids it"
    if protection == HIDE:
        for path in controls:
            if _is_open_socket(path):
                return f"Landlock does not keep a task from {path}"
    return ""


def _is_open_socket(path: str) -> bool:
    with contextlib.suppress(OSError):
        return stat.S_ISSOCK(os.stat(path).st_mode) and os.access(path, os.W_OK)  # noqa: PTH116
    return False


def enclose(
    walls: Sequence[str],
    *,
    hidden: Sequence[str],
    show: Sequence[str],
    writable: Sequence[str],
) -> None:
    """Take from this process what `walls` name, for good. Paths are absolute and real.

    Raises:
        OSError: The kernel refuses; the process must not go on.
    """
    if HIDE in walls or READ_ONLY in walls:
        _close_files(walls, hidden, show, writable)
    if HIDE in walls and os.geteuid() == 0:
        drop_capabilities()
    if NETWORK in walls:
        _close_network()


def _close_files(
    walls: Sequence[str], hidden: Sequence[str], show: Sequence[str], writable: Sequence[str]
) -> None:
    spoken = version()
    if spoken < 1:
        raise SandboxError(HIDE, "Landlock is not there any more")
    handled = _HANDLED[min(spoken, 3)]
    scoped = _SCOPE_ABSTRACT_SOCKETS | _SCOPE_SIGNALS if spoken >= 6 else 0
    attributes = struct.pack("QQQ", handled, 0, scoped)
    size = 24 if spoken >= 6 else 8
    number = libc.syscall(
        ctypes.c_long(_CREATE_RULESET),
        ctypes.c_char_p(attributes),
        ctypes.c_size_t(size),
        ctypes.c_uint(0),
    )
    check(number, "landlock_create_ruleset")
    covered = [*hidden] if HIDE in walls else []
    read = _LOOK if READ_ONLY in walls else handled
    everything = dict.fromkeys((*_SCRATCH, *writable), handled)
    # Libraries and shells write to terminals, /dev/null and their own entries in /proc. For user 0
    # there are settings of the whole kernel among the latter.
    wider = {"/dev": _LOOK | _WRITE_FILE} | everything
    if os.geteuid() != 0:
        wider["/proc"] = _LOOK | _WRITE_FILE
    else:
        wider |= {"/proc": _LOOK, "/sys": _LOOK}
    rules = _Rules(number, handled)
    # Names may be listed everywhere: a rule holds for all that lies below, and the directories
    # above a hidden one must be listed for programs to find what lies beside it.
    rules.add("/", _READ_DIR)
    rules.around("/", covered, read, wider)
    for path in show:
        rules.add(path, wider.get(path, read))
    for path in wider:
        if not any(_within(path, one) or _within(one, path) for one in covered):
            rules.add(path, wider[path])
    for path in writable:
        rules.add(path, handled)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    check(
        libc.syscall(ctypes.c_long(_RESTRICT_SELF), ctypes.c_int(number), ctypes.c_uint(0)),
        "landlock_restrict_self",
    )
    os.close(number)


class _Rules:
    """What a ruleset allows; all that it does not name is refused."""

    def __init__(self, ruleset: int, handled: int) -> None:
        self._ruleset = ruleset
        self._handled = handled

    def add(self, path: str, rights: int) -> None:
        """Allow something below a path, as far as it is there and not a link."""
        try:
            number = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return  # gone, or behind a directory that this user may not pass
        try:
            mode = os.fstat(number).st_mode
            if stat.S_ISLNK(mode):
                return  # the target has a rule of its own, or shall have none
            if not stat.S_ISDIR(mode):
                rights &= _OF_FILES
            rule = struct.pack("=Qi", rights & self._handled, number)
            result = libc.syscall(
                ctypes.c_long(_ADD_RULE),
                ctypes.c_int(self._ruleset),
                ctypes.c_int(_RULE_PATH_BENEATH),
                ctypes.c_char_p(rule),
                ctypes.c_uint(0),
            )
            # Some of the kernel's own file systems take no rules (EBADFD): nothing to protect.
            if result < 0 and ctypes.get_errno() != 77:
                check(result, f"landlock_add_rule for {path}")
        finally:
            os.close(number)

    def around(
        self, folder: str, covered: Sequence[str], rights: int, wider: dict[str, int]
    ) -> None:
        """Allow all below a directory but the covered paths; other rights below those in `wider`.

        What is below one of `wider` and above no covered path is left to the caller.
        """
        rights = wider.get(folder, rights)
        if folder in covered:
            return
        if not any(_within(path, folder) for path in covered):
            self.add(folder, rights)
            return
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                self.around(entry.path, covered, rights, wider)


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def drop_capabilities() -> None:
    """Give up every privilege of user 0, also for whatever is started from now on."""
    number = 0
    while libc.prctl(_PR_CAPBSET_DROP, ctypes.c_ulong(number), 0, 0, 0) == 0:
        number += 1
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    check(libc.capset(ctypes.c_char_p(header), ctypes.c_char_p(bytes(24))), "capset")


def _close_network() -> None:
    architecture, socket_call, ring_call = _ARCHITECTURES[os.uname().machine]
    refuse = _ERRNO | _EACCES
    program = b"".join(
        struct.pack("HBBI", *step)
        for step in (
            (0x20, 0, 0, 4),  # load the architecture
            (0x15, 1, 0, architecture),  # another one has other numbers: nothing of it
            (0x06, 0, 0, _ERRNO | _EPERM),
            (0x20, 0, 0, 0),  # load the number of the call
            (0x35, 0, 1, 0x40000000),  # x32 on x86-64
            (0x06, 0, 0, _ERRNO | _EPERM),
            (0x15, 0, 1, ring_call),
            (0x06, 0, 0, _ERRNO | _ENOSYS),  # programs then do without
            (0x15, 0, 4, socket_call),
            (0x20, 0, 0, 16),  # load its first argument
            (0x15, 2, 0, _AF_UNIX),
            (0x15, 1, 0, _AF_NETLINK),  # the list of interfaces
            (0x06, 0, 0, refuse),
            (0x06, 0, 0, _ALLOW),
        )
    )
    code = ctypes.create_string_buffer(program)
    filter_ = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(code))
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    check(
        libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.c_char_p(filter_), 0, 0),
        "seccomp",
    )


def trial(walls: Sequence[str], hidden: str, fork: Callable[[], int] = os.fork) -> str:
    """Why a process cannot take this from itself, found out by one that tries; "": it can."""
    ends = os.pipe()
    child = fork()
    if child == 0:
        try:
            enclose(walls, hidden=[hidden], show=[], writable=[])
            if HIDE in walls:
                try:
                    os.close(os.open(f"{hidden}/probe", os.O_RDONLY))
                    os.write(ends[1], b"it hid nothing")
                except PermissionError:
                    pass
        except (OSError, SandboxError) as error:
            os.write(ends[1], f"{error}".encode())
        finally:
            os._exit(0)
    os.close(ends[1])
    said = os.read(ends[0], 4096)
    os.close(ends[0])
    os.waitpid(child, 0)
    return said.decode()
