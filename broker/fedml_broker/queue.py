# SPDX-License-Identifier: Apache-2.0
"""Who goes first, and where. Pure: what waits and what there is goes in, a plan comes out.

The order: higher priority, then the user with the smaller share of the machines (dominant resource
fairness, Ghodsi et al. 2011), then who came earlier. What cannot start yet is passed by those that
can (EASY backfilling, Lifka 1995), but the first that waits has its machines reserved: a later one
may use them only where it takes nothing that the first one lacks, or surely ends before these are
free. A run of several machines gets all of them or none.
"""

import heapq
import math
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fedml_broker import match
from fedml_broker.match import Candidate, Wanted
from fedml_protocol.tasks import Needs

LOWEST, HIGHEST = -100, 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What decides when a task goes, beside what it needs of a machine.

    Attributes:
        priority: From `LOWEST` to `HIGHEST`; higher goes first.
        preemptible: It may be ended and queued again for the sake of a higher priority.
        nodes: How many machines its run takes at once, each for one task of the run.
        cluster: The reserved machines that it goes to; empty: any that nobody has reserved.
        max_price: What its machine may cost an hour at most.
    """

    priority: int = 0
    preemptible: bool = False
    nodes: int = 1
    cluster: str = ""
    max_price: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A run whose tasks wait for machines, or one of its tasks where each goes for itself.

    Attributes:
        key: Who it is in the plan.
        since: When it was submitted.
        lasts_s: After which time it is ended at the latest; 0: never.
        elsewhere: Machines that it is not offered to, and why.
    """

    key: str
    run: str
    user: str
    since: float
    wanted: Wanted
    priority: int = 0
    nodes: int = 1
    lasts_s: float = 0.0
    elsewhere: Mapping[str, str] = field(default_factory=dict)

    def kind(self) -> tuple[Any, ...]:
        """Equal for runs of which one finds no room where the other found none."""
        return self.wanted.key(), self.nodes, self.lasts_s, frozenset(self.elsewhere)


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A task that a machine has.

    Attributes:
        ends_by: On the clock of `plan`'s `now`; infinite: nobody knows.
        recalled: It has been asked to end already, and will be queued again.
    """

    task: str
    run: str
    user: str
    device: str
    needs: Needs
    priority: int = 0
    preemptible: bool = False
    ends_by: float = math.inf
    recalled: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """A machine is kept for the first that waits.

    Attributes:
        key, run: Which one.
        needs: What that one takes of it.
        free_at: When there is room for it at the latest; infinite: nobody knows.
    """

    key: str
    run: str
    needs: Needs
    free_at: float


@dataclass(slots=True)
class Plan:
    """What is to be done.

    Attributes:
        places: The machines of each that starts, one a task; by its key.
        recall: Tasks that give way, each to the run named.
        reserved: By device.
    """

    places: dict[str, tuple[str, ...]] = field(default_factory=dict)
    recall: dict[str, str] = field(default_factory=dict)
    reserved: dict[str, Reservation] = field(default_factory=dict)


@dataclass(slots=True)
class _Room:
    """A machine while the plan is made."""

    at: Candidate
    busy: list[Needs]

    @property
    def full(self) -> bool:
        return len(self.busy) >= self.at.capacity.slots

    def rank(self) -> tuple[float, str, str]:
        """Work goes to the emptiest machine."""
        return len(self.busy) / self.at.capacity.slots, self.at.name, self.at.device

    def lacks(
        self, needs: Needs, without: Sequence[Held] = (), beside: Needs | None = None
    ) -> tuple[int, ...]:
        """What is missing for `needs`, were some tasks gone, or one more here."""
        busy = list(self.busy)
        for held in without:
            if held.needs in busy:
                busy.remove(held.needs)
        if beside is not None:
            busy.append(beside)
        return match.shortfall(needs, self.at.capacity, busy)


class View(Protocol):
    """One tenant's machines at this moment."""

    def everybody(self) -> Sequence[Candidate]:
        """All of them."""
        ...

    def ranked(self, wanted: Wanted) -> Iterator[Candidate]:
        """Those that could do it, are not away and have a place free, the emptiest first."""
        ...

    def held(self) -> Sequence[Held]:
        """What they have, oldest first."""
        ...


