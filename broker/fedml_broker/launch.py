# SPDX-License-Identifier: Apache-2.0
"""Launched jobs: checked, queued, and ended with the exit code of their command."""

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import msgspec
from sqlalchemy import Connection

from fedml_broker import deploy, match, packages, runs, tasks
from fedml_broker.accounts import RUN_KEY, Accounts, User
from fedml_broker.blobs import Blobs
from fedml_broker.dispatch import Dispatcher
from fedml_broker.fleet import Fleet, Machine
from fedml_broker.log_order import LogFile
from fedml_broker.match import Fits
from fedml_broker.observe import Observer, add_event, has_event
from fedml_broker.packages import PackageRef, Uploaded
from fedml_broker.problems import Problem
from fedml_broker.queue import HIGHEST, LOWEST, Terms, Waiting
from fedml_broker.store import Store
from fedml_broker.tasks import Task
from fedml_broker.traces import Traces
from fedml_protocol.errors import MalformedMessage
from fedml_protocol.launch import Container, LaunchSpec, Mount, Service, looks_secret
from fedml_protocol.tasks import (
    FINAL,
    TRACEPARENT,
    Needs,
    Offer,
    OnLost,
    Result,
    TaskState,
)

log = logging.getLogger(__name__)

MAX_SCRIPT_BYTES = 64 * 1024
MAX_NODES = 1000

# Below those that Linux gives to outgoing connections (32768 and up).
_FIRST_PORT, _PORTS = 20_000, 10_000


class NeedsBody(msgspec.Struct, frozen=True):
    """What a task asks of a machine; 0, or an empty text, means no demand."""

    gpus: int = 0
    gpu_memory_bytes: int = 0
    cpus: int = 0
    memory_bytes: int = 0
    disk_bytes: int = 0
    gpu_model: str = ""

    def needs(self) -> Needs:
        """The same, as an offer carries it."""
        return Needs(**msgspec.to_builtins(self))


class MountBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a container sees of the machine, if the machine's owner lets it."""

    source: str
    target: str
    writable: bool = False


class ContainerBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a job runs in. The password goes to the machine that pulls the image."""

    image: str
    registry: str = ""
    username: str = ""
    password: str = ""
    mounts: list[MountBody] = []

    def container(self) -> Container:
        """The same, as an offer carries it."""
        told = msgspec.to_builtins(self)
        return Container(**told | {"mounts": tuple(Mount(**one) for one in told["mounts"])})


class ServiceBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a job that stays up answers; as `fedml_protocol.launch.Service`."""

    port: int = 0
    path: str = ""
    within_s: float = 600.0


class LaunchRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A job, as `fedml launch` sends it.

    A client that chooses the id of its `run` may ask again until it is answered: it starts once.
    No log shows the values of variables that are named in `secrets`. With `gpus_optional`, it goes
    without GPUs where no machine has those that it needs. `restarts`: how often it is started again
    when its command fails; `retries` is for machines. `preemptible`: None leaves it to the
    priority: below 0 it is. `network` is `full` or `none`. With `service`, it stays up and answers
    on a port of its machine.
    """

    command: str
    name: str = "job"
    bootstrap: str = ""
    requirements: str = ""
    env: dict[str, str] = {}
    secrets: list[str] = []
    package: PackageRef | None = None
    needs: NeedsBody = NeedsBody()
    network: Literal["full", "none"] = "full"
    container: ContainerBody | None = None
    service: ServiceBody | None = None
    gpus_optional: bool = False
    labels: dict[str, str] = {}
    nodes: int = 1
    priority: int = 0
    preemptible: bool | None = None
    cluster: str = ""
    max_price_per_hour: float | None = None
    deadline_s: float = 0.0
    grace_s: float = 10.0
    retries: int = 3
    restarts: int = 0
    follow: bool = True
    run: str = ""


class Launcher:
    """Starts job runs, and is the dispatcher's `Work` for their tasks."""

    def __init__(
        self,
        store: Store,
        fleet: Fleet,
        dispatcher: Dispatcher,
        observer: Observer,
        blobs: Blobs,
        traces: Traces,
        accounts: Accounts,
    ) -> None:
        self._store = store
        self._fleet = fleet
        self._dispatcher = dispatcher
        self._observer = observer
        self._blobs = blobs
        self._traces = traces
        self._accounts = accounts

    async def submit(self, user: User, request: LaunchRequest, traceparent: str = "") -> str:
        """Queue a job; the run's id. `traceparent`: of whoever traces that he asks.

        Raises:
            Problem: 422 when the job cannot be, or no machine could ever take it.
        """
        run, spec = runs.check_new_id(request.run), _shown(request)
        if TRACEPARENT.fullmatch(traceparent):
            spec["traceparent"] = traceparent
        if request.run and runs.Runs(self._store).submitted(user, run, spec):
            return run
        package = await self._package(user, request)
        key, keep_key = self._accounts.run_key(user, run)
        env = {RUN_KEY: key, **request.env}
        new = self._tasks(user, request, run, package, env, traceparent)

        def commit(tx: Connection) -> None:
            runs.create(
                tx,
                user,
                run=run,
                kind="launch",
                name=request.name,
                spec=spec,
                package=package,
            )
            tasks.insert(tx, new)
            keep_key(tx)
            if new[0].offer.needs.gpus < request.needs.gpus:
                wished = {"gpus": request.needs.gpus, "model": request.needs.gpu_model}
                add_event(tx, run, "without_gpus", wished)

        await self._store.write(commit)
        if package is not None:
            package.release(self._blobs, f"u/{user.name}")
        self._dispatcher.added(new)
        self._observer.ring(run)
        return run

    async def check(self, user: User, request: LaunchRequest) -> Uploaded | None:
        """Whether `submit` would take a job at this moment; its package, claimed for the user.

        Raises:
            Problem: As for `submit`.
        """
        package = await self._package(user, request)
        self._tasks(user, request, runs.new_id(), package, request.env)
        return package

    def _tasks(
        self,
        user: User,
        request: LaunchRequest,
        run: str,
        package: Uploaded | None,
        env: dict[str, str],
        traceparent: str = "",
    ) -> list[Task]:
        """What is to be queued for a job.

        Raises:
            Problem: 422 when the job cannot be, or no machine could ever take it.
        """
        scripts = (request.command, request.bootstrap, request.requirements)
        words = (*scripts, *request.env, *request.env.values())
        if sum(len(text.encode()) for text in words) > MAX_SCRIPT_BYTES:
            raise Problem(
                422,
                "the job's commands, variables and requirements are too long",
                f"at most {MAX_SCRIPT_BYTES} bytes travel with the offer",
                hint="put them into a script or a file in the workspace",
            )
        needs = self._needs(user, request)
        terms = self._terms(user, request)
        ids = [f"{run}-t"]
        if terms.nodes > 1:
            ids = [f"{run}-t{rank}" for rank in range(terms.nodes)]
        try:
            offer = Offer(
                task=ids[0],
                epoch=1,
                run=run,
                spec=_spec(request, env),
                publisher=user.name,
                lease_s=self._dispatcher.timing.lease_s,
                on_lost=OnLost.FINISH_AND_HOLD,
                grace_s=request.grace_s,
                deadline_s=request.deadline_s,
                package=None if package is None else package.manifest,
                needs=needs,
                tail=request.follow,
                traceparent=self._traces.context(run, traceparent),
            )
        except MalformedMessage as error:
            raise Problem(422, "this job cannot be", str(error)) from error
        since = time.time()
        possible(self._fleet, user.tenant, _wanted(request, needs), terms.nodes)
        return [
            Task(
                offer=replace(offer, task=task),
                tenant=user.tenant,
                tries_left=request.retries,
                restarts_left=request.restarts,
                labels=request.labels,
                terms=terms,
                rank=rank,
                since=since,
            )
            for rank, task in enumerate(ids)
        ]

    def _terms(self, user: User, request: LaunchRequest) -> Terms:
        """When it is to go.

        Raises:
            Problem: 403 a priority that only admins give; 404 a cluster that reserves no machine;
                422 numbers that cannot be.
        """
        check_priority(user, request.priority)
        check_cluster(self._fleet, user.tenant, request.cluster)
        if not (1 <= request.nodes <= MAX_NODES and request.restarts >= 0):
            raise Problem(
                422,
                "this job cannot be",
                f"it takes 1 to {MAX_NODES} machines, and may start again 0 times or more often",
            )
        if request.service is not None and request.nodes > 1:
            detail = "each of several machines would answer at an address of its own"
            raise Problem(422, "a service runs on one machine", detail, hint="launch it as often")
        preemptible = request.preemptible
        return Terms(
            priority=request.priority,
            preemptible=request.priority < 0 if preemptible is None else preemptible,
            nodes=request.nodes,
            cluster=request.cluster,
            max_price=request.max_price_per_hour,
        )

    def look(self, user: User, request: LaunchRequest) -> dict[str, Any]:
        """Where a job would run at this moment, machine by machine; nothing is started.

        Raises:
            Problem: As `submit`, of what the job itself says.
        """
        try:
            _spec(request, request.env)
        except MalformedMessage as error:
            raise Problem(422, "this job cannot be", str(error)) from error
        needs, terms = self._needs(user, request), self._terms(user, request)
        wanted = _wanted(request, needs)
        run = Waiting(
            key="",
            run="this one",
            user=user.name,
            since=time.time(),
            wanted=wanted,
            priority=terms.priority,
            nodes=terms.nodes,
            lasts_s=request.deadline_s,
        )
        places, reasons = self._dispatcher.would(user.tenant, run)
        machines = []
        for verdict in match.verdicts(wanted, self._fleet.candidates(user.tenant)):
            rank = places.index(verdict.device) if verdict.device in places else None
            fits, why = verdict.fits, verdict.why
            if fits is Fits.NOW and rank is not None:
                why = self._busy(verdict.device)
            elif fits is Fits.NOW and verdict.name in reasons:
                fits, why = Fits.LATER, reasons[verdict.name]
            elif fits is Fits.NOW:
                why = f"would do, too: {self._busy(verdict.device)}"
            told = {"device": verdict.device, "name": verdict.name, "fits": fits, "why": why}
            machines.append({**told, "rank": rank})
        return {
            "needs": msgspec.to_builtins(needs),
            "nodes": terms.nodes,
            "taken": places[0] if places else None,
            "machines": machines,
        }

    def _busy(self, device: str) -> str:
        machine = self._fleet.get(device)
        if machine is None:
            return "it has left"
        return f"{len(machine.holds)} of its {machine.capacity.slots} places are taken"

    async def _package(self, user: User, request: LaunchRequest) -> Uploaded | None:
        if request.package is None:
            return None
        return await packages.check(self._blobs, request.package, f"u/{user.name}")

    def _needs(self, user: User, request: LaunchRequest) -> Needs:
        """What it is to have; without GPUs where it may do without and nobody has them."""
        needs = request.needs.needs()
        if not (request.gpus_optional and needs.gpus):
            return needs
        if self._fleet.could(user.tenant, _wanted(request, needs)):
            return needs
        return replace(needs, gpus=0, gpu_memory_bytes=0, gpu_model="")

    # ------------------------------------------------------------------ Work

    def ended(self, tx: Connection, task: Task, result: Result) -> None:
        """The run ends as its task did; how long its logs are is known first."""
        for stream, size in (("stdout", result.stdout_bytes), ("stderr", result.stderr_bytes)):
            self._observer.finish(task.run, LogFile(task.id, result.epoch, stream), size)
        if task.serves:
            deploy.forget(tx, task.run)
        if task.rank == 0:
            left = [artifact.blob.sha256 for artifact in result.artifacts]
            runs.refer_all(tx, left, f"run/{task.run}/outputs")
        if task.terms.nodes > 1:
            state = _end_together(tx, task.run, result)
        else:
            state = result.state
            runs.end(tx, task.run, state, cause=result.cause, exit_code=_exit_code(result))
        if state is not None:
            self._traces.run_ended(tx, task.run, state)

    def together(self, members: Sequence[tuple[Task, Machine]]) -> None:
        """Tell each task of a run where the others are, as torchrun and PyTorch expect it."""
        hosts = [machine.host or machine.name for _, machine in members]
        # Told once, by the broker: one that depended on the machine would have to be told around.
        port = _FIRST_PORT + int.from_bytes(members[0][0].run.encode()[-3:]) % _PORTS
        for rank, (task, _) in enumerate(members):
            spec = task.offer.spec
            if isinstance(spec, LaunchSpec):
                env = {**spec.env, **_torchrun(rank, hosts, port, task.offer.needs.gpus)}
                task.offer = replace(task.offer, spec=replace(spec, env=env))

    def told(self, task: Task, result: Result) -> None:
        """Wake who follows."""
        self._observer.ring(task.run)

    async def running(self, task: Task) -> None:
        """The device has started the command."""
        machine = self._fleet.get(task.device or "")
        data: dict[str, Any] = {
            "task": task.id,
            "device": task.device,
            "name": machine.name if machine is not None else task.device,
            "epoch": task.epoch,
        }
        if task.terms.nodes > 1:
            data["rank"] = task.rank

        # Offered before this process began, it may have been told of before, too.
        perhaps = "offered" not in task.moments
        attempt = {"task": task.id, "epoch": task.epoch}

        def commit(tx: Connection) -> bool:
            if perhaps and has_event(tx, task.run, "started", attempt):
                return False
            runs.running(tx, task.run)
            add_event(tx, task.run, "started", data)
            return True

        if await self._store.write(commit):
            self._observer.ring(task.run)

    async def serves(self, task: Task, machine: Machine, port: int) -> None:
        """A service answers on a port of its machine, or no longer does."""
        device = machine.address.device
        endpoint = deploy.endpoint(device, machine.name, machine.host, port)

        def commit(tx: Connection) -> bool:
            if not port:
                return deploy.silent(tx, task.run)
            return deploy.answers(tx, task.run, task.id, task.epoch, endpoint)

        if await self._store.write(commit):
            self._observer.ring(task.run)


