# SPDX-License-Identifier: Apache-2.0
"""From submitting a hello job to its first line of output, with an agent that is there already.

    python benchmarks/first_line.py            # a hundred times each, a minute
    python benchmarks/first_line.py --quick    # fifteen times each

From the API: the call that submits, until the first piece of log has come back over the stream of
the run. From the command: `fedml launch job.yaml` typed, until its first line is on the terminal's
side of the pipe; that includes the start of Python and the imports, which are measured apart by
`fedml launch --help`. One job at a time; the shell, the sandbox and TLS are the real ones.
"""

import os
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from deployment import Deployment, arguments, command, machine, scratch, table

LIMIT_S = 0.5


def from_api(place: Deployment) -> float:
    """Seconds of one job."""
    began = time.perf_counter()
    run = place.client.call("POST", "/v1/launch", {"command": "echo hello", "follow": True})["run"]
    took = 0.0
    for item in place.client.follow(run):
        if "log" in item and not took:
            took = time.perf_counter() - began
        if "end" in item:
            assert item["end"]["state"] == "FINISHED", item["end"]["cause"]
    assert took, "the job wrote nothing"
    return took


def from_command(place: Deployment, job: Path) -> float:
    """Seconds of one job, typed."""
    began = time.perf_counter()
    with _fedml(place, "launch", str(job)) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        took = time.perf_counter() - began
        assert line == "hello\n", line
    assert process.returncode == 0
    return took


def process_start(place: Deployment) -> float:
    """Seconds until the command has told how it is used: what Python and its imports take."""
    began = time.perf_counter()
    with _fedml(place, "launch", "--help") as process:
        assert process.stdout is not None
        process.stdout.read()
    return time.perf_counter() - began


def _fedml(place: Deployment, *words: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command("fedml", *words),
        env={**os.environ, "FEDML_HOME": str(place.user_home)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def main() -> None:
    """Measure and print."""
    chosen = arguments(__doc__, "fewer jobs")
    count = 15 if chosen.quick else 100
    print(machine("aiohttp", "urllib3", "click"))
    with scratch() as folder, Deployment(folder / "place", 1) as place:
        job = folder / "job.yaml"
        job.write_text("job: echo hello\n")
        place.hello()
        api, typed, starts = list[float](), list[float](), list[float]()
        for _ in range(count):  # alternating: what disturbs one disturbs all
            api.append(from_api(place))
            typed.append(from_command(place, job))
            starts.append(process_start(place))
    print(f"\nsubmit to first line, {count} jobs each, ms")
    table(
        ("", "target", "median", "p95", "most", ""),
        [
            _row("from the API", api, limit=True),
            _row("from the command `fedml launch`", typed, limit=True),
            _row("  of which process start", starts),
        ],
    )


def _row(what: str, times: Sequence[float], *, limit: bool = False) -> tuple[str, ...]:
    median = statistics.median(times)
    p95 = sorted(times)[int(0.95 * len(times))]
    cells = [f"{1e3 * value:.0f}" for value in (median, p95, max(times))]
    verdict = "" if not limit else "met" if median <= LIMIT_S else "NOT MET"
    return (what, f"<= {1e3 * LIMIT_S:.0f}" if limit else "", *cells, verdict)


if __name__ == "__main__":
    main()
