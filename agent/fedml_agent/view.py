# SPDX-License-Identifier: Apache-2.0
"""What a task sees of the machine: the mounts, the processes and the network it is given.

The guard arranges this in its own namespaces before the task exists (see namespaces.py). Run as a
script it tries all of it and prints what this machine can do, as JSON.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import socket
import stat
import struct
import sys
from collections.abc import Callable, Iterator, Sequence

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # noqa: PTH100, PTH120

from fedml_agent import confine
from fedml_agent.namespaces import (
    HIDE,
    NETWORK,
    PIDS,
    PROCESSES,
    PROTECTIONS,
    READ_ONLY,
    USER_NAMESPACES,
    SandboxError,
    adopt_orphans,
    check,
    fork_guard,
    libc,
    write_text,
)

_MS_RDONLY = 1
_MS_PLAIN = 2 | 4 | 8  # nosuid, nodev, noexec
_MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 32, 4096, 16384, 1 << 18
_LEAST_PID_MAX = 301  # Linux keeps the first 300 for itself
_SYS_MOUNT_SETATTR = 442  # the same number on every architecture since Linux 5.12
_AT_FDCWD, _AT_RECURSIVE, _MOUNT_ATTR_RDONLY = -100, 0x8000, 1
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1

# Sockets through which a process of the same user gets another one started outside the sandbox.
_CONTROL = (
    "/run/containerd",
    "/run/crio",
    "/run/dbus",
    "/run/docker.sock",
    "/run/libvirt",
    "/run/podman",
    "/run/systemd/private",
    "/run/user",
    "/var/snap/lxd/common/lxd/unix.socket",
)
# Of these, what can be connected to by its path. "{uid}" is the agent's user; the last is user 0's.
_CONTROL_SOCKETS = (
    "/run/containerd/containerd.sock",
    "/run/crio/crio.sock",
    "/run/docker.sock",
    "/run/libvirt/libvirt-sock",
    "/run/podman/podman.sock",
    "/run/systemd/private",
    "/run/user/{uid}/bus",
    "/run/user/{uid}/docker.sock",
    "/run/user/{uid}/podman/podman.sock",
    "/run/user/{uid}/systemd/private",
    "/var/snap/lxd/common/lxd/unix.socket",
    "/run/dbus/system_bus_socket",
)
# What user 0 of the machine may write although it holds no capability outside (sysctl.c asks for
# the user id only): `core_pattern` alone would be a way out. Docker covers the same files.
_KERNEL = ("/proc/sys", "/proc/sysrq-trigger", "/proc/irq", "/proc/bus", "/proc/fs")
# Writable under READ_ONLY beside what the task asks for: libraries expect these to be.
_SCRATCH = ("/dev/shm", "/dev/pts", "/dev/mqueue", "/tmp", "/var/tmp", "/proc")  # noqa: S108


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    """Call mount(2)."""
    result = libc.mount(
        os.fsencode(source), os.fsencode(target), kind.encode(), flags, data.encode()
    )
    check(result, f"mount on {target}")


def _set_read_only(target: str, read_only: bool, *, whole_tree: bool) -> None:
    attr = struct.pack("QQQQ", int(read_only), int(not read_only), 0, 0)
    result = libc.syscall(
        ctypes.c_long(_SYS_MOUNT_SETATTR),
        ctypes.c_long(_AT_FDCWD),
        ctypes.c_char_p(os.fsencode(target)),
        ctypes.c_long(_AT_RECURSIVE if whole_tree else 0),
        ctypes.c_char_p(attr),
        ctypes.c_long(len(attr)),
    )
    check(result, f"mount_setattr on {target}")


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _aliases(hidden: str) -> Iterator[str]:
    """Other places where mounts show `hidden` or a part of it (proc_pid_mountinfo(5))."""
    mounts: list[tuple[str, str, str]] = []
    with open("/proc/self/mountinfo", "rb") as file:  # noqa: PTH123
        for line in file:
            device, root, point = line.split()[2:5]
            mounts.append((device.decode(), _unescape(root), _unescape(point)))
    # The last of the longest mount points is the one that a path leads into.
    home = max(
        (entry for entry in mounts if _within(hidden, entry[2])),
        key=lambda entry: (len(entry[2]), mounts.index(entry)),
    )
    inner = os.path.normpath(home[1] + "/" + hidden[len(home[2].rstrip("/")) :])
    for entry in mounts:
        _, top, shown_at = entry
        if entry == home or entry[0] != home[0]:
            continue
        if _within(inner, top):
            yield os.path.normpath(shown_at + "/" + inner[len(top.rstrip("/")) :])
        elif _within(top, inner):
            yield shown_at


def _unescape(text: bytes) -> str:
    for escaped, plain in ((b"\\040", b" "), (b"\\011", b"\t"), (b"\\012", b"\n")):
        text = text.replace(escaped, plain)
    return os.fsdecode(text.replace(b"\\134", b"\\"))


def _raw_disks() -> Iterator[str]:
    """Devices that this user can read and that show disks beneath their file systems."""
    ahead = ["/dev"]
    while ahead:
        # A directory that we may not list shows the task nothing either.
        with contextlib.suppress(OSError), os.scandir(ahead.pop()) as entries:
            for entry in entries:
                mode = entry.stat(follow_symlinks=False).st_mode
                if stat.S_ISDIR(mode) and entry.name not in ("pts", "shm", "mqueue", "hugepages"):
                    ahead.append(entry.path)
                raw = stat.S_ISCHR(mode) and _reads_disks(entry.path.removeprefix("/dev/"))
                if (raw or stat.S_ISBLK(mode)) and os.access(entry.path, os.R_OK):
                    yield entry.path


def _reads_disks(name: str) -> bool:
    """Whether a character device of this name gives memory or disks beneath their files."""
    return (
        name in ("mem", "kmem", "port")
        or name.startswith(("bsg/", "ng", "nvme"))
        or (name.startswith("sg") and name[2:].isdigit())
    )


def control_sockets() -> list[str]:
    """Unix sockets through which this user could start a process outside of a sandbox."""
    uid = os.geteuid()
    found = [path.format(uid=uid) for path in _CONTROL_SOCKETS]
    return found if uid == 0 else found[:-1]  # everybody may talk on the system bus, for little


def covered_by(hide: Sequence[str]) -> list[str]:
    """Every path that a task must not see when `hide` is hidden; outer ones first.

    Raises:
        SandboxError: One of them is not there, or cannot be hidden.
    """
    hide = [os.path.realpath(path) for path in hide]
    wanted = dict.fromkeys(hide)
    for path in hide:
        if path == "/" or not os.path.exists(path):  # noqa: PTH110
            raise SandboxError(HIDE, f"cannot hide {path}: there is no such directory")
        wanted.update(dict.fromkeys(_aliases(path)))
    if "/" in wanted:
        raise SandboxError(HIDE, "cannot hide a directory that is also mounted as the root")
    for extra in (*_CONTROL, *_raw_disks()):
        wanted[extra] = None
    # What lies in a covered one is covered with it.
    covered: list[str] = []
    for path in sorted(wanted, key=len):
        if os.path.exists(path) and not any(_within(path, done) for done in covered):  # noqa: PTH110
            covered.append(path)
    return covered


class Arrangement:
    """The view of the machine that a task gets. The guard makes it, before the task exists."""

    def __init__(
        self,
        *,
        hide: Sequence[str],
        show: Sequence[str],
        writable: Sequence[str],
        protections: Sequence[str],
        processes: int = 0,
    ) -> None:
        """All paths absolute; `show` and `writable` may lie inside a hidden one."""
        self._hide = [os.path.realpath(path) for path in hide]
        self._show = [os.path.realpath(path) for path in show]
        self._writable = [os.path.realpath(path) for path in writable]
        self._protections = protections
        self._processes = processes

    def make(self) -> None:
        """Change this process's view for good.

        Raises:
            SandboxError: Names the protection that cannot be given, and why.
        """
        if not self._protections:
            return
        # Nothing that is mounted outside later may appear in here, nor the other way round.
        # Some machines (AppArmor) give user namespaces in which nothing may be done: it shows here.
        _step(USER_NAMESPACES, lambda: mount("none", "/", "none", _MS_REC | _MS_PRIVATE))
        if HIDE in self._protections:
            _step(HIDE, self._cover)
        if PIDS in self._protections:
            _step(PIDS, self._own_pids)
        if PROCESSES in self._protections:
            _step(PROCESSES, self._bound_pids)
        if HIDE in self._protections and os.geteuid() == 0:
            _step(HIDE, self._guard_kernel)
        if READ_ONLY in self._protections:
            _step(READ_ONLY, self._lock_files)
        if NETWORK in self._protections:
            _step(NETWORK, _loopback_up)

    def _cover(self) -> None:
        covered = covered_by(self._hide)
        back = [
            (path, os.open(path, os.O_PATH | os.O_DIRECTORY))
            for path in dict.fromkeys((*self._show, *self._writable))
            if any(_within(path, done) for done in covered) and os.path.isdir(path)  # noqa: PTH112
        ]
        for path in covered:
            if os.path.isdir(path):  # noqa: PTH112
                mount("hidden", path, "tmpfs", _MS_PLAIN, "size=256k,mode=0755")
            else:
                mount("/dev/null", path, "none", _MS_BIND)
        before = os.umask(0o022)  # a task of another user must pass what leads to its own
        for path, number in sorted(back, key=lambda pair: len(pair[0])):
            os.makedirs(path, exist_ok=True)  # noqa: PTH103
            mount(f"/proc/self/fd/{number}", path, "none", _MS_BIND | _MS_REC)
            os.close(number)
        os.umask(before)
        for path in covered:
            # After its directory: a shown path may itself be the covered one.
            if os.path.isdir(path) and path not in (pair[0] for pair in back):  # noqa: PTH112
                mount("none", path, "none", _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_PLAIN)

    def _own_pids(self) -> None:
        mount("proc", "/proc", "proc", _MS_PLAIN)

    def _bound_pids(self) -> None:
        # For user 0 the kernel ignores RLIMIT_NPROC. Since Linux 6.14 a pid namespace has a
        # pid_max of its own; in older ones this file is the whole machine's, and user 0 may write.
        release = tuple(int(part) for part in os.uname().release.split(".")[:2])
        if release < (6, 14) or PIDS not in self._protections:
            raise SandboxError(
                PROCESSES,
                "the kernel does not count the processes of user 0 (Linux 6.14 bounds them by pid "
                "namespace): use a control group, or run the agent as another user",
            )
        write_text("/proc/sys/kernel/pid_max", str(max(_LEAST_PID_MAX, self._processes + 2)))

    def _guard_kernel(self) -> None:
        for path in _KERNEL:
            if os.path.exists(path):  # noqa: PTH110
                mount(path, path, "none", _MS_BIND | _MS_REC)
                _set_read_only(path, True, whole_tree=True)

    def _lock_files(self) -> None:
        open_ones = sorted(
            {*self._writable, *(path for path in _SCRATCH if os.path.isdir(path))},  # noqa: PTH112
            key=len,
        )
        for path in open_ones:
            if path != "/proc":  # mounted anew above, or the machine's own: a mount already
                # With everything mounted below, or the bind would lay bare what is covered.
                mount(path, path, "none", _MS_BIND | _MS_REC)
        _set_read_only("/", True, whole_tree=True)
        for path in open_ones:
            _set_read_only(path, False, whole_tree=False)


def _step(protection: str, work: Callable[[], None]) -> None:
    try:
        work()
    except OSError as error:
        raise SandboxError(protection, f"refused: {error.strerror or error}") from error


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sH22x", b"lo", 0)
        answer = fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request)
        flags = struct.unpack_from("H", answer, 16)[0]
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", flags | _IFF_UP))


def _trial(protections: Sequence[str]) -> str:
    """Why this machine does not give these protections together; "" when it does."""
    import tempfile  # here, because a shim starts in the time that this import takes

    answer = os.pipe()
    os.set_blocking(answer[0], False)
    with tempfile.TemporaryDirectory() as folder:
        arrangement = Arrangement(
            hide=[folder], show=[], writable=[], protections=protections, processes=1000
        )

        def inside() -> None:
            try:
                arrangement.make()
            except SandboxError as refusal:
                os.write(answer[1], str(refusal).encode())

        try:
            guard = fork_guard(protections, inside)
        except SandboxError as refusal:
            return str(refusal)
        os.waitpid(guard, 0)
        try:
            return os.read(answer[0], 4096).decode()
        except BlockingIOError:
            return ""


def probe() -> dict[str, tuple[str, str]]:
    """Try each protection for real: why it cannot be given ("" if it can), and by what it is."""
    by_namespaces = _probe_namespaces()
    found = {name: (why, "" if why else "namespaces") for name, why in by_namespaces.items()}
    for name, instead in ((HIDE, "Landlock"), (READ_ONLY, "Landlock"), (NETWORK, "a filter")):
        if by_namespaces[name]:
            why = confine.why_not(name, control_sockets()) or _trial_alone(name)
            found[name] = (f"{by_namespaces[name]}; {why}", "") if why else ("", instead)
    return found


def _trial_alone(protection: str) -> str:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/probe", "w", encoding="ascii"):  # noqa: PTH123
            pass
        return confine.trial([protection], os.path.realpath(folder))


def _probe_namespaces() -> dict[str, str]:
    adopt_orphans()
    found = {USER_NAMESPACES: _trial([HIDE])}
    for protection in PROTECTIONS:
        found[protection] = found[USER_NAMESPACES] or _trial([HIDE, PIDS, protection])
    if found[PIDS] and not found[USER_NAMESPACES]:
        found |= {name: _trial([HIDE, name]) for name in (READ_ONLY, NETWORK)}
    if os.geteuid() != 0:
        found[PROCESSES] = ""  # RLIMIT_NPROC does it
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(probe()))
