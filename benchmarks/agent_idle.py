# SPDX-License-Identifier: Apache-2.0
"""What an agent costs that is logged in and has nothing to do.

    python benchmarks/agent_idle.py            # three minutes
    python benchmarks/agent_idle.py --quick    # one

A real agent process, connected over TLS, beats every ten seconds. Its CPU time is the kernel's
count for the process, in nanoseconds. PSS divides pages that other Python programs of this machine
have mapped too; alone, an agent has its resident set to itself, which is why that is shown beside
it.
"""

import time
from pathlib import Path

from deployment import Deployment, arguments, machine, memory_mb, scratch, table

MOST_MB, MOST_PERCENT = 50.0, 0.3
# Measured on another day: flower-supernode 1.41 with its executor.
RECORDED = ("198", "0.55")


def measure(folder: Path, seconds: float) -> tuple[float, float, float]:
    """PSS and RSS (MB) and percent of a core, over so many seconds of idleness."""
    with Deployment(folder, 1) as place:
        (pid,) = place.agent_pids
        place.hello()  # it is connected, and has done all that it does once
        time.sleep(5)
        cpu, began = cpu_s(pid), time.monotonic()
        time.sleep(seconds)
        took = time.monotonic() - began
        percent = 100 * (cpu_s(pid) - cpu) / took
        place.require_alive()
        return memory_mb(pid, "Pss"), memory_mb(pid, "Rss"), percent


def cpu_s(pid: int) -> float:
    """User and system seconds of a process and all its threads, the ended ones too."""
    return time.clock_gettime(~pid << 3 | 2)  # the kernel's name for another process's clock


def main() -> None:
    """Measure and print."""
    chosen = arguments(__doc__, "one minute")
    print(machine("paho-mqtt", "urllib3", "psutil"))
    with scratch() as folder:
        seconds = 50.0 if chosen.quick else 180.0
        pss, rss, percent = measure(folder / "place", seconds)
    print(f"\none agent, idle for {seconds:.0f} s, a heartbeat every 10 s")
    met = ["met" if good else "NOT MET" for good in (pss <= MOST_MB, percent <= MOST_PERCENT)]
    table(
        ("", "target", "measured", "", "idle flower-supernode, recorded"),
        [
            ("PSS, MB", f"<= {MOST_MB:.0f}", f"{pss:.1f}", met[0], RECORDED[0]),
            ("  resident set, MB", "", f"{rss:.1f}", "", ""),
            ("percent of a core", f"<= {MOST_PERCENT}", f"{percent:.2f}", met[1], RECORDED[1]),
        ],
    )


if __name__ == "__main__":
    main()
