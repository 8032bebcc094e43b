# SPDX-License-Identifier: Apache-2.0
"""The mean of 100 updates of 1.66 M float32 against NumPy's own running sum, in the same run.

    python benchmarks/aggregation.py             # half a minute
    python benchmarks/aggregation.py --quick     # 20 updates, five seconds

NumPy's running sum is ``total += update`` over arrays in memory; into float64, which is the
accuracy that a mean of many needs, and into float32, which is as fast as memory can be read. Ours
also weighs, checks every value and rounds correctly. One thread, CPU seconds, median of alternating
runs. Memory: growth of the peak resident set of a fresh process that folds files of 20 and of 100
updates; in float32 models, result included.
"""

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before NumPy is imported: one core is measured

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from fedml.federate.aggregate import Fold, PartialSum, weighted_mean

# The FedAvg paper's CNN for MNIST: 1,663,370 parameters.
SHAPES = {
    "conv1.weight": (32, 1, 5, 5),
    "conv1.bias": (32,),
    "conv2.weight": (64, 32, 5, 5),
    "conv2.bias": (64,),
    "fc1.weight": (512, 3136),
    "fc1.bias": (512,),
    "fc2.weight": (10, 512),
    "fc2.bias": (10,),
}
MODEL_BYTES = 4 * sum(int(np.prod(shape)) for shape in SHAPES.values())


def update(k: int) -> dict[str, np.ndarray]:
    """Client k's update, the same in every process."""
    rng = np.random.default_rng(k)
    return {name: rng.standard_normal(s, dtype=np.float32) for name, s in SHAPES.items()}


def running_sum(updates: list[dict[str, np.ndarray]], dtype: type) -> None:
    total = {name: np.zeros(shape, dtype) for name, shape in SHAPES.items()}
    for one in updates:
        for name, array in one.items():
            total[name] += array


def fold_files(folder: str, count: int) -> None:
    """In a fresh process: fold files and print by how much the peak resident set grew."""
    # One file first, so that what NumPy and BLAS allocate once is not counted.
    warm = Fold()
    warm.add(0, f"{folder}/tiny", 1.0)
    warm.result()
    before = resident()
    fold = Fold()
    for k in range(count):
        fold.add(k, f"{folder}/{k}", k + 1.0)
    result = fold.result()
    grown = peak() - before
    print(json.dumps({"bytes": grown, "sum": float(result.arrays["fc2.bias"].sum())}))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def cpu(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def memory(folder: Path, count: int) -> float:
    """Models of growth in a fresh process."""
    command = [sys.executable, __file__, "--fold", str(folder), str(count)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout)["bytes"]) / MODEL_BYTES


def measure(count: int, rounds: int) -> None:
    updates = [update(k) for k in range(count)]
    weights = [float(w) for w in np.random.default_rng(0).integers(10, 600, count)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file({"w": np.ones(1, np.float32)}, folder / "tiny")
        for k, one in enumerate(updates):
            save_file(one, folder / str(k))

        def fold(sources: list[object], total: Fold | PartialSum) -> None:
            for k, source in enumerate(sources):
                total.add(k, source, weights[k])  # type: ignore[arg-type]
            total.result()

        files: list[object] = [folder / str(k) for k in range(count)]
        works: dict[str, Callable[[], object]] = {
            "numpy float64": lambda: running_sum(updates, np.float64),
            "numpy float32": lambda: running_sum(updates, np.float32),
            "mean, in memory": lambda: weighted_mean(updates, weights),
            "Fold, files": lambda: fold(files, Fold()),
            "PartialSum, files": lambda: fold(files, PartialSum()),
        }
        times: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(rounds):
            for name, work in works.items():
                times[name].append(cpu(work))
        took = {name: statistics.median(each) for name, each in times.items()}
        few, many = memory(folder, max(count // 5, 4)), memory(folder, count)

    print(f"{count} updates of {MODEL_BYTES / 4e6:.2f} M float32; {rounds} alternating rounds")
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()},")
    print(f"NumPy {np.__version__}, one thread\n")
    print(f"{'':24}{'CPU ms':>8}{'GB/s read':>11}{'of float64':>12}{'of float32':>12}")
    for name, seconds in took.items():
        speed = count * MODEL_BYTES / seconds / 1e9
        ratios = [took[f"numpy {kind}"] / seconds for kind in ("float64", "float32")]
        print(f"{name:24}{seconds * 1e3:8.0f}{speed:11.1f}{ratios[0]:12.2f}{ratios[1]:12.2f}")
    speed = took["numpy float64"] / took["mean, in memory"]
    print(f"\n{'target':44}{'measured':>10}")
    row("mean >= 0.5 of numpy's float64 running sum", speed, speed >= 0.5)
    row("peak memory <= 3 models, files", many, many <= 3)
    row("  ... whatever the number: growth from a fifth", many - few, many - few < 0.25)


def row(target: str, value: float, met: bool) -> None:
    print(f"{target:46}{value:8.2f}  {'met' if met else 'NOT MET'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="20 updates")
    parser.add_argument("--fold", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.fold:
        fold_files(arguments.fold[0], int(arguments.fold[1]))
    else:
        measure(20 if arguments.quick else 100, 3 if arguments.quick else 5)


if __name__ == "__main__":
    main()
