# SPDX-License-Identifier: Apache-2.0
"""Gives tasks to machines, and takes them back from machines that fell silent.

Three things move a task: `serve` offers what is queued, `heard` (called with each report of an
agent) accepts, rejects and ends, and one timer per held task watches its lease. Every step is
first a fenced transaction in the store, then a change of the mirror in memory, then a message.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from typing import Protocol

from sqlalchemy import Connection

from fedml_broker import deploy, match, tasks
from fedml_broker.backlog import Backlog
from fedml_broker.blobs import Blobs
from fedml_broker.fleet import Fleet, Machine
from fedml_broker.leases import Leases, Timing
from fedml_broker.mqtt import PostError
from fedml_broker.observe import add_event
from fedml_broker.open_tasks import OpenTasks
from fedml_broker.orders import Orders
from fedml_broker.queue import Waiting
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

# The longest pause before a machine gets a task again that it keeps losing, and before one starts
# again that keeps failing.
_LOSS_PAUSE_S = 30.0
_FAILURE_PAUSE_S = 300.0

# A machine may note so much of one task, each note so long.
_NOTES = 20
_NOTE_CHARACTERS = 500

# With more machines than these, a person is told how many of them have each reason.
_MACHINES_NAMED = 20

# With large queues and fleets, looking through them takes no more than a fifth of a core. What is
# over after so many CPU seconds keeps nobody waiting.
_PLANNING = 4
_LONG_S = 0.002


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
        # Called with a run that still waits after it was looked at: for other reasons, it may be.
        self.on_waiting: Callable[[str], None] = lambda run: None
        # The tasks of one run are about to be offered at once: each may be told of the others.
        self.on_together: Callable[[Sequence[tuple[Task, Machine]]], None] = lambda members: None
        # Called with a run of which a machine has noted something.
        self.on_noted: Callable[[str], None] = lambda run: None
        # Called when a service answers on a port of its machine; 0: when it no longer does.
        self.on_serves: Callable[[Task, Machine, int], Awaitable[None]]
        self.on_ended: Callable[[TaskState], None] = lambda state: None
        # Called when a machine has taken a task, and when its result is in the store.
        self.on_accepted: Callable[[Task], None] = lambda task: None
        self.on_result: Callable[[Task, Result], None] = lambda task, result: None
        self._store = store
        self._fleet = fleet
        self._orders = orders
        self._blobs = blobs
        self._tasks = OpenTasks(fleet)
        self._leases = Leases(fleet, timing, self._lease_is_over)
        self._backlog = Backlog(fleet, self._tasks.held_of)
        self._wake = asyncio.Event()
        self._background: set[asyncio.Task[None]] = set()

    # ------------------------------------------------------------------ what words ask for

    async def load(self) -> None:
        """Take up every open task; a device that may hold one gets the time to come back."""
        back_s = RECONNECT_BEATS * self.timing.heartbeat_s + self.timing.lease_s
        for task in await self._store.read(tasks.load_open):
            self._know(task)
            if task.state in HELD and task.device is not None:
                self._tasks.hold(task)
                self._leases.extend(task, back_s)
                if task.stopping:  # told with its next heartbeat
                    self._end_unanswered(task, back_s)
        for run, reason in {t.run: t.stopping for t in self._backlog if t.stopping}.items():
            await self._end_queued(run, reason)
        for run in self._tasks.runs():
            await self._end_with_the_failed(run, self._tasks.of_run(run))
        self._wake.set()

    async def _end_with_the_failed(self, run: str, members: Sequence[Task]) -> None:
        """We may have died between the failure of one of several tasks and the end of the rest."""
        if not 0 < len(members) < members[0].terms.nodes:
            return
        ended = await self._store.read(lambda tx: tasks.of_run(tx, run))
        if any(state in FINAL and state is not TaskState.FINISHED for state, _, _ in ended):
            await self.stop_run(run, "another of its run has failed")

    def added(self, new: Iterable[Task]) -> None:
        """Tasks that were just committed."""
        for task in new:
            task.moments["queued"] = time.time()
            self._know(task)
        self._wake.set()

    def _know(self, task: Task) -> None:
        self._tasks.add(task)
        if task.state is TaskState.QUEUED:
            self._backlog.add(task)

    def of_run(self, run: str) -> list[Task]:
        """The open tasks of a run."""
        return self._tasks.of_run(run)

    def states(self) -> list[TaskState]:
        """The state of each open task."""
        return [task.state for task in self._tasks]

    def waiting(self, run: str) -> str:
        """Why a run's tasks are still queued, machine by machine; empty: none is."""
        reasons = self.reasons(run)
        if len(reasons) <= _MACHINES_NAMED:
            return "; ".join(f"{name}: {why}" for name, why in reasons.items())
        return match.summary(reasons)

    def reasons(self, run: str) -> dict[str, str]:
        """The same, by the machine's name."""
        return self._backlog.reasons([t for t in self.of_run(run) if t.state is TaskState.QUEUED])

    def queued(self, tenant: str) -> list[str]:
        """The runs of a tenant that wait for machines, in the order in which they are looked at."""
        return self._backlog.order(tenant)

    def would(self, tenant: str, run: Waiting) -> tuple[tuple[str, ...], dict[str, str]]:
        """Where a run would go that was submitted now; see `Backlog.would`."""
        return self._backlog.would(tenant, run)

    def priority(self, run: str) -> int:
        """That of a run's open tasks."""
        return next((task.terms.priority for task in self.of_run(run)), 0)

    async def set_priority(
        self, run: str, priority: int, note: Callable[[Connection], None]
    ) -> None:
        """Another priority for what of a run has not ended; `note` is written with it."""
        mine = self.of_run(run)
        terms = [replace(task.terms, priority=priority) for task in mine]

        def commit(tx: Connection) -> None:
            if terms:
                tasks.set_terms(tx, run, terms[0])
            note(tx)

        await self._store.write(commit)
        for task, theirs in zip(mine, terms, strict=True):
            task.terms = theirs
        self._wake.set()

    def wake(self) -> None:
        """Something has changed that may let a queued task go."""
        self._wake.set()

    def reserve(self, device: str, session: str, needs: Needs) -> None:
        """Keep room on a device for a session, between its tasks too."""
        machine = self._fleet.get(device)
        if machine is not None:
            self._fleet.hold(machine, session, needs)

    def release(self, device: str, session: str) -> None:
        """The session is over: its warm worker may go."""
        machine = self._fleet.get(device)
        if machine is None:
            return
        self._fleet.free(machine, session)
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
            began = time.thread_time()
            picked, recalls = self._pick()
            took = time.thread_time() - began
            if picked:
                await self._offer(picked)
            for task, reason in recalls:
                self._spawn(self._recall(task, reason))
            if took > _LONG_S:
                await asyncio.sleep(_PLANNING * took)

    def _pick(self) -> tuple[list[tuple[Task, Machine]], list[tuple[Task, str]]]:
        """Who is offered what, room being taken at once; and who is to hand back what."""
        waited = {task.run for task in self._backlog}
        picked, recall = self._backlog.pick()
        for members in picked:
            for task, machine in members:
                self._take(task, machine)
            if len(members) > 1:
                self.on_together(members)
        offers = [offer for members in picked for offer in members]
        for run in waited - {task.run for task, _ in offers}:
            self.on_waiting(run)
        return offers, [(self._tasks[task], f"{by} goes first") for task, by in recall.items()]

    def _take(self, task: Task, machine: Machine) -> None:
        """The next epoch of a task, for this machine; room on it is taken."""
        self._backlog.remove(task)
        task.state = move(task.state, TaskState.OFFERED)
        task.epoch += 1
        task.device = machine.address.device
        task.accepted_seq = -1
        task.ends_by = math.inf
        self._tasks.hold(task)

    async def _offer(self, picked: Sequence[tuple[Task, Machine]]) -> None:
        def commit(tx: Connection) -> list[bool]:
            return [
                tasks.offered(
                    tx,
                    task.id,
                    task.epoch,
                    machine.address.device,
                    task.offer if task.terms.nodes > 1 else None,
                )
                for task, machine in picked
            ]

        done = await self._when_there_is_room(commit)
        sending = []
        for (task, machine), still_queued in zip(picked, done, strict=True):
            if not still_queued:  # stopped in the meantime
                self._let_go(task)
                continue
            self._leases.extend(task, self.timing.offer_s)
            task.moments["offered"] = time.time()
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
            task = self._tasks.current(machine, told.task, told.epoch)
            if task is not None:
                if task.state is TaskState.OFFERED:  # its Accept was lost
                    task.state = move(task.state, TaskState.LEASED)
                    task.accepted_seq = seq
                task.lease_until = self._fleet.clock() + self.timing.lease_s
                # Its Cancel was lost, it may be.
                if (task.stopping or task.recalled) and told.state not in FINAL:
                    self._send(machine.address, _cancel(task))
            elif told.state not in FINAL:
                self._send(
                    machine.address,
                    Cancel(task=told.task, epoch=told.epoch, reason="no longer yours"),
                )
        for told in beat.tasks:
            task = self._tasks.current(machine, told.task, told.epoch)
            if task is None or told.state is not TaskState.RUNNING:
                continue
            if task.state is TaskState.LEASED:  # its Progress was lost
                await self._begins(task)
            if task.serves and told.port != task.port:
                await self.on_serves(task, machine, told.port)
                if self._tasks.current(machine, told.task, told.epoch) is not None:
                    task.port = told.port
        for task in self._tasks.held_by(machine):
            gone = (task.id, task.epoch) not in held and task.accepted_seq < seq
            if gone and task.state in (TaskState.LEASED, TaskState.RUNNING):
                await self._take_back(task, f"{machine.name} no longer has it")

    async def online(self, machine: Machine) -> None:
        """A machine (re)connected: what was offered to it may have been lost on the way."""
        for task in self._tasks.held_by(machine):
            if task.state is TaskState.OFFERED:
                await self._publish_offer(task, machine.address)

    async def accept(self, machine: Machine, told: Accept, seq: int) -> None:
        """The device takes the task; not written down: the heartbeat would say it again."""
        task = self._tasks.current(machine, told.task, told.epoch)
        if task is None:
            self._send(
                machine.address,
                Cancel(task=told.task, epoch=told.epoch, grace_s=0, reason="offered elsewhere"),
            )
        elif task.state is TaskState.OFFERED:
            task.state = move(task.state, TaskState.LEASED)
            task.accepted_seq = seq
            self._leases.extend(task, self.timing.lease_s)
            self.on_accepted(task)

    async def reject(self, machine: Machine, told: Reject) -> None:
        """The device does not take it: somebody else may, or it later."""
        task = self._tasks.current(machine, told.task, told.epoch)
        if task is None or task.state is not TaskState.OFFERED:
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
        await self._requeue(task, f"{machine.name}: {detail}")

    async def progress(self, machine: Machine, told: Progress) -> None:
        """The task runs."""
        task = self._tasks.current(machine, told.task, told.epoch)
        if task is None:
            return
        if task.state in (TaskState.OFFERED, TaskState.LEASED):
            await self._begins(task)
        note = told.note[:_NOTE_CHARACTERS]
        if note and note not in task.noted and len(task.noted) < _NOTES:
            task.noted.add(note)
            data: dict[str, object] = {"task": task.id, "name": machine.name, "text": note}
            if task.terms.nodes > 1:
                data["rank"] = task.rank
            await self._store.write(lambda tx: add_event(tx, task.run, "noted", data))
            self.on_noted(task.run)

    async def _begins(self, task: Task) -> None:
        task.state = move(task.state, TaskState.RUNNING)
        if task.offer.deadline_s:
            task.ends_by = self._fleet.clock() + task.offer.deadline_s
        await self.works[task.kind].running(task)

    async def result(self, machine: Machine, told: Result) -> None:
        """The task has ended. Counted once; acknowledged always, once it is on the disk."""
        device = machine.address.device
        task = self._tasks.current(machine, told.task, told.epoch)
        if task is not None:
            if any(self._blobs.size(a.blob.sha256) is None for a in told.artifacts):
                # Not acknowledged: the agent uploads again before it sends again.
                log.warning("%s: a result of %s names blobs that are not here", told.task, device)
                return
            why = told.cause.message if told.cause is not None else told.state.name.lower()
            if self._is_handed_back(task, told):
                await self._requeue(task, task.recalled)
            elif told.state is TaskState.LOST:
                self._pause_after_loss(task, device)
                await self._take_back(task, f"{machine.name}: {why}")
            elif told.state is TaskState.FAILED and self._starts_again(task, told):
                self._pause_after_failure(task)
                left = task.restarts_left - 1
                await self._requeue(task, f"{machine.name}: {why}", restarts=left)
            else:
                await self._end(task, told, device)
        for artifact in told.artifacts:
            self._blobs.release(artifact.blob.sha256, device)
        self._spawn(self._orders.acknowledge(machine.address, told.task, told.epoch))

    # ------------------------------------------------------------------ ends

    async def _end(self, task: Task, result: Result, device: str | None = None) -> None:
        work = self.works[task.kind]
        task.moments["received"] = time.time()

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
        if task.recalled and not task.stopping:
            await self._requeue(task, task.recalled)
            return
        if task.tries_left < 1 and not task.stopping:
            await self._end(task, tasks.lost(task, why))
            return
        await self._requeue(task, why, tries=task.tries_left - 1)

    def _pause_after_loss(self, task: Task, device: str) -> None:
        """The first loss costs no time; one that repeats must not go round at full speed."""
        pause = min(2.0**task.losses - 1, _LOSS_PAUSE_S)
        task.losses += 1
        if pause:
            task.not_before[device] = self._fleet.clock() + pause
            self._later(pause, self._awake)

    def _pause_after_failure(self, task: Task) -> None:
        pause = min(2.0**task.failures, _FAILURE_PAUSE_S)
        task.failures += 1
        task.not_until = self._fleet.clock() + pause
        self._later(pause, self._awake)

    @staticmethod
    def _is_handed_back(task: Task, told: Result) -> bool:
        """Whether it ended because it was recalled. One of several has to start with the others."""
        if not task.recalled or task.stopping:
            return False
        return told.state is TaskState.STOPPED or task.terms.nodes > 1

    @staticmethod
    def _starts_again(task: Task, told: Result) -> bool:
        """Whether its own failure is one that its job asked to be started again after."""
        own = told.cause is None or told.cause.fault is Fault.TASK
        return own and task.restarts_left > 0 and not task.stopping

    async def _requeue(
        self, task: Task, why: str, *, tries: int | None = None, restarts: int | None = None
    ) -> None:
        """Queue a held task again; those that started with it come back too."""
        if task.stopping:  # nobody wants it any more
            await self._end(task, _stopped(task, task.stopping))
            return
        others = [t for t in self.of_run(task.run) if t is not task] if not task.bound else []
        if len(others) < task.terms.nodes - 1:
            message = f"{why}, and others of its run had ended"
            await self._end(task, tasks.lost(task, message))
            return
        epoch = task.epoch
        tries = task.tries_left if tries is None else tries
        restarts = task.restarts_left if restarts is None else restarts

        def commit(tx: Connection) -> bool:
            again = tasks.queued_again(tx, task.id, epoch, tries, restarts)
            if again and task.serves:
                deploy.forget(tx, task.run)
            if again and task.kind == "launch":
                rank = {"rank": task.rank} if task.terms.nodes > 1 else {}
                add_event(tx, task.run, "again", {"why": why, "device": task.device, **rank})
            return again

        again = await self._store.write(commit)
        if not (again and task.epoch == epoch and task.state in HELD):
            return
        self._let_go(task)
        task.tries_left, task.restarts_left, task.recalled = tries, restarts, ""
        task.state, task.port = move(task.state, TaskState.QUEUED), None
        task.moments = {"queued": time.time()}
        self._backlog.add(task)
        if not task.bound:
            task.device = None
        for other in others:
            other.tries_left, other.restarts_left = tries, restarts
            if other.state in HELD and not other.recalled:
                await self._recall(other, "the others of its run start again")
        self._wake.set()

    async def _recall(self, task: Task, reason: str) -> None:
        """Have the device of a held task end it, after its grace; it is queued again then."""
        epoch = task.epoch
        if task.state not in HELD or task.recalled:
            return
        task.recalled = reason
        try:
            held = await self._store.write(lambda tx: tasks.recalled(tx, task.id, epoch, reason))
        except StoreUnavailable:  # a full disk; the next look through the queue asks again
            task.recalled = ""
            raise
        machine = self._fleet.get(task.device or "")
        if held and machine is not None and task.epoch == epoch:
            self._send(machine.address, _cancel(task))

    def _forget(self, task: Task, result: Result | None) -> None:
        if self._tasks.remove(task):
            self.on_ended(TaskState.STOPPED if result is None else result.state)
        self._backlog.remove(task)
        self._leases.drop(task)
        self._wake.set()
        if result is None:
            return
        self.works[task.kind].told(task, result)
        self.on_result(task, result)
        if (
            task.terms.nodes > 1
            and result.state is not TaskState.FINISHED
            and self.of_run(task.run)
        ):
            self._spawn(self.stop_run(task.run, f"rank {task.rank} {result.state.name.lower()}"))

    def _let_go(self, task: Task) -> None:
        self._leases.drop(task)
        self._tasks.let_go(task)

    def _lease_is_over(self, task: Task) -> None:
        if task.state is TaskState.OFFERED:
            self._spawn(self._requeue(task, "its offer was not answered"))
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
    """To the device of a task that is stopped, or recalled. Again is harmless: the first counts."""
    reason = task.stopping or task.recalled
    return Cancel(task=task.id, epoch=task.epoch, grace_s=task.offer.grace_s, reason=reason)


def _stopped(task: Task, reason: str) -> Result:
    cause = Cause(fault=Fault.TASK, message=reason)
    return _ended(task, TaskState.STOPPED, cause)
