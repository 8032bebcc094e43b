# SPDX-License-Identifier: Apache-2.0
"""One driver per federated run walks it from round to round.

The driver holds nothing that is not in the store. Whatever dies (the aggregator, this process), the
next driver reads the last finished round and the replies to the open one, and goes on from there;
the sum is folded in the order of clients, so that the model has the same bits either way.
"""

import asyncio
import logging
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection

from fedml_broker import match, packages, rounds, runs, tasks
from fedml_broker.aggregator import Aggregator, AggregatorDied, AggregatorRefused
from fedml_broker.asynchronous import Versions
from fedml_broker.observe import add_event
from fedml_broker.rounds import Kept, Round, Start, Tally
from fedml_broker.runs import RunFailed, RunStopped
from fedml_broker.store import StoreUnavailable
from fedml_broker.synchronous import Rounds, evaluate_last
from fedml_broker.tasks import Task, cause_json
from fedml_protocol.blob import Blob
from fedml_protocol.cause import Cause, Fault
from fedml_protocol.federate import (
    AddUpdate,
    MakeModel,
    ModelMade,
    OpenRun,
    RunOpened,
    StageKind,
    StageSpec,
    UpdateAdded,
)
from fedml_protocol.tasks import Offer, OnLost, Result, TaskState

if TYPE_CHECKING:
    from fedml_broker.federate import FederateRequest, Federation

log = logging.getLogger(__name__)

# How often the aggregator may die over one and the same round before the run is given up.
_DEATHS = 5
# A machine that loses a stage gets it again, as often as it takes: the round's deadline decides.
_TRIES = 1_000_000
NOTHING: Mapping[str, float] = MappingProxyType({})
# After a full disk, how long until the store is asked again.
_DISK_PAUSE_S = 5.0


