# SPDX-License-Identifier: Apache-2.0
"""Federated runs: checked, started, stopped, and taken up again after a restart.

What happens inside a run is `driver.py`; this module is what people and the dispatcher talk to.
"""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import Connection

from fedml_broker import match, packages, runs
from fedml_broker.accounts import User
from fedml_broker.blobs import Blobs
from fedml_broker.dispatch import Dispatcher
from fedml_broker.driver import Driver
from fedml_broker.fleet import Fleet
from fedml_broker.launch import NeedsBody, check_cluster, possible
from fedml_broker.match import Fits
from fedml_broker.observe import Observer
from fedml_broker.packages import PackageRef, Uploaded
from fedml_broker.problems import Problem
from fedml_broker.store import Store
from fedml_broker.tasks import Task
from fedml_broker.traces import Traces
from fedml_protocol.tasks import Result

log = logging.getLogger(__name__)


class ClientsBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who takes part.

    Attributes:
        count: How many devices the run has.
        labels: What each of them must wear.
        per_round: How many are asked in each round; 0 means all.
        over_select: How many more are asked than must answer, as a part of `per_round`.
        minimum: How many must have answered before a round may close at its deadline; 0: all.
        deadline_s: Of one round; 0 waits for every client that was asked.
    """

    count: int
    labels: dict[str, str] = {}
    per_round: int = 0
    over_select: float = 0.0
    minimum: int = 0
    deadline_s: float = 0.0


class EvaluateBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where models are evaluated. `every` counts rounds; the last one is always evaluated."""

    every: int = 1
    devices: bool = True
    central: bool = True


class MachinesRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a federated run asks of each machine.

    For `cluster` and `max_price_per_hour` see `LaunchRequest`.
    """

    clients: ClientsBody
    needs: NeedsBody = NeedsBody()
    cluster: str = ""
    max_price_per_hour: float | None = None

    def wanted(self) -> match.Wanted:
        """The same, for `match`."""
        return match.Wanted(
            kind="federate",
            needs=self.needs.needs(),
            labels=self.clients.labels,
            cluster=self.cluster,
            max_price=self.max_price_per_hour,
        )


class FederateRequest(MachinesRequest, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A federated run, as `fedml federate` sends it. For `run` see `LaunchRequest`."""

    app: str
    package: PackageRef
    rounds: int
    name: str = "federate"
    seed: int = 0
    algorithm: str = "fedavg"
    algorithm_config: str = "{}"
    treatment: str = "{}"
    groups: str = "{}"
    config: str = "{}"
    evaluate: EvaluateBody = EvaluateBody()
    run: str = ""