def _spec(request: LaunchRequest, env: dict[str, str]) -> LaunchSpec:
    """What its machine is told to do, with these variables.

    Raises:
        MalformedMessage: It cannot be.
    """
    if request.container is not None and request.requirements.strip():
        raise MalformedMessage(
            "`requirements` are for the machine's own Python, which a container does not see: have "
            "`bootstrap` install them, or take an image that has them"
        )
    return LaunchSpec(
        command=request.command,
        bootstrap=request.bootstrap,
        env=env,
        requirements=request.requirements,
        secrets=tuple(dict.fromkeys((*request.secrets, *(n for n in (RUN_KEY,) if n in env)))),
        offline=request.network == "none",
        container=None if request.container is None else request.container.container(),
        service=None
        if request.service is None
        else Service(**msgspec.to_builtins(request.service)),
    )


def _shown(request: LaunchRequest) -> dict[str, Any]:
    """The request as people may see it afterwards."""
    spec: dict[str, Any] = msgspec.to_builtins(request)
    for name in spec["env"]:
        if name in request.secrets or looks_secret(name):
            spec["env"][name] = f"***{name}***"
    if request.container is not None and request.container.password:
        spec["container"]["password"] = "***"  # noqa: S105 - of it there is nothing else to see
    return spec


def _exit_code(result: Result) -> int | None:
    """As a shell tells it: 128 + N of what signal N has ended."""
    if result.exit_code is None and result.signal is not None:
        return 128 + result.signal
    return result.exit_code


