# SPDX-License-Identifier: Apache-2.0
"""One tenant's machines in the order in which work is given out, so that few are looked at.

Kept in step with every change, because tasks come hundreds a second and machines are thousands:
which machines have room (a sorted list), and which could ever do what was asked for lately (a set
for each demand). What only the clock tells, a machine that has fallen silent, is seen when it is
looked at.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Hashable, Iterator, Set

from fedml_broker.match import Candidate, Wanted, never

# Demands whose machines are remembered.
_KEPT = 64

_Rank = tuple[float, str, str]


class Places:
    """By device id; `candidate` says how a machine is at this moment, None: it is unknown."""

    def __init__(self, candidate: Callable[[str], Candidate | None]) -> None:
        self._candidate = candidate
        self._devices: set[str] = set()
        self._roomy: list[_Rank] = []
        self._rank: dict[str, _Rank] = {}
        self._could: dict[Hashable, tuple[Wanted, set[str]]] = {}

    def put(self, device: str) -> None:
        """A machine is new, or what it has was changed."""
        found = self._candidate(device)
        if found is None:
            self.drop(device)
            return
        self._devices.add(device)
        for wanted, able in self._could.values():
            (able.discard if never(wanted, found) else able.add)(device)
        self.settle(device)

    def drop(self, device: str) -> None:
        """A machine is gone."""
        self._devices.discard(device)
        for _, able in self._could.values():
            able.discard(device)
        self._move(device, None)

    def settle(self, device: str) -> None:
        """A machine has got or lost room, or was heard of."""
        found = self._candidate(device)
        rank = None
        if found is not None and not found.away and len(found.busy) < found.capacity.slots:
            rank = (len(found.busy) / found.capacity.slots, found.name, device)
        self._move(device, rank)

    def could(self, wanted: Wanted) -> Set[str]:
        """Every machine that could do it, now or later."""
        key = wanted.key()
        known = self._could.get(key)
        if known is None:
            if len(self._could) >= _KEPT:
                del self._could[next(iter(self._could))]
            able = {
                device
                for device in self._devices
                if (found := self._candidate(device)) is not None and not never(wanted, found)
            }
            known = self._could[key] = wanted, able
        return known[1]

    def ranked(self, wanted: Wanted) -> Iterator[Candidate]:
        """Those that could do it, are not away and have a place free, in the order of work."""
        able = self.could(wanted)
        few = 8 * len(able) < len(self._roomy)
        ranks = sorted(self._rank[d] for d in able if d in self._rank) if few else self._roomy
        silent: list[str] = []
        try:
            for _, _, device in ranks:
                if device not in able:
                    continue
                found = self._candidate(device)
                if found is None or found.away:
                    silent.append(device)
                else:
                    yield found
        finally:  # also when nobody asks for the rest
            for device in silent:
                self._move(device, None)

    def _move(self, device: str, rank: _Rank | None) -> None:
        before = self._rank.get(device)
        if before == rank:
            return
        if before is not None:
            del self._roomy[bisect_left(self._roomy, before)]
            del self._rank[device]
        if rank is not None:
            insort(self._roomy, rank)
            self._rank[device] = rank