def plan(waiting: Sequence[Waiting], view: View, now: float) -> Plan:
    """Who starts where, who gives way, what is kept for whom; for one tenant.

    Of the machines only as many are looked at as it takes; all of them when the first that cannot
    start has its machines reserved.

    Args:
        now: The clock that `Held.ends_by` is on.
    """
    made = Plan()
    shares: dict[str, float] = defaultdict(float)
    whole: tuple[int, ...] = ()
    if len({w.user for w in waiting}) > 1:
        whole = _whole(view.everybody())
        shares |= used(view.held(), whole)
    taken: dict[str, _Room] = {}
    hopeless: set[tuple[Any, ...]] = set()
    for run in in_order(waiting, shares):
        kind = run.kind()
        if kind in hopeless:
            continue
        found = _find(run, view, taken, made.reserved, now)
        if found:
            for room in found:
                room.busy.append(run.wanted.needs)
                taken[room.at.device] = room
            made.places[run.key] = tuple(room.at.device for room in found)
            if whole:
                shares[run.user] += run.nodes * _share(_amounts(run.wanted.needs), whole)
            continue
        hopeless.add(kind)
        if not made.reserved:
            _reserve(run, view, taken, made)
    return made


def in_order(waiting: Iterable[Waiting], shares: Mapping[str, float]) -> Iterator[Waiting]:
    """Who is to be looked at next; `shares` may change meanwhile."""
    levels: dict[int, dict[str, deque[Waiting]]] = defaultdict(lambda: defaultdict(deque))
    for one in sorted(waiting, key=lambda w: (w.since, w.key)):
        levels[one.priority][one.user].append(one)
    for _, users in sorted(levels.items(), reverse=True):
        while users:
            user = min(users, key=lambda u: (shares.get(u, 0.0), users[u][0].since, u))
            yield users[user].popleft()
            if not users[user]:
                del users[user]


def why(
    run: Waiting,
    candidates: Iterable[Candidate],
    reserved: Mapping[str, Reservation],
    now: float,
) -> dict[str, str]:
    """For each machine, why the run does not start on it; by the machine's name."""
    reasons: dict[str, str] = {}
    fitting = []
    for one in candidates:
        reason = run.elsewhere.get(one.device) or match.never(run.wanted, one)
        reason = reason or match.now(run.wanted, one)
        kept = reserved.get(one.device)
        if (
            not reason
            and kept is not None
            and not _may_use(run, _Room(one, [*one.busy]), kept, now)
        ):
            reason = f"kept free for {kept.run}, which waits longer or has a higher priority"
            if kept.free_at < math.inf:
                left_s = max(kept.free_at - now, 0)
                reason += f"; a `deadline` of at most {left_s:.0f} s would let it go first"
        if reason:
            reasons[one.name] = reason
        else:
            fitting.append(one.name)
    if fitting and run.nodes > 1:
        reasons |= dict.fromkeys(fitting, f"free; {len(fitting)} of {run.nodes} machines are")
    return reasons


def shares_of(view: View) -> dict[str, float]:
    """Each user's share of the machines: that of the resource of which he has most."""
    return used(view.held(), _whole(view.everybody()))


def used(held: Iterable[Held], whole: Sequence[int]) -> dict[str, float]:
    """The same, of slots, GPUs, CPUs and memory in all."""
    sums: dict[str, list[int]] = defaultdict(lambda: [0] * len(whole))
    for one in held:
        sums[one.user] = [a + b for a, b in zip(sums[one.user], _amounts(one.needs), strict=True)]
    return {user: _share(amounts, whole) for user, amounts in sums.items()}


# ---------------------------------------------------------------------- small print


def _find(
    run: Waiting,
    view: View,
    taken: Mapping[str, _Room],
    reserved: Mapping[str, Reservation],
    now: float,
) -> list[_Room]:
    """Room for every task of the run, on the emptiest machines; empty: there is too little."""
    untouched = (_Room(c, [*c.busy]) for c in view.ranked(run.wanted) if c.device not in taken)
    able = (r for r in taken.values() if not r.full and not match.never(run.wanted, r.at))
    touched = sorted(able, key=_Room.rank)
    found: list[_Room] = []
    for room in heapq.merge(untouched, touched, key=_Room.rank):
        kept = reserved.get(room.at.device)
        if _fits(run, room) and (kept is None or _may_use(run, room, kept, now)):
            found.append(room)
            if len(found) == run.nodes:
                return found
    return []


