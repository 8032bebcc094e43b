# SPDX-License-Identifier: Apache-2.0
"""All tasks that are not final, by id, by run, and by the machine that holds them."""

from collections.abc import Iterator

from fedml_broker.fleet import Fleet, Machine
from fedml_broker.tasks import Task
from fedml_protocol.tasks import HELD


class OpenTasks:
    """The dispatcher's mirror of the store; a held task has its room on its machine."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._tasks: dict[str, Task] = {}
        self._runs: dict[str, dict[str, Task]] = {}
        # The held ones by their device: what a heartbeat costs must not grow with the fleet.
        self._held: dict[str, dict[str, Task]] = {}

    def __iter__(self) -> Iterator[Task]:
        return iter(self._tasks.values())

    def add(self, task: Task) -> None:
        """It was just committed, or loaded."""
        self._tasks[task.id] = task
        self._runs.setdefault(task.run, {})[task.id] = task

    def remove(self, task: Task) -> bool:
        """It is final; whether it was here."""
        found = self._tasks.pop(task.id, None) is not None
        if (known := self._runs.get(task.run)) is not None:
            known.pop(task.id, None)
            if not known:
                del self._runs[task.run]
        self.let_go(task)
        return found

    def __getitem__(self, task: str) -> Task:
        return self._tasks[task]

    def get(self, task: str) -> Task | None:
        """By its id."""
        return self._tasks.get(task)

    def current(self, machine: Machine, task: str, epoch: int) -> Task | None:
        """The task that a machine speaks of, if it is the one that holds this epoch of it."""
        found = self._tasks.get(task)
        if found is None or found.epoch != epoch or found.state not in HELD:
            return None
        return found if found.device == machine.address.device else None

    def of_run(self, run: str) -> list[Task]:
        """Those of a run."""
        return list(self._runs.get(run, {}).values())

    def runs(self) -> list[str]:
        """Those that have any."""
        return list(self._runs)

    def hold(self, task: Task) -> None:
        """Its device has it; the room that it needs there is taken."""
        device = task.device or ""
        self._held.setdefault(device, {})[task.id] = task
        machine = self._fleet.get(device)
        if machine is not None:
            self._fleet.hold(machine, task.room, task.offer.needs)

    def let_go(self, task: Task) -> None:
        """No device has it, if one had."""
        device = task.device or ""
        if (held := self._held.get(device)) is not None:
            held.pop(task.id, None)
            if not held:
                del self._held[device]
        machine = self._fleet.get(device)
        if machine is not None and task.room == task.id:  # a session's room is its run's to free
            self._fleet.free(machine, task.room)

    def held_by(self, machine: Machine) -> list[Task]:
        """Those on one machine."""
        return list(self._held.get(machine.address.device, {}).values())

    def held_of(self, tenant: str) -> Iterator[Task]:
        """Those of a tenant, wherever they are."""
        held = (task for tasks in self._held.values() for task in tasks.values())
        return (task for task in held if task.tenant == tenant)
