# SPDX-License-Identifier: Apache-2.0
"""The work of a shim: one event loop from the start of its task to the record of its end.

What it does, says and writes is described in shim.py; this is apart from it because Python
compiles the file that it is started with each time anew.
"""

import contextlib
import errno
import json
import os
import resource
import select
import signal
import socket
import struct
import time

from fedml_agent import cgroups, confine, namespaces, processes, view
from fedml_agent.capped_log import EXIT_RECORD, ORDER, STREAMS, LogWriter, OrderWriter
from fedml_agent.guard import VERSION, Channels, Spec, guard
from fedml_agent.namespaces import SandboxError
from fedml_agent.redact import Redactor, Secrets

SHIM_FILE = "shim.json"
SOCKET_FILE = "s"
LOG_EVENT_EVERY_S = 0.02

# How a task can have ended.
EXITED = "exited"  # by itself
STOPPED = "stopped"  # somebody asked for it, however it then ended
DEADLINE = "deadline"  # its time was up
KILLED = "killed"  # at once: asked for, or its guard was killed by another
REFUSED = "refused"  # its program never ran: `error` says why

_RESERVED_FILE = "exit.reserved"
_RESERVED_BYTES = 8192
_LINE_LIMIT = 4096
_AFTER_S = 30.0
_UNSENT_LIMIT = 256 << 10
_READ_BYTES = 256 << 10
_DRAIN_READS = 4


def write_record(name: str, record: object, *, into: str | None = None) -> None:
    """Put a JSON file into the current directory, whole or not at all, synced to the disk.

    `into` names a file whose space is used, so that a full disk is no obstacle.
    """
    temporary = into or f"{name}.tmp"
    text = json.dumps(record, separators=(",", ":")).encode() + b"\n"
    number = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        view = memoryview(text)
        while view:
            view = view[os.write(number, view) :]
        os.ftruncate(number, len(text))
        os.fsync(number)
    finally:
        os.close(number)
    os.rename(temporary, name)  # noqa: PTH104 - pathlib costs 5 ms at start
    folder = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def claim(record: object) -> bool:
    """Create shim.json in the current directory, unless it is there; tell whether it was not.

    An agent that gives a task up closes its directory in the same way, so that a shim that was
    slow to start cannot run what the agent has reported as lost.
    """
    temporary = f"{SHIM_FILE}.{os.getpid()}"
    with open(temporary, "x", encoding="utf-8") as file:  # noqa: PTH123
        json.dump(record, file)
    try:
        os.link(temporary, SHIM_FILE)
    except FileExistsError:
        return False
    finally:
        os.unlink(temporary)  # noqa: PTH108
    return True


def run_after(words: list[str], env: dict[str, str]) -> None:
    """Run what must be run when a task is over, wherever it was; at most for half a minute."""
    if not words:
        return
    import subprocess  # 10 ms, and most tasks need nothing

    with contextlib.suppress(OSError, subprocess.SubprocessError):
        subprocess.run(
            words,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_AFTER_S,
            check=False,
        )


