# SPDX-License-Identifier: Apache-2.0
"""The agent daemon: takes tasks from the broker and sees each one to its end.

The nesting in `Daemon.serve` is the shutdown order, read from the inside out: take no more offers,
let the tasks end (or leave them to their shims), say goodbye, close the link, close the journal. A
second stop does not wait for tasks: they go on without the agent, which adopts them at its next
start.
"""

import asyncio
import datetime
import logging
import time
from collections import Counter
from collections.abc import Coroutine
from typing import Any

from fedml_agent import containers, hardware, login, sandbox, systemd
from fedml_agent.attic import Attic
from fedml_agent.control import Control
from fedml_agent.environments import Environments
from fedml_agent.errors import AgentError, BrokerRefused, BrokerUnreachable, HomeUnusable
from fedml_agent.federate import Stages
from fedml_agent.heartbeat import Heart
from fedml_agent.home import Home
from fedml_agent.https import Https, patiently
from fedml_agent.intake import Intake, room_name
from fedml_agent.journal import Entry, Journal
from fedml_agent.launch import Jobs, container_name
from fedml_agent.link import Link, LinkDown
from fedml_agent.outbox import Outbox
from fedml_agent.packages import Packages
from fedml_agent.policy import Policy, closed
from fedml_agent.policy_file import load_or_refuse
from fedml_agent.room import Room, all_names, disk_free, leasable, report, slots
from fedml_agent.traces import Traces
from fedml_agent.unleased import Use, unleased
from fedml_agent.verdict import full_disk
from fedml_agent.voice import Voice
from fedml_protocol.cause import Cause, Fault
from fedml_protocol.launch import LaunchSpec
from fedml_protocol.tasks import (
    Accept,
    Cancel,
    Cancelled,
    OnLost,
    Progress,
    Reject,
    Result,
    TaskState,
)

log = logging.getLogger(__name__)

# Between two tries to reach the broker over HTTPS at the start.
_HELLO_PAUSE_S = 5.0
_HOUSE_S = 60.0
_RESYNC_S = 3600.0
# Thousands of logs may lie there.
_TIDY_S = 600.0


