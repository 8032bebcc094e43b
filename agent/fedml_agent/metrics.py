# SPDX-License-Identifier: Apache-2.0
"""The agent's numbers for Prometheus: on a port of loopback, or in a file for node_exporter.

Off unless asked for, and never on another address: nothing on a machine listens to the outside.
The text format is a few lines, so that the agent needs no library for it.
"""

import asyncio
import contextlib
import logging
import os
import resource
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fedml_agent import hardware
from fedml_protocol.tasks import FINAL, TaskState

if TYPE_CHECKING:
    from fedml_agent.daemon import Daemon

log = logging.getLogger(__name__)

# A scraper that asks more often, or a second one, gets the same readings of the GPUs.
_FRESH_S = 1.0
_FILE_EVERY_S = 15.0
_ASKED_WITHIN_S = 5.0
_LONGEST_REQUEST = 16 * 1024
_ESCAPED = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


class Number(NamedTuple):
    """One metric: its name behind `fedml_agent_`, what it is, and its values by label."""

    name: str
    kind: str
    help: str
    values: Iterable[tuple[dict[str, str], float | None]]


class Metrics:
    """Serves while entered; `port` 0 chooses a free one, None serves none."""

    def __init__(self, daemon: "Daemon", *, port: int | None, file: Path | None) -> None:
        self.port = port
        self._daemon = daemon
        self._file = file
        self._server: asyncio.Server | None = None
        self._readings: hardware.Readings | None = None
        self._read_at = float("-inf")
        self._reading = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Answer and write until left.

        Raises:
            OSError: The port is taken, or the file's folder is not there.
        """
        writing: asyncio.Task[None] | None = None
        if self.port is not None:
            self._server = await asyncio.start_server(
                self._answer, "127.0.0.1", self.port, limit=_LONGEST_REQUEST
            )
            self.port = self._server.sockets[0].getsockname()[1]
            log.info("numbers for Prometheus: http://127.0.0.1:%d/metrics", self.port)
        try:
            if self._file is not None:
                _write(self._file, await self.page())
                writing = asyncio.get_running_loop().create_task(
                    self._keep_file(self._file), name="agent.metrics"
                )
            yield
        finally:
            if self._server is not None:
                self._server.close()
            if writing is not None:
                writing.cancel()
                # What is old shall not be taken for what is: node_exporter would go on.
                assert self._file is not None
                self._file.unlink(missing_ok=True)

    async def page(self) -> str:
        """Everything, in Prometheus' text format."""
        async with self._reading:
            now = asyncio.get_running_loop().time()
            if self._readings is None or now - self._read_at > _FRESH_S:
                daemon = self._daemon
                # In a thread: a failing GPU can hold NVML up for seconds.
                self._readings = await asyncio.to_thread(
                    hardware.readings, disk=daemon.home.root, nvml=daemon.nvml
                )
                self._read_at = now
        numbers = (*_of_agent(self._daemon, now), *_of_machine(self._readings))
        return "".join(line for number in numbers for line in _lines(number))

    async def _keep_file(self, file: Path) -> None:
        while True:
            await asyncio.sleep(_FILE_EVERY_S)
            try:
                _write(file, await self.page())
            except OSError as error:
                log.warning("the numbers could not be written: %s", error)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_ASKED_WITHIN_S):
                head = await reader.readuntil(b"\r\n\r\n")
                method, path, _ = (*head.split(b"\r\n", 1)[0].split(b" "), b"", b"")[:3]
                status, body = "404 Not Found", "only /metrics is here\n"
                if method == b"GET" and path.partition(b"?")[0] == b"/metrics":
                    status, body = "200 OK", await self.page()
                kind = "text/plain; version=0.0.4; charset=utf-8"
                data = body.encode()
                writer.write(
                    f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\n"
                    "Connection: close\r\n\r\n".encode()
                    + data
                )
                await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # whoever asked has left, or asks for something else
        finally:
            writer.close()


