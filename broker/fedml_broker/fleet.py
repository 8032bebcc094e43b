# SPDX-License-Identifier: Apache-2.0
"""The machines as this process hears them: who beats, who is silent, who has room.

Nothing here is on disk. After a restart the fleet is empty until the agents reconnect and beat,
which they do at once; what the store says of them is in `devices.py`.
"""

import asyncio
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from fedml_broker.match import Candidate, Capacity, Gpu, Wanted
from fedml_broker.places import Places
from fedml_protocol.devices import Heartbeat
from fedml_protocol.tasks import Needs
from fedml_protocol.topics import Address

# A device that has been silent for this many intervals is offline.
SILENT_AFTER = 3.5


@dataclass(slots=True)
class Machine:
    """One enrolled device.

    Attributes:
        heard_at: Of the last heartbeat, on the monotonic clock; None before the first.
        host: Its address, for other machines that work with it on one job; empty: unknown.
        cluster: The name of the cluster that has reserved it; empty: none. Changed by
            `Fleet.reserve` alone.
        holds: What the tasks and sessions on it were promised, by their id. Changed by
            `Fleet.hold` and `Fleet.free` alone.
    """

    address: Address
    name: str
    labels: dict[str, str]
    capacity: Capacity
    draining: bool = False
    host: str = ""
    cluster: str = ""
    heard_at: float | None = None
    boot_n: int = 0
    beat: Heartbeat | None = None
    holds: dict[str, Needs] = field(default_factory=dict)


class Fleet:
    """All machines of all tenants, by device id."""

    def __init__(self, *, heartbeat_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.heartbeat_s = heartbeat_s
        self.clock = clock
        # Called with a machine of which anything has changed, or that is no more.
        self.on_change: Callable[[Address], None] = lambda device: None
        self._machines: dict[str, Machine] = {}
        self._places: dict[str, Places] = {}
        self._bell = asyncio.Event()

    def bell(self) -> asyncio.Event:
        """Set when a machine joins, comes online or leaves. Get it first, look second, then wait.

        It does not ring for one that falls silent: that shows in the clock alone.
        """
        return self._bell

    def _ring(self) -> None:
        self._bell.set()
        self._bell = asyncio.Event()

    def __iter__(self) -> Iterator[Machine]:
        return iter(self._machines.values())

    def get(self, device: str) -> Machine | None:
        """The machine, if it is enrolled."""
        return self._machines.get(device)

    def put(self, machine: Machine) -> None:
        """Add a machine, or replace what is known of it; what was heard of it stays."""
        known = self._machines.get(machine.address.device)
        if known is not None:
            machine.heard_at, machine.boot_n = known.heard_at, known.boot_n
            machine.beat, machine.holds = known.beat, known.holds
            machine.cluster = known.cluster
        self._machines[machine.address.device] = machine
        self._of(machine.address.tenant).put(machine.address.device)
        self.on_change(machine.address)

    def drop(self, device: str) -> None:
        """Forget a machine that was revoked or removed."""
        machine = self._machines.pop(device, None)
        if machine is not None:
            self._of(machine.address.tenant).drop(device)
            self.on_change(machine.address)

    def hold(self, machine: Machine, room: str, needs: Needs) -> None:
        """Promise room on a machine to a task or session."""
        machine.holds[room] = needs
        self._settle(machine)

    def free(self, machine: Machine, room: str) -> None:
        """That room is free again."""
        machine.holds.pop(room, None)
        self._settle(machine)

    def heard(self, device: str, boot_n: int, beat: Heartbeat) -> Machine | None:
        """Note a heartbeat; None when the device is unknown or the beat is of an older boot."""
        machine = self._machines.get(device)
        if machine is None or boot_n < machine.boot_n:
            return None
        was_online = self.online(machine)
        machine.heard_at = self.clock()
        machine.boot_n = boot_n
        machine.beat = beat
        self._settle(machine)
        if not was_online:
            self._ring()
        return machine

    def gone(self, device: str, boot_n: int) -> None:
        """Note a will or a goodbye; that of an older boot says nothing."""
        machine = self._machines.get(device)
        if machine is not None and boot_n >= machine.boot_n:
            machine.heard_at = None
            self._settle(machine)
            self._ring()

    def online(self, machine: Machine) -> bool:
        """Whether it has beaten lately."""
        if machine.heard_at is None:
            return False
        return self.clock() - machine.heard_at < SILENT_AFTER * self.heartbeat_s

    def online_of(self, tenant: str) -> set[str]:
        """The devices of a tenant that are online."""
        return {
            name
            for name, machine in self._machines.items()
            if machine.address.tenant == tenant and self.online(machine)
        }

    def next_silence(self, devices: Iterable[str]) -> float:
        """After how many seconds the first of these is offline, if it says nothing till then."""
        heard = [
            machine.heard_at
            for device in devices
            if (machine := self._machines.get(device)) is not None and machine.heard_at is not None
        ]
        due = min(heard, default=math.inf) + SILENT_AFTER * self.heartbeat_s
        return max(due - self.clock(), 0.05)

    def away(self, machine: Machine) -> str:
        """Why it takes nothing now; empty: it does."""
        if not self.online(machine):
            return "offline"
        if machine.draining:
            return "draining"
        if machine.beat is not None and machine.beat.draining:
            return "its agent is stopping"
        return machine.beat.refusing if machine.beat is not None else ""

    def candidates(self, tenant: str) -> list[Candidate]:
        """The tenant's machines, for `match`."""
        return [self._candidate(m) for m in self._machines.values() if m.address.tenant == tenant]

    def could(self, tenant: str, wanted: Wanted) -> Set[str]:
        """The tenant's machines that could do it, now or later."""
        return self._of(tenant).could(wanted)

    def ranked(self, tenant: str, wanted: Wanted) -> Iterator[Candidate]:
        """Those of them that are not away and have a place free, the emptiest first."""
        return self._of(tenant).ranked(wanted)

    def reserve(self, device: str, cluster: str) -> None:
        """A machine is of a cluster now, or (an empty name) of none."""
        machine = self._machines.get(device)
        if machine is not None:
            machine.cluster = cluster
            self._of(machine.address.tenant).put(device)

    def _candidate(self, machine: Machine) -> Candidate:
        return Candidate(
            device=machine.address.device,
            name=machine.name,
            capacity=machine.capacity,
            labels=machine.labels,
            busy=tuple(machine.holds.values()),
            away=self.away(machine),
            cluster=machine.cluster,
        )

    def _of(self, tenant: str) -> Places:
        places = self._places.get(tenant)
        if places is None:
            places = self._places[tenant] = Places(self._look)
        return places

    def _look(self, device: str) -> Candidate | None:
        machine = self._machines.get(device)
        return None if machine is None else self._candidate(machine)

    def _settle(self, machine: Machine) -> None:
        self._of(machine.address.tenant).settle(machine.address.device)
        self.on_change(machine.address)


def read_capacity(inventory: Mapping[str, Any]) -> Capacity:
    """The capacity in an inventory that an agent posted (checked by `devices.Inventory`)."""
    told = inventory["capacity"]
    return Capacity(
        slots=told["slots"],
        cpus=told["cpus"],
        memory_bytes=told["memory_bytes"],
        disk_bytes=told["disk_bytes"],
        gpus=tuple(Gpu(**gpu) for gpu in told["gpus"]),
        kinds=frozenset(told["kinds"]),
        price=told.get("price", 0.0),
        # What an older agent does not tell of, it cannot do either.
        engine=told.get("engine", ""),
        no_engine=told.get("no_engine", ""),
        offline=told.get("offline", False),
    )
