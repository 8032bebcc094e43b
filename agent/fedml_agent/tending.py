# SPDX-License-Identifier: Apache-2.0
"""The agent's side of the shims: start one, find it again after a restart, follow it, stop it.

Nothing here runs by itself: no thread, no asyncio task, no timer. A `Tended` is fed by the event
loop through its socket, and each question about it is a coroutine of whoever asks.

The shim writes exit.json before it tells anybody. So whatever happens to the connection, the end
of a task can be read from its directory; that a shim died without leaving that record is the only
way to be `Gone`.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from fedml_agent import capped_log, cgroups, guard, keeper, namespaces, processes, shim
from fedml_agent.capped_log import LogReader
from fedml_agent.sandbox import Limits
from fedml_agent.sockets import address_of

Stream: TypeAlias = Literal["out", "err", "order"]
_Facts: TypeAlias = dict[str, Any]  # a JSON object of the shim's, see shim.py


class TendingError(Exception):
    """A shim could not be started or reached."""


class TaskRefused(TendingError):
    """The task's program never ran: the sandbox or the program is not to be had here."""


class ShimSilent(TendingError):
    """The shim lives and does not answer. It may be frozen; the task may well be running."""


class Detached(TendingError):
    """We stopped listening ourselves, so we shall not hear how the task ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSpec:
    """What one task runs, and what it is locked into.

    Attributes:
        argv: The program, found on the PATH of `env`, and its arguments.
        env: The whole environment; see `clean_env`.
        cwd: The task's own directory. It may lie inside a hidden one and in the shim's directory.
        limits: What it may use.
        hide: Directories (or files) that are empty to the task, wherever else they are mounted
            too. Each must exist. The shim's directory is always among them.
        show: Directories inside hidden ones that the task sees all the same.
        writable: Directories that it may write to, beside its own and /tmp, /var/tmp, /dev/shm.
        read_only: Everything else cannot be written.
        network: False leaves it nothing but loopback.
        optional: Protections (see sandbox.py) without which the task may run where the machine
            cannot give them. Process numbers of its own are always optional.
        enclosed: False: the program itself locks in what it runs, as a container engine does.
        after: A command that is run when the task is over, also by the agent when its shim is dead.
        say_missing: Its log begins with a line for each protection that it runs without.
        deadline_s: It is stopped after so many seconds; None means never.
        grace_s: How long it gets between TERM and KILL when its deadline is over.
        log_cap_bytes: Kept of each output stream at most; the oldest goes first.
        log_segment_bytes: Size of one log file.
        secrets: Names of variables in `env` whose values its logs do not show.
        marker: Handed back in every record, for the agent to know whose task this is.
        user: User and group that it runs as, where the agent is root; None: as the agent.
        cgroup: From `cgroups.prepare`, or None for limits that hold for each process.
    """

    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: Path
    limits: Limits = field(default_factory=Limits)
    hide: Sequence[Path] = ()
    show: Sequence[Path] = ()
    writable: Sequence[Path] = ()
    read_only: bool = True
    network: bool = True
    optional: Sequence[str] = ()
    say_missing: bool = False
    enclosed: bool = True
    after: Sequence[str] = ()
    deadline_s: float | None = None
    grace_s: float = guard.DEFAULT_GRACE_S
    log_cap_bytes: int = capped_log.DEFAULT_CAP
    log_segment_bytes: int = capped_log.DEFAULT_SEGMENT
    secrets: Sequence[str] = ()
    marker: str = ""
    user: tuple[int, int] | None = None
    cgroup: str | None = None

    def to_json(self) -> str:
        """Give spec.json, as the shim reads it."""
        return json.dumps(
            {
                "version": guard.VERSION,
                "argv": list(self.argv),
                "env": dict(self.env),
                "cwd": str(self.cwd),
                "limits": self.limits.to_dict(),
                "hide": [str(path) for path in self.hide],
                "show": [str(path) for path in self.show],
                "writable": [str(path) for path in self.writable],
                "read_only": self.read_only,
                "network": self.network,
                "optional": list(self.optional),
                "say_missing": self.say_missing,
                "enclosed": self.enclosed,
                "after": list(self.after),
                "deadline_s": self.deadline_s,
                "grace_s": self.grace_s,
                "log_cap_bytes": self.log_cap_bytes,
                "log_segment_bytes": self.log_segment_bytes,
                "secrets": list(self.secrets),
                "marker": self.marker,
                "user": self.user,
                "cgroup": self.cgroup,
            }
        )


class StreamSize(NamedTuple):
    """How much a task has written to one stream, and how much of that is not kept (bytes)."""

    size: int
    dropped: int


class LogGrown(NamedTuple):
    """How far the log is. One of these stands for everything that was written before it."""

    out: StreamSize
    err: StreamSize


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a task ended, as its shim recorded it.

    Attributes:
        reason: "exited", "stopped", "deadline", "killed" or "refused" (keeper.py explains them).
        code: Exit status of its first process, or None if that did not exit.
        signal: The signal that ended it, or None.
        error: For "refused", why.
        oom: "yes", "likely" or "no": whether the kernel took it for want of memory.
        duration_s: From its exec to its end, on the monotonic clock.
        logs: How much it wrote.
        record: All of exit.json: pids, clocks, resource usage.
    """

    reason: str
    code: int | None
    signal: int | None
    error: str
    oom: str
    duration_s: float
    logs: LogGrown
    record: _Facts

    @classmethod
    def from_record(cls, record: _Facts) -> "Ended":
        """Read what the shim wrote."""
        return cls(
            reason=record["reason"],
            code=record["code"],
            signal=record["signal"],
            error=record["error"],
            oom=record["oom"],
            duration_s=record["ended"]["monotonic"] - record["started"]["monotonic"],
            logs=_log_grown(record["logs"]),
            record=record,
        )


