# SPDX-License-Identifier: Apache-2.0
"""The task's side of its shim: what is run, the guard that watches it, the steps before its exec.

The guard is the first process of the task's namespaces, so that the end of the guard is the end
of everything that the task started. It keeps no descriptor and no memory that the task may see.
Where there are no pid namespaces it is an ordinary process that adopts orphans, and whoever ends
it sweeps up after it.
"""

import contextlib
import fcntl
import json
import os
import resource
import signal
import socket
import struct

from fedml_agent import confine, namespaces, view
from fedml_agent.capped_log import DEFAULT_CAP, DEFAULT_SEGMENT
from fedml_agent.namespaces import SandboxError
from fedml_agent.processes import count_threads_of_user, sweep

VERSION = 1
SPEC_FILE = "spec.json"
DEFAULT_GRACE_S = 10.0

_PIPE_BYTES = 256 << 10
_F_SETPIPE_SZ = 1031
_LIMITS = ("memory_bytes", "processes", "open_files", "file_bytes", "nice", "cpus")
_OOM_SCORE = 500  # the kernel shall take tasks before the agent and its shims


class SpecError(ValueError):
    """spec.json does not say what to run; whoever wrote it must correct it."""


class Spec:
    """What one task is, as read from spec.json. `TaskSpec` in tending.py explains each field."""

    def __init__(self, said: object) -> None:
        if not isinstance(said, dict):
            raise SpecError("the task specification is not an object")
        self._said = said
        if said.get("version") != VERSION:
            raise SpecError(f"version: this shim reads {VERSION}, got {said.get('version')!r}")
        self.argv = self._strings("argv")
        self.env = self._environment()
        self.cwd = self._text("cwd")
        self.hide = self._strings("hide", ())
        self.show = self._strings("show", ())
        self.writable = self._strings("writable", ())
        self.optional = self._strings("optional", ())
        self.secrets = self._strings("secrets", ())
        self.network = self._flag("network", True)
        self.read_only = self._flag("read_only", True)
        self.say_missing = self._flag("say_missing", False)
        self.enclosed = self._flag("enclosed", True)
        self.after = self._strings("after", ())
        self.deadline_s = self._number("deadline_s", None)
        self.grace_s = self._number("grace_s", DEFAULT_GRACE_S) or 0.0
        self.log_cap = int(self._number("log_cap_bytes", DEFAULT_CAP) or 0)
        self.log_segment = int(self._number("log_segment_bytes", DEFAULT_SEGMENT) or 0)
        self.marker = self._text("marker", "")
        self.cgroup = None if said.get("cgroup") is None else self._text("cgroup")
        self.limits = self._whole_numbers()
        self.user = self._ids()
        if not self.argv:
            raise SpecError("argv: names no program")
        for path in (self.cwd, *self.hide, *self.show, *self.writable):
            if not path.startswith("/"):
                raise SpecError(f"{path!r}: paths must be absolute")
        for path in (self.cwd, *self.writable):
            if not os.path.isdir(path):  # noqa: PTH112
                raise SpecError(f"{path!r}: there is no such directory")
        if os.path.realpath(self.cwd) != self.cwd:
            raise SpecError(f"cwd: {self.cwd!r} leads over a symbolic link, give the real path")
        if self.cwd == os.path.realpath("."):
            raise SpecError("cwd: give the task a directory of its own, not the shim's")
        if unknown := set(self.optional) - set(namespaces.PROTECTIONS):
            raise SpecError(f"optional: knows {namespaces.PROTECTIONS}, got {sorted(unknown)}")
        if not 0 < self.log_segment * 2 <= self.log_cap:
            raise SpecError("log_cap_bytes: must hold at least two of log_segment_bytes")

    @classmethod
    def read(cls) -> "Spec":
        """Read spec.json of the current directory.

        Raises:
            SpecError: It is missing, or it is not what it should be.
        """
        try:
            with open(SPEC_FILE, "rb") as file:  # noqa: PTH123 - pathlib costs 5 ms here
                return cls(json.load(file))
        except FileNotFoundError as missing:
            raise SpecError(f"no {SPEC_FILE} in this directory") from missing
        except json.JSONDecodeError as broken:
            raise SpecError(f"{SPEC_FILE} is not JSON: {broken}") from broken

    def _text(self, name: str, absent: str | None = None) -> str:
        value = self._said.get(name, absent)
        if not isinstance(value, str):
            raise SpecError(f"{name}: must be text, got {value!r}")
        return value

    def _environment(self) -> dict[str, str]:
        value = self._said.get("env")
        if isinstance(value, dict) and all(isinstance(text, str) for text in value.values()):
            return value
        raise SpecError(f"env: must map names to text, got {value!r}")

    def _whole_numbers(self) -> dict[str, int]:
        value = self._said.get("limits", {})
        if not isinstance(value, dict) or not all(type(number) is int for number in value.values()):
            raise SpecError(f"limits: must map names to whole numbers, got {value!r}")
        if unknown := set(value) - set(_LIMITS):
            raise SpecError(f"limits: knows {_LIMITS}, got {sorted(unknown)}")
        return value

    def _ids(self) -> list[int] | None:
        value = self._said.get("user")
        if value is None:
            return None
        if isinstance(value, list) and len(value) == 2 and all(type(one) is int for one in value):
            return value
        raise SpecError(f"user: must be the ids of a user and a group, got {value!r}")

    def _strings(self, name: str, absent: tuple[str, ...] | None = None) -> list[str]:
        value = self._said.get(name, absent)
        if not isinstance(value, list | tuple) or not all(isinstance(one, str) for one in value):
            raise SpecError(f"{name}: must be a list of text, got {value!r}")
        return list(value)

    def _flag(self, name: str, absent: bool) -> bool:
        value = self._said.get(name, absent)
        if not isinstance(value, bool):
            raise SpecError(f"{name}: must be true or false, got {value!r}")
        return value

    def _number(self, name: str, absent: float | None) -> float | None:
        value = self._said.get(name, absent)
        if value is None and absent is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise SpecError(f"{name}: must be a number >= 0, got {value!r}")
        return value

    def protections(self) -> list[str]:
        """What to lock the task into; process numbers of its own always, where possible."""
        if not self.enclosed:
            return []
        asked = [namespaces.HIDE, namespaces.PIDS]
        if self.read_only:
            asked.append(namespaces.READ_ONLY)
        if not self.network:
            asked.append(namespaces.NETWORK)
        # The kernel counts the processes of every user but 0.
        uncounted = os.geteuid() == 0 and self.user is None
        if uncounted and "processes" in self.limits and self.cgroup is None:
            asked.append(namespaces.PROCESSES)
        return asked

    def can_do_without(self, protection: str) -> bool:
        """Whether the task may run although the machine cannot give this protection.

        The shim always hides the task's own directory from the task. That alone is no reason to
        refuse it.
        """
        return (
            protection in self.optional
            or protection == namespaces.PIDS
            or (protection == namespaces.HIDE and not self.hide)
        )


