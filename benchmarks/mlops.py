# SPDX-License-Identifier: Apache-2.0
"""What one call of `fedml.mlops` costs the loop that makes it, in CPU time of its process.

    python benchmarks/mlops.py

The lines go to a file in a temporary directory, as in a task; nobody reads them meanwhile. Beside
it stands the same line encoded by `json` and written by `print` into a file that is flushed.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from fedml import mlops
from fedml_protocol.records import ENV

CALLS = 50_000


def _us(work: Callable[[int], object]) -> float:
    """Microseconds of CPU for each call, user and system; the best of three."""
    best = float("inf")
    for _ in range(3):
        began = time.process_time()
        for n in range(CALLS):
            work(n)
        best = min(best, (time.process_time() - began) / CALLS * 1e6)
    return best


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {ENV: f"{folder}/mlops", "LOCAL_RANK": "1"}
        ten = {f"m{n}": n / 7 for n in range(10)}
        with (Path(folder) / "plain").open("w") as plain:
            found = {
                "mlops.log, 1 metric": _us(lambda n: mlops.log({"loss": 0.1}, step=n)),
                "mlops.log, 10 metrics": _us(lambda n: mlops.log(ten, step=n)),
                "print(json.dumps(…), flush=True)": _us(
                    lambda n: print(json.dumps({"step": n, "loss": 0.1}), file=plain, flush=True)
                ),
                "a dict and a lambda": _us(lambda n: {"loss": 0.1}),
            }
        mlops.finish()
    for name, us in found.items():
        print(f"{name:<34} {us:6.1f} µs of CPU")


if __name__ == "__main__":
    main()
