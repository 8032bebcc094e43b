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
import tarfile
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection

from fedml_broker import match, rounds, runs, tasks
from fedml_broker.aggregator import Aggregator, AggregatorDied, AggregatorRefused
from fedml_broker.observe import add_event
from fedml_broker.rounds import Round
from fedml_broker.store import StoreUnavailable
from fedml_broker.tasks import Task, cause_json
from fedml_protocol.blob import Blob
from fedml_protocol.cause import Cause, Fault
from fedml_protocol.federate import (
    AddUpdate,
    BeginRound,
    FinishRound,
    MakeModel,
    ModelMade,
    OpenRun,
    PlanRound,
    RoundBegun,
    RoundPlan,
    StageKind,
    StageSpec,
    UpdateAdded,
)
from fedml_protocol.tasks import Offer, OnLost, Result, TaskState

if TYPE_CHECKING:
    from fedml_broker.federate import FederateRequest, Federation

log = logging.getLogger(__name__)

# How often the aggregator may die before the run is given up.
_DEATHS = 3
# A machine that loses a stage gets it again, as often as it takes: the round's deadline decides.
_TRIES = 1_000_000
# After a full disk, how long until the store is asked again.
_DISK_PAUSE_S = 5.0


class RunFailed(Exception):
    """The run cannot go on; `cause` is for the person who started it."""

    def __init__(self, cause: Cause) -> None:
        super().__init__(cause.message)
        self.cause = cause


class RunStopped(Exception):
    """Somebody stopped the run."""