def _may_ask(run: Waiting, at: Candidate) -> bool:
    """Whether a machine that could do it may be offered it."""
    return at.device not in run.elsewhere and not match.reserved(run.wanted, at)


def _fits(run: Waiting, room: _Room) -> bool:
    return _may_ask(run, room.at) and not any(room.lacks(run.wanted.needs))


def _may_use(run: Waiting, room: _Room, kept: Reservation, now: float) -> bool:
    """Whether the run may go on a machine that is kept for another one, which it must not delay."""
    if kept.key == run.key:
        return True
    if run.lasts_s and now + run.lasts_s <= kept.free_at < math.inf:
        return True
    return room.lacks(kept.needs) == room.lacks(kept.needs, beside=run.wanted.needs)


def _reserve(run: Waiting, view: View, taken: Mapping[str, _Room], made: Plan) -> None:
    """Keep the machines for the first that waits, and clear them where others must give way."""
    here: dict[str, list[Held]] = defaultdict(list)
    for one in view.held():
        here[one.device].append(one)
    needs = run.wanted.needs
    options = []
    for candidate in view.everybody():
        able = not candidate.away and not match.never(run.wanted, candidate)
        if not able or not _may_ask(run, candidate):
            continue
        room = taken.get(candidate.device) or _Room(candidate, [*candidate.busy])
        tasks = here[room.at.device]
        victims = _victims(run, room, tasks)
        free_at = _free_at(needs, room, tasks)
        cost = (math.inf, 0) if victims is None else _cost(victims)
        options.append((cost, free_at, room.rank(), room, victims))
    if len(options) < run.nodes:
        return  # it waits for machines that are away: to keep these would help nobody
    options.sort(key=lambda option: option[:3])
    chosen = options[: run.nodes]
    if all(victims is not None for *_, victims in chosen):
        for *_, victims in chosen:
            made.recall |= {v.task: run.run for v in victims or () if not v.recalled}
        free_at = math.inf
    else:
        chosen = sorted(options, key=lambda option: option[1:3])[: run.nodes]
        free_at = max(option[1] for option in chosen)
    for *_, room, _ in chosen:
        made.reserved[room.at.device] = Reservation(
            key=run.key, run=run.run, needs=needs, free_at=free_at
        )


def _victims(run: Waiting, room: _Room, tasks: Sequence[Held]) -> list[Held] | None:
    """The fewest tasks to end, those of least priority first; None: that would not be enough."""
    lower = [t for t in tasks if t.recalled or (t.preemptible and t.priority < run.priority)]
    # Of equal priority, the youngest has least to lose: tasks are listed by their age.
    lower.reverse()
    lower.sort(key=lambda t: (not t.recalled, t.priority))
    gone: list[Held] = []
    for victim in lower:
        if not any(room.lacks(run.wanted.needs, gone)):
            break
        gone.append(victim)
    if any(room.lacks(run.wanted.needs, gone)):
        return None
    # Some may have been taken for nothing, before the one that made the room.
    for one in gone[:-1]:
        if not one.recalled:
            rest = [g for g in gone if g is not one]
            if not any(room.lacks(run.wanted.needs, rest)):
                gone = rest
    return gone


def _cost(victims: Sequence[Held]) -> tuple[float, int]:
    new = [v for v in victims if not v.recalled]
    return (max((v.priority for v in new), default=-math.inf), len(new))


def _free_at(needs: Needs, room: _Room, tasks: Sequence[Held]) -> float:
    """When enough of what is there has ended; infinite: nobody knows."""
    gone: list[Held] = []
    for one in sorted(tasks, key=lambda t: t.ends_by):
        gone.append(one)
        if not any(room.lacks(needs, gone)):
            return one.ends_by
    return math.inf


def _amounts(needs: Needs) -> tuple[int, ...]:
    return (1, needs.gpus, needs.cpus, needs.memory_bytes)


def _whole(candidates: Iterable[Candidate]) -> tuple[int, ...]:
    """All that there is: slots, GPUs, CPUs, bytes of memory."""
    all_of = [c.capacity for c in candidates]
    amounts = [(c.slots, len(c.gpus), c.cpus, c.memory_bytes) for c in all_of]
    return tuple(sum(column) for column in zip(*amounts, strict=True)) or (0, 0, 0, 0)


def _share(amounts: Sequence[int], whole: Sequence[int]) -> float:
    parts = zip(amounts, whole, strict=True)
    return max((part / of for part, of in parts if of), default=0.0)
