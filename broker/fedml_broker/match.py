# SPDX-License-Identifier: Apache-2.0
"""Which device a task goes to, and why each of the others does not fit. Pure.

A demand that no device could ever meet and one that is only waiting for room look different: the
first says so at once, before anybody waits.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from fedml_protocol.gpus import is_model
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
        price: What its owner asks for an hour of it.
        engine: What runs containers there; empty: nothing does.
        no_engine: Why not, where the agent says so.
        offline: Whether a job can be cut off from the network there.
    """

    slots: int
    cpus: int
    memory_bytes: int
    disk_bytes: int
    gpus: tuple[Gpu, ...] = ()
    kinds: frozenset[str] = frozenset({"launch", "federate"})
    price: float = 0.0
    engine: str = ""
    no_engine: str = ""
    offline: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One device at this moment.

    Attributes:
        busy: What the tasks it holds were promised.
        away: Why it takes nothing now (offline, draining, its owner's reason); empty otherwise.
        cluster: Who asks for it must name this cluster; empty: nobody has reserved it.
    """

    device: str
    name: str
    capacity: Capacity
    labels: Mapping[str, str] = field(default_factory=dict)
    busy: tuple[Needs, ...] = ()
    away: str = ""
    cluster: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What one task asks for.

    Attributes:
        cluster: It goes to the machines of this cluster only.
        max_price: What its machine may cost an hour at most; None: any price.
        container: It runs in a container.
        offline: It is to have no network.
    """

    kind: str
    needs: Needs = field(default_factory=Needs)
    labels: Mapping[str, str] = field(default_factory=dict)
    cluster: str = ""
    max_price: float | None = None
    container: bool = False
    offline: bool = False

    def key(self) -> Hashable:
        """Equal for those that ask for the same."""
        labels = tuple(sorted(self.labels.items()))
        rest = self.cluster, self.max_price, self.container, self.offline
        return (self.kind, self.needs, labels, *rest)


def never(wanted: Wanted, candidate: Candidate) -> str:
    """Why this device can never do it, however long one waits; empty: it could."""
    if wanted.cluster and candidate.cluster != wanted.cluster:
        return f"is not in the cluster {wanted.cluster}"
    for name, value in wanted.labels.items():
        have = candidate.labels.get(name)
        if have != value:
            return f"label {name} is {have!r}, not {value!r}" if have else f"no label {name}"
    capacity, needs = candidate.capacity, wanted.needs
    if wanted.kind not in capacity.kinds:
        return f"its owner takes no {wanted.kind} tasks"
    if wanted.container and not capacity.engine:
        return f"runs no containers: {capacity.no_engine or 'it has no container engine'}"
    if wanted.offline and not capacity.offline:
        return "cannot run a job without a network (`network: none`)"
    if needs.gpus > len(_fitting(capacity.gpus, needs)):
        return _too_few_gpus(capacity.gpus, needs)
    if needs.cpus > capacity.cpus:
        return f"has {capacity.cpus} CPUs, {needs.cpus} are asked for"
    if needs.memory_bytes > capacity.memory_bytes:
        asked = _gib(needs.memory_bytes)
        return f"has {_gib(capacity.memory_bytes)} of memory, {asked} are asked for"
    if needs.disk_bytes > capacity.disk_bytes:
        asked = _gib(needs.disk_bytes)
        return f"has {_gib(capacity.disk_bytes)} of disk, {asked} are asked for"
    if wanted.max_price is not None and capacity.price > wanted.max_price:
        return f"costs {capacity.price:g} an hour, at most {wanted.max_price:g} is allowed"
    return ""


def reserved(wanted: Wanted, candidate: Candidate) -> str:
    """Whether others have reserved it, who may give it back one day; empty: nobody has."""
    if candidate.cluster in ("", wanted.cluster):
        return ""
    return f"is kept for the cluster {candidate.cluster}"


def shortfall(needs: Needs, capacity: Capacity, busy: Iterable[Needs]) -> tuple[int, ...]:
    """What is missing for one more task at this moment: slots, GPUs, CPUs, bytes of memory."""
    busy = list(busy)
    free = len(_fitting(_free_gpus(capacity, busy), needs)) if needs.gpus else 0
    missing = (
        len(busy) + 1 - capacity.slots,
        needs.gpus - free,
        needs.cpus and needs.cpus + sum(b.cpus for b in busy) - capacity.cpus,
        needs.memory_bytes
        and needs.memory_bytes + sum(b.memory_bytes for b in busy) - capacity.memory_bytes,
    )
    return tuple(max(each, 0) for each in missing)


def now(wanted: Wanted, candidate: Candidate) -> str:
    """Why this device, which could do it, cannot take it at this moment; empty: it can."""
    if candidate.away:
        return candidate.away
    if kept := reserved(wanted, candidate):
        return kept
    busy, capacity, needs = candidate.busy, candidate.capacity, wanted.needs
    if len(busy) >= capacity.slots:
        return f"busy: {len(busy)} of {capacity.slots} tasks run"
    large = _fitting(capacity.gpus, needs)
    free = _fitting(_free_gpus(capacity, busy), needs)
    if needs.gpus > len(free):
        which = _which(needs) if len(large) < len(capacity.gpus) else ""
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


class Fits(StrEnum):
    """Whether a device takes a task."""

    NOW = "now"
    LATER = "later"
    NEVER = "never"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What would become of a task on one device.

    Attributes:
        why: The reason against it; empty where it fits now.
    """

    device: str
    name: str
    fits: Fits
    why: str


def verdicts(wanted: Wanted, candidates: Iterable[Candidate]) -> list[Verdict]:
    """Every device with its verdict, by name."""
    found = []
    for candidate in sorted(candidates, key=lambda c: (c.name, c.device)):
        fits, why = Fits.NEVER, never(wanted, candidate)
        if not why:
            why = now(wanted, candidate)
            fits = Fits.LATER if why else Fits.NOW
        found.append(Verdict(device=candidate.device, name=candidate.name, fits=fits, why=why))
    return found


def summary(reasons: Mapping[str, str], *, named: int = 3) -> str:
    """Reasons in few words, the most frequent first: ``offline (a, b, c and 95 more)``.

    Args:
        reasons: By the machine's name.
        named: How many machines are named for each reason.
    """
    by_reason: dict[str, list[str]] = {}
    for name, why in reasons.items():
        by_reason.setdefault(why, []).append(name)
    texts = []
    for why, names in sorted(by_reason.items(), key=lambda item: (-len(item[1]), item[0])):
        more = f" and {len(names) - named} more" if len(names) > named else ""
        texts.append(f"{why} ({', '.join(sorted(names)[:named])}{more})")
    return "; ".join(texts)


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
    return [
        gpu
        for gpu in gpus
        if gpu.memory_bytes >= needs.gpu_memory_bytes
        and is_model(needs.gpu_model, gpu.name, gpu.memory_bytes)
    ]


def _too_few_gpus(gpus: tuple[Gpu, ...], needs: Needs) -> str:
    if not gpus:
        return f"has no GPU, {needs.gpus} are asked for"
    if len(gpus) < needs.gpus:
        return f"has {len(gpus)} GPUs, {needs.gpus} are asked for"
    model = [g for g in gpus if is_model(needs.gpu_model, g.name, g.memory_bytes)]
    if len(model) < needs.gpus:
        have = ", ".join(
            f"{n} × {name}" for name, n in sorted(Counter(g.name for g in gpus).items())
        )
        return f"has {have}: {len(model)} of {needs.gpus} are {needs.gpu_model}"
    return f"its GPUs have less than {_gib(needs.gpu_memory_bytes)} of memory each"


def _which(needs: Needs) -> str:
    model = f" of the model {needs.gpu_model}" if needs.gpu_model else ""
    return model + (f" with {_gib(needs.gpu_memory_bytes)}" if needs.gpu_memory_bytes else "")


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
