# SPDX-License-Identifier: Apache-2.0
"""A deployed federated round: no-op training, real processes, TLS over loopback.

    python benchmarks/deployed_round.py              # four minutes
    python benchmarks/deployed_round.py --quick      # one and a half: fewer rounds
    python benchmarks/deployed_round.py --flower     # Flower too (pip, a venv of its own): ten more

With `--quick`, Flower is not measured with fifty nodes: that takes a quarter of an hour.

Small model (0.1 MB), N agents: the time from the end of one round to the end of the next, by the
stamps that the broker writes into its store, after the rounds in which workers start. CPU seconds
are those of broker, aggregator, agents, shims and workers together.

Large model (100 MB): the same, against moving the same bytes (N downloads, N uploads at once) with
`curl` and a plain TLS file server, before and after in the same run. No two updates are alike, so
that every byte travels. The broker's memory is its peak over the rounds.
"""

import itertools
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deployment import Deployment, Foreign, Watch, arguments, machine, scratch, table
from flower_deployment import FLOWER, Flower
from plain_transfers import Plain

APP = """
import numpy as np

def model(config):
    rng = np.random.default_rng(1)
    return {f"w{i}": rng.random(config["values"] // 10, dtype=np.float32) for i in range(10)}

def data(client, config):
    return client.index

def train(model, data, config, rng):
    shift = np.float32(data + rng.random())  # no two updates are the same blob
    for values in model.values():
        values += shift
    return {"examples": 1}
"""

WARM = 3  # rounds in which workers start and caches fill
SMALL_MB, LARGE_MB = 0.1, 100.0
TARGETS_MS = {2: 50, 10: 150, 50: 600}
# Measured on another day with Flower 1.41 on two cores: seconds a round.
RECORDED = {2: "3.2-6.5 s", 10: "12.5 s", 50: "75-109 s"}
RECORDED_LARGE = {2: "6 s", 10: "25 s"}

_OTHERS = "others' cores"
_COST = ("", "broker", "aggregator", "agents", "workers")


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """What the steady rounds of one run took.

    Attributes:
        gaps_s: From the end of one round to the end of the next.
        cpu_s: A round, by kind of process.
        broker_mb: PSS at its peak.
        foreign: Cores that other processes of the machine kept busy.
    """

    gaps_s: Sequence[float]
    cpu_s: dict[str, float]
    broker_mb: float
    foreign: float

    @property
    def median_s(self) -> float:
        """Of the gaps."""
        return statistics.median(self.gaps_s)


def measure(folder: Path, clients: int, mb: float, rounds: int) -> Rounds:
    """One run of so many steady rounds, on a deployment of its own."""
    ends: list[float] = []
    with Deployment(folder, clients) as place:
        run = place.federate(
            APP,
            rounds=WARM + rounds,
            clients={"count": clients},
            evaluate={"devices": False, "central": False},
            config=json.dumps({"values": int(mb * 1e6 / 4)}),
        )
        before = after = dict[str, float]()
        foreign, cores = Foreign(), 0.0
        with Watch(place.broker_pid) as broker:
            for item in place.client.follow(run, logs=False):
                place.require_alive()
                event = item.get("event", {})
                if event.get("kind") == "round_ends":
                    ends.append(event["at"])
                    number = event["data"]["round"]
                    if number == WARM:
                        before, foreign = place.cpu_s(), Foreign()
                    elif number == WARM + rounds:
                        after = place.cpu_s()
                        wall = ends[-1] - ends[WARM]
                        ours = sum(after.values()) - sum(before.values())
                        cores = foreign.cores(ours, wall)
                elif "end" in item:
                    assert item["end"]["state"] == "FINISHED", item["end"]["cause"]
    steady = ends[WARM:]
    return Rounds(
        gaps_s=[end - begin for begin, end in itertools.pairwise(steady)],
        cpu_s={role: (after[role] - before[role]) / rounds for role in before},
        broker_mb=broker.peak_mb,
        foreign=cores,
    )


