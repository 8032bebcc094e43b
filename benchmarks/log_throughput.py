# SPDX-License-Identifier: Apache-2.0
"""What a task that prints a lot is slowed by, and how fast its output reaches the broker.

    python benchmarks/log_throughput.py            # 200 MB each way, five times, two minutes
    python benchmarks/log_throughput.py --quick    # 50 MB, three times

The same program runs plainly (`program > file`), alternating with a job on an agent. It computes
and prints lines with Python's own buffer, so much of the one for each of the other that plainly it
prints 20 MB/s, the rate that must not slow it; it tells its own time, and that is compared. Another
computes little and prints some 100 MB/s. Two more show what a task can print at most: lines and
nothing else, and a file that is copied. The job's output goes through the shim (with and without
secrets to look for), the agent, gzip and TLS to the broker's file; the rate is counted from
submission until the broker has its last byte. CPU seconds are of everything between the program and
that file.

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
from typing import Any

from deployment import Deployment, arguments, machine, scratch, table

LEAST_MB_S = 20.0
LEAST_RATIO = 0.9
_LINE = "epoch 12 step 003456 loss=0.693147 accuracy=0.501 lr=0.0300 grad_norm=1.2345 time=0.0123s"

# The time, and what of it this process could have run and others had the processors (schedstat).
_CLOCK = """
import time
def clock():
    try:
        waited_ns = int(open("/proc/self/schedstat").read().split()[1])
    except OSError:
        waited_ns = 0
    return time.perf_counter(), waited_ns / 1e9
"""
_SAYS = """
took, waited = (now - then for now, then in zip(clock(), began))
print("took", took, waited, file=sys.stderr, flush=True)
"""
# Prints its lines, then on stderr how long that took; the job lives on to be looked at.
_PRINTS = f"""{_CLOCK}
import sys
began = clock()
for n in range(int(sys.argv[1])):
    sum(range(WORK))
    print({_LINE!r}, n)
sys.stdout.flush()
{_SAYS}"""
_COPIES = f"""{_CLOCK}
import os, sys
data = open(sys.argv[2], "rb")
began = clock()
while piece := data.read(1 << 16):
    while piece:
        piece = piece[os.write(1, piece):]
{_SAYS}"""
_STEADY = "computes, prints 20 MB/s"
_FAST = "computes little and prints"
_COMPARED = (_STEADY, _FAST)
PROGRAMS = {
    _STEADY: "",  # how much it computes is found out first: see `steady`
    _FAST: _PRINTS.replace("WORK", "100"),
    "prints only": _PRINTS.replace("WORK", "0"),
    "copies a file": _COPIES,
}
_SECRETS = {f"SERVICE_{n}_TOKEN": os.urandom(20).hex() for n in range(3)}


# The program's own seconds, and of these in which it waited for a processor.
Took = tuple[float, float]


class Measured:
    """One job: MB, what it took, seconds until the broker had all, CPU seconds by process."""

    def __init__(self, size: int, took: Took, whole_s: float, cpu: dict[str, float]) -> None:
        self.mb, self.took, self.whole_s, self.cpu = size / 1e6, took, whole_s, cpu


def steady(folder: Path, lines: int) -> str:
    """The program that prints `LEAST_MB_S` here: so much CPU time does a line of it take.

    CPU time, as others may be at work on the machine; it grows with what a line computes.
    """
    program, some = folder / "trial.py", lines // 10

    def line_s(work: int) -> float:
        text = _PRINTS.replace("WORK", str(work)).replace("time.perf_counter", "time.process_time")
        program.write_text(text)
        return min(plainly(program, folder, some, folder / "trial")[0] for _ in range(5)) / some

    few, many = 200, 1000
    least_s, more_s = line_s(few), line_s(many)
    wanted_s = (len(_LINE) + 8) / 1e6 / LEAST_MB_S
    work = few + round((many - few) * (wanted_s - least_s) / (more_s - least_s))
    return _PRINTS.replace("WORK", str(work))


def plainly(program: Path, text: Path, lines: int, into: Path) -> Took:
    """What the program takes with its output in a file."""
    with into.open("wb") as out:
        done = subprocess.run(
            [sys.executable, str(program), str(lines), str(text)],
            stdout=out,
            stderr=subprocess.PIPE,
            env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8"},  # as a job has it: buffered
            check=True,
        )
    return _said(done.stderr.split()) or (0.0, 0.0)


def _said(words: list[Any]) -> Took | None:
    """What a program has said on stderr."""
    return (float(words[-2]), float(words[-1])) if words[-3:-2] in (["took"], [b"took"]) else None


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
    took = None
    while took is None:
        place.require_alive()
        time.sleep(0.02)
        said = local / "err.0"
        took = _said(said.read_text().split()) if said.exists() else None
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
    return Measured(size, took, whole_s, cpu)


def main() -> None:
    """Measure and print."""
    chosen = arguments(__doc__, "50 MB, three times")
    size, times = (50_000_000, 3) if chosen.quick else (200_000_000, 5)
    lines = size // (len(_LINE) + 8)
    print(machine("aiohttp", "urllib3"))
    plain: dict[str, list[Took]] = defaultdict(list)
    jobs: dict[tuple[str, str], list[Measured]] = defaultdict(list)
    with scratch() as folder, Deployment(folder / "place", 1) as place:
        text = folder / "text"
        text.write_text("".join(f"{_LINE} {n}\n" for n in range(lines)))
        programs = {}
        for number, (name, source) in enumerate(PROGRAMS.items()):
            programs[name] = folder / f"program{number}.py"
            programs[name].write_text(source or steady(folder, lines))
        place.hello()
        for _ in range(times):  # alternating: what disturbs one disturbs all
            for name, program in programs.items():
                plain[name].append(plainly(program, text, lines, folder / "out"))
                for kind in ("job", "job with 3 secrets"):
                    secret = kind != "job"
                    found = as_job(place, program, text, lines, secret=secret)
                    jobs[name, kind].append(found)
        frozen = as_job(place, programs[_FAST], text, lines, secret=False, frozen=True)
    rows = []
    for name in programs:
        seconds = _medians(plain[name])
        rows.append((f"{name} > file", f"{size / 1e6 / seconds[0]:.0f}", *[""] * 8))
        for kind in ("job", "job with 3 secrets"):
            rows.append(_row(kind, jobs[name, kind], seconds if name in _COMPARED else None))
    rows.append(_row("computes little, agent stopped", [frozen], _medians(plain[_FAST])))
    print(f"\n{size / 1e6:.0f} MB of lines, medians of {times}; CPU seconds per 100 MB")
    print(
        "alone: without the time in which it waited for a processor; no judgement where others work"
    )
    head = ("", "task MB/s", "of plain", "", "alone", "broker MB/s", "", "shim", "agent", "broker")
    table(head, rows)


def _medians(took: list[Took]) -> Took:
    """Of the seconds, and of the seconds without those in which it waited for a processor."""
    return statistics.median(t for t, _ in took), statistics.median(t - w for t, w in took)


def _row(name: str, found: list[Measured], plain: Took | None) -> tuple[str, ...]:
    mb = found[0].mb
    took, alone = _medians([one.took for one in found])
    # What does nothing but write has no speed of its own to be slowed from.
    slow = plain is not None and mb / plain[0] < 1.25 * LEAST_MB_S
    ratio = None if plain is None else plain[0] / took
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
        "" if plain is None else f"{plain[1] / alone:.2f}",
        f"{mb / whole:.0f}", met[1], *(f"{s:.2f}" for s in cpu),
    )  # fmt: skip


if __name__ == "__main__":
    main()
