# SPDX-License-Identifier: Apache-2.0
"""Gives tasks to machines, and takes them back from machines that fell silent.

Three things move a task: `serve` offers what is queued, `heard` (called with each report of an
agent) accepts, rejects and ends, and one timer per held task watches its lease. Every step is
first a fenced transaction in the store, then a change of the mirror in memory, then a message.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from sqlalchemy import Connection

from fedml_broker import match, tasks
from fedml_broker.blobs import Blobs
from fedml_broker.fleet import Fleet, Machine
from fedml_broker.mqtt import PostError
from fedml_broker.orders import Orders
from fedml_broker.store import Store, StoreUnavailable
from fedml_broker.tasks import Task
from fedml_protocol.cause import Cause, Fault
from fedml_protocol.devices import RECONNECT_BEATS, Heartbeat
from fedml_protocol.tasks import (
    FINAL,
    HELD,
    PERMANENT,
    Accept,
    Cancel,
    CloseSession,
    Needs,
    Progress,
    Reject,
    Result,
    Tail,
    TaskState,
    move,
)
from fedml_protocol.topics import Address

log = logging.getLogger(__name__)

# The longest pause before a machine gets a task again that it keeps losing.
_LOSS_PAUSE_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How long things may take, seconds. Tests shorten them."""

    heartbeat_s: float = 10.0
    lease_s: float = 45.0
    offer_s: float = 30.0
    # A timer that fires this much late means that this process itself was away (suspended).
    away_s: float = 5.0


class Work(Protocol):
    """What a word does when a task of its ends."""

    def ended(self, tx: Connection, task: Task, result: Result) -> None:
        """In the transaction that ends the task: the effect."""

    def told(self, task: Task, result: Result) -> None:
        """After the commit: wake whoever waits."""

    async def running(self, task: Task) -> None:
        """The device has started it."""


