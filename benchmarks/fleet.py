# SPDX-License-Identifier: Apache-2.0
"""A broker with ten thousand machines, simulated by `fedml-broker simulate-fleet`.

    python benchmarks/fleet.py            # three minutes, 10,000 machines
    python benchmarks/fleet.py --quick    # half a minute, 1,000 of them

Broker and machines are two processes on this machine, with real TLS, MQTT, signatures and
heartbeats every ten seconds; 200 tasks a second are asked for over HTTPS. CPU and memory are the
broker's. Times by the clock count what the simulation itself takes, which is shown.
"""

import json
import subprocess
from typing import Any

from deployment import arguments, command, machine, table

AGENTS, RATE = 10_000, 200
CONNECT_S, BEATS_CORE, RSS_MB, ACCEPT_MS = 30.0, 0.30, 600.0, 250.0


def measure(agents: int, rate: float, duration_s: float, heartbeat_s: float) -> dict[str, Any]:
    """The figures of one simulation."""
    words = [f"--agents={agents}", f"--tasks-per-second={rate}", f"--duration={duration_s}"]
    words += [f"--heartbeat={heartbeat_s}", "--json"]
    done = subprocess.run(
        command("fedml_broker", "simulate-fleet", *words), stdout=subprocess.PIPE, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    """Measure and print."""
    chosen = arguments(__doc__, "a tenth of the machines, a quarter of the tasks")
    print(machine("mqtt5", "aiohttp", "sqlalchemy", "cryptography"))
    agents, rate, duration_s, heartbeat_s = AGENTS, float(RATE), 60.0, 10.0
    if chosen.quick:
        # As many heartbeats and connections a second: only memory and the first row are smaller.
        agents, rate, duration_s, heartbeat_s = AGENTS // 10, RATE / 4, 10.0, 1.0
    found = measure(agents, rate, duration_s, heartbeat_s)
    part = agents / AGENTS
    beats = AGENTS / 10.0
    beats_core = found["beats_core"] * beats / found["beats_per_s"]
    rows = [
        ("connected, seconds", CONNECT_S * part, found["connect_s"], "{:.1f}"),
        ("  CPU of the broker, ms each", None, 1e3 * found["connect_cpu_s"] / agents, "{:.2f}"),
        (f"{beats:.0f} heartbeats a second, of a core", BEATS_CORE, beats_core, "{:.2f}"),
        ("submit to accept, p99, ms", ACCEPT_MS, found["accept_p99_ms"], "{:.0f}"),
        ("  median, ms", None, found["accept_p50_ms"], "{:.0f}"),
        ("  CPU of the broker, ms a task", None, _each_ms(found, rate), "{:.1f}"),
        ("memory of the broker, MB", RSS_MB, found["rss_mb"], "{:.0f}"),
        ("tasks that did not end well", 0, found["unfinished"], "{:.0f}"),
        ("the simulation itself, of a core", None, found["simulator_core"], "{:.2f}"),
    ]
    print(f"\n{agents} machines, {rate:g} tasks a second for {duration_s:g} s")
    table(
        ("", "target", "measured", ""),
        [
            (
                what,
                "" if most is None else f"<= {most:g}",
                form.format(value),
                "" if most is None else "met" if value <= most else "NOT MET",
            )
            for what, most, value, form in rows
        ],
    )
    for what, count in found["troubles"].items():
        print(f"{count} x {what}")


def _each_ms(found: dict[str, Any], rate: float) -> float:
    """CPU of a task: what is used with tasks, without what heartbeats alone use."""
    return 1e3 * (found["tasks_core"] - found["beats_core"]) / rate


if __name__ == "__main__":
    main()