def _of_agent(daemon: "Daemon", now: float) -> Iterator[Number]:
    facts = {"version": daemon.version, "device": daemon.membership.device}
    yield Number("info", "gauge", "Always 1; says who this is.", [(facts, 1)])
    yield _one("up_seconds", "gauge", "Since this process began.", now - daemon.started_at)
    up = daemon.link.up.is_set()
    yield _one("link_up", "gauge", "Whether the broker is connected.", up)
    refusing = bool(daemon.intake.refusing)
    yield _one("refusing", "gauge", "Whether no offer would be taken.", refusing)
    yield _one("draining", "gauge", "Whether it takes no more offers.", daemon.intake.draining)
    held = [entry.state for entry in daemon.journal.held()]
    states = [state for state in TaskState if state not in FINAL and state is not TaskState.QUEUED]
    yield Number(
        "tasks",
        "gauge",
        "Tasks that it holds.",
        [({"state": state.name}, held.count(state)) for state in states],
    )
    yield Number(
        "tasks_ended_total",
        "counter",
        "Tasks that have ended since this process began.",
        [({"state": state.name}, daemon.ended_tasks[state]) for state in sorted(FINAL)],
    )
    yield _one("slots", "gauge", "Tasks that it takes at once.", daemon.room.slots)
    owed = len(list(daemon.journal.owed()))
    yield _one("outbox", "gauge", "Results that the broker has not confirmed.", owed)
    shipped = daemon.journal.log_bytes
    yield _one("log_bytes_total", "counter", "Bytes of logs that the broker has taken.", shipped)
    uses = len(daemon.unleased)
    yield _one("gpu_unleased", "gauge", "Uses of GPUs by tasks that do not hold them.", uses)
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu = used.ru_utime + used.ru_stime
    yield _one("process_cpu_seconds_total", "counter", "Of this process.", cpu)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    resident = pages * os.sysconf("SC_PAGE_SIZE")
    yield _one("process_resident_bytes", "gauge", "Memory of this process.", resident)


def _of_machine(read: hardware.Readings) -> Iterator[Number]:
    yield _one("disk_free_bytes", "gauge", "Where tasks write.", read.disk.free)
    yield _one("disk_bytes", "gauge", "Size of that disk.", read.disk.total)
    yield _one("memory_available_bytes", "gauge", "For tasks.", read.memory_available)
    yield _one("cpu_busy_seconds_total", "counter", "All processors, working.", read.cpu_busy_s)
    yield _one("cpu_seconds_total", "counter", "All processors, there.", read.cpu_total_s)
    gpus = [({"gpu": str(gpu.index), "uuid": gpu.uuid or ""}, gpu) for gpu in read.gpus]
    for name, text, values in (
        ("gpu_utilisation_percent", "Time with a kernel.", [(w, g.utilisation) for w, g in gpus]),
        ("gpu_memory_used_bytes", "Of one GPU.", [(w, g.memory_used) for w, g in gpus]),
        ("gpu_temperature_celsius", "Of one GPU.", [(w, g.temperature) for w, g in gpus]),
        ("gpu_power_watts", "Of one GPU.", [(w, g.power) for w, g in gpus]),
        ("gpu_fault", "Whether it is out of order.", [(w, g.fault is not None) for w, g in gpus]),
    ):
        yield Number(name, "gauge", text, values)


def _one(name: str, kind: str, text: str, value: float) -> Number:
    return Number(name, kind, text, [({}, value)])


def _lines(number: Number) -> Iterator[str]:
    yield f"# HELP fedml_agent_{number.name} {number.help}\n"
    yield f"# TYPE fedml_agent_{number.name} {number.kind}\n"
    for labels, value in number.values:
        if value is None:  # the machine does not say
            continue
        inner = ",".join(f'{name}="{said.translate(_ESCAPED)}"' for name, said in labels.items())
        shown = f"{{{inner}}}" if inner else ""
        yield f"fedml_agent_{number.name}{shown} {float(value):.16g}\n"


def _write(file: Path, text: str) -> None:
    """Whole or not at all, under its name, readable for the exporter."""
    number, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(number, "w", encoding="utf-8") as new:
            new.write(text)
            os.fchmod(number, 0o644)
        Path(name).replace(file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