@dataclass(frozen=True, slots=True)
class Gone:
    """The task is not running any more, and nobody recorded how it ended."""

    why: str


End: TypeAlias = Ended | Gone


def _log_grown(logs: _Facts) -> LogGrown:
    out, err = (StreamSize(logs[name]["size"], logs[name]["dropped"]) for name in ("out", "err"))
    return LogGrown(out, err)


class Tended(asyncio.Protocol):
    """One task that runs, followed through the socket of its shim.

    Attributes:
        facts: shim.json: `shim`, `guard` and `task` with pid and start time, `protections` that
            are in force by namespaces, `walls` that are by other means, `missing` ones with the
            reason, `marker`.
        logs: How far the log is, as last heard.
    """

    def __init__(self, taskdir: Path) -> None:
        """Use `start` or `adopt`."""
        self.taskdir = taskdir
        self.facts: _Facts = {}
        self.logs = LogGrown(StreamSize(0, 0), StreamSize(0, 0))
        self._transport: asyncio.Transport | None = None
        self._heard = b""
        self._end: End | None = None
        self._lost = False
        self._detached = False
        self._change: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._settling = asyncio.Lock()

    def log(self, stream: Stream) -> LogReader:
        """Give a reader of its log, from the first byte on."""
        return LogReader(self.taskdir, stream)

    @property
    def pids(self) -> list[int]:
        """Its shim, its guard and its first process: whatever it starts descends from one."""
        roles = (self.facts.get(role) for role in ("shim", "guard", "task"))
        return [who["pid"] for who in roles if who is not None]

    @property
    def is_over(self) -> bool:
        """Whether the end is known; `ended` then gives it without waiting."""
        return self._end is not None

    def stop(self, grace_s: float) -> None:
        """Ask it to end: TERM to its process group, and after the grace period KILL to all of it.

        Once more with a shorter period shortens it. Await `ended()` to see it done.
        """
        self._say({"do": "stop", "grace_s": grace_s})

    def kill(self) -> None:
        """End it at once."""
        self._say({"do": "kill"})

    def detach(self) -> None:
        """Stop listening; the task goes on, and can be adopted again."""
        self._detached = True
        if self._transport is not None:
            self._transport.close()
        self._tell()

    async def ended(self) -> End:
        """Wait until it has ended.

        `Gone` is given only after what was left of it is dead.

        Raises:
            Detached: `detach` was called.
        """
        while self._end is None:
            if self._detached:
                raise Detached(f"no longer following the task in {self.taskdir}")
            if self._lost:
                async with self._settling:
                    if self._end is None:
                        self._finish(await _look_for_end(self.taskdir, self.facts))
            else:
                await asyncio.shield(self._change)
        return self._end

    async def events(self) -> AsyncIterator[LogGrown | End]:
        """Give the log's growth as it happens, merged if we are slow, and last the end.

        Raises:
            Detached: `detach` was called.
        """
        told = LogGrown(StreamSize(0, 0), StreamSize(0, 0))
        while True:
            if self.logs != told:
                told = self.logs
                yield told
            elif self._end is not None or self._lost or self._detached:
                yield await self.ended()
                return
            else:
                await asyncio.shield(self._change)

    # What follows is called by the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        *lines, self._heard = (self._heard + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            match message["event"]:
                case "snapshot":
                    self.facts = message
                    self.logs = _log_grown(message["logs"])
                case "log":
                    self.logs = _log_grown(message["logs"])
                case "ended":
                    self._finish(Ended.from_record(message["exit"]))
        self._tell()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        self._tell()

    # Ours again.

    @property
    def is_connected(self) -> bool:
        """Whether there was a socket to connect to."""
        return self._transport is not None

    def is_served_by(self, who: _Facts) -> bool:
        """Whether the other end of the socket is that very process, and not a later one."""
        assert self._transport is not None
        sock = self._transport.get_extra_info("socket")
        size = struct.calcsize("iII")
        peer = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
        try:
            start = processes.process_start(who["pid"])
        except ProcessLookupError:  # it has just ended, or /proc does not show it to us
            start = who["start"]
        return bool(peer[0] == who["pid"] and start == who["start"])

    async def introduced(self) -> None:
        """Wait for the first thing that the shim says, or for it to be gone without a word."""
        while not self.facts and self._end is None and not self._lost:
            await asyncio.shield(self._change)

    def _finish(self, end: End) -> None:
        self._end = end
        if isinstance(end, Ended):
            self.facts = self.facts or end.record
            self.logs = end.logs
        if self._transport is not None:
            self._transport.close()
        self._tell()

    def _tell(self) -> None:
        self._change.set_result(None)
        self._change = asyncio.get_running_loop().create_future()

    def _say(self, message: _Facts) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(json.dumps(message).encode() + b"\n")


