# SPDX-License-Identifier: Apache-2.0
"""Launched jobs: checked, queued, and ended with the exit code of their command."""

import logging
from dataclasses import replace
from typing import Any, Literal

import msgspec
from sqlalchemy import Connection

from fedml_broker import match, runs, tasks
from fedml_broker.accounts import User
from fedml_broker.blobs import Blobs
from fedml_broker.dispatch import Dispatcher
from fedml_broker.fleet import Fleet
from fedml_broker.observe import LogFile, Observer, add_event
from fedml_broker.problems import Problem
from fedml_broker.store import Store
from fedml_broker.tasks import Task
from fedml_protocol.blob import Blob
from fedml_protocol.errors import MalformedMessage
from fedml_protocol.launch import Container, LaunchSpec, Mount
from fedml_protocol.tasks import Needs, Offer, OnLost, Result

log = logging.getLogger(__name__)

MAX_SCRIPT_BYTES = 64 * 1024
_TOLD = "***"


class PackageRef(msgspec.Struct, frozen=True):
    """An uploaded package."""

    sha256: str
    size: int


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


class LaunchRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A job, as `fedml launch` sends it.

    A client that chooses the id of its `run` may ask again until it is answered: it starts once.
    With `gpus_optional`, it goes without GPUs where no machine has those that it needs. `network`
    is `full` or `none`.
    """

    command: str
    name: str = "job"
    bootstrap: str = ""
    env: dict[str, str] = {}
    package: PackageRef | None = None
    needs: NeedsBody = NeedsBody()
    network: Literal["full", "none"] = "full"
    container: ContainerBody | None = None
    gpus_optional: bool = False
    labels: dict[str, str] = {}
    deadline_s: float = 0.0
    grace_s: float = 10.0
    retries: int = 3
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
    ) -> None:
        self._store = store
        self._fleet = fleet
        self._dispatcher = dispatcher
        self._observer = observer
        self._blobs = blobs

    async def submit(self, user: User, request: LaunchRequest) -> str:
        """Queue a job; the run's id.

        Raises:
            Problem: 422 when the job cannot be, or no machine could ever take it.
        """
        words = (request.command, request.bootstrap, *request.env, *request.env.values())
        if sum(len(text.encode()) for text in words) > MAX_SCRIPT_BYTES:
            raise Problem(
                422,
                "the job's commands and variables are too long",
                f"at most {MAX_SCRIPT_BYTES} bytes travel with the offer",
                hint="put them into a script or a file in the workspace",
            )
        run, told = runs.check_new_id(request.run), msgspec.to_builtins(request)
        if request.container is not None and request.container.password:
            told["container"]["password"] = _TOLD  # everybody in the tenant may read it
        if await runs.Runs(self._store).submitted(user, run, told):
            return run
        package = check_package(self._blobs, request.package)
        try:
            spec = _spec(request)
            needs = self._needs(user, request, spec)
            offer = Offer(
                task=f"{run}-t",
                epoch=1,
                run=run,
                spec=spec,
                publisher=user.name,
                lease_s=self._dispatcher.timing.lease_s,
                on_lost=OnLost.FINISH_AND_HOLD,
                grace_s=request.grace_s,
                deadline_s=request.deadline_s,
                package=package,
                needs=needs,
                tail=request.follow,
            )
        except MalformedMessage as error:
            raise Problem(422, "this job cannot be", str(error)) from error
        task = Task(
            offer=offer,
            tenant=user.tenant,
            tries_left=request.retries,
            labels=request.labels,
        )
        possible(self._fleet, user.tenant, task.wanted())

        def commit(tx: Connection) -> None:
            runs.create(
                tx,
                user,
                run=run,
                kind="launch",
                name=request.name,
                spec=told,
                package=package,
            )
            tasks.insert(tx, [task])
            if needs.gpus < request.needs.gpus:
                wished = {"gpus": request.needs.gpus, "model": request.needs.gpu_model}
                add_event(tx, run, "without_gpus", wished)

        await self._store.write(commit)
        uploaded(self._blobs, package, user)
        self._dispatcher.added([task])
        return run

    def look(self, user: User, request: LaunchRequest) -> dict[str, Any]:
        """Where a job would run at this moment, machine by machine; nothing is started."""
        try:
            spec = _spec(request)
        except MalformedMessage as error:
            raise Problem(422, "this job cannot be", str(error)) from error
        needs = self._needs(user, request, spec)
        wanted = match.Wanted.launched(spec, needs, request.labels)
        candidates = self._fleet.candidates(user.tenant)
        taken, _ = match.choose(wanted, candidates)
        return {
            "needs": msgspec.to_builtins(needs),
            "taken": taken,
            "machines": [msgspec.to_builtins(v) for v in match.verdicts(wanted, candidates)],
        }

    def _needs(self, user: User, request: LaunchRequest, spec: LaunchSpec) -> Needs:
        """What it is to have; without GPUs where it may do without and nobody has them."""
        needs = request.needs.needs()
        if not (request.gpus_optional and needs.gpus):
            return needs
        wanted = match.Wanted.launched(spec, needs, request.labels)
        if any(not match.never(wanted, c) for c in self._fleet.candidates(user.tenant)):
            return needs
        return replace(needs, gpus=0, gpu_memory_bytes=0, gpu_model="")

    # ------------------------------------------------------------------ Work

    def ended(self, tx: Connection, task: Task, result: Result) -> None:
        """The run ends as its task did; how long its logs are is known first."""
        for stream, size in (("stdout", result.stdout_bytes), ("stderr", result.stderr_bytes)):
            self._observer.finish(task.run, LogFile(task.id, result.epoch, stream), size)
        runs.end(tx, task.run, result.state, cause=result.cause, exit_code=_exit_code(result))

    def told(self, task: Task, result: Result) -> None:
        """Wake who follows."""
        self._observer.ring(task.run)

    async def running(self, task: Task) -> None:
        """The device has started the command."""
        machine = self._fleet.get(task.device or "")
        data: dict[str, Any] = {
            "device": task.device,
            "name": machine.name if machine is not None else task.device,
            "epoch": task.epoch,
        }

        def commit(tx: Connection) -> None:
            runs.running(tx, task.run)
            add_event(tx, task.run, "started", data)

        await self._store.write(commit)
        self._observer.ring(task.run)


def _exit_code(result: Result) -> int | None:
    """As a shell tells it: 128 + N of what signal N has ended."""
    if result.exit_code is None and result.signal is not None:
        return 128 + result.signal
    return result.exit_code


def _spec(request: LaunchRequest) -> LaunchSpec:
    return LaunchSpec(
        command=request.command,
        bootstrap=request.bootstrap,
        env=request.env,
        offline=request.network == "none",
        container=None if request.container is None else request.container.container(),
    )


def possible(fleet: Fleet, tenant: str, wanted: match.Wanted, count: int = 1) -> None:
    """Refuse what could never run, with the reason for each machine that was looked at.

    Raises:
        Problem: 422.
    """
    candidates = fleet.candidates(tenant)
    reasons = {c.name: match.never(wanted, c) for c in candidates}
    fitting = [name for name, reason in reasons.items() if not reason]
    if len(fitting) >= count:
        return
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


def uploaded(blobs: Blobs, package: Blob | None, user: User) -> None:
    """The run refers to its package now: the upload need not keep it any longer."""
    if package is not None:
        blobs.release(package.sha256, f"u/{user.name}")


def check_package(blobs: Blobs, package: PackageRef | None) -> Blob | None:
    if package is None:
        return None
    size = blobs.size(package.sha256)
    if size is None:
        raise Problem(
            422, "the package was not uploaded", package.sha256, hint="upload it first, then submit"
        )
    return Blob(sha256=package.sha256, size=size)