class Channels:
    """What runs between the shim and the processes of its task; every end closes at an exec."""

    def __init__(self) -> None:
        self.out = os.pipe()
        self.err = os.pipe()
        self.status = os.pipe()  # guard -> shim: how the task's first process ended
        self.failed = os.pipe()  # task -> shim: why there was no exec; EOF is the exec
        self.mine, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.mine.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        for pipe in (self.out, self.err):
            with contextlib.suppress(OSError):  # an ordinary user has a budget for this
                fcntl.fcntl(pipe[0], _F_SETPIPE_SZ, _PIPE_BYTES)

    def keep_shims_ends(self) -> None:
        self.theirs.close()
        for pipe in (self.out, self.err, self.status, self.failed):
            os.close(pipe[1])

    def keep_tasks_ends(self) -> None:
        self.mine.close()
        for pipe in (self.out, self.err, self.status, self.failed):
            os.close(pipe[0])

    def keep_guards_end(self) -> None:
        self.theirs.close()
        for pipe in (self.out, self.err, self.failed):
            os.close(pipe[1])

    def close_all_of_shim(self) -> None:
        self.mine.close()
        for pipe in (self.out, self.err, self.status, self.failed):
            os.close(pipe[0])

    def tell_task(self, word: bytes) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # hear_task will tell
            self.mine.send(word)

    def hear_task(self) -> tuple[bytes, int]:
        """The next message and the pid of who sent it, in our numbers; b"" when they are gone."""
        data, ancillary, _, _ = self.mine.recvmsg(4096, socket.CMSG_SPACE(12))
        sender = 0
        for _, kind, value in ancillary:
            if kind == socket.SCM_CREDENTIALS:
                sender = struct.unpack("iII", value)[0]
        return data, sender


