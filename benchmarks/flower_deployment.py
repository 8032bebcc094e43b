# SPDX-License-Identifier: Apache-2.0
"""No benchmark, but a peer: Flower's deployment (SuperLink, SuperNodes), TLS, loopback.

    flower = Flower(folder)                    # installs it into a virtual environment there
    flower.rounds(clients=10, mb=0.1, count=3)

The application is what Flower's own documentation shows, FedAvg with clients that answer at once;
each shifts the model by its number, since equal replies would travel once only. Flower checks for
updates and reports usage unless told not to: it is told not to.
"""

import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil

from fedml_broker.identity import Identity

VERSION = "1.41.0"
FLOWER = f"Flower {VERSION}"
_AT_ONCE = 5  # SuperNodes that start

_PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "roundtrip"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "bench"

[tool.flwr.app.components]
serverapp = "rt.server:app"
clientapp = "rt.client:app"

[tool.flwr.app.config]
values = 25000
rounds = 3
nodes = 2
out = ""
"""

_CLIENT = """
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

@app.train()
def train(message: Message, context: Context) -> Message:
    shift = float(context.node_config["partition-id"]) + 1.0
    arrays = [a + shift for a in message.content["arrays"].to_numpy_ndarrays()]
    content = {"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": 1})}
    return Message(RecordDict(content), reply_to=message)
"""

_SERVER = """
import json
import time

import numpy as np
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()

class Timed(FedAvg):
    ends = []

    def aggregate_train(self, server_round, replies):
        made = super().aggregate_train(server_round, replies)
        self.ends.append(time.monotonic())
        return made