class Driver:
    """Walks one run; `told` is set whenever a client has answered."""

    def __init__(
        self,
        federation: "Federation",
        run: str,
        tenant: str,
        publisher: str,
        request: "FederateRequest",
    ) -> None:
        self.told = asyncio.Event()
        self._waits: Callable[[], str] = _for_nothing
        # The open round in numbers: {"number", "asked", "answered", "received_bytes"}.
        self.progress: dict[str, int] | None = None
        self._all = federation
        self._run = run
        self._tenant = tenant
        self._publisher = publisher
        self._request = request
        self._needs = request.needs.needs()
        self._stopped_by = ""
        self._refused = 0
        self._received_bytes = 0
        self._stopping = asyncio.Event()
        self._clients: dict[int, str] = {}
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
        deaths = 0
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
                deaths += 1
                log.warning("%s: the aggregator died: %s", self._run, error)
                if deaths < _DEATHS:
                    continue
                message = f"the aggregator died {deaths} times: {error}"
                await self._end(TaskState.FAILED, Cause(fault=Fault.BROKER, message=message))
            except (StoreUnavailable, OSError) as error:
                log.warning("%s waits for the disk: %s", self._run, error)
                self._wait_for(partial(str, f"the broker's disk: {error}"))
                await asyncio.sleep(_DISK_PAUSE_S)
                continue
            except Exception as error:  # ours: the run must not hang for it
                log.exception("the driver of %s broke", self._run)
                cause = Cause(fault=Fault.BROKER, message=f"the broker failed: {error}")
                await self._end(TaskState.FAILED, cause)
            return

    async def _walk(self) -> None:
        await self._choose_clients()
        everything = self._all
        aggregator = await Aggregator.start(
            self._work_dir, home=everything.home, blobs=everything.blobs.root
        )
        try:
            await aggregator.ask(await self._opening(), RoundBegun)
            done = await self._all.store.read(lambda tx: rounds.load(tx, self._run))
            if not done or not done[0].done:
                latest = await self._first_model(aggregator, begun=bool(done))
            else:
                latest = next(r for r in reversed(done) if r.done)
            opened = next((r for r in done[1:] if not r.done), None)
            while latest.number < self._request.rounds:
                latest = await self._round(aggregator, latest, opened)
                opened = None
            if self._request.evaluate.devices:
                await self._last_evaluation(latest, opened)
        finally:
            await aggregator.close()

    async def _end(self, state: TaskState, cause: Cause | None = None) -> None:
        run, everything = self._run, self._all
        await everything.dispatcher.stop_run(run, "the run has ended")

        def commit(tx: Connection) -> list[str]:
            runs.end(tx, run, state, cause=cause)
            # The package stays as long as the run is listed: the next run often brings it again.
            return runs.release(tx, f"run/{run}/updates")

        idle = await everything.store.write(commit)
        for device in self._clients.values():
            everything.dispatcher.release(device, run)
        everything.observer.ring(run)
        await self._discard(idle)
        shutil.rmtree(self._work_dir, ignore_errors=True)

    # ------------------------------------------------------------------ who takes part

    async def _choose_clients(self) -> None:
        """Which device is which client: decided once, then kept."""
        everything, wanted = self._all, self._request.clients
        self._clients = await runs.Runs(everything.store).clients(self._run)
        while not self._clients:
            bell = everything.fleet.bell()
            self._check_stop()
            ask = match.Wanted(kind="federate", needs=self._needs, labels=wanted.labels)
            # By name, so that the same fleet gives the same clients, and with them the same data.
            candidates = sorted(
                everything.fleet.candidates(self._tenant), key=lambda c: (c.name, c.device)
            )
            reasons = {c.name: match.never(ask, c) or match.now(ask, c) for c in candidates}
            chosen = [c.device for c in candidates if not reasons[c.name]][: wanted.count]
            if len(chosen) == wanted.count:
                await everything.store.write(partial(self._start, chosen=chosen))
                self._clients = dict(enumerate(chosen))
                break
            missing = "; ".join(f"{name}: {why}" for name, why in reasons.items() if why)
            words = f"{len(chosen)} of {wanted.count} machines are ready ({missing})"
            self._wait_for(partial(str, words))
            await self._either(bell, within_s=everything.dispatcher.timing.heartbeat_s)
        self._waits = _for_nothing
        for device in self._clients.values():
            everything.dispatcher.reserve(device, self._run, self._needs)

    def _start(self, tx: Connection, chosen: list[str]) -> None:
        rounds.set_clients(tx, self._run, chosen)
        runs.running(tx, self._run)
        names = [m.name for d in chosen if (m := self._all.fleet.get(d)) is not None]
        add_event(tx, self._run, "clients", {"names": names})

    # ------------------------------------------------------------------ models

    async def _opening(self) -> OpenRun:
        request = self._request
        package = self._all.blobs.path(request.package.sha256)
        app_dir = self._work_dir / "app"
        await asyncio.to_thread(_unpack, package, app_dir)
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
        made = await aggregator.ask(MakeModel(out_dir=str(self._out_dir(0))), ModelMade)
        if not begun:
            await self._all.store.write(lambda tx: rounds.begin(tx, self._run, 0, ()))
        return await self._finish(0, made, (), {})

    async def _finish(
        self, number: int, made: ModelMade, good: tuple[int, ...], devices: Mapping[str, float]
    ) -> Round:
        """The round's model into the store, together with all that it makes true."""
        blobs = self._all.blobs
        model = await blobs.adopt(Path(made.model_path))
        state = await blobs.adopt(Path(made.state_path)) if made.state_path else None
        sent = await blobs.adopt(Path(made.sent_path)) if made.sent_path else None

        def commit(tx: Connection) -> list[str]:
            rounds.add_metrics(tx, self._run, number - 1, devices)
            return rounds.finish(
                tx,
                self._run,
                number,
                model=model,
                state=state,
                sent=sent,
                metrics=made.metrics,
                replies=len(good),
                refused=self._refused,
                received_bytes=self._received_bytes,
            )

        idle = await self._all.store.write(commit)
        for blob in (model, state, sent):
            if blob is not None:
                blobs.release(blob.sha256, "broker")
        self._all.observer.ring(self._run)
        await self._discard(idle)
        shutil.rmtree(self._out_dir(number), ignore_errors=True)
        return Round(number=number, clients=good, model=model, state=state, sent=sent, done=True)

    # ------------------------------------------------------------------ one round

    async def _round(self, aggregator: Aggregator, latest: Round, opened: Round | None) -> Round:
        """Ask a cohort, take what it sends, make the next model."""
        number = latest.number + 1
        if opened is not None:
            cohort = opened.clients
        else:
            self._check_stop()
            plan = PlanRound(
                round=number, clients=tuple(sorted(self._clients)), count=self._asked()
            )
            cohort = (await aggregator.ask(plan, RoundPlan)).clients
            await self._ask_clients(number, cohort, latest, StageKind.TRAIN)
        begin = BeginRound(
            round=number,
            model_path=self._path(latest.model),
            state_path=self._path(latest.state),
            clients=cohort,
        )
        await aggregator.ask(begin, RoundBegun)
        replies = await self._collect(aggregator, number, cohort)
        made = await aggregator.ask(FinishRound(out_dir=str(self._out_dir(number))), ModelMade)
        reports = [result.metrics for result in replies.values()]
        devices = rounds.mean_metrics(reports, "eval.")
        return await self._finish(
            number,
            made,
            tuple(replies),
            {f"devices.{name}": value for name, value in devices.items()},
        )

    async def _ask_clients(
        self, number: int, cohort: tuple[int, ...], latest: Round, kind: StageKind
    ) -> None:
        new = [self._task(number, client, latest, kind) for client in cohort]

        def commit(tx: Connection) -> None:
            rounds.begin(tx, self._run, number, cohort)
            tasks.insert(tx, new)

        await self._all.store.write(commit)
        self._all.dispatcher.added(new)
        self._all.observer.ring(self._run)

    def _task(self, number: int, client: int, latest: Round, kind: StageKind) -> Task:
        request, device = self._request, self._clients[client]
        machine = self._all.fleet.get(device)
        if latest.model is None:
            raise RuntimeError("a finished round has a model")
        every = request.evaluate.every
        spec = StageSpec(
            session=self._run,
            kind=kind,
            round=number,
            client=client,
            clients=len(self._clients),
            seed=request.seed,
            app=request.app,
            config=request.config,
            algorithm=request.algorithm,
            algorithm_config=request.algorithm_config,
            treatment=request.treatment,
            model=latest.model,
            sent=latest.sent,
            evaluate=request.evaluate.devices and (number - 1) % every == 0,
            labels=machine.labels if machine is not None else {},
        )
        offer = Offer(
            task=f"{self._run}-{number}-{client}",
            epoch=1,
            run=self._run,
            spec=spec,
            publisher=self._publisher,
            lease_s=self._all.dispatcher.timing.lease_s,
            on_lost=OnLost.FINISH_AND_HOLD,
            package=Blob(sha256=request.package.sha256, size=request.package.size),
            needs=self._needs,
        )
        return Task(
            offer=offer,
            tenant=self._tenant,
            tries_left=_TRIES,
            device=device,
            bound=True,
            round=number,
            client=client,
        )

    # ------------------------------------------------------------------ replies

    async def _collect(
        self, aggregator: Aggregator, number: int, cohort: tuple[int, ...]
    ) -> dict[int, Result]:
        """Give every update to the aggregator as it comes, until the round may close."""
        limit = self._request.clients
        enough = min(limit.per_round or limit.count, len(cohort))
        minimum = limit.minimum or enough
        loop = asyncio.get_running_loop()
        deadline = loop.time() + limit.deadline_s if limit.deadline_s else math.inf
        good: dict[int, Result] = {}
        bad: dict[int, Cause] = {}
        self._refused = self._received_bytes = 0
        while True:
            self.told.clear()
            self._check_stop()
            for client, _, result in await self._results(number, {*good, *bad}):
                if len(good) == enough:
                    break
                cause = await self._add(aggregator, client, result)
                self._received_bytes += sum(a.blob.size for a in result.artifacts)
                if cause is None:
                    good[client] = result
                else:
                    bad[client] = cause
                    self._refused = len(bad)
                    await self._complain(number, client, cause)
            left = len(cohort) - len(bad)
            if left < minimum:
                raise RunFailed(_too_few(number, minimum, left, next(iter(bad.values()))))
            late = loop.time() >= deadline
            if len(good) >= min(enough, left) or (late and len(good) >= minimum):
                break
            self.progress = {
                "number": number,
                "asked": len(cohort),
                "answered": len(good) + len(bad),
                "received_bytes": self._received_bytes,
            }
            need = minimum if late else 0
            self._wait_for(partial(self._missing, number, cohort, good, bad, need))
            await self._either(self.told, within_s=None if late else deadline - loop.time())
        self._waits = _for_nothing
        await self._go_on_without(number)
        return dict(sorted(good.items()))

    async def _results(
        self, number: int, known: Collection[int] = ()
    ) -> list[tuple[int, str, Result]]:
        return await self._all.store.read(lambda tx: tasks.results(tx, self._run, number, known))

    async def _add(self, aggregator: Aggregator, client: int, result: Result) -> Cause | None:
        if result.state is not TaskState.FINISHED:
            message = f"its stage ended {result.state.name}"
            return result.cause or Cause(fault=Fault.MACHINE, message=message)
        update = next((a.blob for a in result.artifacts if a.name == "update"), None)
        if update is None or self._all.blobs.size(update.sha256) is None:
            return Cause(fault=Fault.MACHINE, message="it sent no update")
        added = await aggregator.ask(
            AddUpdate(
                client=client,
                path=self._path(update),
                weight=result.weight,
                metrics=result.metrics,
            ),
            UpdateAdded,
        )
        return added.refusal

    async def _complain(self, number: int, client: int, cause: Cause) -> None:
        machine = self._all.fleet.get(self._clients[client])
        data = {
            "round": number,
            "client": client,
            "name": machine.name if machine is not None else self._clients[client],
            "cause": cause_json(cause),
        }
        await self._all.store.write(lambda tx: add_event(tx, self._run, "client_failed", data))
        self._all.observer.ring(self._run)

    async def _go_on_without(self, number: int) -> None:
        late = [t for t in self._all.dispatcher.of_run(self._run) if t.round == number]
        if not late:
            return
        ids = await self._all.store.write(lambda tx: rounds.stop_waiting(tx, self._run, number))
        self._all.dispatcher.give_up(self._run, [t for t in late if t.id in ids])

    async def _last_evaluation(self, latest: Round, opened: Round | None) -> None:
        """The last model, evaluated on the devices; it has no next round to be evaluated in."""
        number = latest.number + 1
        cohort = tuple(sorted(self._clients))
        if opened is None:
            await self._ask_clients(number, cohort, latest, StageKind.EVALUATE)
        limit = self._request.clients
        loop = asyncio.get_running_loop()
        deadline = loop.time() + (limit.deadline_s or math.inf)
        while True:
            self.told.clear()
            self._check_stop()
            replies = await self._results(number)
            if len(replies) == len(cohort) or loop.time() >= deadline:
                break
            answered = {client: result for client, _, result in replies}
            self.progress = {
                "number": number,
                "asked": len(cohort),
                "answered": len(answered),
                "received_bytes": 0,
            }
            self._wait_for(partial(self._missing, number, cohort, answered, {}, 0))
            await self._either(self.told, within_s=deadline - loop.time())
        self._waits = _for_nothing
        await self._go_on_without(number)
        for client, _, result in replies:
            if result.state is not TaskState.FINISHED and result.cause is not None:
                await self._complain(number, client, result.cause)
        found = rounds.mean_metrics([r.metrics for _, _, r in replies], "eval.")
        devices = {f"devices.{name}": value for name, value in found.items()}
        await self._all.store.write(
            lambda tx: rounds.add_metrics(tx, self._run, latest.number, devices)
        )

    # ------------------------------------------------------------------ small print

    def _asked(self) -> int:
        limit = self._request.clients
        per_round = limit.per_round or limit.count
        return min(math.ceil(per_round * (1 + limit.over_select)), len(self._clients))

    def _check_stop(self) -> None:
        if self._stopping.is_set():
            raise RunStopped

    def _wait_for(self, words: Callable[[], str]) -> None:
        """Whoever follows asks for the words now, and whenever a machine comes or goes."""
        self._waits = words
        self._all.observer.ring(self._run)

    async def _either(self, event: asyncio.Event, *, within_s: float | None) -> None:
        """Until `event`, a stop, or the time is over."""
        waits = [asyncio.ensure_future(e.wait()) for e in (event, self._stopping)]
        timeout = None if within_s is None or math.isinf(within_s) else max(within_s, 0.0)
        try:
            await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    def _missing(
        self,
        number: int,
        cohort: tuple[int, ...],
        good: Mapping[int, Result],
        bad: Mapping[int, Cause],
        minimum: int,
    ) -> str:
        names = []
        for client in cohort:
            machine = self._all.fleet.get(self._clients[client])
            if client in good or client in bad or machine is None:
                continue
            away = self._all.fleet.away(machine)
            names.append(f"{machine.name} ({away})" if away else machine.name)
        late = f", past its deadline; it needs {minimum}" if minimum else ""
        return (
            f"round {number}: {len(good)} of {len(cohort)} have answered{late}; "
            f"waiting for {', '.join(names)}"
        )

    def _out_dir(self, number: int) -> Path:
        folder = self._work_dir / f"out-{number}"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder

    def _path(self, blob: Blob | None) -> str:
        return "" if blob is None else str(self._all.blobs.path(blob.sha256))

    async def _discard(self, idle: list[str]) -> None:
        await asyncio.gather(*(self._all.blobs.discard(sha256) for sha256 in idle))


def _for_nothing() -> str:
    return ""


def _unpack(package: Path, into: Path) -> None:
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir(mode=0o700, parents=True)
    with tarfile.open(package) as archive:
        archive.extractall(into, filter="data")


def _too_few(number: int, minimum: int, left: int, first: Cause) -> Cause:
    return Cause(
        fault=first.fault,
        message=f"round {number} needs {minimum} updates and can get {left}: {first.message}",
        hint=first.hint,
        traceback=first.traceback,
    )