async def start(taskdir: Path, spec: TaskSpec) -> Tended:
    """Start a task. Returns when its program runs; it may already have ended then.

    Args:
        taskdir: An existing directory, of this task only, in which nothing was started yet.
        spec: What to run.

    Raises:
        TaskRefused: The specification is wrong, or this machine cannot run it as asked.
        TendingError: The shim could not be started.
        FileExistsError: Something was started in this directory before.
    """
    number = os.open(taskdir / guard.SPEC_FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(number, "w", encoding="utf-8") as file:
        file.write(spec.to_json())
    await _spawn(taskdir)
    tended = Tended(taskdir)
    await _connect(tended)
    await tended.introduced()
    if tended.facts.get("task") is None or tended.is_over:
        end = await tended.ended()
        if isinstance(end, Gone):
            raise TendingError(f"the shim in {taskdir} did not start: {end.why}")
        if end.reason == keeper.REFUSED:
            raise TaskRefused(end.error)
    return tended


async def adopt(taskdir: Path, *, answer_within_s: float = 5.0) -> Tended | Ended | Gone:
    """Take up a task that an earlier agent started.

    It is the same shim if pid, start time and boot are those on record. Where the shim never
    began, the directory is closed to it: it cannot begin afterwards.

    Raises:
        ShimSilent: Its shim lives and does not answer.
    """
    if not (taskdir / keeper.SHIM_FILE).exists() and _close(taskdir):
        return Gone("its shim never began")
    facts: _Facts = json.loads((taskdir / keeper.SHIM_FILE).read_text())
    if "shim" not in facts:
        return Gone("its shim never began")
    if (end := _read_end(taskdir)) is not None:
        return end
    if facts["boot_id"] != processes.boot_id():
        return Gone("the machine was restarted while it ran")
    tended = Tended(taskdir)
    await _connect(tended)
    if tended.is_connected and not tended.is_served_by(facts["shim"]):
        tended.detach()
        return await _look_for_end(taskdir, facts)
    try:
        async with asyncio.timeout(answer_within_s):
            await tended.introduced()
    except TimeoutError:
        tended.detach()
        raise ShimSilent(f"process {facts['shim']['pid']} serves {taskdir}, silently") from None
    if tended.facts and not tended.is_over:
        return tended
    tended.facts = facts
    return await tended.ended()


async def _spawn(taskdir: Path) -> None:
    """Run the shim's first process, which leaves once the shim is on its own."""
    command = [sys.executable, "-I", "-S", shim.__file__, str(taskdir)]
    nothing = subprocess.DEVNULL
    # Nothing of the agent's environment: it is what /proc/PID/environ of the shim would show.
    with subprocess.Popen(  # noqa: ASYNC220 - it returns at once, and asyncio's own takes a thread
        command, stdin=nothing, stdout=nothing, stderr=subprocess.PIPE, env={"LANG": "C.UTF-8"}
    ) as process:
        await _death(process.pid)
        assert process.stderr is not None
        os.set_blocking(process.stderr.fileno(), False)
        said = process.stderr.read()
    if process.returncode < 0:
        raise TendingError(f"its shim was killed ({signal.Signals(-process.returncode).name})")
    if process.returncode:
        why = (said or b"").decode(errors="replace").strip()
        raise TaskRefused(why or f"its shim left with status {process.returncode}")


async def _death(pid: int) -> None:
    """Wait until a process has ended, without reaping it."""
    try:
        number = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop = asyncio.get_running_loop()
    dead: asyncio.Future[None] = loop.create_future()
    loop.add_reader(number, _settle, dead)
    try:
        await dead
    finally:
        loop.remove_reader(number)
        os.close(number)


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _connect(tended: Tended) -> None:
    """Connect, or leave it `lost`: then its end is in its directory, or it has none."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        with address_of(tended.taskdir / keeper.SOCKET_FILE) as address:
            sock.connect(address)
    except (ConnectionRefusedError, FileNotFoundError):
        sock.close()
        tended.connection_lost(None)
    except OSError as error:
        sock.close()
        raise ShimSilent(f"cannot connect to the shim in {tended.taskdir}: {error}") from error
    else:
        await asyncio.get_running_loop().create_unix_connection(lambda: tended, sock=sock)


def _close(taskdir: Path) -> bool:
    """Put our own shim.json in place of the one that a late shim would claim."""
    mine = taskdir / f"{keeper.SHIM_FILE}.closed"
    mine.write_text(json.dumps({"version": guard.VERSION, "closed": True}))
    try:
        os.link(mine, taskdir / keeper.SHIM_FILE)
    except FileExistsError:
        return False
    finally:
        mine.unlink()
    return True


def _read_end(taskdir: Path) -> Ended | None:
    with contextlib.suppress(FileNotFoundError):
        return Ended.from_record(json.loads((taskdir / capped_log.EXIT_RECORD).read_text()))
    return None


async def _look_for_end(taskdir: Path, facts: _Facts) -> End:
    """Read how it ended; where nobody wrote that down, make sure that it has."""
    if (end := _read_end(taskdir)) is not None:
        return end
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        facts = facts or json.loads((taskdir / keeper.SHIM_FILE).read_text())
    await _kill("shim", facts, signal.SIGKILL)
    # A guard that is process 1 takes everything with it; another one sweeps when it is asked to.
    own_pids = namespaces.PIDS in facts.get("protections", ())
    await _kill("guard", facts, signal.SIGKILL if own_pids else signal.SIGTERM)
    await _kill("task", facts, signal.SIGKILL)
    if "cgroup" in facts:
        cgroups.kill(facts["cgroup"])
    if (end := _read_end(taskdir)) is not None:
        return end
    with contextlib.suppress(OSError, guard.SpecError, ValueError):
        spec = guard.Spec(json.loads((taskdir / guard.SPEC_FILE).read_text()))
        await asyncio.to_thread(keeper.run_after, spec.after, spec.env)
    why = "its shim was killed"
    with contextlib.suppress(FileNotFoundError):
        last = (taskdir / shim.TRACEBACK_FILE).read_text().strip().rpartition("\n")[2]
        why = f"its shim failed: {last}"
    return Gone(why)


async def _kill(role: str, facts: _Facts, number: signal.Signals) -> None:
    """Signal a process that is still the one on record, and wait until it is dead."""
    who = facts.get(role)
    if who is None:
        return
    with contextlib.suppress(ProcessLookupError):
        if processes.process_start(who["pid"]) != who["start"]:
            return
        if role == "task":  # it leads its group
            os.killpg(who["pid"], number)
        else:
            os.kill(who["pid"], number)
        await _death(who["pid"])