class Dispatcher:
    """All tasks that are not final, and where each of them is."""

    def __init__(
        self, store: Store, fleet: Fleet, orders: Orders, blobs: Blobs, timing: Timing
    ) -> None:
        self.timing = timing
        self.works: dict[str, Work] = {}
        # Called with a run whose reasons for waiting have changed.
        self.on_waiting: Callable[[str], None] = lambda run: None
        self.on_ended: Callable[[TaskState], None] = lambda state: None
        self._store = store
        self._fleet = fleet
        self._orders = orders
        self._blobs = blobs
        self._tasks: dict[str, Task] = {}
        # The held ones by their device: what a heartbeat costs must not grow with the fleet.
        self._held: dict[str, dict[str, Task]] = {}
        self._wake = asyncio.Event()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._background: set[asyncio.Task[None]] = set()

    # ------------------------------------------------------------------ what words ask for

    async def load(self) -> None:
        """Take up every open task; a device that may hold one gets the time to come back."""
        back_s = RECONNECT_BEATS * self.timing.heartbeat_s + self.timing.lease_s
        for task in await self._store.read(tasks.load_open):
            self._tasks[task.id] = task
            if task.state in HELD and task.device is not None:
                self._hold(task)
                self._extend(task, back_s)
                if task.stopping:  # told with its next heartbeat
                    self._end_unanswered(task, back_s)
        for run, reason in {t.run: t.stopping for t in self._queued() if t.stopping}.items():
            await self._end_queued(run, reason)
        self._wake.set()

    def added(self, new: Iterable[Task]) -> None:
        """Tasks that were just committed."""
        self._tasks.update((task.id, task) for task in new)
        self._wake.set()

    def of_run(self, run: str) -> list[Task]:
        """The open tasks of a run."""
        return [task for task in self._tasks.values() if task.run == run]

    def states(self) -> list[TaskState]:
        """The state of each open task."""
        return [task.state for task in self._tasks.values()]

    def waiting(self, run: str) -> str:
        """Why a run's tasks are still queued, machine by machine; empty: none is."""
        queued = [t for t in self.of_run(run) if t.state is TaskState.QUEUED]
        return (
            "; ".join(f"{name}: {why}" for name, why in queued[0].reasons.items()) if queued else ""
        )

    def wake(self) -> None:
        """Something has changed that may let a queued task go."""
        self._wake.set()

    def reserve(self, device: str, session: str, needs: Needs) -> None:
        """Keep room on a device for a session, between its tasks too."""
        machine = self._fleet.get(device)
        if machine is not None:
            machine.holds[session] = needs

    def release(self, device: str, session: str) -> None:
        """The session is over: its warm worker may go."""
        machine = self._fleet.get(device)
        if machine is None:
            return
        machine.holds.pop(session, None)
        self._wake.set()
        self._send(machine.address, CloseSession(session=session))

    def tail(self, run: str, on: bool) -> None:
        """Somebody starts or stops watching the logs of a run."""
        for task in self.of_run(run):
            machine = self._fleet.get(task.device or "")
            if machine is not None and task.state in HELD:
                self._send(machine.address, Tail(task=task.id, on=on))

    async def stop_run(self, run: str, reason: str) -> None:
        """End every task of a run: the queued at once, the held ones by their device."""
        await self._end_queued(run, reason)
        for task in self.of_run(run):
            if task.state in HELD:
                await self.stop(task, reason)

    async def _end_queued(self, run: str, reason: str) -> None:
        # Listed here: the writer's thread must not walk through what this one changes.
        mine = self.of_run(run)
        stopped = set(await self._store.write(lambda tx: self._stop_queued(tx, run, mine)))
        for task in self.of_run(run):
            if task.id in stopped:
                self._forget(task, _stopped(task, reason))

    def _stop_queued(self, tx: Connection, run: str, mine: Sequence[Task]) -> list[str]:
        ids = tasks.stop_queued(tx, run)
        for task in mine:
            if task.id in ids:
                self.works[task.kind].ended(tx, task, _stopped(task, "stopped"))
        return ids

    async def stop(self, task: Task, reason: str) -> None:
        """End one held task. A device that does not answer in time is not waited for."""
        task.stopping = reason
        machine = self._fleet.get(task.device or "")
        if machine is None or not self._fleet.online(machine):
            await self._end(task, _stopped(task, f"{reason} (its device is offline)"))
            return
        await self._orders.send(machine.address, _cancel(task))
        self._end_unanswered(task)

    def _end_unanswered(self, task: Task, delay_s: float = 0.0) -> None:
        epoch, end = task.epoch, _stopped(task, f"{task.stopping} (no answer)")
        self._later(
            delay_s + task.offer.grace_s + self.timing.offer_s,
            lambda: self._end_if(task, epoch, end),
        )

    def give_up(self, run: str, chosen: Iterable[Task]) -> None:
        """Cancel tasks whose results no longer matter; their rows have been stopped already."""
        for task in list(chosen):
            self._forget(task, None)
            machine = self._fleet.get(task.device or "")
            if machine is not None and task.state in HELD:
                self._send(
                    machine.address,
                    Cancel(task=task.id, epoch=task.epoch, grace_s=0, reason=f"{run} goes on"),
                )

    # ------------------------------------------------------------------ offering

    async def serve(self) -> None:
        """Offer what is queued, whenever something may have changed.

        Looked at again once an interval all the same: the reasons that people read name machines
        that have fallen silent, and silence wakes nobody.
        """
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.timing.heartbeat_s):
                    await self._wake.wait()
            self._wake.clear()
            picked = [(t, m) for t in self._queued() if (m := self._look(t)) is not None]
            if picked:
                await self._offer(picked)

    def _queued(self) -> list[Task]:
        return [t for t in self._tasks.values() if t.state is TaskState.QUEUED]

    def _look(self, task: Task) -> Machine | None:
        before = task.reasons
        machine = self._pick(task)
        if machine is None and task.reasons != before:
            self.on_waiting(task.run)
        return machine

    def _pick(self, task: Task) -> Machine | None:
        """A machine for this task; room on it is taken at once."""
        now = self._fleet.clock()
        wanted = task.wanted()
        if task.bound and task.device is not None:
            machine = self._fleet.get(task.device)
            if machine is None:
                task.reasons = {task.device: "revoked or removed"}
                return None
            away = self._fleet.away(machine)
            if not away and task.not_before.get(task.device, 0) > now:
                away = "asked to wait"
            task.reasons = {machine.name: away} if away else {}
            if away:
                return None
        else:
            refused = {**task.refused, **{d: "" for d, t in task.not_before.items() if t > now}}
            candidates = [c for c in self._fleet.candidates(task.tenant) if c.device not in refused]
            device, task.reasons = match.choose(wanted, candidates)
            for other, why in task.refused.items():
                known = self._fleet.get(other)
                task.reasons[known.name if known else other] = why
            machine = self._fleet.get(device) if device is not None else None
            if machine is None:
                return None
        task.state = move(task.state, TaskState.OFFERED)
        task.epoch += 1
        task.device = machine.address.device
        task.accepted_seq = -1
        self._hold(task)
        return machine

    async def _offer(self, picked: Sequence[tuple[Task, Machine]]) -> None:
        def commit(tx: Connection) -> list[bool]:
            return [
                tasks.offered(tx, task.id, task.epoch, machine.address.device)
                for task, machine in picked
            ]

        done = await self._when_there_is_room(commit)
        sending = []
        for (task, machine), still_queued in zip(picked, done, strict=True):
            if not still_queued:  # stopped in the meantime
                self._let_go(task)
                continue
            self._extend(task, self.timing.offer_s)
            sending.append(self._publish_offer(task, machine.address))
        # All at once: the endpoint commits them together, and the last device waits for no other.
        await asyncio.gather(*sending)

    async def _when_there_is_room(self, commit: Callable[[Connection], list[bool]]) -> list[bool]:
        """A full disk holds offers back; it does not end the broker."""
        while True:
            try:
                return await self._store.write(commit)
            except StoreUnavailable as error:
                log.warning("offers wait: %s", error)
                await asyncio.sleep(self.timing.heartbeat_s)

    async def _publish_offer(self, task: Task, address: Address) -> None:
        try:
            await self._orders.send(address, task.current_offer(), lifetime_s=self.timing.offer_s)
        except (PostError, StoreUnavailable) as error:  # its timer will offer it again
            log.warning("offer of %s to %s was not sent: %s", task.id, address.device, error)

    # ------------------------------------------------------------------ what agents report

    async def beat(self, machine: Machine, beat: Heartbeat, seq: int) -> None:
        """Renew leases, and heal what a lost message left apart."""
        held = {(b.task, b.epoch) for b in beat.tasks}
        for told in beat.tasks:
            task = self._tasks.get(told.task)
            if task is not None and self._is_current(task, machine, told.epoch):
                if task.state is TaskState.OFFERED:  # its Accept was lost
                    task.state = move(task.state, TaskState.LEASED)
                    task.accepted_seq = seq
                task.lease_until = self._fleet.clock() + self.timing.lease_s
                if task.stopping and told.state not in FINAL:  # its Cancel was lost, it may be
                    self._send(machine.address, _cancel(task))
            elif told.state not in FINAL:
                self._send(
                    machine.address,
                    Cancel(task=told.task, epoch=told.epoch, reason="no longer yours"),
                )
        for task in self._held_by(machine):
            gone = (task.id, task.epoch) not in held and task.accepted_seq < seq
            if gone and task.state in (TaskState.LEASED, TaskState.RUNNING):
                await self._take_back(task, f"{machine.name} no longer has it")

    async def online(self, machine: Machine) -> None:
        """A machine (re)connected: what was offered to it may have been lost on the way."""
        for task in self._held_by(machine):
            if task.state is TaskState.OFFERED:
                await self._publish_offer(task, machine.address)

    async def accept(self, machine: Machine, told: Accept, seq: int) -> None:
        """The device takes the task; not written down: the heartbeat would say it again."""
        task = self._tasks.get(told.task)
        if task is None or not self._is_current(task, machine, told.epoch):
            self._send(
                machine.address,
                Cancel(task=told.task, epoch=told.epoch, grace_s=0, reason="offered elsewhere"),
            )
        elif task.state is TaskState.OFFERED:
            task.state = move(task.state, TaskState.LEASED)
            task.accepted_seq = seq
            self._extend(task, self.timing.lease_s)

    async def reject(self, machine: Machine, told: Reject) -> None:
        """The device does not take it: somebody else may, or it later."""
        task = self._tasks.get(told.task)
        if task is None or not self._is_current(task, machine, told.epoch):
            return
        if task.state is not TaskState.OFFERED:
            return
        device = machine.address.device
        detail = told.detail or told.reason.name.lower()
        if told.reason in PERMANENT:
            task.refused[device] = f"refused: {detail}"
            if task.bound:
                message = f"{machine.name} refused: {detail}"
                cause = Cause(fault=Fault.POLICY, message=message)
                await self._end(task, _ended(task, TaskState.FAILED, cause))
                return
        else:
            task.not_before[device] = self._fleet.clock() + self.timing.heartbeat_s
            self._later(self.timing.heartbeat_s, self._awake)
        task.reasons[machine.name] = detail
        await self._requeue(task)

    async def progress(self, machine: Machine, told: Progress) -> None:
        """The task runs."""
        task = self._tasks.get(told.task)
        if task is None or not self._is_current(task, machine, told.epoch):
            return
        if task.state in (TaskState.OFFERED, TaskState.LEASED):
            task.state = move(task.state, TaskState.RUNNING)
            await self.works[task.kind].running(task)

    async def result(self, machine: Machine, told: Result) -> None:
        """The task has ended. Counted once; acknowledged always, once it is on the disk."""
        device = machine.address.device
        task = self._tasks.get(told.task)
        if task is not None and self._is_current(task, machine, told.epoch):
            if any(self._blobs.size(a.blob.sha256) is None for a in told.artifacts):
                # Not acknowledged: the agent uploads again before it sends again.
                log.warning("%s: a result of %s names blobs that are not here", told.task, device)
                return
            if told.state is TaskState.LOST:
                why = told.cause.message if told.cause is not None else "lost"
                self._pause_after_loss(task, device)
                await self._take_back(task, f"{machine.name}: {why}")
            else:
                await self._end(task, told, device)
        for artifact in told.artifacts:
            self._blobs.release(artifact.blob.sha256, device)
        self._spawn(self._orders.acknowledge(machine.address, told.task, told.epoch))

    # ------------------------------------------------------------------ ends

    async def _end(self, task: Task, result: Result, device: str | None = None) -> None:
        work = self.works[task.kind]

        def commit(tx: Connection) -> bool:
            if not tasks.ended(tx, device, result):
                return False
            work.ended(tx, task, result)
            return True

        if result.epoch != task.epoch:
            result = _ended(task, result.state, result.cause)
        if await self._store.write(commit):
            self._forget(task, result)

    async def _end_if(self, task: Task, epoch: int, result: Result) -> None:
        if self._tasks.get(task.id) is task and task.epoch == epoch:
            await self._end(task, result)

    async def _take_back(self, task: Task, why: str) -> None:
        """A machine lost the task: offer it again, or give it up when no try is left."""
        log.info("task %s: %s", task.id, why)
        if task.tries_left < 1 and not task.stopping:
            await self._end(task, tasks.lost(task, why))
            return
        await self._requeue(task, task.tries_left - 1)

    def _pause_after_loss(self, task: Task, device: str) -> None:
        """The first loss costs no time; one that repeats must not go round at full speed."""
        pause = min(2.0**task.losses - 1, _LOSS_PAUSE_S)
        task.losses += 1
        if pause:
            task.not_before[device] = self._fleet.clock() + pause
            self._later(pause, self._awake)

    async def _requeue(self, task: Task, tries: int | None = None) -> None:
        if task.stopping:  # nobody wants it any more
            await self._end(task, _stopped(task, task.stopping))
            return
        epoch, left = task.epoch, task.tries_left if tries is None else tries
        again = await self._store.write(lambda tx: tasks.queued_again(tx, task.id, epoch, left))
        if again and task.epoch == epoch and task.state in HELD:
            task.tries_left = left
            self._let_go(task)
            task.state = move(task.state, TaskState.QUEUED)
            if not task.bound:
                task.device = None
            self._wake.set()

    def _forget(self, task: Task, result: Result | None) -> None:
        if self._tasks.pop(task.id, None) is not None:
            self.on_ended(TaskState.STOPPED if result is None else result.state)
        self._let_go(task)
        self._wake.set()
        if result is not None:
            self.works[task.kind].told(task, result)

    def _held_by(self, machine: Machine) -> list[Task]:
        return list(self._held.get(machine.address.device, {}).values())

    def _hold(self, task: Task) -> None:
        device = task.device or ""
        self._held.setdefault(device, {})[task.id] = task
        machine = self._fleet.get(device)
        if machine is not None:
            machine.holds[task.room] = task.offer.needs

    def _let_go(self, task: Task) -> None:
        timer = self._timers.pop(task.id, None)
        if timer is not None:
            timer.cancel()
        device = task.device or ""
        if (held := self._held.get(device)) is not None:
            held.pop(task.id, None)
            if not held:
                del self._held[device]
        machine = self._fleet.get(device)
        if machine is not None and task.room == task.id:  # a session's room is its run's to free
            machine.holds.pop(task.room, None)

    def _is_current(self, task: Task, machine: Machine, epoch: int) -> bool:
        return task.epoch == epoch and task.device == machine.address.device and task.state in HELD

    # ------------------------------------------------------------------ leases

    def _extend(self, task: Task, seconds: float) -> None:
        task.lease_until = self._fleet.clock() + seconds
        old = self._timers.pop(task.id, None)
        if old is not None:
            old.cancel()
        self._watch(task)

    def _watch(self, task: Task) -> None:
        delay = max(task.lease_until - self._fleet.clock(), 0.0)
        due = asyncio.get_running_loop().time() + delay
        self._timers[task.id] = asyncio.get_running_loop().call_at(
            due, self._lease_is_over, task, due
        )

    def _lease_is_over(self, task: Task, due: float) -> None:
        late = asyncio.get_running_loop().time() - due
        if late > self.timing.away_s:
            # This process was frozen, not the agents: let each of them be heard first.
            task.lease_until = self._fleet.clock() + self.timing.lease_s
        if self._fleet.clock() < task.lease_until - 0.001:  # heartbeats have renewed it
            self._watch(task)
            return
        # Should the step fail (a full disk), it is tried again.
        task.lease_until = self._fleet.clock() + self.timing.heartbeat_s
        self._watch(task)
        if task.state is TaskState.OFFERED:
            self._spawn(self._requeue(task))
        elif task.state in HELD:
            machine = self._fleet.get(task.device or "")
            name = machine.name if machine is not None else task.device
            why = f"{name} was not heard of for {self.timing.lease_s:g} s"
            self._spawn(self._take_back(task, why))

    # ------------------------------------------------------------------ small print

    async def _awake(self) -> None:
        self._wake.set()

    def _later(self, seconds: float, work: Callable[[], Awaitable[None]]) -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(seconds, lambda: self._spawn(work()))

    def _send(self, address: Address, what: Cancel | CloseSession | Tail) -> None:
        self._spawn(self._orders.send(address, what))

    def _spawn(self, work: Awaitable[None]) -> None:
        async def guarded() -> None:
            try:
                await work
            except Exception:  # one failed message or step must not end the broker
                log.exception("a step of the dispatcher failed")

        task = asyncio.get_running_loop().create_task(guarded(), name="dispatch.step")
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _ended(task: Task, state: TaskState, cause: Cause | None) -> Result:
    return Result(task=task.id, epoch=max(task.epoch, 1), state=state, cause=cause)


def _cancel(task: Task) -> Cancel:
    """To the device of a task that is being stopped. Again is harmless: the first one counts."""
    return Cancel(task=task.id, epoch=task.epoch, grace_s=task.offer.grace_s, reason=task.stopping)


def _stopped(task: Task, reason: str) -> Result:
    cause = Cause(fault=Fault.TASK, message=reason)
    return _ended(task, TaskState.STOPPED, cause)
