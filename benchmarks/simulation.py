# SPDX-License-Identifier: Apache-2.0
"""Simulated clients a second, against a bare loop of the same work in the same run.

    python benchmarks/simulation.py               # W1 and W2, some five minutes
    python benchmarks/simulation.py --quick       # fewer rounds
    python benchmarks/simulation.py --peers DIR   # beside pfl, FedML and Flower (DIR: gigabytes)
    python benchmarks/simulation.py --device cuda # both on a GPU, beside a plain loop there

W1: logistic regression 784 x 10, 1,000 clients with 60 examples, 10 a round, B = 10, lr 0.03.
W2: the FedAvg paper's CNN, 1,663,370 parameters, 100 clients with 100, 10 a round, B = 20, lr 0.1.
One local epoch, batches in stored order, so that everybody ends at the same model up to rounding:
the table shows how far apart.

The bare loop is what one would write for speed and nothing else, on one core with one thread: the
gradient in NumPy for W1, a fused torch loop in channels-last layout for W2. It has no processes,
no results file, no checks. Ours runs through `fedml.simulate` with a results file, on all cores.
Rates are of steady state, the first third of the rounds left out; CPU seconds are those of all
processes. Alternating runs, medians. Peers run in virtual environments of their own below DIR,
made when they are not there; one that cannot be installed is left out, and said so.

On a GPU both are torch modules, and the plain loop is that of W2: all examples lie there before it
begins, clients train one after the other, and the sum of a round stays there.
"""

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before NumPy is imported: a loop has one core
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

import numpy as np

WORK: dict[str, dict[str, Any]] = {
    "W1": {"clients": 1000, "each": 60, "rounds": 3000, "batch": 10, "lr": 0.03, "noise": 1.4},
    "W2": {"clients": 100, "each": 100, "rounds": 10, "batch": 20, "lr": 0.1, "noise": 1.0},
}
ON_GPU = {"W1": 300, "W2": 150}  # rounds
COHORT, CLASSES, SIDE = 10, 10, 28
PEERS = {
    "pfl": ["pfl[pytorch]"],
    "fedml": ["setuptools<81", "numpy<2", "fedml==0.9.6"],
    "flower": ["flwr[simulation]"],
}

APP = {
    "W1": """
import numpy as np
from fedml.federate.local_sgd import LocalSGD

X, Y = (np.load(f"W1_{n}.npy", mmap_mode="r") for n in "xy")

def model(config):
    return {"w": np.zeros((784, 10), np.float32), "b": np.zeros(10, np.float32)}

def data(client, config):
    return X[client.index], Y[client.index]

train = LocalSGD(shuffle=False)
""",
    "W2": """
import numpy as np
from torch import nn
from fedml import model as models
from fedml.federate.local_sgd import LocalSGD

X, Y = (np.load(f"W2_{n}.npy", mmap_mode="r") for n in "xy")

def model(config):
    return models.create("cnn", seed=7)

def data(client, config):
    return np.array(X[client.index])[:, None], np.array(Y[client.index])

train = LocalSGD(shuffle=False)
""",
}
# On a GPU, a dict of arrays will not do.
APP["W1-gpu"] = APP["W2"].replace("W2_", "W1_").replace('create("cnn"', 'create("linear"')
APP["W1-gpu"] = APP["W1-gpu"].replace("[:, None]", "")


def make_data(name: str) -> None:
    """Noisy class templates, one slice a client, in the current folder."""
    w = WORK[name]
    rng = np.random.default_rng(20260101)
    low = rng.normal(0.0, 1.0, (CLASSES, 7, 7)).astype(np.float32)
    templates = np.kron(low, np.ones((1, 4, 4), np.float32))
    shares = rng.dirichlet(np.full(CLASSES, 0.5), w["clients"])
    y = np.stack([rng.choice(CLASSES, w["each"], p=share) for share in shares]).astype(np.int64)
    x = templates[y] + rng.normal(0.0, w["noise"], (*y.shape, SIDE, SIDE)).astype(np.float32)
    np.save(f"{name}_x.npy", x.astype(np.float32))
    np.save(f"{name}_y.npy", y)


def plan(name: str, rounds: int, engine: str = "auto", device: str = "cpu") -> dict[str, Any]:
    """The run, as a run file has it."""
    w = WORK[name]
    beside = "-gpu" if name == "W1" and device != "cpu" else ""
    return {
        "app": f"{name.lower()}{beside}.py",
        "simulation": {"engine": engine, "device": device},
        "rounds": rounds,
        "config": {"lr": w["lr"], "batch_size": w["batch"]},
        "clients": {"count": w["clients"], "per_round": COHORT},
        "evaluate": {"devices": False, "central": False},
    }


