# SPDX-License-Identifier: Apache-2.0
"""No benchmark, but what the deployed ones stand on: a broker and its agents, and what they cost.

    with Deployment(folder, agents=10) as place:
        run = place.federate(app, rounds=20, clients={"count": 10})
        for item in place.client.follow(run): ...
        place.cpu_s(), place.pss_mb()

Real processes, TLS, loopback, each in a home of its own below the folder. Everything that runs
there is counted under what it is: broker, aggregator, agent, shim (with its guard), worker.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import psutil

from fedml import session
from fedml.client import Client
from fedml.parts import send

_HZ = os.sysconf("SC_CLK_TCK")


def command(package: str, *words: str) -> list[str]:
    """One of our commands, run by this Python."""
    return [sys.executable, "-c", f"from {package}.cli import main; main()", *words]


class Deployment:
    """A broker with so many agents that are logged in, run, and have been heard of."""

    def __init__(self, folder: Path, agents: int) -> None:
        self.folder = folder
        self.client: Client
        self._count = agents
        self._running: list[subprocess.Popen[str]] = []
        self._names: dict[int, str] = {}

    @property
    def user_home(self) -> Path:
        """Where the person who asks for runs is logged in."""
        return self.folder / "me"

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # The broker first: so no session is closed one by one, and what is left is ended below.
        for process in self._running:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        left = [psutil.Process(pid) for pid in self._shims()]
        for shim in left:
            shim.kill()
        psutil.wait_procs(left, timeout=10)

    def _start(self) -> None:
        words = command("fedml_broker", "up", "--https-port=0", "--mqtt-port=0", "--json")
        broker = self._run(words, "broker")
        assert broker.stdout is not None
        line = broker.stdout.readline()
        if not line:
            broker.wait()
            self.require_alive()
        told = json.loads(line)
        admin = Path(told["admin_key_file"]).read_text()
        self.client = Client(session.login(self.user_home, admin))
        key = self.client.call("POST", "/v1/keys", {"uses": self._count})["key"]
        names = [f"agent-{n:02}" for n in range(self._count)]
        for name in names:
            login = command("fedml_agent", "login", key, "--name", name)
            done = subprocess.run(login, env=self._env(name), capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            self._run(command("fedml_agent", "run"), name)

    def _run(self, words: list[str], name: str) -> "subprocess.Popen[str]":
        self.folder.mkdir(exist_ok=True)
        with (self.folder / f"{name}.log").open("w") as log:
            process = subprocess.Popen(
                words, env=self._env(name), stdout=subprocess.PIPE, stderr=log, text=True
            )
        self._running.append(process)
        self._names[process.pid] = name
        return process

    def _env(self, name: str) -> dict[str, str]:
        return {**os.environ, "FEDML_HOME": str(self.folder / name)}

    def require_alive(self) -> None:
        """Raise, with its last words, if a process has ended that should serve."""
        for process in self._running:
            if process.poll() is not None:
                name = self._names[process.pid]
                log = (self.folder / f"{name}.log").read_text()
                raise RuntimeError(f"{name} ended with {process.returncode}:\n{log[-3000:]}")

    # ------------------------------------------------------------------ runs

    def federate(self, app: str, **request: Any) -> str:
        """Submit a federated run of one file of Python; its id."""
        folder = self.folder / "app"
        folder.mkdir(exist_ok=True)
        (folder / "app.py").write_text(app)
        package = send(self.client, folder, cache=self.folder / "cache")
        asked = {"app": "app.py", "package": package, **request}
        return str(self.client.call("POST", "/v1/federate", asked)["run"])

    def hello(self) -> None:
        """Run one job to its end: the first waits until an agent is connected."""
        run = self.client.call("POST", "/v1/launch", {"command": "echo hello"})["run"]
        for item in self.client.follow(run):
            self.require_alive()
            if "end" in item:
                assert item["end"]["state"] == "FINISHED", item["end"]["cause"]

    # ------------------------------------------------------------------ what it costs

    def processes(self) -> dict[str, list[int]]:
        """The living processes of the deployment, by what they are."""
        found: dict[str, list[int]] = defaultdict(list)
        for process in self._running:
            role = "broker" if process is self._running[0] else "agent"
            found[role].append(process.pid)
        parents = _parents()
        found["aggregator"] = [p for p, up in parents.items() if up == self._running[0].pid]
        shims = self._shims()
        found["shim"] = sorted(shims)
        found["worker"] = [p for p in _descendants(shims, parents) if p not in shims]
        return found

    def cpu_s(self) -> dict[str, float]:
        """User and system seconds of the living processes so far, by what they are."""
        return {role: sum(_cpu_s(pid) for pid in pids) for role, pids in self.processes().items()}

    def pss_mb(self) -> dict[str, float]:
        """Proportional set size (10^6 bytes) of the living processes, by what they are."""
        return {
            role: sum(memory_mb(pid, "Pss") for pid in pids)
            for role, pids in self.processes().items()
        }

    def metrics(self) -> list[str]:
        """The broker's page for Prometheus."""
        page: bytes = self.client._ask("GET", "/metrics", None, {}).data
        return page.decode().splitlines()

    @property
    def broker_pid(self) -> int:
        """The broker's process."""
        return self._running[0].pid

    @property
    def agent_pids(self) -> list[int]:
        """The agents' processes."""
        return [process.pid for process in self._running[1:]]

    def _shims(self) -> set[int]:
        """Shims and guards: started by agents, and nobody's children since."""
        found = set()
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or ()
            if any(word.startswith(f"{self.folder}/") for word in words):
                found.add(process.pid)
        return found - {process.pid for process in self._running}


