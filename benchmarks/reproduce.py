# SPDX-License-Identifier: Apache-2.0
"""Published numbers beside ours, over seeds: measures what is missing, writes docs/reproduced.md.

    make reproduce                                        # all of it: hours
    python -m benchmarks.reproduce --quick                # without the long ones: minutes
    python -m benchmarks.reproduce --only gcn --seeds 5
    python -m benchmarks.reproduce --write                # nothing measured, only written

Run it from the repository's root. Each number is kept in `published/measured.json` as soon as it
is there, and is not measured again; simulations go on from their last checkpoint. So a run that
was broken off goes on. Delete the file to begin anew. Seeds count from 1.

The claims are data: `benchmarks/published/claims.py`.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before they are imported: one core
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import contextlib
import datetime
import json
import platform
import re
import sqlite3
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.published.claims import CLAIMS, Claim

ROOT = Path(__file__).parents[1]
KEPT = ROOT / ".reproduce"
# Part of the repository: what was measured on other machines stays on the page.
RESULTS = ROOT / "benchmarks" / "published" / "measured.json"
PAGE = ROOT / "docs" / "reproduced.md"
LIBRARIES = ("numpy", "torch", "dp-accounting")

HEAD = """
# Reproduced

Published numbers, and what this code gives for the same. `make reproduce` writes this page from
what it has measured, and only that.
"""

LEGEND = """
Ours is the mean ± standard deviation over so many seeds. "Differs" stands where it is not the
published number in its digits and lies further from it than two standard deviations, theirs or
ours, whichever is larger. Minutes are those of one seed by the clock, on a machine that had other
work as well.
"""

ABSENT = """
- Not in the table: the upload of SecAgg (Bonawitz et al. 2016: 1.73 times), which this code does
  not have yet.
"""

# By name of the claim and seed: value, minutes, date, machine, versions.
Found = dict[str, dict[str, dict[str, Any]]]


def load() -> Found:
    """What has been measured before."""
    found: Found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return found


def keep(found: Found) -> None:
    """Write it, whole or not at all."""
    RESULTS.parent.mkdir(exist_ok=True)
    beside = RESULTS.with_suffix(".new")
    beside.write_text(json.dumps(found, indent=1))
    beside.replace(RESULTS)


def measure(claims: Iterable[Claim], seeds: int | None, found: Found) -> None:
    """Measure what ``found`` lacks, and keep each number as it comes."""
    for claim in claims:
        have = found.setdefault(claim.name, {})
        # What has no randomness says the same for every seed.
        count = claim.seeds if seeds is None or claim.seeds == 1 else seeds
        for seed in range(1, count + 1):
            if str(seed) in have:
                continue
            print(f"{claim.name}, seed {seed}", flush=True)
            folder = KEPT / f"{claim.name}-{seed}"
            began = time.perf_counter()
            try:
                value = claim.measure(seed, folder)
            except ModuleNotFoundError as error:
                print(f"  left out: {error}")
                break
            have[str(seed)] = {
                "value": value,
                "minutes": spent(folder, time.perf_counter() - began) / 60,
                "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
                "machine": machine(),
                "versions": versions(),
            }
            keep(found)
            print(f"  {value:.{claim.digits}f}, published {claim.published:.{claim.digits}f}")


def spent(folder: Path, seconds: float) -> float:
    """Seconds that a number took; a simulation's include those before it was broken off."""
    results = folder / "results.sqlite"
    if not results.exists():
        return seconds
    with contextlib.closing(sqlite3.connect(results)) as database:
        ((whole,),) = database.execute("select max(wall_s) from rounds")
    return float(whole)


def agrees(claim: Claim, values: Sequence[float]) -> bool:
    """Whether ours is what was published, as far as both are known.

    Where both have a spread, the means differ by no more than two of the larger one; else they are
    the same in the published digits, or ours lies within two of its own standard deviations.
    """
    mean = statistics.fmean(values)
    own = statistics.stdev(values) if len(values) > 1 else 0.0
    last = 10.0**-claim.digits
    return abs(mean - claim.published) <= max(2 * claim.spread, 2 * own, 0.5001 * last)


def row(claim: Claim, have: Mapping[str, Mapping[str, Any]]) -> str:
    """A claim's line of the table."""
    n = claim.digits
    published = f"{claim.published:.{n}f}" + (f" ± {claim.spread:.{n}f}" if claim.spread else "")
    values = [one["value"] for one in have.values()]
    command = f"`{claim.command}`"
    if not values:
        return line(claim.claim, claim.source, published, "not run here yet", "", "", command, "")
    ours = f"{statistics.fmean(values):.{n}f}"
    if len(values) > 1:
        ours += f" ± {statistics.stdev(values):.{n}f}"
    if not agrees(claim, values):
        ours = f"**{ours}** (differs)"
    minutes = statistics.fmean(one["minutes"] for one in have.values())
    took = "< 0.1" if minutes < 0.1 else f"{minutes:.1f}"
    last = max(one["date"] for one in have.values())
    return line(claim.claim, claim.source, published, ours, len(values), took, command, last)


def line(*cells: object) -> str:
    """One of a Markdown table."""
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def page(found: Found, claims: Sequence[Claim] = CLAIMS) -> str:
    """docs/reproduced.md."""
    heads = ("what", "source", "published", "ours", "seeds", "minutes a seed", "command", "date")
    table = [line(*heads), line(*["---"] * len(heads))]
    table += [row(claim, found.get(claim.name, {})) for claim in claims]
    notes = []
    for note in dict.fromkeys(claim.note for claim in claims if claim.note):
        whose = ", ".join(f"`{claim.name}`" for claim in claims if claim.note == note)
        notes.append(f"- {whose}: {note}")
    measured = [one for claim in claims for one in found.get(claim.name, {}).values()]
    where = [f"- {text}" for text in sorted({f"{m['machine']}: {m['versions']}" for m in measured})]
    parts = [HEAD, "\n".join(table), LEGEND, "\n".join([*notes, ABSENT.strip()])]
    parts += ["Measured on", "\n".join(where)] if where else []
    return "\n\n".join(part.strip() for part in parts) + "\n"


def machine() -> str:
    """What this runs on; a GPU, which a simulation takes if it can, by its model."""
    found = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        name = torch.cuda.get_device_name(0)
        model = re.search(r"[A-Z]+\d+\w*", name)
        found += f", {torch.cuda.device_count()} × {model[0] if model else name}"
    return found


def versions() -> str:
    """Of what the numbers come from."""
    parts = [f"Python {platform.python_version()}"]
    for name in LIBRARIES:
        try:
            parts.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [claim.name for claim in CLAIMS]
    parser.add_argument("--only", choices=names, action="append", help="this one; repeatable")
    parser.add_argument("--seeds", type=int, help="how many, where there is randomness")
    parser.add_argument("--quick", action="store_true", help="leave out what takes many minutes")
    parser.add_argument("--write", action="store_true", help="measure nothing, write the page")
    args = parser.parse_args()
    if args.seeds is not None and args.seeds < 1:
        parser.error("--seeds: at least 1")
    wanted = [
        claim
        for claim in CLAIMS
        if (not args.only or claim.name in args.only) and not (args.quick and claim.long)
    ]
    found = load()
    if not args.write:
        measure(wanted, args.seeds, found)
    PAGE.write_text(page(found))
    print(f"written: {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
