# SPDX-License-Identifier: Apache-2.0
"""Robust rules on 100 updates of 1.66 M float32, one core.

    python benchmarks/robust_rules.py             # under a minute
    python benchmarks/robust_rules.py --quick     # 20 updates

Updates lie in memory and are checked for NaN beforehand, as they are when they arrive; a rule's
time is that of `result`. One thread, CPU seconds, median. Beside them, what the obvious NumPy line
takes in the same run, where it fits in memory.
"""

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before NumPy is imported: one core is measured

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np

from fedml.protect.robust import (
    GeometricMedian,
    Krum,
    Median,
    NearestNeighbours,
    RobustFold,
    TrimmedMean,
)

SIZE = 1_663_370


def cpu(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def measure(count: int, rounds: int) -> None:
    updates = [
        np.random.default_rng(k).standard_normal(SIZE, dtype=np.float32) for k in range(count)
    ]
    f = count // 5
    rules: dict[str, tuple[object, list[object], float | None]] = {
        "Krum": (Krum(f), [], 0.5),
        "median": (Median(), [], 2.5),
        "geometric median": (GeometricMedian(), [], 2.5),
        "trimmed mean": (TrimmedMean(f), [], None),
        "NNM + trimmed mean": (TrimmedMean(f), [NearestNeighbours(f)], None),
    }

    def prepared(rule: object, mixing: list[object]) -> RobustFold:
        fold = RobustFold(rule, mixing=mixing)  # type: ignore[arg-type]
        for k, one in enumerate(updates):
            fold.add(k, {"w": one})
        return fold

    took: dict[str, float] = {}
    for name, (rule, mixing, _) in rules.items():
        took[name] = statistics.median(cpu(prepared(rule, mixing).result) for _ in range(rounds))
    stack = np.stack(updates)
    plain = cpu(lambda: np.median(stack, axis=0))

    print(f"{count} updates of {SIZE / 1e6:.2f} M float32, median of {rounds}")
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()},")
    print(f"NumPy {np.__version__}, one thread\n")
    print(f"{'':24}{'CPU s':>8}{'target':>10}")
    for name, (_, _, target) in rules.items():
        if target is None:
            print(f"{name:24}{took[name]:8.2f}")
        else:
            verdict = "met" if took[name] <= target else "NOT MET"
            print(f"{name:24}{took[name]:8.2f}{f'<= {target}':>10}  {verdict}")
    print(f"{'np.median(stack)':24}{plain:8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="20 updates")
    arguments = parser.parse_args()
    measure(20 if arguments.quick else 100, 3)


if __name__ == "__main__":
    main()
