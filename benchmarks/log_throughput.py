# SPDX-License-Identifier: Apache-2.0
"""What a task that prints a lot is slowed by, and how fast its output reaches the broker.

    python benchmarks/log_throughput.py            # 200 MB each way, five times, two minutes
    python benchmarks/log_throughput.py --quick    # 50 MB, three times

The same program runs plainly (`program > file`), alternating with a job on an agent. It computes a
little and prints lines, some 30 MB/s, with Python's own buffer; it tells its own time, and that is
compared. Two others show what a task can print at most: lines and nothing else, and a file that is
copied. The job's output goes through the shim (with and without secrets to look for), the agent,
gzip and TLS to the broker's file; the rate is counted from submission until the broker has its last
byte. CPU seconds are of everything between the program and that file.

At last the agent is stopped (SIGSTOP, a broker that takes nothing looks the same to the shim) while
the task prints: it must run as before, and its oldest output goes.
"""

import os
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

from deployment import Deployment, arguments, machine, scratch, table

LEAST_MB_S = 20.0
LEAST_RATIO = 0.9
_LINE = "epoch 12 step 003456 loss=0.693147 accuracy=0.501 lr=0.0300 grad_norm=1.2345 time=0.0123s"

# Prints its lines, then on stderr how long that took; the job lives on to be looked at.
_PRINTS = f"""
import sys, time
began = time.perf_counter()
for n in range(int(sys.argv[1])):
    sum(range(WORK))
    print({_LINE!r}, n)
sys.stdout.flush()
print("took", time.perf_counter() - began, file=sys.stderr, flush=True)
"""
_COPIES = """
import os, sys, time
data = open(sys.argv[2], "rb")
began = time.perf_counter()
while piece := data.read(1 << 16):
    while piece:
        piece = piece[os.write(1, piece):]
print("took", time.perf_counter() - began, file=sys.stderr, flush=True)
"""
_NAMED = "computes and prints"
PROGRAMS = {
    _NAMED: _PRINTS.replace("WORK", "100"),
    "prints only": _PRINTS.replace("WORK", "0"),
    "copies a file": _COPIES,
}
_SECRETS = {f"SERVICE_{n}_TOKEN": os.urandom(20).hex() for n in range(3)}


class Measured:
    """One job: MB, the program's own seconds, until the broker had all, CPU seconds by process."""

    def __init__(self, size: int, took_s: float, whole_s: float, cpu: dict[str, float]) -> None:
        self.mb, self.took_s, self.whole_s, self.cpu = size / 1e6, took_s, whole_s, cpu


def plainly(program: Path, text: Path, lines: int, into: Path) -> float:
    """The program's own seconds with its output in a file."""
    with into.open("wb") as out:
        done = subprocess.run(
            [sys.executable, str(program), str(lines), str(text)],
            stdout=out,
            stderr=subprocess.PIPE,
            env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8"},  # as a job has it: buffered
            check=True,
        )
    return float(done.stderr.split()[1])


def as_job(
    place: Deployment, program: Path, text: Path, lines: int, *, secret: bool, frozen: bool = False
) -> Measured:
    """The same as a job on the agent."""
    before, began = place.cpu_s(), time.perf_counter()
    asked = {
        "command": f"{sys.executable} {program} {lines} {text}; exec sleep 600",
        "env": _SECRETS if secret else {},
        "follow": False,
    }
    run = place.client.call("POST", "/v1/launch", asked)["run"]
    folder = place.folder / "broker" / "broker" / "logs" / run
    local = place.folder / "agent-00" / "agent" / "tasks" / f"{run}-t.1"
    if frozen:
        while not (local / "out.0").exists():
            time.sleep(0.01)
        os.kill(place.agent_pids[0], signal.SIGSTOP)
    took_s = 0.0
    while not took_s:
        place.require_alive()
        time.sleep(0.02)
        said = local / "err.0"
        words = said.read_text().split() if said.exists() else []
        took_s = float(words[words.index("took") + 1]) if words[-2:-1] == ["took"] else 0.0
    first, last = max((int(p.suffix[1:]), p) for p in local.glob("out.*"))
    size = first + last.stat().st_size
    if frozen:
        os.kill(place.agent_pids[0], signal.SIGCONT)
    here = folder / f"{run}-t.1.stdout.log"
    while not here.exists() or here.stat().st_size < size:
        place.require_alive()
        time.sleep(0.02)
    whole_s = time.perf_counter() - began
    after = place.cpu_s()
    cpu = {role: after[role] - before.get(role, 0.0) for role in ("shim", "agent", "broker")}
    place.client.call("POST", f"/v1/runs/{run}/stop")
    for _ in place.client.follow(run, logs=False):
        pass
    return Measured(size, took_s, whole_s, cpu)