class Driver:
    """Walks one run; `told` is set whenever a client has answered.

    What is public here is for the two ways through a run: `synchronous` and `asynchronous`.
    """

    def __init__(
        self,
        federation: "Federation",
        run: str,
        tenant: str,
        publisher: str,
        request: "FederateRequest",
    ) -> None:
        self.told = asyncio.Event()
        self._waits: Callable[[], str] = str
        # The open round in numbers: {"number", "asked", "answered", "received_bytes"}.
        self.progress: dict[str, int] | None = None
        self.all = federation
        self.store = federation.store
        self.run = run
        self._tenant = tenant
        self._publisher = publisher
        self.request = request
        self._needs = request.needs.needs()
        self._stopped_by = ""
        self._stopping = asyncio.Event()
        self._deaths = 0  # of the aggregator since a round was finished
        self.clients: dict[int, str] = {}
        # How the algorithm is walked, and the group of each client, where groups have rounds.
        self.way = RunOpened()
        self.groups: dict[int, int] = {}
        self._work_dir = federation.work_dir / run

    @property
    def waiting(self) -> str:
        """What the run waits for at this moment, in words; empty when it does not."""
        return self._waits()

    def stop(self, by: str) -> None:
        """End the run as soon as possible."""
        self._stopped_by = by
        self._stopping.set()
        self.told.set()

    # ------------------------------------------------------------------ from start to end

    async def drive(self) -> None:
        """Walk the run to its end, whatever it takes."""
        while True:
            try:
                await self._walk()
                await self._end(TaskState.FINISHED)
            except RunStopped:
                cause = Cause(fault=Fault.TASK, message=f"stopped by {self._stopped_by}")
                await self._end(TaskState.STOPPED, cause)
            except RunFailed as error:
                await self._end(TaskState.FAILED, error.cause)
            except AggregatorRefused as error:
                await self._end(TaskState.FAILED, error.cause)
            except AggregatorDied as error:
                log.warning("%s: the aggregator died: %s", self.run, error)
                self._deaths += 1
                if self._deaths < _DEATHS:
                    continue
                message = f"the aggregator died {self._deaths} times: {error}"
                await self._end(TaskState.FAILED, Cause(fault=Fault.BROKER, message=message))
            except (StoreUnavailable, OSError) as error:
                log.warning("%s waits for the disk: %s", self.run, error)
                self.wait_for(partial(str, f"the broker's disk: {error}"))
                await asyncio.sleep(_DISK_PAUSE_S)
                continue
            except Exception as error:  # ours: the run must not hang for it
                log.exception("the driver of %s broke", self.run)
                cause = Cause(fault=Fault.BROKER, message=f"the broker failed: {error}")
                await self._end(TaskState.FAILED, cause)
            return

    async def _walk(self) -> None:
        await self._choose_clients()
        everything = self.all
        aggregator = await Aggregator.start(
            self._work_dir,
            home=everything.home,
            blobs=everything.blobs.root,
            timed=everything.on_answer,
        )
        try:
            self.way = await aggregator.ask(await self._opening(), RunOpened)
            self.groups = {c: g for g, its in enumerate(self.way.groups) for c in its.clients}
            done = await self.store.read(lambda tx: rounds.load(tx, self.run))
            if not done or not done[0].done:
                latest = await self._first_model(aggregator, begun=bool(done))
            else:
                latest = next(r for r in reversed(done) if r.done)
            opened = next((r for r in done[1:] if not r.done), None)
            if latest.number < self.request.rounds:
                if self.way.asynchronous:
                    latest = await Versions(self, aggregator, self.way.buffer).walk(latest, opened)
                else:
                    latest = await Rounds(self, aggregator, self.way.stages).walk(latest, opened)
                opened = None
            if self.request.evaluate.devices:
                starts = await self.store.read(lambda tx: tasks.starts(tx, self.run))
                turn = starts or self.request.rounds * self.way.stages
                await evaluate_last(self, latest, opened, turn + 1)
        finally:
            await aggregator.close()

    async def _end(self, state: TaskState, cause: Cause | None = None) -> None:
        run, everything = self.run, self.all
        await everything.dispatcher.stop_run(run, "the run has ended")

        def commit(tx: Connection) -> list[str]:
            runs.end(tx, run, state, cause=cause)
            everything.traces.run_ended(tx, run, state)
            # The package stays as long as the run is listed: the next run often brings it again.
            return runs.release(tx, f"run/{run}/updates")

        idle = await self.store.write(commit)
        for device in self.clients.values():
            everything.dispatcher.release(device, run)
        everything.observer.ring(run)
        await self._discard(idle)
        shutil.rmtree(self._work_dir, ignore_errors=True)

    # ------------------------------------------------------------------ who takes part

    async def _choose_clients(self) -> None:
        """Which device is which client: decided once, then kept."""
        everything, wanted = self.all, self.request.clients
        self.clients = await runs.Runs(self.store).clients(self.run)
        while not self.clients:
            bell = everything.fleet.bell()
            self.check_stop()
            ask = self.request.wanted()
            # By name, so that the same fleet gives the same clients, and with them the same data.
            candidates = sorted(
                everything.fleet.candidates(self._tenant), key=lambda c: (c.name, c.device)
            )
            reasons = {c.name: match.never(ask, c) or match.now(ask, c) for c in candidates}
            chosen = [c.device for c in candidates if not reasons[c.name]][: wanted.count]
            if len(chosen) == wanted.count:
                await self.store.write(partial(self._start, chosen=chosen))
                self.clients = dict(enumerate(chosen))
                break
            missing = "; ".join(f"{name}: {why}" for name, why in reasons.items() if why)
            words = f"{len(chosen)} of {wanted.count} machines are ready ({missing})"
            self.wait_for(partial(str, words))
            await self.either(bell, within_s=everything.dispatcher.timing.heartbeat_s)
        self.done_waiting()
        for device in self.clients.values():
            everything.dispatcher.reserve(device, self.run, self._needs)

    def _start(self, tx: Connection, chosen: list[str]) -> None:
        rounds.set_clients(tx, self.run, chosen)
        runs.running(tx, self.run)
        names = [m.name for d in chosen if (m := self.all.fleet.get(d)) is not None]
        add_event(tx, self.run, "clients", {"names": names})

    # ------------------------------------------------------------------ models

    async def _opening(self) -> OpenRun:
        request = self.request
        app_dir = self._work_dir / "app"
        await asyncio.to_thread(packages.unpack, self.all.blobs, request.package.sha256, app_dir)
        return OpenRun(
            algorithm=request.algorithm,
            algorithm_config=request.algorithm_config,
            treatment=request.treatment,
            groups=request.groups,
            seed=request.seed,
            app_dir=str(app_dir),
            app=request.app,
            config=request.config,
            central=request.evaluate.central,
            clients=request.clients.count,
        )

    async def _first_model(self, aggregator: Aggregator, *, begun: bool) -> Round:
        made = await aggregator.ask(MakeModel(out_dir=str(self.out_dir(0))), ModelMade)
        if not begun:
            await self.store.write(lambda tx: rounds.begin(tx, self.run, 0, ()))
        return await self.finish(0, made, Tally(), turns=())

    async def finish(
        self,
        number: int,
        made: ModelMade,
        tally: Tally,
        *,
        turns: Sequence[int],
        devices: Mapping[str, float] = NOTHING,
        counted: Sequence[str] = (),
    ) -> Round:
        """The round's model into the store, together with all that it makes true.

        Args:
            turns: Whose updates are in it.
            devices: What the devices found of the model before.
            counted: See `rounds.finish`.
        """
        kept = await self.adopt(made)

        def commit(tx: Connection) -> list[str]:
            rounds.add_metrics(tx, self.run, number - 1, devices)
            return rounds.finish(
                tx,
                self.run,
                number,
                kept,
                metrics=made.metrics,
                tally=tally,
                turns=turns,
                counted=counted,
            )

        await self.commit(kept, commit)
        self._deaths = 0
        if number > 0:  # 0 is the model before the first round
            self.all.on_round()
        shutil.rmtree(Path(made.model_path).parent, ignore_errors=True)
        return Round(number=number, clients=(), done=True, kept=kept)

    async def adopt(self, made: ModelMade) -> Kept:
        """Take files of the aggregator as blobs; `commit` refers to them."""

        async def blob(path: str) -> Blob | None:
            return await self.all.blobs.adopt(Path(path)) if path else None

        return Kept(
            model=await blob(made.model_path),
            state=await blob(made.state_path),
            sent=await blob(made.sent_path),
            groups={
                group.group: Start(
                    model=await blob(group.model_path), sent=await blob(group.sent_path)
                )
                for group in made.groups
            },
        )

    async def commit(self, kept: Kept, step: Callable[[Connection], list[str]]) -> None:
        """One transaction, which refers to what is kept; it returns the blobs that may go."""
        idle = await self.store.write(step)
        for blob in kept.blobs():
            self.all.blobs.release(blob.sha256, "broker")
        self.all.observer.ring(self.run)
        await self._discard(idle)

    async def queue(self, new: Sequence[Task], commit: Callable[[Connection], None]) -> None:
        """Hand tasks to the dispatcher, once `commit` has written them down."""
        await self.store.write(commit)
        self.all.dispatcher.added(new)
        self.all.observer.ring(self.run)

    async def go_on_without(self, turn: int | None) -> None:
        """Give up what has not answered: in a turn, or (None) at all."""
        late = [t for t in self.all.dispatcher.of_run(self.run) if turn is None or t.round == turn]
        if late:
            ids = await self.store.write(lambda tx: rounds.stop_waiting(tx, self.run, turn))
            self.all.dispatcher.give_up(self.run, [t for t in late if t.id in ids])

    def task(
        self,
        turn: int,
        client: int,
        latest: Kept,
        kind: StageKind,
        *,
        evaluate: bool = False,
        version: int | None = None,
    ) -> Task:
        """One client's part of a turn, from the latest model.

        Args:
            latest: With the models of groups that have rounds of their own.
            evaluate: Before it trains.
            version: See `tasks.Task`.
        """
        request, device = self.request, self.clients[client]
        machine = self.all.fleet.get(device)
        group = self.groups.get(client) if kind is StageKind.TRAIN else None
        within: dict[str, Any] = {}
        sent, model = latest.sent, latest.model
        if group is not None:
            start = latest.groups[group]
            sent, model = start.sent, start.model or model
            kind = StageKind.TRAIN_IN_GROUP
            within = {"group": group, "turns": self.way.stages}
        if model is None:
            raise RuntimeError("a finished round has a model")
        spec = StageSpec(
            session=self.run,
            kind=kind,
            round=turn,
            client=client,
            clients=len(self.clients),
            seed=request.seed,
            app=request.app,
            config=request.config,
            algorithm=self.way.algorithm or request.algorithm,
            algorithm_config=self.way.algorithm_config or request.algorithm_config,
            treatment=request.treatment,
            model=model,
            sent=sent,
            **within,
            evaluate=evaluate,
            deadline_s=(request.clients.deadline_s or 0.0) if self.way.partial else 0.0,
            labels=machine.labels if machine is not None else {},
        )
        package = request.package.sha256
        offer = Offer(
            task=f"{self.run}-{turn}-{client}",
            epoch=1,
            run=self.run,
            spec=spec,
            publisher=self._publisher,
            lease_s=self.all.dispatcher.timing.lease_s,
            on_lost=OnLost.FINISH_AND_HOLD,
            package=Blob(sha256=package, size=self.all.blobs.size(package) or 0),
            needs=self._needs,
            traceparent=self.all.traces.context(self.run),
        )
        return Task(
            offer=offer,
            tenant=self._tenant,
            tries_left=_TRIES,
            device=device,
            bound=True,
            round=turn,
            client=client,
            version=version,
        )

    async def add(
        self, aggregator: Aggregator, client: int, result: Result, *, staleness: int = 0
    ) -> UpdateAdded:
        """Give one client's update to the aggregator; what it says, or why there is none."""
        if result.state is not TaskState.FINISHED:
            message = f"its stage ended {result.state.name}"
            cause = result.cause or Cause(fault=Fault.MACHINE, message=message)
            return UpdateAdded(client=client, refusal=cause)
        update = next((a.blob for a in result.artifacts if a.name == "update"), None)
        if update is None or self.all.blobs.size(update.sha256) is None:
            cause = Cause(fault=Fault.MACHINE, message="it sent no update")
            return UpdateAdded(client=client, refusal=cause)
        question = AddUpdate(
            client=client,
            path=self.path(update),
            weight=result.weight,
            metrics=result.metrics,
            staleness=staleness,
        )
        return await aggregator.ask(question, UpdateAdded)

    async def complain(self, number: int, client: int, cause: Cause) -> None:
        """Tell whoever follows that a client's part of a round came to nothing."""
        machine = self.all.fleet.get(self.clients[client])
        data = {
            "round": number,
            "client": client,
            "name": machine.name if machine is not None else self.clients[client],
            "cause": cause_json(cause),
        }
        await self.store.write(lambda tx: add_event(tx, self.run, "client_failed", data))
        self.all.observer.ring(self.run)

    # ------------------------------------------------------------------ small print

    def check_stop(self) -> None:
        """Raise `RunStopped` if somebody has stopped the run."""
        if self._stopping.is_set():
            raise RunStopped

    def done_waiting(self) -> None:
        """It goes on."""
        self._waits = str

    def wait_in_round(
        self, words: Callable[[], str], *, number: int, asked: int, answered: int, received: int = 0
    ) -> None:
        """As `wait_for`, with the open round in numbers; ``received`` counts bytes."""
        self.progress = {
            "number": number,
            "asked": asked,
            "answered": answered,
            "received_bytes": received,
        }
        self.wait_for(words)

    def names(self, clients: Iterable[int | None]) -> str:
        """The machines of some clients, with the reason where one takes nothing now."""
        fleet, found = self.all.fleet, []
        for client in clients:
            machine = fleet.get(self.clients[client]) if client is not None else None
            if machine is not None:
                away = fleet.away(machine)
                found.append(f"{machine.name} ({away})" if away else machine.name)
        return ", ".join(found)

    def wait_for(self, words: Callable[[], str]) -> None:
        """Whoever follows asks for the words now, and whenever a machine comes or goes."""
        self._waits = words
        self.all.observer.ring(self.run)

    async def either(self, *events: asyncio.Event, within_s: float | None) -> None:
        """Until one of the events, a stop, or the time is over."""
        waits = [asyncio.ensure_future(e.wait()) for e in (*events, self._stopping)]
        timeout = None if within_s is None or math.isinf(within_s) else max(within_s, 0.0)
        try:
            await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    def out_dir(self, number: int) -> Path:
        """Where the aggregator puts what it makes of a round."""
        folder = self._work_dir / f"out-{number}"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder

    def path(self, blob: Blob | None) -> str:
        """Where the bytes of a blob lie; empty for none."""
        return "" if blob is None else str(self.all.blobs.path(blob.sha256))

    async def _discard(self, idle: list[str]) -> None:
        await asyncio.gather(*(self.all.blobs.discard(sha256) for sha256 in idle))