@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    nodes, values = int(config["nodes"]), int(config["values"])
    rng = np.random.default_rng(1)
    arrays = [rng.random(values // 10, dtype=np.float32) for _ in range(10)]
    strategy = Timed(
        fraction_train=1.0,
        fraction_evaluate=0.0,
        min_train_nodes=nodes,
        min_available_nodes=nodes,
    )
    strategy.ends.append(time.monotonic())
    rounds = int(config["rounds"])
    strategy.start(grid=grid, initial_arrays=ArrayRecord(arrays), num_rounds=rounds, timeout=600)
    with open(str(config["out"]), "w") as file:
        json.dump(strategy.ends, file)
"""


@dataclass(frozen=True, kw_only=True)
class FlowerRounds:
    """What its rounds took: all gaps, and CPU seconds a round over all its processes."""

    gaps_s: Sequence[float]
    cpu_s: float

    @property
    def median_s(self) -> float:
        """Of the gaps."""
        return statistics.median(self.gaps_s)


class Flower:
    """One installation; each measurement is a deployment of its own.

    Args:
        folder: For its virtual environment and all that it writes.
        most: Nodes that it is to be measured with.
    """

    def __init__(self, folder: Path, *, most: int = 50) -> None:
        self.most = most
        self._bin = folder / "venv" / "bin"
        self._app = folder / "app"
        self._folder = folder
        subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
        pip = [str(self._bin / "pip"), "install", "-q", f"flwr=={VERSION}", "numpy"]
        done = subprocess.run(pip, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (self._app / "rt").mkdir(parents=True)
        (self._app / "pyproject.toml").write_text(_PROJECT)
        (self._app / "rt" / "__init__.py").touch()
        (self._app / "rt" / "client.py").write_text(_CLIENT)
        (self._app / "rt" / "server.py").write_text(_SERVER)
        self._identity = Identity.open(folder / "identity", names=["localhost"])

    def rounds(self, clients: int, mb: float, count: int) -> FlowerRounds:
        """So many rounds with so many SuperNodes.

        Raises:
            TimeoutError: It did not come up, or did not finish.
        """
        home = self._folder / f"home-{clients}-{mb}"
        home.mkdir()
        port = 18_000
        connection = f'address = "localhost:{port}"\nroot-certificates = "{self._identity.ca_file}"'
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "bench"\n\n[superlink.bench]\n{connection}\n'
        )
        with ExitStack() as stack:
            tree = stack.enter_context(_Tree(home, self._bin))
            certificate, key = self._identity.server_files
            link = ["--host", "127.0.0.1", "--port", str(port), "--isolation", "subprocess"]
            link += ["--disable-runtime-dependency-installation"]
            link += ["--ssl-ca-certfile", str(self._identity.ca_file)]
            link += ["--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)]
            tree.start("superlink", "flower-superlink", *link)
            tree.wait("superlink", "startup complete", 90)
            for n in range(clients):
                node = ["--superlink", f"localhost:{port}", "--port", str(port + 100 + n)]
                node += ["--root-certificates", str(self._identity.ca_file)]
                node += ["--node-config", f"partition-id={n} num-partitions={clients}"]
                tree.start(f"node-{n}", "flower-supernode", *node)
                # A few at a time: fifty at once find the SuperLink so busy that they give up.
                if n % _AT_ONCE == _AT_ONCE - 1 or n == clients - 1:
                    for started in range(n - n % _AT_ONCE, n + 1):
                        tree.wait(f"node-{started}", "SuperNode ID", 120)
            return self._run(tree, home, clients, int(mb * 1e6 / 4), count)

    def _run(
        self, tree: "_Tree", home: Path, clients: int, values: int, count: int
    ) -> FlowerRounds:
        out = home / "ends.json"
        settings = {"nodes": clients, "values": values, "rounds": count, "out": str(out)}
        text = " ".join(f"{name}={json.dumps(value)}" for name, value in settings.items())
        before = tree.cpu_s()
        tree.call("flwr", "run", str(self._app), "bench", "-c", text)
        limit = time.monotonic() + 200 * count
        while not out.exists() or not out.read_text():
            if time.monotonic() > limit:
                raise TimeoutError(f"{FLOWER} did not finish; see {home}")
            tree.cpu_s()  # its processes live for one message: each must be seen before it goes
            time.sleep(0.2)
        ends = json.loads(out.read_text())
        gaps = [end - begin for begin, end in itertools.pairwise(ends)]
        return FlowerRounds(gaps_s=gaps, cpu_s=(tree.cpu_s() - before) / count)


class _Tree:
    """Its processes and theirs."""

    def __init__(self, home: Path, binaries: Path) -> None:
        self._home = home
        self._bin = binaries
        self._running: list[psutil.Popen] = []
        self._seen: dict[tuple[int, float], float] = {}
        self._env = {
            **{k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")},
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PYTHONUNBUFFERED": "1",
            "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        }

    def __enter__(self) -> "_Tree":
        return self

    def __exit__(self, *_: object) -> None:
        every = [p for root in self._running for p in (root, *self._children(root))]
        for process in every:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(every, timeout=10)

    def start(self, name: str, program: str, *words: str) -> None:
        with (self._home / f"{name}.log").open("w") as log:
            self._running.append(
                psutil.Popen(
                    [str(self._bin / program), *words],
                    env=self._env,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=self._home,
                )
            )

    def call(self, program: str, *words: str) -> None:
        done = subprocess.run(
            [self._bin / program, *words], env=self._env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def wait(self, name: str, text: str, seconds: float) -> None:
        log = self._home / f"{name}.log"
        limit = time.monotonic() + seconds
        while text.lower() not in log.read_text(errors="replace").lower():
            if time.monotonic() > limit:
                raise TimeoutError(f"{name} did not come up:\n{log.read_text()[-2000:]}")
            time.sleep(0.2)

    def cpu_s(self) -> float:
        """Seconds of every process seen so far, as last seen."""
        for root in self._running:
            for process in (root, *self._children(root)):
                try:
                    times = process.cpu_times()
                    self._seen[process.pid, process.create_time()] = times.user + times.system
                except psutil.NoSuchProcess:
                    continue
        return sum(self._seen.values())

    @staticmethod
    def _children(root: psutil.Process) -> list[psutil.Process]:
        try:
            found: list[psutil.Process] = root.children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        return found