class _Connection:
    """One agent that listens. What it does not take yet is kept; log events are merged."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.heard = b""
        self.unsent = b""
        self.owes_log_event = False

    def say(self, message: object) -> None:
        self.unsent += json.dumps(message, separators=(",", ":")).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        # A broken connection shows when it is read next.
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            self.unsent = self.unsent[self.sock.send(self.unsent) :]


class Keeper:
    """Keeps one task. One thread, and it sleeps unless something happens."""

    def __init__(self, spec: Spec, listener: socket.socket) -> None:
        self._spec = spec
        self._listener = listener
        self._logs = {
            name: LogWriter(name, cap=spec.log_cap, segment=spec.log_segment) for name in STREAMS
        }
        self._order = OrderWriter()
        secrets = Secrets({name: spec.env[name] for name in spec.secrets if name in spec.env})
        # Without secrets, output goes from the pipe to the file as it is.
        self._redactors = {name: Redactor(secrets) for name in STREAMS} if secrets else {}
        self._who: dict[str, object] = {
            "version": VERSION,
            "marker": spec.marker,
            "boot_id": processes.boot_id(),
            "shim": self._identity(os.getpid()),
        }
        self._channels = Channels()
        self._cgroup: cgroups.Cgroup | None = None
        self._guard = 0
        self._task = 0
        self._poll = select.poll()
        self._connections: dict[int, _Connection] = {}
        self._buffer = bytearray(_READ_BYTES)
        self._wake = os.pipe()
        self._status: int | None = None  # of the task's first process, as wait(2) gives it
        self._reason = ""
        self._error = ""
        self._over = False
        self._started = _now()
        self._oom_kills = _oom_kills()
        self._kill_at: float | None = None
        self._deadline_at: float | None = None
        self._log_event_at: float | None = None
        self._log_event_not_before = 0.0

    def run(self) -> None:
        """See the task to its end."""
        if not claim(self._who):
            return
        with open(_RESERVED_FILE, "wb") as file:  # noqa: PTH123
            file.write(b" " * _RESERVED_BYTES)
        namespaces.adopt_orphans()
        try:
            self._start()
        except SandboxError as refusal:
            self._reason, self._error = REFUSED, str(refusal)
            self._kill_guard()
        else:
            self._loop()
        self._finish()

    # -- from the fork to the exec -----------------------------------------------------------

    def _start(self) -> None:
        protections = self._spec.protections()
        walls: list[str] = []
        missing: dict[str, str] = {}
        while True:
            try:
                self._start_within(protections, walls)
                break
            except SandboxError as refusal:
                for name in self._refused(refusal, protections):
                    protections.remove(name)
                    # What namespaces do not give, the task may be able to take from itself.
                    nor = confine.why_not(name, view.control_sockets())
                    if not nor:
                        walls.append(name)
                    elif self._spec.can_do_without(name):
                        missing[name] = str(refusal)
                    else:
                        text = f"this machine cannot give the protection '{name}': {refusal}; {nor}"
                        raise SandboxError(name, text) from refusal
                self._kill_guard()
                self._channels.close_all_of_shim()
                self._channels = Channels()
        if self._spec.say_missing and missing:
            self._say_missing(missing)
        self._who |= {
            "guard": self._identity(self._guard),
            "task": self._identity(self._task),
            "protections": protections,
            "walls": walls,
            "missing": missing,
        }
        write_record(SHIM_FILE, self._who)
        self._channels.tell_task(b"go")
        self._started = _now()
        why = b""
        while piece := os.read(self._channels.failed[0], 4096):
            why += piece
        if why:
            raise SandboxError("", f"the program could not be started: {why.decode()}")

    def _refused(self, refusal: SandboxError, protections: list[str]) -> list[str]:
        """Which of the protections a refusal is about; raises it where that is none of them."""
        if not refusal.protection:
            raise refusal
        if refusal.protection == namespaces.USER_NAMESPACES and protections:
            return list(protections)
        if refusal.protection not in protections:
            raise refusal  # it was given up already, and that did not help
        return [refusal.protection]

    def _say_missing(self, missing: dict[str, str]) -> None:
        """The first lines of the task's log: whoever reads it shall know what it ran without."""
        for name, why in missing.items():
            line = f"fedml: this machine gives tasks no protection '{name}': {why}\n"
            self._write("err", memoryview(line.encode()))

    def _start_within(self, protections: list[str], walls: list[str]) -> None:
        channels = self._channels

        def inside() -> None:
            self._listener.close()
            guard(self._spec, protections, walls, channels)

        if self._spec.cgroup is not None and self._cgroup is None:
            name = f"{os.getpid()}-{self._who['boot_id']}"
            self._cgroup = cgroups.Cgroup(self._spec.cgroup, self._spec.limits, name[:24])
            self._who["cgroup"] = self._cgroup.path
        try:
            self._guard = namespaces.fork_guard(protections, inside)
        finally:
            channels.keep_shims_ends()
        if self._cgroup is not None:
            self._cgroup.take(self._guard)
        channels.tell_task(b"begin")
        said, sender = channels.hear_task()
        if said == b"ready":
            self._task = sender
        elif said:
            protection, why = json.loads(said)
            raise SandboxError(protection, why)
        else:
            why = os.read(channels.failed[0], 4096).decode()
            raise SandboxError("", why or "the task's process died before it began")

    def _identity(self, pid: int) -> dict[str, int]:
        try:
            return {"pid": pid, "start": processes.process_start(pid)}
        except ProcessLookupError as gone:
            raise SandboxError("", "the task's process died before it began") from gone

    # -- while it runs -----------------------------------------------------------------------

    def _loop(self) -> None:
        if self._spec.deadline_s is not None:
            self._deadline_at = time.monotonic() + self._spec.deadline_s
        os.set_blocking(self._wake[1], False)
        signal.set_wakeup_fd(self._wake[1])  # so that a signal ends the poll below
        signal.signal(signal.SIGTERM, lambda *_: self._stop(STOPPED, self._spec.grace_s))
        try:
            guard_end = os.pidfd_open(self._guard)
        except OSError:
            guard_end = -1  # Linux < 5.3: the guard's end of the status pipe tells as well
        logs = {self._channels.out[0]: "out", self._channels.err[0]: "err"}
        status, listener = self._channels.status[0], self._listener.fileno()
        for number in (*logs, status, self._wake[0], listener, guard_end):
            if number >= 0:
                os.set_blocking(number, False)
                self._poll.register(number, select.POLLIN)
        while not self._over:
            for number, events in self._poll.poll(self._sleep_ms()):
                if number in logs:
                    if not self._take_output(number, logs[number]):
                        self._poll.unregister(number)
                elif number in self._connections:
                    self._serve(self._connections[number], events)
                elif number == listener:
                    self._accept()
                elif number == self._wake[0]:
                    os.read(number, 64)
                elif not self._take_status() or number == guard_end:
                    self._over = guard_end in (number, -1)
                    self._poll.unregister(number)
            self._look_at_clock()

    def _sleep_ms(self) -> int | None:
        times = (self._kill_at, self._deadline_at, self._log_event_at)
        due = [at for at in times if at is not None]
        return max(0, int((min(due) - time.monotonic()) * 1000) + 1) if due else None

    def _look_at_clock(self) -> None:
        now = time.monotonic()
        if self._deadline_at is not None and now >= self._deadline_at:
            self._deadline_at = None
            self._stop(DEADLINE, self._spec.grace_s)
        if self._kill_at is not None and now >= self._kill_at:
            self._kill_at = None
            os.kill(self._guard, signal.SIGKILL)
        if self._log_event_at is not None and now >= self._log_event_at:
            self._log_event_at = None
            self._log_event_not_before = now + LOG_EVENT_EVERY_S
            self._order.flush()  # first: whoever hears of the bytes finds their place
            for connection in self._connections.values():
                self._tell_log(connection)

    def _take_output(self, number: int, stream: str) -> bool:
        """Move what is in the pipe to the log; False when nobody can write to it any more."""
        try:
            count = os.readv(number, [self._buffer])
        except BlockingIOError:
            return True
        piece = memoryview(self._buffer)[:count]
        if stream in self._redactors:
            piece = memoryview(self._redactors[stream].feed(bytes(piece)))
        self._write(stream, piece)
        if count and self._log_event_at is None:
            self._log_event_at = self._log_event_not_before
        return count > 0

    def _write(self, stream: str, piece: memoryview) -> None:
        if piece:
            self._logs[stream].append(piece)
            self._order.note(stream, self._logs[stream].size, time.time())

    def _take_status(self) -> bool:
        """Hear from the guard how the task's first process ended; False when the guard is gone."""
        try:
            said = os.read(self._channels.status[0], 4)
        except BlockingIOError:
            return True
        if said:
            self._status = struct.unpack("i", said)[0]
            if not self._reason:
                os.kill(self._guard, signal.SIGKILL)
        return bool(said)

    def _stop(self, reason: str, grace_s: float) -> None:
        """TERM to the task's group, KILL to all of it after the grace period. The sooner counts."""
        kill_at = time.monotonic() + grace_s
        self._kill_at = kill_at if self._kill_at is None else min(kill_at, self._kill_at)
        if self._reason:
            return
        self._reason = reason
        if self._status is None and reason != KILLED:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._task, signal.SIGTERM)
                os.killpg(self._task, signal.SIGCONT)  # a frozen process takes no TERM

    # -- those who listen --------------------------------------------------------------------

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
            sock, _ = self._listener.accept()
            sock.setblocking(False)
            connection = self._connections[sock.fileno()] = _Connection(sock)
            self._poll.register(sock, select.POLLIN)
            connection.say(
                {"event": "snapshot", **self._who, "reason": self._reason, "logs": self._sizes()}
            )
            self._watch(connection)

    def _sizes(self) -> dict[str, dict[str, int]]:
        self._order.flush()  # whoever hears of bytes finds their place
        return {
            name: {"size": log.size, "dropped": log.dropped}
            for name, log in (*self._logs.items(), (ORDER, self._order.log))
        }

    def _tell_log(self, connection: _Connection) -> None:
        if connection.unsent:
            connection.owes_log_event = True  # one event, with the sizes of then, will do
        else:
            connection.owes_log_event = False
            connection.say({"event": "log", "logs": self._sizes()})
        self._watch(connection)

    def _watch(self, connection: _Connection) -> None:
        waits = select.POLLOUT if connection.unsent else 0
        self._poll.modify(connection.sock, select.POLLIN | waits)

    def _serve(self, connection: _Connection, events: int) -> None:
        if events & select.POLLOUT:
            connection.flush()
            if not connection.unsent and connection.owes_log_event:
                self._tell_log(connection)
        if events & ~select.POLLOUT:
            try:
                said = connection.sock.recv(_LINE_LIMIT)
            except BlockingIOError:
                return
            except ConnectionResetError:
                said = b""
            *lines, connection.heard = (connection.heard + said).split(b"\n")
            for line in lines:
                self._obey(connection, line)
            deaf = len(connection.unsent) > _UNSENT_LIMIT
            if not said or deaf or len(connection.heard) > _LINE_LIMIT:
                self._poll.unregister(connection.sock)
                del self._connections[connection.sock.fileno()]
                connection.sock.close()
                return
        self._watch(connection)

    def _obey(self, connection: _Connection, line: bytes) -> None:
        try:
            order = json.loads(line)
            grace_s = float(order.get("grace_s", self._spec.grace_s))
            match order.get("do"):
                case "stop" if grace_s >= 0:
                    self._stop(STOPPED, grace_s)
                case "kill":
                    self._stop(KILLED, 0.0)
                case "ping":
                    connection.say({"event": "pong"})
                case _:
                    connection.say({"event": "error", "why": f"no such command: {order}"})
        except (ValueError, TypeError, AttributeError) as error:
            connection.say({"event": "error", "why": f"not a command: {error}"})

    # -- the end -----------------------------------------------------------------------------

    def _kill_guard(self) -> None:
        """End what is left of the task, whatever state it is in, and reap all of it."""
        if self._cgroup is not None:
            self._cgroup.kill()
        if self._guard:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._guard, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self._guard, 0)
            self._guard = 0
        processes.sweep()

    def _finish(self) -> None:
        self._kill_guard()
        run_after(self._spec.after, self._spec.env)
        for stream, pipe in (("out", self._channels.out), ("err", self._channels.err)):
            os.set_blocking(pipe[0], False)
            # All who could write are dead. The bound is for one who was handed the pipe and is not.
            for _ in range(_DRAIN_READS):
                if not self._take_output(pipe[0], stream):
                    break
            if stream in self._redactors:
                self._write(stream, memoryview(self._redactors[stream].rest()))
        self._order.flush()
        record = self._record()
        while True:
            try:
                write_record(EXIT_RECORD, record, into=_RESERVED_FILE)
                break
            except OSError as error:  # a file system that copies on write may want new space
                room = any(log.give_way() for log in (*self._logs.values(), self._order.log))
                if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not room:
                    raise
        os.unlink(SOCKET_FILE)  # noqa: PTH108
        self._listener.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                sock, _ = self._listener.accept()
                sock.setblocking(False)
                self._connections[sock.fileno()] = _Connection(sock)
        for connection in self._connections.values():
            connection.say({"event": "ended", "exit": record})

    def _record(self) -> dict[str, object]:
        code = signalled = None
        reason = self._reason or (KILLED if self._status is None else EXITED)
        if self._status is not None:
            code = os.waitstatus_to_exitcode(self._status)
            code, signalled = (code, None) if code >= 0 else (None, -code)
        elif reason != REFUSED:
            signalled = int(signal.SIGKILL)
        oom, forks_refused = "no", 0
        if signalled == signal.SIGKILL and reason in (EXITED, KILLED):
            oom = "likely" if _oom_kills() > self._oom_kills else "no"
        if self._cgroup is not None:
            oom = "yes" if self._cgroup.count("memory.events", "oom_kill") else oom
            forks_refused = self._cgroup.count("pids.events", "max")
            self._cgroup.remove()
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return {
            **self._who,
            "reason": reason,
            "code": code,
            "signal": signalled,
            "error": self._error,
            "oom": oom,
            "forks_refused": forks_refused,
            "limits": self._spec.limits,
            "started": self._started,
            "ended": _now(),
            "rusage": {
                "user_s": round(used.ru_utime, 6),
                "system_s": round(used.ru_stime, 6),
                "max_rss_bytes": used.ru_maxrss * 1024,
                "read_blocks": used.ru_inblock,
                "written_blocks": used.ru_oublock,
            },
            "logs": self._sizes(),
        }


def _now() -> dict[str, float]:
    return {"wall": time.time(), "monotonic": time.monotonic()}


def _oom_kills() -> int:
    """How many processes the kernel has killed for want of memory since boot (Linux >= 4.13)."""
    with contextlib.suppress(OSError), open("/proc/vmstat", "rb") as file:  # noqa: PTH123
        for line in file:
            if line.startswith(b"oom_kill "):
                return int(line.split()[1])
    return 0