def guard(spec: Spec, protections: list[str], walls: list[str], channels: Channels) -> None:
    """Run the task's first process and reap whatever it leaves. This is process 1 in there.

    `protections` are arranged here, by namespaces; `walls` are what the task then takes from
    itself, see confine.py.
    """
    channels.keep_tasks_ends()
    if channels.theirs.recv(16) != b"begin":
        return
    try:
        hide = [*spec.hide, os.getcwd()]  # noqa: PTH109
        hidden = view.covered_by(hide) if namespaces.HIDE in walls else []
        view.Arrangement(
            hide=hide,
            show=spec.show,
            writable=[spec.cwd, *spec.writable],
            protections=protections,
            processes=spec.limits.get("processes", 0),
        ).make()
        pid = namespaces.enter_second_namespace(os.fork) if protections else os.fork()
    except SandboxError as refusal:
        channels.theirs.send(json.dumps([refusal.protection, str(refusal)]).encode())
        return
    except Exception as failure:  # there is nobody else to tell
        channels.theirs.send(json.dumps(["", f"the sandbox failed: {failure!r}"]).encode())
        return
    if pid == 0:
        _become_task(spec, channels, walls, hidden, namespaced=bool(protections))
    os.chdir("/")  # we still stood in the directory that is hidden now
    channels.keep_guards_end()
    namespaces.harden_process()
    if namespaces.PIDS not in protections:
        namespaces.adopt_orphans()
        signal.signal(signal.SIGTERM, _sweep_and_leave)
    while True:
        try:
            ended, status, _ = os.wait3(0)
        except ChildProcessError:
            return
        if ended == pid:
            os.write(channels.status[1], struct.pack("i", status))


def _sweep_and_leave(*_: object) -> None:
    sweep()
    os._exit(0)


def _become_task(
    spec: Spec, channels: Channels, walls: list[str], hidden: list[str], *, namespaced: bool
) -> None:
    try:
        os.setsid()
        os.dup2(channels.out[1], 1)
        os.dup2(channels.err[1], 2)
        os.umask(0o077)
        os.chdir(spec.cwd)
        scratch = spec.env.get("TMPDIR", "")
        if scratch.startswith(spec.cwd + "/"):
            os.makedirs(scratch, mode=0o700, exist_ok=True)  # noqa: PTH103
        with contextlib.suppress(OSError):
            namespaces.write_text("/proc/self/oom_score_adj", str(_OOM_SCORE))
        # Whoever started the agent may have ignored some: a shell does that to its background jobs.
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_DFL)
        channels.theirs.send(b"ready")
        if channels.theirs.recv(16) != b"go":
            os._exit(70)
        _limit(spec, namespaced=namespaced)
        if spec.user is not None:
            _change_user(spec.user[0], spec.user[1], spec.cwd)
        if spec.enclosed:
            namespaces.seal_task()
        confine.enclose(
            walls,
            hidden=hidden,
            show=[os.path.realpath(path) for path in spec.show],
            writable=[os.path.realpath(path) for path in (spec.cwd, *spec.writable)],
        )
        try:
            os.execvpe(spec.argv[0], spec.argv, spec.env)  # noqa: S606
        except OSError as error:
            raise OSError(error.errno, error.strerror, spec.argv[0]) from error
    except BaseException as error:  # whatever it is, it must not go on as a second guard
        os.write(channels.failed[1], f"{error}"[:4000].encode())
    finally:
        os._exit(71)


def _change_user(user: int, group: int, cwd: str) -> None:
    """Give up user 0 for good. The task's directory is theirs already."""
    os.setgroups([])
    os.setresgid(group, group, group)
    os.setresuid(user, user, user)
    try:
        os.chdir(cwd)
    except OSError as error:
        raise SandboxError(
            "",
            f"user {user} cannot pass the directories above {cwd}: give the agent a home that "
            f"others may pass, such as /var/lib/fedml ({error.strerror})",
        ) from error


def _limit(spec: Spec, *, namespaced: bool) -> None:
    limits = spec.limits
    if nice := limits.get("nice", 0):
        os.nice(nice)
    if cpus := limits.get("cpus", 0):
        # The same ones for each task: so this is the most that all of them use together.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cpus])
    kinds = [(resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, limits.get("file_bytes"))]
    if spec.cgroup is None:
        # Not RLIMIT_AS: CUDA reserves hundreds of gigabytes of addresses that it never touches.
        kinds.append((resource.RLIMIT_DATA, limits.get("memory_bytes")))
    if (processes := limits.get("processes")) is not None:
        # The kernel counts by user and user namespace. Without one, the user's others count too.
        others = 0 if namespaced else count_threads_of_user()
        kinds.append((resource.RLIMIT_NPROC, processes + others))
    kinds.append((resource.RLIMIT_NOFILE, limits.get("open_files")))
    for kind, most in kinds:
        if most is not None:
            hard = resource.getrlimit(kind)[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(kind, (most, most))