def check_priority(user: User, priority: int) -> None:
    """Whether the user may give it.

    Raises:
        Problem: 422 there is no such priority; 403 only admins give it.
    """
    if not LOWEST <= priority <= HIGHEST:
        raise Problem(
            422,
            f"the priority cannot be {priority}",
            f"it goes from {LOWEST} to {HIGHEST}; 0 is normal",
        )
    if priority > 0 and not user.may("admin"):
        raise Problem(
            403,
            "only admins let a job go before those of others",
            f"{user.name} is a {user.role}; a priority of 0 or below is open to you",
            hint="ask an admin: `fedml run priority RUN 50`",
        )


def _end_together(tx: Connection, run: str, last: Result) -> TaskState | None:
    """The run ends with the last of its tasks, as the first that did not finish did.

    Returns:
        How it has ended; None while others of it have not.
    """
    all_of = tasks.of_run(tx, run)
    if any(state not in FINAL for state, _, _ in all_of):
        return None
    for blamed in (TaskState.FAILED, TaskState.LOST, TaskState.STOPPED):
        for state, rank, result in all_of:
            if state is blamed:
                told = result or last
                cause = told.cause
                if cause is not None and blamed is not TaskState.STOPPED:
                    cause = replace(cause, message=f"rank {rank}: {cause.message}")
                runs.end(tx, run, state, cause=cause, exit_code=_exit_code(told))
                return state
    runs.end(tx, run, TaskState.FINISHED, exit_code=_exit_code(last))
    return TaskState.FINISHED