def cohorts(name: str, rounds: int) -> list[list[int]]:
    """Who takes part, as the simulator draws it."""
    from fedml.federate.cohort import choose

    return [choose(0, r, range(WORK[name]["clients"]), COHORT) for r in range(rounds)]


class Clock:
    """Wall and CPU seconds after each round, of this process and its children."""

    def __init__(self) -> None:
        import psutil

        self._own = psutil.Process()
        self.began = time.time()
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self._seen = 0

    def tick(self, last: bool, steady: bool) -> None:
        self.wall.append(time.perf_counter())
        if last or (steady and not self.cpu):
            everyone = [self._own, *self._own.children(recursive=True)]
            self.cpu.append(sum(sum(p.cpu_times()[:2]) for p in everyone))

    def report(self, rounds: int, **more: Any) -> None:
        skip = rounds // 3
        clients = (rounds - 1 - skip) * COHORT
        wall = self.wall[-1] - self.wall[skip]
        cpu = self.cpu[-1] - self.cpu[0]
        said = json.dumps({"per_s": clients / wall, "cpu_ms": cpu / clients * 1e3, **more})
        # Not by `print`: FedML puts a logger in its place.
        os.write(1, f"\n{said}\n".encode())


def ours(name: str, rounds: int, engine: str = "auto", device: str = "cpu") -> None:
    """In a process of its own: through the front door."""
    started = time.time()
    from fedml.simulation import simulate

    clock = Clock()
    first: list[float] = []

    def heard(round_: Any) -> None:
        if not first:
            first.append(time.time() - started)
        clock.tick(round_.number == rounds, round_.number > rounds // 3)

    with tempfile.TemporaryDirectory() as out:
        result = simulate(plan(name, rounds, engine, device), out=out, on_round=heard)
    weight = max(result.model.values(), key=lambda array: array.size)
    clock.report(rounds, engine=result.engine, first_s=first[0], norm=_norm(weight))


def bare_w1(rounds: int) -> None:
    """Softmax regression, the gradient written out; the weights stay in the cache."""
    w = WORK["W1"]
    x = np.load("W1_x.npy").reshape(w["clients"], w["each"], -1)
    y, lr, batch = np.load("W1_y.npy"), w["lr"], w["batch"]
    weight, bias = np.zeros((784, 10), np.float32), np.zeros(10, np.float32)
    rows = np.arange(batch)
    plans = cohorts("W1", rounds)
    clock = Clock()
    for r, clients in enumerate(plans):
        sum_w, sum_b = np.zeros_like(weight), np.zeros_like(bias)
        for k in clients:
            u, c = weight.copy(), bias.copy()
            for start in range(0, w["each"], batch):
                xb, yb = x[k, start : start + batch], y[k, start : start + batch]
                z = xb @ u + c
                z -= z.max(1, keepdims=True)
                np.exp(z, out=z)
                z /= z.sum(1, keepdims=True)
                z[rows, yb] -= 1
                z *= lr / batch
                u -= xb.T @ z
                c -= z.sum(0)
            sum_w += u
            sum_b += c
        weight, bias = sum_w / COHORT, sum_b / COHORT
        clock.tick(r == rounds - 1, r >= rounds // 3)
    clock.report(rounds, norm=_norm(weight))


def bare_w2(rounds: int) -> None:
    """The CNN in channels-last layout, fused steps, weights put back in place."""
    import torch
    from torch.nn.functional import cross_entropy

    from fedml import model as models

    torch.set_num_threads(1)
    w = WORK["W2"]
    x = torch.from_numpy(np.load("W2_x.npy"))[:, :, None]
    y, lr, batch = torch.from_numpy(np.load("W2_y.npy")), w["lr"], w["batch"]
    net = models.create("cnn", seed=7).to(memory_format=torch.channels_last)
    ps = list(net.parameters())
    at = [p.detach() for p in ps]
    model = [p.clone() for p in at]
    plans = cohorts("W2", rounds)
    clock = Clock()
    for r, clients in enumerate(plans):
        total = [torch.zeros_like(m) for m in model]
        for k in clients:
            torch._foreach_copy_(at, model)
            for start in range(0, w["each"], batch):
                xb = x[k, start : start + batch].contiguous(memory_format=torch.channels_last)
                loss = cross_entropy(net(xb), y[k, start : start + batch])
                torch._foreach_add_(at, torch.autograd.grad(loss, ps), alpha=-lr)
            torch._foreach_add_(total, at)
        model = [t / COHORT for t in total]
        clock.tick(r == rounds - 1, r >= rounds // 3)
    weight = max(model, key=lambda tensor: tensor.numel()).numpy()
    clock.report(rounds, norm=_norm(weight))


def bare_on(name: str, rounds: int, device: str) -> None:
    """Either on a GPU, client after client: nothing but the model's first weights moves."""
    import torch
    from torch.nn.functional import cross_entropy

    from fedml import model as models

    w = WORK[name]
    shape = (1, SIDE, SIDE) if name == "W2" else (SIDE, SIDE)
    x = torch.from_numpy(np.load(f"{name}_x.npy")).to(device)
    x = x.reshape(w["clients"], w["each"], *shape)
    y, lr, batch = torch.from_numpy(np.load(f"{name}_y.npy")).to(device), w["lr"], w["batch"]
    net = models.create("cnn" if name == "W2" else "linear", seed=7).to(device)
    ps = list(net.parameters())
    at = [p.detach() for p in ps]
    model = [p.clone() for p in at]
    plans = cohorts(name, rounds)
    clock = Clock()
    for r, clients in enumerate(plans):
        total = [torch.zeros_like(m) for m in model]
        for k in clients:
            torch._foreach_copy_(at, model)
            for start in range(0, w["each"], batch):
                loss = cross_entropy(net(x[k, start : start + batch]), y[k, start : start + batch])
                torch._foreach_add_(at, torch.autograd.grad(loss, ps), alpha=-lr)
            torch._foreach_add_(total, at)
        model = [t / COHORT for t in total]
        torch.cuda.synchronize()
        clock.tick(r == rounds - 1, r >= rounds // 3)
    weight = max(model, key=lambda tensor: tensor.numel())
    clock.report(rounds, norm=_norm(weight.cpu()))


def _norm(array: Any) -> float:
    return float(np.linalg.norm(np.asarray(array, np.float64)))


def start(
    role: str, name: str, rounds: int, folder: Path, engine: str = "auto", device: str = "cpu"
) -> "subprocess.Popen[str]":
    """A role in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--device", device]
    command += ["--role", role, name, str(rounds), engine]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)


def end(process: "subprocess.Popen[str]") -> dict[str, Any]:
    """What it measured."""
    out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{process.args} failed")
    return reported(out)


def reported(out: str) -> dict[str, Any]:
    """What `Clock.report` said, among whatever else was."""
    line = next(line for line in reversed(out.splitlines()) if line.startswith('{"per_s"'))
    found: dict[str, Any] = json.loads(line)
    return found


def measure(name: str, rounds: int, times: int, folder: Path) -> float:
    """One workload, and its table; our clients a second."""
    cores = len(os.sched_getaffinity(0))
    found: dict[str, list[dict[str, Any]]] = {"bare": [], "every core": [], "ours": []}
    for _ in range(times):
        found["bare"].append(end(start("bare", name, rounds, folder)))
        # What this machine gives to as many bare loops as it has cores, at this time.
        beside = [end(p) for p in [start("bare", name, rounds, folder) for _ in range(cores)]]
        found["every core"].append({**beside[0], "per_s": sum(each["per_s"] for each in beside)})
        found["ours"].append(end(start("ours", name, rounds, folder)))

    def middle(role: str, what: str) -> float:
        return statistics.median(each[what] for each in found[role])

    def of(other: str, by: float) -> float:
        pairs = zip(found["ours"], found[other], strict=True)
        return statistics.median(o["per_s"] / b["per_s"] / by for o, b in pairs)

    print(f"\n{name}: {COHORT} of {WORK[name]['clients']} clients, {rounds} rounds, {times} times")
    print(f"{'':34}{'clients/s':>11}{'CPU ms a client':>17}{'|weights|':>12}")
    labels = {
        "bare": "bare loop, one core",
        "every core": f"{cores} bare loops side by side",
        "ours": f"ours ({found['ours'][0]['engine']}, {cores} cores)",
    }
    for role, text in labels.items():
        rate, cpu = middle(role, "per_s"), middle(role, "cpu_ms")
        print(f"{text:34}{rate:11.1f}{cpu:17.3f}{middle(role, 'norm'):12.6f}")
    goal = 0.8 if name == "W1" else 0.9
    row(f"of one bare loop x {cores} cores, >= {goal}", of("bare", cores), goal)
    row(f"of {cores} bare loops side by side, >= {goal}", of("every core", 1), goal)
    cpu = middle("bare", "cpu_ms") / middle("ours", "cpu_ms")
    row(f"of a bare loop's work a CPU second, >= {goal}", cpu, goal)
    first = middle("ours", "first_s")
    print(f"  {'seconds until round 1 is over, <= 2 (W1)':52}{first:8.2f}")
    return middle("ours", "per_s")


def measure_on(device: str, name: str, rounds: int, times: int, folder: Path) -> None:
    """One workload on a GPU, by each engine, beside a plain loop there."""
    roles = {"bare": "auto", "one by one": "inplace", "side by side": "stacked"}
    found: dict[str, list[dict[str, Any]]] = {role: [] for role in roles}
    for _ in range(times):
        for role, engine in roles.items():
            kind = "bare" if role == "bare" else "ours"
            found[role].append(end(start(kind, name, rounds, folder, engine, device)))
    print(f"\n{name} on {device}: {COHORT} of {WORK[name]['clients']} clients, ", end="")
    print(f"{rounds} rounds, {times} times")
    print(f"{'':34}{'clients/s':>11}{'of the loop':>13}{'CPU ms a client':>17}{'|weights|':>12}")
    for role, engine in roles.items():
        one = {k: statistics.median(f[k] for f in found[role]) for k in ("per_s", "cpu_ms", "norm")}
        ratio = statistics.median(
            ours["per_s"] / bare["per_s"]
            for ours, bare in zip(found[role], found["bare"], strict=True)
        )
        label = "plain loop" if role == "bare" else f"ours, {engine}"
        print(
            f"{label:34}{one['per_s']:11.1f}{ratio:13.2f}{one['cpu_ms']:17.3f}{one['norm']:12.6f}"
        )


def peer_python(peer: str, packages: list[str], folder: Path) -> Path | None:
    """The interpreter of a peer's own environment, made if need be; None if it cannot be."""
    home = folder / peer
    python = home / "bin" / "python"
    if (home / "whole").exists():
        return python
    venv.create(home, with_pip=True, clear=True)
    # torch is large and the same for all: what they do not bring is found in this environment.
    here = Path(np.__file__).parents[1]
    (here_file,) = home.glob("lib/python*/site-packages")
    (here_file / "shared.pth").write_text(f"{here}\n")
    command = [str(python), "-m", "pip", "install", "-q", *packages]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"  {peer} cannot be installed here: {done.stderr.splitlines()[-1]}")
        return None
    (home / "whole").touch()
    return python


def beside_peers(name: str, rate: float, rounds: int, folder: Path, environments: Path) -> None:
    """The other simulators on one workload, one run each."""
    script = Path(__file__).with_name("simulation_peers.py")
    for peer, packages in PEERS.items():
        python = peer_python(peer, packages, environments)
        if python is None:
            continue
        command = [str(python), str(script), peer, name, str(rounds)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            print(f"  {peer} failed: {done.stderr.splitlines()[-1:]}")
            continue
        found = reported(done.stdout)
        times = rate / found["per_s"]
        print(f"{peer:34}{found['per_s']:11.1f}{found['cpu_ms']:17.3f}   ours: {times:.1f} x")


def row(what: str, value: float, goal: float) -> None:
    print(f"  {what:52}{value:8.2f}  {'ok' if value >= goal else 'missed'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=WORK)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--peers", type=Path, metavar="DIR")
    parser.add_argument("--device", default="cpu", help="cpu, or a GPU: cuda, cuda:N")
    parser.add_argument("--role", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        role, name, rounds, engine = args.role
        if role == "ours":
            ours(name, int(rounds), engine, args.device)
        elif args.device != "cpu":
            bare_on(name, int(rounds), args.device)
        else:
            {"W1": bare_w1, "W2": bare_w2}[name](int(rounds))
        return
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()},")
    print(f"NumPy {np.__version__}")
    peers = None if args.peers is None else args.peers.resolve()
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        os.chdir(folder)
        for name in [args.only] if args.only else WORK:
            make_data(name)
            for app, text in APP.items():
                (folder / f"{app.lower()}.py").write_text(text)
            rounds = WORK[name]["rounds"] // (3 if args.quick else 1)
            if args.device != "cpu":
                rounds = ON_GPU[name] // (3 if args.quick else 1)
                measure_on(args.device, name, rounds, 2 if args.quick else args.times, folder)
                continue
            rate = measure(name, rounds, 2 if args.quick else args.times, folder)
            if peers is not None:
                beside_peers(name, rate, 100 if name == "W1" else 5, folder, peers)


if __name__ == "__main__":
    main()