def small(folder: Path, rounds: dict[int, int], flower: Flower | None) -> None:
    """The small model with few and many agents."""
    rows, costs = [], []
    for clients, count in rounds.items():
        ours = measure(folder / f"small-{clients}", clients, SMALL_MB, count)
        theirs, times = RECORDED[clients], ""
        if flower is not None and clients <= flower.most:
            theirs, peer_s = _peer(flower, clients, SMALL_MB)
            times = f"{peer_s / ours.median_s:.0f}x" if peer_s else ""
        rows.append(
            (
                f"N = {clients}",
                f"<= {TARGETS_MS[clients]}",
                f"{ours.median_s * 1e3:.0f}",
                f"{min(ours.gaps_s) * 1e3:.0f}-{max(ours.gaps_s) * 1e3:.0f}",
                _met(ours.median_s * 1e3, TARGETS_MS[clients]),
                f"{sum(ours.cpu_s.values()) * 1e3:.0f}",
                f"{ours.broker_mb:.0f}",
                f"{ours.foreign:.1f}",
                theirs,
                times,
            )
        )
        costs.append(_cost(clients, ours))
    print(f"\n{SMALL_MB} MB model, steady rounds")
    head = ("", "target ms", "median", "range", "", "CPU ms", "broker MB", _OTHERS)
    table((*head, _of(flower), ""), rows)
    print("\nCPU ms a round")
    table(_COST, costs)


def large(folder: Path, rounds: dict[int, int], flower: Flower | None) -> None:
    """The large model against the bare transfer of its bytes."""
    rows, costs, memory = [], [], []
    size = int(LARGE_MB * 1e6)
    with Plain(folder / "plain") as plain:
        plain.round(1, size)
        for clients, count in rounds.items():
            moved = [plain.round(clients, size) for _ in range(3)]
            ours = measure(folder / f"large-{clients}", clients, LARGE_MB, count)
            moved += [plain.round(clients, size) for _ in range(3)]
            bare_s = statistics.median(wall for wall, _ in moved)
            bare_cpu_s = statistics.median(cpu for _, cpu in moved)
            theirs = RECORDED_LARGE[clients]
            if flower is not None and clients <= flower.most:
                theirs, _ = _peer(flower, clients, LARGE_MB)
            ratio = ours.median_s / bare_s
            memory.append(ours.broker_mb)
            rows.append(
                (
                    f"N = {clients}",
                    "<= 2.0",
                    f"{ratio:.1f}",
                    _met(ratio, 2.0),
                    f"{ours.median_s:.2f}",
                    f"{bare_s:.2f}",
                    f"{sum(ours.cpu_s.values()):.1f}",
                    f"{bare_cpu_s:.1f}",
                    f"{sum(ours.cpu_s.values()) / bare_cpu_s:.1f}",
                    f"{ours.broker_mb:.0f}",
                    f"{ours.foreign:.1f}",
                    theirs,
                )
            )
            costs.append(_cost(clients, ours))
    print(f"\n{LARGE_MB:.0f} MB model: times the bare transfers")
    head = ("", "target", "times", "", "s a round", "bare s", "CPU s", "bare CPU s")
    table((*head, "CPU times", "broker MB", _OTHERS, _of(flower)), rows)
    print("\nCPU ms a round")
    table(_COST, costs)
    # What each connection costs is there with a small model too; one model more would be a leak.
    growth = max(memory) - min(memory)
    print(f"\nbroker's memory, few to many agents: +{growth:.0f} MB", _met(growth, LARGE_MB / 2))


def _cost(clients: int, ours: Rounds) -> tuple[str, ...]:
    roles = ("broker", "aggregator", "agent", "worker")
    return (f"N = {clients}", *(f"{ours.cpu_s[role] * 1e3:.0f}" for role in roles))


def _peer(flower: Flower, clients: int, mb: float) -> tuple[str, float]:
    """What Flower takes, in words, and its seconds a round; 0 if it did not manage."""
    try:
        peer = flower.rounds(clients, mb, 3)
    except TimeoutError as error:  # its affair: our own figures are told all the same
        print(error)
        return "did not come up, or not to an end", 0.0
    return f"{peer.median_s:.1f} s, {peer.cpu_s:.1f} CPU s", peer.median_s


def _of(flower: Flower | None) -> str:
    return f"{FLOWER}, recorded" if flower is None else FLOWER


def _met(value: float, limit: float) -> str:
    return "met" if value <= limit else "NOT MET"


def main() -> None:
    """Measure and print."""
    chosen = arguments(__doc__, "fewer rounds", flower="measure Flower's deployment too")
    few = chosen.quick
    print(machine("numpy", "aiohttp", "mqtt5", "paho-mqtt"))
    print(time.strftime("%Y-%m-%d %H:%M"))
    with scratch() as folder:
        flower = Flower(folder / "flower", most=10 if few else 50) if chosen.flower else None
        small(folder, {2: 30, 10: 20, 50: 6} if few else {2: 200, 10: 100, 50: 40}, flower)
        large(folder, {2: 8, 10: 4} if few else {2: 15, 10: 6}, flower)


if __name__ == "__main__":
    main()