def _torchrun(rank: int, hosts: Sequence[str], port: int, gpus: int) -> dict[str, str]:
    """What a task learns of the others. PET_*: torchrun's own options, so that it needs none."""
    nodes = str(len(hosts))
    return {
        "MASTER_ADDR": hosts[0],
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": nodes,
        "LOCAL_RANK": "0",
        "NODE_RANK": str(rank),
        "PET_NNODES": nodes,
        "PET_NODE_RANK": str(rank),
        "PET_NPROC_PER_NODE": str(max(gpus, 1)),
        "PET_MASTER_ADDR": hosts[0],
        "PET_MASTER_PORT": str(port),
        "FEDML_CLIENT_RANK": str(rank),
        "FEDML_NUM_NODES": nodes,
        **{f"FEDML_NODE_{n}_ADDR": host for n, host in enumerate(hosts)},
        "FEDML_NODE_0_PORT": str(port),
        "SKYPILOT_NODE_RANK": str(rank),
        "SKYPILOT_NUM_NODES": nodes,
        "SKYPILOT_NODE_IPS": "\n".join(hosts),
    }


def _wanted(request: LaunchRequest, needs: Needs) -> match.Wanted:
    return match.Wanted(
        kind="launch",
        needs=needs,
        labels=request.labels,
        cluster=request.cluster,
        max_price=request.max_price_per_hour,
        container=request.container is not None,
        offline=request.network == "none",
    )


def check_cluster(fleet: Fleet, tenant: str, name: str) -> None:
    """Refuse the name of a cluster that reserves no machine; an empty one is none.

    Raises:
        Problem: 404.
    """
    if name and name not in {one.cluster for one in fleet.candidates(tenant)}:
        raise Problem(
            404,
            f"no machine is reserved as {name}",
            "there is no such cluster, or it is stopped",
            hint=f"`fedml cluster start {name}`, or first "
            f"`fedml cluster create {name} --device MACHINE`",
        )


def possible(fleet: Fleet, tenant: str, wanted: match.Wanted, count: int = 1) -> None:
    """Refuse what could never run, with the reason for each machine that was looked at.

    Raises:
        Problem: 422.
    """
    fitting = fleet.could(tenant, wanted)
    if len(fitting) >= count:
        return
    candidates = fleet.candidates(tenant)
    reasons = {c.name: match.never(wanted, c) for c in candidates}
    if not candidates:
        raise Problem(
            422,
            "no machine has joined yet",
            "there is nobody to run this",
            hint="`fedml-broker keys create`, then `fedml-agent login KEY` on a machine",
        )
    looked_at = "\n".join(f"  {name}: {why}" for name, why in sorted(reasons.items()) if why)
    asked = f"{count} machines are asked for, {len(fitting)} fit" if count > 1 else "none fits"
    raise Problem(
        422,
        "no machine can ever run this",
        f"{asked} of {len(candidates)} that were looked at:\n{looked_at}",
        hint="ask for less, or let a machine join that has it"
        + (
            "; `--any-resource` does without"
            if wanted.kind == "launch" and wanted.needs.gpus
            else ""
        ),
    )