def main() -> None:
    """Measure and print."""
    chosen = arguments(__doc__, "50 MB, three times")
    size, times = (50_000_000, 3) if chosen.quick else (200_000_000, 5)
    lines = size // (len(_LINE) + 8)
    print(machine("aiohttp", "urllib3"))
    plain: dict[str, list[float]] = defaultdict(list)
    jobs: dict[tuple[str, str], list[Measured]] = defaultdict(list)
    with scratch() as folder, Deployment(folder / "place", 1) as place:
        text = folder / "text"
        text.write_text("".join(f"{_LINE} {n}\n" for n in range(lines)))
        programs = {}
        for number, (name, source) in enumerate(PROGRAMS.items()):
            programs[name] = folder / f"program{number}.py"
            programs[name].write_text(source)
        place.hello()
        for _ in range(times):  # alternating: what disturbs one disturbs all
            for name, program in programs.items():
                plain[name].append(plainly(program, text, lines, folder / "out"))
                for kind in ("job", "job with 3 secrets"):
                    secret = kind != "job"
                    found = as_job(place, program, text, lines, secret=secret)
                    jobs[name, kind].append(found)
        frozen = as_job(place, programs[_NAMED], text, lines, secret=False, frozen=True)
    rows = []
    for name in programs:
        seconds = statistics.median(plain[name])
        rows.append((f"{name} > file", f"{size / 1e6 / seconds:.0f}", *[""] * 7))
        for kind in ("job", "job with 3 secrets"):
            rows.append(_row(kind, jobs[name, kind], seconds if name == _NAMED else None))
    rows.append(_row("the same, agent stopped", [frozen], statistics.median(plain[_NAMED])))
    print(f"\n{size / 1e6:.0f} MB of lines, medians of {times}; CPU seconds per 100 MB")
    head = ("", "task MB/s", "of plain", "", "broker MB/s", "", "shim", "agent", "broker")
    table(head, rows)


def _row(name: str, found: list[Measured], plain_s: float | None) -> tuple[str, ...]:
    mb = found[0].mb
    # What does nothing but write has no speed of its own to be slowed from.
    took = statistics.median(one.took_s for one in found)
    slow = plain_s is not None and mb / plain_s < 1.25 * LEAST_MB_S
    ratio = None if plain_s is None else plain_s / took
    whole = statistics.median(one.whole_s for one in found)
    cpu = [
        statistics.median(o.cpu[r] for o in found) / mb * 100 for r in ("shim", "agent", "broker")
    ]
    met = [
        "" if ratio is None else "met" if ratio >= LEAST_RATIO else "NOT MET",
        # Where other programs leave less than that to the plain one, there is nothing to be met.
        "" if slow else "met" if mb / whole >= LEAST_MB_S else "NOT MET",
    ]
    return (
        f"  {name}", f"{mb / took:.0f}", "" if ratio is None else f"{ratio:.2f}", met[0],
        f"{mb / whole:.0f}", met[1], *(f"{s:.2f}" for s in cpu),
    )  # fmt: skip


if __name__ == "__main__":
    main()
