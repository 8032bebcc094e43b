# SPDX-License-Identifier: Apache-2.0
"""Submitting a workspace of 1 GB again: what is sent, and what it costs to find out.

    python benchmarks/package.py            # 1 GB: 9,000 files of 4 kB and 963 of 1 MB
    python benchmarks/package.py --quick    # a tenth of it

Each row submits a job that looks for one file, and waits for its end. Bytes are those of blobs as
the broker counts them, up from the person and down to the machine. CPU seconds are those of this
process (the person's side: walk, hash, TLS) and of broker and agent; the last two lay the whole
workspace out for the job each time. Nothing else is measured while it runs.
"""

import os
import resource
import time
from pathlib import Path

from deployment import Deployment, arguments, machine, scratch, table

from fedml import launch

SMALL, LARGE = 4_000, 1_000_000


def main() -> None:
    """Measure and print."""
    chosen = arguments(__doc__, "a tenth of the files")
    share = 10 if chosen.quick else 1
    small, large = 9_000 // share, 963 // share
    print(machine("aiohttp", "urllib3", "pathspec"))
    with scratch() as folder, Deployment(folder / "place", 1) as place:
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        work = folder / "work"
        for n in range(small):
            _write(work / "src" / f"{n % 97}" / f"{n}.py", SMALL)
        for n in range(large):
            _write(work / "data" / f"{n}.bin", LARGE)
        job = folder / "job.yaml"
        job.write_text("workspace: work\njob: test -s data/0.bin\n")
        time.sleep(3)  # files written this moment are read again: git's rule, and ours
        place.hello()
        rows = [_row("first", place, job), _row("unchanged", place, job)]
        _write(work / "src" / "3" / "3.py", SMALL)
        rows.append(_row("one file of 4 kB changed", place, job))
        _write(work / "data" / "3.bin", LARGE)
        rows.append(_row("one file of 1 MB changed", place, job))
        time.sleep(3)
        rows += [_row("unchanged", place, job)]
    total = (small * SMALL + large * LARGE) / 1e6
    print(f"\n{small + large} files, {total:.0f} MB; a job that uses them, submit to end")
    table(
        ("", "sent, kB", "fetched, kB", "CPU s: submit", "broker", "agent", "submit s", "end s"),
        rows,
    )
    # What a change costs beside the file itself is the list of all files.
    unchanged, changed = (float(rows[n][1].replace(",", "")) for n in (1, 3))
    print()
    table(
        ("", "target", "sent, kB", ""),
        [
            ("unchanged", "0", rows[1][1], _met(unchanged, 0)),
            ("one file of 1 MB changed", "<= 1,700", rows[3][1], _met(changed, 1_700)),
        ],
    )


def _met(value: float, limit: float) -> str:
    return "met" if value <= limit else "NOT MET"


def _write(file: Path, size: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(os.urandom(size))


def _row(what: str, place: Deployment, job: Path) -> tuple[str, ...]:
    sent, fetched = _moved(place)
    before, cpu, began = place.cpu_s(), _own_cpu_s(), time.perf_counter()
    run = launch.launch(place.client, job)
    submit_s, own_s = time.perf_counter() - began, _own_cpu_s() - cpu
    for item in place.client.follow(run, logs=False):
        place.require_alive()
        if "end" in item:
            assert item["end"]["state"] == "FINISHED", item["end"]["cause"]
    end_s, after = time.perf_counter() - began, place.cpu_s()
    sent, fetched = (now - then for now, then in zip(_moved(place), (sent, fetched), strict=True))
    spent = (after.get(role, 0) - before.get(role, 0) for role in ("broker", "agent"))
    numbers = (f"{value:.2f}" for value in (own_s, *spent, submit_s, end_s))
    return (what, f"{sent / 1e3:,.0f}", f"{fetched / 1e3:,.0f}", *numbers)


def _moved(place: Deployment) -> tuple[float, float]:
    """Bytes of blobs that came to the broker, and that went."""
    found = {"in": 0.0, "out": 0.0}
    for line in place.metrics():
        name, _, value = line.rpartition(" ")
        for direction in found:
            if name == f'fedml_broker_blob_bytes_total{{direction="{direction}"}}':
                found[direction] = float(value)
    return found["in"], found["out"]


def _own_cpu_s() -> float:
    spent = resource.getrusage(resource.RUSAGE_SELF)
    return spent.ru_utime + spent.ru_stime


if __name__ == "__main__":
    main()