class Daemon:
    """Owns every asyncio task of the agent; wires the parts and obeys orders."""

    def __init__(self, home: Home, version: str, *, nvml: Any = None) -> None:
        self.home = home
        self.version = version
        self.started_at = time.monotonic()
        self.membership = home.membership()
        self.policy = load_or_refuse(home.policy)
        self.journal = Journal(home.private / "journal.db")
        self.inventory = hardware.inventory(nvml=nvml)
        sandbox.cgroup_of_tasks()
        containers.here(self.policy)
        sandbox.capabilities()  # tried now, not when the first offer waits
        self.room = Room(leasable(self.inventory, self.policy), slots(self.inventory, self.policy))
        self.nvml = nvml
        # What tasks use of the machine's accelerators without holding it, as of the last beat.
        self.unleased: set[Use] = set()
        # Since this process began, by how they ended.
        self.ended_tasks: Counter[TaskState] = Counter()
        self.traces = Traces()
        self._https: Https | None = None
        self._stopping = asyncio.Event()
        self._confirmation = asyncio.Event()
        self._tidied_at = self._tried_at = self._resynced_at = float("-inf")
        self._serving: asyncio.Task[None] | None = None
        self._tasks: asyncio.TaskGroup | None = None
        self._runs: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._making_room = asyncio.Lock()
        self._background: set[asyncio.Task[None]] = set()

        self.voice = Voice(self.membership.address, home.next_boot(), version)
        self.packages = Packages(home.packages, self.https, self._policy)
        self.attic = Attic(home.logs, self.journal, self.https, self._policy)
        self.environments = Environments(home, self._policy)
        self.jobs = Jobs(
            home,
            self.journal,
            self.packages,
            self.environments,
            self.https,
            self,
            self._policy,
            self.attic,
            self.traces,
        )
        self.stages = Stages(
            home,
            self.journal,
            self.packages,
            self.https,
            self,
            self._policy,
            self.room,
            self.attic,
        )
        self.outbox = Outbox(self.voice, self.journal, self._upload, self._lost_again)
        self.intake = Intake(
            home,
            self.journal,
            self.membership,
            self.room,
            self._policy,
            all_names(self.inventory),
            self,
        )
        self.heart = Heart(
            self.voice,
            self.journal,
            home.root,
            refusing=lambda: self.intake.refusing,
            free_slots=lambda: self.room.slots - len(self.room.taken),
            draining=lambda: self.intake.draining,
            seen=self._look_at_use,
            port_of=lambda entry: self.jobs.port(entry),
            nvml=nvml,
        )
        self.link = Link(
            self.membership.address, self._where, self.voice.will(), self.intake.take, self._greet
        )
        self.voice.link = self.link
        self._beat_every(self.membership.heartbeat_s)
        self.control = Control(home.control, self)

    # ------------------------------------------------------------------ life

    def stop(self) -> None:
        """First call: take nothing more and let tasks end. Second call: leave them and go."""
        if self._stopping.is_set() and self._serving is not None:
            self._serving.cancel()
        self._stopping.set()

    async def serve(self) -> None:
        """Run until stopped."""
        self._serving = asyncio.current_task()
        try:
            with hardware.nvml_held_open(self.nvml):
                async with self.control, asyncio.TaskGroup() as loops:
                    every = [
                        loops.create_task(self.link.serve(), name="agent.link"),
                        loops.create_task(self.outbox.serve(), name="agent.outbox"),
                        loops.create_task(self._keep_house(), name="agent.house"),
                        loops.create_task(self.attic.serve(), name="agent.attic"),
                        loops.create_task(self._say_hello(), name="agent.hello"),
                        loops.create_task(_keep_watchdog(), name="agent.watchdog"),
                    ]
                    beating = loops.create_task(self.heart.beat_for_ever(), name="agent.heart")
                    try:
                        await self._see_tasks_through()
                        await self._settle_debts()
                    finally:
                        beating.cancel()
                        await asyncio.shield(self._say_goodbye())
                        for task in every:
                            task.cancel()
        finally:
            self.jobs.detach()
            self.stages.detach()
            self.journal.close()
            self.traces.close()

    async def _see_tasks_through(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            self._adopt_all()
            systemd.ready()
            await self._stopping.wait()
            systemd.stopping()
            self.intake.draining = True
            self.heart.now()
            if self._runs:
                log.info("%d tasks are left; a second stop leaves them running", len(self._runs))
            # The warm workers of federated runs are between stages; they outlive the agent.

    async def _settle_debts(self) -> None:
        """Give results that are just finished a moment to be confirmed; the journal keeps them."""
        if not self.link.up.is_set():
            return
        try:
            async with asyncio.timeout(3):
                while self.journal.owed():
                    self._confirmation.clear()
                    await self._confirmation.wait()
        except TimeoutError:
            pass

    async def _say_goodbye(self) -> None:
        try:
            async with asyncio.timeout(2):
                await self.voice.presence(online=False)
        except TimeoutError:
            pass

    # ------------------------------------------------------------------ at the start

    def _adopt_all(self) -> None:
        """Take up what an earlier agent left; what nobody knows any more is ended."""
        for entry in self.journal.held():
            self.room.take(room_name(entry.offer), entry.offer.needs, entry.gpus)
            self._run(entry, adopt=True)
        for entry in self.journal.owed():
            if isinstance(entry.offer.spec, LaunchSpec):
                self._spawn(self.jobs.ship_rest(entry), "agent.log")
        self._spawn(self.environments.take_up(), "agent.environments")
        self._spawn(self._remove_containers(), "agent.containers")
        known = {e.folder for e in (*self.journal.held(), *self.journal.owed())}
        for folder in self.home.tasks.iterdir():
            if folder.name not in known:
                self._spawn(self.jobs.end_stray(folder), "agent.stray")
        for folder in self.home.sessions.iterdir():
            if not self.journal.knows_session(folder.name):
                self._spawn(self.stages.take_up(folder), "agent.session")

    async def _remove_containers(self) -> None:
        """What a dead shim has left running, and no task in the journal answers for."""
        engine = containers.here(self.policy)
        if isinstance(engine, str):
            return
        device = self.membership.device
        known = {container_name(device, entry) for entry in self.journal.held()}
        for name in await asyncio.to_thread(containers.remove_unknown, engine, device, known):
            log.warning("the container %s had no task any more: it was ended", name)

    async def _say_hello(self) -> None:
        """Tell the broker what the machine is like; until it hears, go on with what we know."""
        while True:
            try:
                await self._renew_if_due()
                # In a thread: an engine that was just let in is asked what it can do.
                await asyncio.to_thread(containers.here, self.policy)
                told = report(self.inventory, self.policy, disk_free(self.home.root))
                self.membership = await asyncio.to_thread(
                    login.hello, self.home, self.https(), told, self.version
                )
            except (BrokerUnreachable, BrokerRefused, HomeUnusable, OSError) as error:
                log.info("the broker was not told about this machine yet: %s", error)
                await asyncio.sleep(_HELLO_PAUSE_S)
                continue
            self._beat_every(self.membership.heartbeat_s)
            self.intake.use_keys(self.membership.verify_keys)
            return

    async def _resync(self) -> None:
        """Ask what messages that were lost, or held back on the way, would have told us."""
        self._resynced_at = asyncio.get_running_loop().time()
        question = {"sessions": self.stages.kept()}
        try:
            told = await patiently(lambda: self.https().call("POST", "/v1/agent/resync", question))
        except BrokerRefused as error:  # its disk, it may be: soon, not at the next regular time
            log.warning("the broker did not say what was missed: %s", error)
            self._resynced_at += _HOUSE_S - _RESYNC_S
            return
        self.intake.sent_by_now(told["counter"])
        for name in set(question["sessions"]).intersection(told["over"]):
            await self.stages.close(name)

    def _beat_every(self, seconds: float) -> None:
        self.heart.every_s = self.link.beat_every_s = seconds

    async def _renew_if_due(self) -> None:
        if login.expired(self.home):
            await asyncio.to_thread(login.recover, self.home)
        elif login.renewal_due(self.home):
            await asyncio.to_thread(login.renew, self.home, self.https())
        else:
            return
        self._https = None

    async def _keep_house(self) -> None:
        """Now and then: the disk, the policy file, the certificate, idle sessions, lost leases."""
        while True:
            self._read_policy()
            await self._look_at_machine()
            await self.stages.close_idle()
            self._end_lost()
            if asyncio.get_running_loop().time() - self._resynced_at > _RESYNC_S:
                self._spawn(self._resync(), "agent.resync")
            await asyncio.sleep(min(_HOUSE_S, self.heart.every_s))
            try:
                await self._renew_if_due()
            except (AgentError, OSError) as error:
                log.warning("the certificate could not be renewed: %s", error)

    def _read_policy(self) -> None:
        """What its owner has written since; the broker is told of what it lets out."""
        policy = load_or_refuse(self.home.policy)
        if policy == self.policy:
            return
        log.info("the policy has changed")
        self.policy = policy
        self.room.devices = leasable(self.inventory, policy)
        self.room.slots = slots(self.inventory, policy)
        self._spawn(self._say_hello(), "agent.hello")

    async def _look_at_machine(self) -> None:
        """Whether anything can be taken now; old logs make room."""
        now = time.monotonic()
        free = disk_free(self.home.root)
        low = free < self.policy.disk_reserve
        if low:
            self.packages.make_room()
        if low or now > self._tidied_at + _TIDY_S:
            self._tidied_at = now
            await asyncio.to_thread(self.attic.tidy, disk_low=low)
            await asyncio.to_thread(self.environments.evict, 0 if low else None)
        if set(self.policy.require) & set(sandbox.cannot()) and now > self._tried_at + _HOUSE_S:
            self._tried_at = now
            sandbox.capabilities.cache_clear()  # its owner may have mended that
            await asyncio.to_thread(sandbox.capabilities)
        at = datetime.datetime.now().astimezone().time()
        reason = closed(self.policy, at=at, disk_free=free, cannot=sandbox.cannot())
        if bool(reason) != bool(self.intake.refusing):
            log.warning("offers are %s %s", "refused:" if reason else "taken again", reason)
            self.heart.now()
        self.intake.refusing = reason

    def _look_at_gpus(self, read: hardware.Readings) -> None:
        """A task that computes where it may not is named here, and to whoever follows its run."""
        if not read.gpus:
            return
        held = {name: uuids for name, (_, uuids) in self.room.taken.items()}
        found = unleased(read.gpus, self.jobs.pids() | self.stages.pids(), held)
        entries = {room_name(entry.offer): entry for entry in self.journal.held()}
        for use in sorted(found - self.unleased):
            note = f"computes on {use.gpu}, which it does not hold"
            log.warning("%s %s", use.task, note)
            entry = entries.get(use.task)
            if entry is not None:
                task, epoch = entry.key
                self._say(Progress(task=task, epoch=epoch, state=TaskState.RUNNING, note=note))
            if self.policy.end_trespassers:
                why = f"it {note} (resources.end_trespassers)"
                self.jobs.oust(use.task, Cause(fault=Fault.POLICY, message=why))
        self.unleased = found

    def _end_lost(self) -> None:
        """A task that must not run without the broker's word, when that has been silent."""
        silent_s = asyncio.get_running_loop().time() - self.link.confirmed_at
        for entry in self.journal.held():
            if entry.offer.on_lost is OnLost.STOP and silent_s > entry.offer.lease_s:
                self.cancel(Cancel(task=entry.key[0], epoch=entry.key[1], reason="lease over"))

    def _look_at_use(self, read: hardware.Readings) -> None:
        """What tasks use that they must not."""
        self._look_at_gpus(read)
        if read.disk.free < self.policy.disk_reserve // 2 and self.jobs.running():
            self._spawn(self._make_room(read.disk.free), "agent.disk")

    async def _make_room(self, free: int) -> None:
        """The disk runs full while jobs run: the one that has taken most is ended."""
        if self._making_room.locked():
            return
        async with self._making_room:
            found = await asyncio.to_thread(self.jobs.filling, self.policy.disk_reserve // 2)
            if found is not None:
                cause = full_disk(found[1], free, self.policy)
                log.warning("%s is ended: %s", found[0], cause.message)
                self.jobs.oust(found[0], cause)

    async def _greet(self) -> None:
        await self.voice.presence(online=True)
        self.heart.now()
        self.outbox.again()
        if self.stages.kept():
            self._spawn(self._resync(), "agent.resync")

    # ------------------------------------------------------------------ orders (see intake.py)

    def begin(self, entry: Entry) -> None:
        """A task was taken: run it."""
        self.traces.begins(entry)
        self._run(entry, adopt=False)

    def answer(self, body: Accept | Reject) -> None:
        """Tell the broker; when it gets lost, the heartbeat or the offer's end heals it."""
        self._say(body)

    def cancel(self, order: Cancel) -> None:
        """End a task; the answer is its result, or that it is not here."""
        entry = self.journal.get(order.task, order.epoch)
        if entry is None:
            self._say(Cancelled(task=order.task, epoch=order.epoch))
        elif entry.result is None:
            log.info("%s is ended: %s", order.task, order.reason)
            if isinstance(entry.offer.spec, LaunchSpec):
                self.jobs.stop(entry, order.grace_s)
            else:
                self.stages.stop(entry)

    def drain(self, on: bool) -> None:
        """Take no more offers, or take them again."""
        log.info("the broker %s this machine", "drains" if on else "uses again")
        self.heart.now()

    def tail(self, task: str, on: bool) -> None:
        """Somebody watches a log."""
        self.jobs.watch(task, on)
        self.stages.watch(task, on)

    def resync(self) -> None:
        """Say at once what runs here."""
        self.heart.now()
        self.outbox.again()

    def close_session(self, session: str) -> None:
        """A federated run is over."""
        self._spawn(self.stages.close(session), "agent.session")

    def confirmed(self, task: str, epoch: int) -> None:
        """The broker has a result: its files may go."""
        entry = self.journal.confirm(task, epoch)
        self.outbox.confirmed((task, epoch))
        self._confirmation.set()
        if entry is not None:
            if isinstance(entry.offer.spec, LaunchSpec):
                self.jobs.clean(entry)
            else:
                self.stages.clean(entry)

    # ------------------------------------------------------------------ tasks report (Reporter)

    def started(self, entry: Entry) -> None:
        """A job runs."""
        self.journal.running(entry)
        self._say(Progress(task=entry.key[0], epoch=entry.key[1], state=TaskState.RUNNING))

    def serves(self) -> None:
        """A service answers, or no longer does: a heartbeat says so."""
        self.heart.now()

    def ended(self, entry: Entry, result: Result) -> None:
        """A task has ended: written down first, then sent."""
        if entry.result is not None:
            return
        self.journal.end(entry, result)
        self.ended_tasks[result.state] += 1
        self.traces.ended(entry, result)
        if isinstance(entry.offer.spec, LaunchSpec):
            self.room.give_back(room_name(entry.offer))
        self.outbox.new(entry)

    async def _upload(self, entry: Entry, *, again: bool) -> None:
        words = self.jobs if isinstance(entry.offer.spec, LaunchSpec) else self.stages
        await words.upload(entry, again=again)

    def _lost_again(self, entry: Entry, why: str) -> None:
        """A result that cannot be delivered: the broker may offer the task anew."""
        cause = Cause(fault=Fault.MACHINE, message=why)
        task, epoch = entry.key
        self.journal.end(entry, Result(task=task, epoch=epoch, state=TaskState.LOST, cause=cause))
        self.outbox.again()

    # ------------------------------------------------------------------ small print

    def https(self) -> Https:
        """Connections to the broker with the present certificate."""
        if self._https is None:
            self._https = Https.of(self.home, self.membership.url)
        return self._https

    def _policy(self) -> Policy:
        return self.policy

    def _where(self) -> tuple[str, int, Any]:
        found = self.membership
        return found.mqtt_host, found.mqtt_port, login.mqtt_context(self.home)

    def _run(self, entry: Entry, *, adopt: bool) -> None:
        if self._tasks is None:
            return
        words = self.jobs if isinstance(entry.offer.spec, LaunchSpec) else self.stages
        work = words.adopt(entry) if adopt else words.run(entry)
        task = self._tasks.create_task(self._guard(entry, work), name=f"task.{entry.key[0]}")
        self._runs[entry.key] = task
        task.add_done_callback(lambda _: self._runs.pop(entry.key, None))

    async def _guard(self, entry: Entry, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception:  # the one place: a broken task must not take its neighbours down
            log.exception("the task %s broke the agent's own code", entry.key[0])
            if entry.result is None:
                self.jobs.lose(entry, "the agent failed; its log on that machine says why")

    def _say(self, body: Accept | Reject | Progress | Cancelled) -> None:
        async def say() -> None:
            try:
                await self.voice.task(body)
            except LinkDown as error:
                log.debug("%s was not sent: %s", type(body).__name__, error)

        self._spawn(say(), "agent.say")

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        async def guarded() -> None:
            try:
                await work
            except Exception:
                log.exception("%s failed", name)

        task = asyncio.get_running_loop().create_task(guarded(), name=name)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


async def _keep_watchdog() -> None:
    """Tell systemd that the event loop turns, as often as it asks for."""
    interval = systemd.watchdog_interval_s()
    while interval is not None:
        systemd.alive()
        await asyncio.sleep(interval)
