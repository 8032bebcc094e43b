# SPDX-License-Identifier: Apache-2.0
"""Simulated devices: how long each would take, when it is online, when it drops out.

Nothing here waits. Times are seconds of a simulated clock that starts at 0, and every number is a
function of the run's seed and the client, so that two algorithms meet the same devices.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedml.errors import ConfigError

# Streams apart from those of `federate.cohort`.
_SPEED, _PHASE, _DROPOUT = 101, 102, 103


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """A population of devices.

    Attributes:
        seconds_per_example: What a device of speed 1 needs for one example in one epoch, >= 0.
        speed_spread: Standard deviation of the logarithm of the speed, >= 0; 0 makes all alike,
            0.5 makes the fastest of a hundred some ten times as fast as the slowest.
        latency_s: Added to every stage, >= 0.
        megabits_per_s: Of each device's link, in each direction; 0 moves bytes in no time.
        dropout: Probability that a device that was asked never answers, in [0, 1).
        online_s: How long a device is online at a time; 0 with `offline_s` 0 is always.
        offline_s: How long it is away after that; where in this cycle it starts is drawn.
        trace: For some clients, when they are online, as (start, end) pairs that ascend.
        seed: Of what is drawn.
    """

    seconds_per_example: float = 0.001
    speed_spread: float = 0.0
    latency_s: float = 0.0
    megabits_per_s: float = 0.0
    dropout: float = 0.0
    online_s: float = 0.0
    offline_s: float = 0.0
    trace: Mapping[int, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    seed: int = 0

    @classmethod
    def read(cls, found: Mapping[str, Any], workspace: Path, seed: int) -> Devices:
        """Devices as ``simulation.devices`` of a run file has them.

        Raises:
            ConfigError: A value is out of range, or the trace cannot be read.
        """
        given = dict(found)
        trace = given.pop("trace", "")
        if trace:
            given["trace"] = _read_trace(workspace / trace)
        unknown = given.keys() - cls.__dataclass_fields__.keys()
        if unknown:
            raise ConfigError(f"simulation.devices has no key {min(unknown)!r}")
        devices = cls(**given, seed=seed)
        for name in given:
            value = getattr(devices, name)
            if name != "trace" and not (isinstance(value, int | float) and value >= 0):
                raise ConfigError(f"simulation.devices.{name} must be >= 0, got {value!r}")
        if devices.dropout >= 1:
            raise ConfigError(f"simulation.devices.dropout must be below 1, got {devices.dropout}")
        if devices.offline_s and not devices.online_s:
            raise ConfigError("simulation.devices: with offline_s and no online_s nobody is online")
        return devices

    def speed(self, client: int) -> float:
        """How many times as fast as usual; log-normal around 1."""
        if not self.speed_spread:
            return 1.0
        return math.exp(self.speed_spread * float(self._drawn(_SPEED, client).standard_normal()))

    def duration(self, client: int, examples: float, down: int, up: int) -> float:
        """Seconds from being asked to the answer.

        Args:
            client: Who.
            examples: How many it goes through, all epochs together.
            down: Bytes that it is sent.
            up: Bytes that it sends.
        """
        moving = 8e-6 * (down + up) / self.megabits_per_s if self.megabits_per_s else 0.0
        return self.latency_s + examples * self.seconds_per_example / self.speed(client) + moving

    def drops_out(self, client: int, turn: int) -> bool:
        """Whether this client, asked in this turn, never answers."""
        return bool(self.dropout) and float(self._drawn(_DROPOUT, client, turn).random()) < (
            self.dropout
        )

    def online(self, client: int, at: float) -> bool:
        """Whether the client is there at this time."""
        return self.next_online(client, at) <= at

    def next_online(self, client: int, at: float) -> float:
        """When it is there next, ``at`` itself if it is there now; infinite when never again."""
        if client in self.trace:
            for start, end in self.trace[client]:
                if at < end:
                    return max(at, start)
            return math.inf
        if not self.offline_s:
            return at
        period = self.online_s + self.offline_s
        into = (at + period * float(self._drawn(_PHASE, client).random())) % period
        return at if into < self.online_s else at + period - into

    def _drawn(self, *key: int) -> np.random.Generator:
        words = [len(key) + 1, key[0], self.seed, *key[1:]]
        return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


def online(devices: Devices, clients: Iterable[int], at: float) -> tuple[list[int], float]:
    """Those of ``clients`` who are there, and if nobody is, when somebody will be.

    Returns:
        The clients and ``at``, or nobody and a later time, infinite when there is none.
    """
    known = list(clients)
    if not devices.trace and not devices.offline_s:
        return known, at
    next_time = {client: devices.next_online(client, at) for client in known}
    there = [client for client in known if next_time[client] <= at]
    return there, at if there else min(next_time.values(), default=math.inf)


def _read_trace(path: Path) -> dict[int, tuple[tuple[float, float], ...]]:
    """A CSV file with the columns client, start_s and end_s."""
    spans: dict[int, list[tuple[float, float]]] = {}
    try:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                start, end = float(row["start_s"]), float(row["end_s"])
                if not 0 <= start < end:
                    raise ValueError(f"a span from {start:g} to {end:g}")
                spans.setdefault(int(row["client"]), []).append((start, end))
    except OSError as error:
        raise ConfigError(f"the trace {path} cannot be read: {error.strerror}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"the trace {path} is wrong: {error}", "it has the columns client, start_s and end_s"
        ) from error
    return {client: tuple(sorted(each)) for client, each in spans.items()}