class Federation:
    """All federated runs; the dispatcher's `Work` for their tasks."""

    def __init__(
        self,
        store: Store,
        fleet: Fleet,
        dispatcher: Dispatcher,
        observer: Observer,
        blobs: Blobs,
        home: Path,
    ) -> None:
        self.store = store
        self.fleet = fleet
        self.dispatcher = dispatcher
        self.observer = observer
        self.traces = Traces()
        self.blobs = blobs
        self.home = home
        self.work_dir = home / "work"
        self.on_round: Callable[[], None] = lambda: None
        self.on_answer: Callable[[float], None] = lambda seconds: None  # of an aggregator
        self._drivers: dict[str, Driver] = {}
        self._walking: dict[str, asyncio.Task[None]] = {}

    async def submit(self, user: User, request: FederateRequest) -> str:
        """Start a run; its id.

        Raises:
            Problem: 422 when the run cannot be, or too few machines could ever take part.
        """
        run, spec = runs.check_new_id(request.run), msgspec.to_builtins(request)
        if request.run and runs.Runs(self.store).submitted(user, run, spec):
            return run
        package = await self.check(user, request)

        def commit(tx: Connection) -> None:
            runs.create(
                tx,
                user,
                run=run,
                kind="federate",
                name=request.name,
                spec=spec,
                package=package,
            )

        await self.store.write(commit)
        package.release(self.blobs, f"u/{user.name}")
        self._drive(run, user.tenant, user.name, request)
        self.observer.ring(run)
        return run

    async def check(self, user: User, request: FederateRequest) -> Uploaded:
        """Whether `submit` would take a run at this moment; its package, claimed for the user.

        Raises:
            Problem: As for `submit`.
        """
        _check(request)
        package = await packages.check(self.blobs, request.package, f"u/{user.name}")
        check_cluster(self.fleet, user.tenant, request.cluster)
        possible(self.fleet, user.tenant, request.wanted(), request.clients.count)
        return package

    def look(self, user: User, request: MachinesRequest) -> dict[str, Any]:
        """Which machines would be the clients at this moment; nothing is started.

        Raises:
            Problem: 404 a cluster that reserves no machine.
        """
        check_cluster(self.fleet, user.tenant, request.cluster)
        verdicts = match.verdicts(request.wanted(), self.fleet.candidates(user.tenant))
        ready = [v.device for v in verdicts if v.fits is Fits.NOW][: request.clients.count]
        chosen = ready if len(ready) == request.clients.count else []
        machines = []
        for verdict in verdicts:
            rank = chosen.index(verdict.device) + 1 if verdict.device in chosen else None
            why = verdict.why or ("it is ready" if rank else "would do, too")
            told = {"device": verdict.device, "name": verdict.name, "fits": verdict.fits}
            machines.append({**told, "why": why, "rank": rank})
        return {
            "needs": msgspec.to_builtins(request.needs),
            "nodes": request.clients.count,
            "taken": chosen[0] if chosen else None,
            "machines": machines,
        }

    async def resume(self) -> None:
        """Take up every run that has not ended."""
        for row in await runs.Runs(self.store).open("federate"):
            request = msgspec.convert(row["spec"], FederateRequest)
            self._drive(row["id"], row["tenant"], row["user"], request)
            if row["stopped_by"] is not None:
                self._drivers[row["id"]].stop(row["stopped_by"])

    def stop(self, run: str, by: str) -> None:
        """End a run; its driver tells the devices."""
        driver = self._drivers.get(run)
        if driver is not None:
            driver.stop(by)

    def waiting(self, run: str) -> str:
        """What a run waits for; empty when it does not wait."""
        driver = self._drivers.get(run)
        return driver.waiting if driver is not None else ""

    def progress(self, run: str) -> dict[str, int] | None:
        """The open round of a run in numbers, if it has one."""
        driver = self._drivers.get(run)
        return driver.progress if driver is not None else None

    async def close(self) -> None:
        """Leave every run where it is; `resume` takes it up again."""
        for task in self._walking.values():
            task.cancel()
        await asyncio.gather(*self._walking.values(), return_exceptions=True)

    def _drive(self, run: str, tenant: str, publisher: str, request: FederateRequest) -> None:
        driver = Driver(self, run, tenant, publisher, request)
        self._drivers[run] = driver
        walking = asyncio.get_running_loop().create_task(driver.drive(), name=f"federate.{run}")
        self._walking[run] = walking

        def gone(task: asyncio.Task[None]) -> None:
            self._drivers.pop(run, None)
            self._walking.pop(run, None)
            if not task.cancelled() and task.exception() is not None:
                log.error("the driver of %s broke", run, exc_info=task.exception())

        walking.add_done_callback(gone)

    # ------------------------------------------------------------------ Work

    def ended(self, tx: Connection, task: Task, result: Result) -> None:
        """Keep what the client sent until its round is done."""
        for artifact in result.artifacts:
            owner = f"run/{task.run}/updates/{task.round}/{task.client}"
            runs.refer(tx, artifact.blob.sha256, owner)

    def told(self, task: Task, result: Result) -> None:
        """Wake the driver."""
        driver = self._drivers.get(task.run)
        if driver is not None:
            driver.told.set()

    async def running(self, task: Task) -> None:
        """Stages are short: nobody waits for this."""


def _check(request: FederateRequest) -> None:
    clients = request.clients
    wrong = []
    if request.rounds < 1:
        wrong.append(f"rounds must be >= 1, got {request.rounds}")
    if clients.count < 1:
        wrong.append(f"clients.count must be >= 1, got {clients.count}")
    if not 0 <= clients.per_round <= clients.count:
        wrong.append(f"clients.per_round is {clients.per_round}, there are {clients.count} clients")
    per_round = clients.per_round or clients.count
    if not 0 <= clients.minimum <= per_round:
        wrong.append(f"clients.minimum is {clients.minimum}, {per_round} take part in a round")
    if not 0 <= clients.over_select <= 10:
        wrong.append(f"clients.over_select must be in [0, 10], got {clients.over_select}")
    if clients.deadline_s < 0:
        wrong.append(f"clients.deadline_s must be >= 0, got {clients.deadline_s}")
    if request.evaluate.every < 1:
        wrong.append(f"evaluate.every must be >= 1, got {request.evaluate.every}")
    if request.seed < 0:
        wrong.append(f"seed must be >= 0, got {request.seed}")
    if wrong:
        raise Problem(422, "this federated run cannot be", "\n".join(wrong))
    for name in ("config", "algorithm_config", "treatment", "groups"):
        try:
            msgspec.json.decode(getattr(request, name).encode(), type=dict)
        except msgspec.MsgspecError as error:
            raise Problem(422, f"{name} must be a JSON object", str(error)) from error
