# SPDX-License-Identifier: Apache-2.0
"""The tasks that wait for a machine, and what the queue makes of them at this moment."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from fedml_broker import queue
from fedml_broker.fleet import Fleet, Machine
from fedml_broker.match import Candidate, Wanted
from fedml_broker.queue import Held, Plan, Waiting
from fedml_broker.tasks import Task

# The tasks that a tenant's machines have, oldest first.
HeldOf = Callable[[str], Iterable[Task]]


class Backlog:
    """Every queued task; `order` and `reasons` for people, `pick` for the dispatcher."""

    def __init__(self, fleet: Fleet, held: HeldOf) -> None:
        self._fleet = fleet
        self._held = held
        self._tasks: dict[str, Task] = {}
        self._plans: dict[str, Plan] = {}  # the latest, by tenant

    def __iter__(self) -> Iterator[Task]:
        return iter(list(self._tasks.values()))

    def add(self, task: Task) -> None:
        """It waits."""
        self._tasks[task.id] = task

    def remove(self, task: Task) -> None:
        """It does not wait any more; again is harmless."""
        self._tasks.pop(task.id, None)

    def pick(self) -> tuple[list[list[tuple[Task, Machine]]], dict[str, str]]:
        """The runs that start now, each with a machine for each task; and who gives way.

        Returns:
            The second part: for a held task's id, the run for whose sake it is to be recalled.
        """
        picked: list[list[tuple[Task, Machine]]] = []
        recall: dict[str, str] = {}
        for task in [t for t in self._tasks.values() if t.bound and t.device is not None]:
            machine = self._fleet.get(task.device or "")
            if machine is not None and not self._keeps_off(task, machine):
                picked.append([(task, machine)])
        now, whole = self._fleet.clock(), self._whole_runs()
        self._plans = {}
        for tenant, runs in whole.items():
            ready = {_key(r[0]): r for r in runs if max(t.not_until for t in r) <= now}
            waiting = [self._waiting(members) for members in ready.values()]
            plan = queue.plan(waiting, self._view(tenant), now)
            self._plans[tenant] = plan
            recall |= plan.recall
            for key, devices in plan.places.items():
                machines = [m for d in devices if (m := self._fleet.get(d)) is not None]
                picked.append(list(zip(ready[key], machines, strict=True)))
        return picked, recall

    def reasons(self, queued: Sequence[Task]) -> dict[str, str]:
        """Why the queued tasks of one run do not start, by the machine's name."""
        if not queued:
            return {}
        task, now = queued[0], self._fleet.clock()
        if task.bound and task.device is not None:
            machine = self._fleet.get(task.device)
            name = machine.name if machine is not None else task.device
            why = self._keeps_off(task, machine)
            return {name: why} if why else {}
        if len(queued) < task.terms.nodes:
            return {"the others of the run": "are still ending what they began"}
        if (rest := max(t.not_until for t in queued) - now) > 0:
            return {"every machine": f"it failed, and starts again in {math.ceil(rest)} s"}
        kept = self._plans.get(task.tenant, Plan()).reserved
        candidates = self._fleet.candidates(task.tenant)
        return queue.why(self._waiting(queued), candidates, kept, now)

    def would(self, tenant: str, run: Waiting) -> tuple[tuple[str, ...], dict[str, str]]:
        """The machine of each of its tasks, were a run submitted now; nothing is changed.

        Returns:
            The machines, empty where it would wait; and by a machine's name, why it is not one.
        """
        now = self._fleet.clock()
        others = [self._waiting(members) for members in self._whole_runs().get(tenant, [])]
        plan = queue.plan([*others, run], self._view(tenant), now)
        candidates = self._fleet.candidates(tenant)
        return plan.places.get(run.key, ()), queue.why(run, candidates, plan.reserved, now)

    def order(self, tenant: str) -> list[str]:
        """The runs of a tenant that wait, in the order in which they are looked at."""
        waiting = map(self._waiting, self._whole_runs().get(tenant, []))
        shares = queue.shares_of(self._view(tenant))
        return [run.run for run in queue.in_order(waiting, shares)]

    def _whole_runs(self) -> dict[str, list[list[Task]]]:
        """By tenant, the tasks that may go anywhere; those that go together, once all are here."""
        runs: dict[str, list[Task]] = {}
        for task in self._tasks.values():
            if not task.bound:
                runs.setdefault(_key(task), []).append(task)
        tenants: dict[str, list[list[Task]]] = {}
        for members in runs.values():
            if len(members) == members[0].terms.nodes:
                members.sort(key=lambda t: t.rank)
                tenants.setdefault(members[0].tenant, []).append(members)
        return tenants

    def _waiting(self, members: Sequence[Task]) -> Waiting:
        """A run, as the queue sees it."""
        first, now = members[0], self._fleet.clock()
        elsewhere: dict[str, str] = {}
        for task in members:
            elsewhere |= {d: "asked to wait" for d, t in task.not_before.items() if t > now}
            elsewhere |= task.refused
        terms = first.terms
        return Waiting(
            key=_key(first),
            run=first.run,
            user=first.offer.publisher,
            since=first.since,
            wanted=first.wanted(),
            priority=terms.priority,
            nodes=terms.nodes,
            lasts_s=first.offer.deadline_s,
            elsewhere=elsewhere,
        )

    def _view(self, tenant: str) -> "_View":
        return _View(self._fleet, tenant, self._held)

    def _keeps_off(self, task: Task, machine: Machine | None) -> str:
        """Why the machine that a task is bound to does not get it now; empty: it does."""
        if machine is None:
            return "revoked or removed"
        away = self._fleet.away(machine)
        if not away and task.not_before.get(task.device or "", 0) > self._fleet.clock():
            return "asked to wait"
        return away


@dataclass(frozen=True, slots=True)
class _View:
    """One tenant's machines, as the queue asks for them."""

    fleet: Fleet
    tenant: str
    tasks: HeldOf

    def everybody(self) -> Sequence[Candidate]:
        return self.fleet.candidates(self.tenant)

    def ranked(self, wanted: Wanted) -> Iterator[Candidate]:
        return self.fleet.ranked(self.tenant, wanted)

    def held(self) -> Sequence[Held]:
        return [
            Held(
                task=task.id,
                run=task.run,
                user=task.offer.publisher,
                device=task.device or "",
                needs=task.offer.needs,
                priority=task.terms.priority,
                preemptible=task.terms.preemptible and not task.stopping,
                ends_by=task.ends_by,
                recalled=bool(task.recalled),
            )
            for task in self.tasks(self.tenant)
        ]


def _key(task: Task) -> str:
    """What is placed at once: a run of several machines, or one task."""
    return task.run if task.terms.nodes > 1 else task.id
