# SPDX-License-Identifier: Apache-2.0
"""Which device a task goes to, and why each of the others does not fit. Pure.

A demand that no device could ever meet and one that is only waiting for room look different: the
first says so at once, before anybody waits.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from fedml_protocol.tasks import Needs

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One accelerator as matching sees it."""

    uuid: str
    name: str
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What a machine has, and what its owner lets out of it.

    Attributes:
        slots: Tasks at the same time.
        kinds: Kinds of task that the owner's policy takes at all.
    """

    slots: int
    cpus: int
    memory_bytes: int
    disk_bytes: int
    gpus: tuple[Gpu, ...] = ()
    kinds: frozenset[str] = frozenset({"launch", "federate"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One device at this moment.

    Attributes:
        busy: What the tasks it holds were promised.
        away: Why it takes nothing now (offline, draining, its owner's reason); empty otherwise.
    """

    device: str
    name: str
    capacity: Capacity
    labels: Mapping[str, str] = field(default_factory=dict)
    busy: tuple[Needs, ...] = ()
    away: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What one task asks for."""

    kind: str
    needs: Needs = field(default_factory=Needs)
    labels: Mapping[str, str] = field(default_factory=dict)


def never(wanted: Wanted, candidate: Candidate) -> str:
    """Why this device can never do it, however long one waits; empty: it could."""
    for name, value in wanted.labels.items():
        have = candidate.labels.get(name)
        if have != value:
            return f"label {name} is {have!r}, not {value!r}" if have else f"no label {name}"
    capacity, needs = candidate.capacity, wanted.needs
    if wanted.kind not in capacity.kinds:
        return f"its owner takes no {wanted.kind} tasks"
    if needs.gpus > len(_fitting(capacity.gpus, needs)):
        return _too_few_gpus(capacity.gpus, needs)
    if needs.cpus > capacity.cpus:
        return f"has {capacity.cpus} CPUs, {needs.cpus} are asked for"
    if needs.memory_bytes > capacity.memory_bytes:
        return f"has {_gib(capacity.memory_bytes)} of memory"
    if needs.disk_bytes > capacity.disk_bytes:
        return f"has {_gib(capacity.disk_bytes)} of disk"
    return ""


def now(wanted: Wanted, candidate: Candidate) -> str:
    """Why this device, which could do it, cannot take it at this moment; empty: it can."""
    if candidate.away:
        return candidate.away
    busy, capacity, needs = candidate.busy, candidate.capacity, wanted.needs
    if len(busy) >= capacity.slots:
        return f"busy: {len(busy)} of {capacity.slots} tasks run"
    large = _fitting(capacity.gpus, needs)
    free = _fitting(_free_gpus(capacity, busy), needs)
    if needs.gpus > len(free):
        which = f" with {_gib(needs.gpu_memory_bytes)}" if len(large) < len(capacity.gpus) else ""
        return f"busy: {len(free)} of {len(large)} GPUs{which} are free"
    free_memory = capacity.memory_bytes - sum(b.memory_bytes for b in busy)
    if needs.memory_bytes > free_memory:
        return f"busy: {_gib(free_memory)} of memory are not promised"
    if needs.cpus > capacity.cpus - sum(b.cpus for b in busy):
        return "busy: too few CPUs are free"
    return ""


def choose(wanted: Wanted, candidates: Iterable[Candidate]) -> tuple[str | None, dict[str, str]]:
    """The device to offer to, and for each device that does not fit its reason.

    Of those that fit, the one with the largest part of its slots free, then by name: work spreads,
    and the choice is the same for the same fleet.
    """
    reasons: dict[str, str] = {}
    fitting: list[tuple[float, str, str]] = []
    for candidate in candidates:
        reason = never(wanted, candidate) or now(wanted, candidate)
        if reason:
            reasons[candidate.name] = reason
        else:
            load = len(candidate.busy) / candidate.capacity.slots
            fitting.append((load, candidate.name, candidate.device))
    return (min(fitting)[2] if fitting else None), reasons


def _free_gpus(capacity: Capacity, busy: Iterable[Needs]) -> list[Gpu]:
    """What is left when each takes the smallest that are large enough, as agents lease them.

    Which ones are really taken only the agent knows: an offer that fits by this count it may have
    to reject for now, and is asked again later.
    """
    free = list(capacity.gpus)
    for needs in busy:
        # Those too small come last: taken only if a machine has less than when it was promised.
        large = sorted(_fitting(free, needs), key=lambda gpu: (gpu.memory_bytes, gpu.uuid))
        free = [*large, *(gpu for gpu in free if gpu not in large)][needs.gpus :]
    return free


def _fitting(gpus: Iterable[Gpu], needs: Needs) -> list[Gpu]:
    return [gpu for gpu in gpus if gpu.memory_bytes >= needs.gpu_memory_bytes]


def _too_few_gpus(gpus: tuple[Gpu, ...], needs: Needs) -> str:
    if not gpus:
        return f"has no GPU, {needs.gpus} are asked for"
    if len(gpus) < needs.gpus:
        return f"has {len(gpus)} GPUs, {needs.gpus} are asked for"
    return f"its GPUs have less than {_gib(needs.gpu_memory_bytes)} of memory each"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