class Watch:
    """The largest proportional set size of one process, looked at a few times a second."""

    def __init__(self, pid: int) -> None:
        self.peak_mb = 0.0
        self._pid = pid
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.2):
            self.peak_mb = max(self.peak_mb, memory_mb(self._pid, "Pss"))


def memory_mb(pid: int, kind: str) -> float:
    """A process's "Pss" or "Rss", 10^6 bytes; 0 for one that is gone."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(f"{kind}:"):
                return int(line.split()[1]) * 1024 / 1e6
    except OSError:
        pass
    return 0.0


def cpu_of(pids: Iterable[int]) -> float:
    """User and system seconds of some processes, their dead and reaped children's included."""
    return sum(_cpu_s(pid, children=True) for pid in pids)


def _cpu_s(pid: int, *, children: bool = False) -> float:
    fields = _stat(pid)
    if fields is None:
        return 0.0
    return sum(int(ticks) for ticks in fields[11 : 15 if children else 13]) / _HZ


def _stat(pid: int) -> list[str] | None:
    """What follows the command's name in /proc/PID/stat; the state is field 0, ppid field 1."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _parents() -> dict[int, int]:
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (fields := _stat(int(folder.name))) is not None:
            found[int(folder.name)] = int(fields[1])
    return found


def _descendants(roots: Iterable[int], parents: Mapping[int, int]) -> Iterator[int]:
    children: dict[int, list[int]] = defaultdict(list)
    for pid, parent in parents.items():
        children[parent].append(pid)
    todo = list(roots)
    while todo:
        for child in children[todo.pop()]:
            yield child
            todo.append(child)


# --- the frame of a benchmark -------------------------------------------------------------------


def arguments(doc: str, quick: str, **options: str) -> argparse.Namespace:
    """The command line: `--quick`, and switches by name with their help."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=quick)
    for name, text in options.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    return parser.parse_args()


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder that goes with the benchmark. What is big in it goes to the real disk."""
    with tempfile.TemporaryDirectory(prefix="fedml-bench-", ignore_cleanup_errors=True) as name:
        yield Path(name).resolve()


class Foreign:
    """How many cores other processes kept busy meanwhile: a measurement beside them is no limit."""

    def __init__(self) -> None:
        self._began = self._now()

    def cores(self, ours_s: float, wall_s: float) -> float:
        """Cores, on average, given what was ours."""
        return max(0.0, self._now() - self._began - ours_s) / wall_s

    @staticmethod
    def _now() -> float:
        times = psutil.cpu_times()
        return float(times.user + times.nice + times.system + times.irq + times.softirq)


def machine(*packages: str) -> str:
    """Machine and versions, two lines."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    model = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(": ")[2]
            break
    gb = psutil.virtual_memory().total / 1e9
    return (
        f"{platform.platform()}, {os.cpu_count()} cores ({model}), {gb:.0f} GB,\n"
        f"Python {platform.python_version()}, {versions}"
    )


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    """Print rows: the first column to the left, the others to the right."""
    every = [head, *rows]
    widths = [max(len(row[i]) for row in every) for i in range(len(head))]
    for row in every:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join(cells).rstrip())
