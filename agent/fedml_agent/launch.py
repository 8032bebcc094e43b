# SPDX-License-Identifier: Apache-2.0
"""A launched job: its workspace, its shim, its log, its result.

tasks/TASK.EPOCH/          of the shim: its records and the log
tasks/TASK.EPOCH/work/     the job's own: the unpacked workspace, where its command runs
tasks/TASK.EPOCH/mlops/    what it records of itself, see records.py
tasks/TASK.EPOCH/outputs/  what it left for others, until the broker has it
"""

import asyncio
import datetime
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from fedml_agent import belongings, containers, deploy, outputs, records, sandbox, tending
from fedml_agent.attic import Attic
from fedml_agent.containers import NoImage
from fedml_agent.environments import CannotBuild, Environments, Wanted
from fedml_agent.errors import AgentError, BrokerUnreachable
from fedml_agent.home import Home
from fedml_agent.https import Https
from fedml_agent.journal import Entry, Journal
from fedml_agent.observe import Finished, Logged, LogShipper
from fedml_agent.packages import BadPackage, Packages
from fedml_agent.policy import Policy, time_limit_s
from fedml_agent.room import disk_free, size_of
from fedml_agent.secret_names import secrets_of
from fedml_agent.tending import End, Ended, Gone, TaskSpec, Tended
from fedml_agent.traces import Traces
from fedml_agent.verdict import may_be_taken_away, result_of, stopped
from fedml_agent.version import VERSION
from fedml_protocol.cause import Cause, Fault
from fedml_protocol.launch import Container, LaunchSpec, Service
from fedml_protocol.tasks import Result, TaskState

log = logging.getLogger(__name__)

# The bootstrap's variables and virtual environment are there for the command, as in one shell.
_SCRIPT = """\
cd "$FEDML_WORKSPACE" || exit 126
if [ -s ../bootstrap.sh ]; then
  . ../bootstrap.sh || { code=$?; echo "fedml: the bootstrap ended with $code" >&2; exit $code; }
fi
. ../job.sh
"""


# How long records may hold up the result of the job that made them.
_RECORDS_S = 5.0
# How long until a shim that does not answer is asked again.
_SILENCE_S = 10.0
_OUSTED_S = 5.0
_ENDED_JUST_NOW_S = 60.0
_LEAST = 1 << 20


class Reporter(Protocol):
    """Whom a job tells how it goes."""

    def started(self, entry: Entry) -> None:
        """It runs."""
        ...

    def ended(self, entry: Entry, result: Result) -> None:
        """It has ended; the result is to be written down and sent."""
        ...

    def serves(self) -> None:
        """A service answers, or no longer does."""
        ...


class Jobs:
    """The launched jobs of this machine."""

    def __init__(
        self,
        home: Home,
        journal: Journal,
        packages: Packages,
        environments: Environments,
        https: Callable[[], Https],
        reporter: Reporter,
        policy: Callable[[], Policy],
        attic: Attic,
        traces: Traces,
    ) -> None:
        self._traces = traces
        self._attic = attic
        self._home = home
        self._journal = journal
        self._packages = packages
        self._environments = environments
        self._https = https
        self._reporter = reporter
        self._policy = policy
        self._services = deploy.Services(lambda: self._reporter.serves())
        self._tended: dict[tuple[str, int], Tended] = {}
        self._shippers: dict[tuple[str, int], LogShipper] = {}
        self._stops: dict[tuple[str, int], float] = {}
        self._ousted: dict[tuple[str, int], Cause] = {}
        self._kept: set[tuple[str, int]] = set()
        # What comes before the start and takes long: an environment, an image.
        self._building: dict[tuple[str, int], asyncio.Task[Path]] = {}
        self._pulls: dict[tuple[str, int], asyncio.Task[None]] = {}

    async def run(self, entry: Entry) -> None:
        """One job from its offer, or from where a former agent left it, to its confirmed end."""
        try:
            tended = await self._begin(entry)
        except (BadPackage, tending.TaskRefused, sandbox.SandboxError) as error:
            self._fail(entry, Cause(fault=Fault.MACHINE, message=str(error)))
            return
        except NoImage as error:
            if error.passing:
                self.lose(entry, str(error))
            else:
                self._fail(entry, Cause(fault=Fault.TASK, message=str(error)))
            return
        except CannotBuild as error:
            self._fail(entry, error.cause)
            return
        except (AgentError, tending.TendingError, OSError) as error:
            self.lose(entry, str(error))
            return
        if tended is not None:
            await self._see_to_its_end(entry, tended)

    async def adopt(self, entry: Entry) -> None:
        """A job that a former agent started: it goes on, has ended, or is lost."""
        match found := await self._find(entry):
            case Tended():
                log.info("%s goes on; it was started by an earlier agent", entry.key[0])
                await self._see_to_its_end(entry, found)
            case Ended():
                await self._end(entry, found)
                await self._ship(entry, Finished(self._folder(entry), found))
            case Gone(why):
                self.lose(entry, why)
                if self._folder(entry).exists():
                    await self._ship(entry, Finished(self._folder(entry), found))

    async def _find(self, entry: Entry) -> Tended | Ended | Gone:
        while True:
            try:
                return await tending.adopt(self._folder(entry))
            except tending.ShimSilent as error:  # frozen, it may be; it is not ours to guess
                log.warning("%s", error)
                await asyncio.sleep(_SILENCE_S)
            except FileNotFoundError:
                return Gone("it had not begun when the agent stopped")

    def stop(self, entry: Entry, grace_s: float) -> None:
        """TERM, grace, KILL; also when it has not begun."""
        self._stops[entry.key] = grace_s
        tended, building = self._tended.get(entry.key), self._building.get(entry.key)
        if tended is not None:
            tended.stop(grace_s)
        elif building is not None:
            building.cancel()
        elif entry.key in self._pulls:
            self._pulls[entry.key].cancel()

    def filling(self, over: int) -> tuple[str, int] | None:
        """The job whose files are most above what it asked for, and their size; call in a thread.

        Args:
            over: Bytes; below this, ending it would not help.
        """
        sizes: list[tuple[int, str, int]] = []
        for key in list(self._tended):
            entry = self._journal.get(*key)
            if entry is not None:
                size = size_of(self._folder(entry) / "work")
                sizes.append((size - entry.offer.needs.disk_bytes, key[0], size))
        most, task, size = max(sizes, default=(0, "", 0))
        return (task, size) if most > 0 and size >= over else None

    def running(self) -> bool:
        """Whether any is."""
        return bool(self._tended)

    def oust(self, task: str, why: Cause) -> None:
        """End a job that does what it must not do on this machine."""
        for key, tended in self._tended.items():
            if key[0] == task:
                self._ousted.setdefault(key, why)
                tended.stop(_OUSTED_S)

    def port(self, entry: Entry) -> int:
        """Where a task answers at this moment, if it is a service; 0: nowhere."""
        if entry.result is not None or _service(entry) is None:
            return 0
        return self._services.port(self._folder(entry))

    def pids(self) -> dict[int, str]:
        """Whose the processes at the root of each job are."""
        return {pid: key[0] for key, tended in self._tended.items() for pid in tended.pids}

    def detach(self) -> None:
        """The agent stops; the jobs go on without it."""
        for tended in self._tended.values():
            tended.detach()

    def watch(self, task: str, on: bool) -> None:
        """Somebody starts or stops watching a task's log."""
        for (name, _), shipper in self._shippers.items():
            if name == task:
                shipper.watch(on)

    def clean(self, entry: Entry) -> None:
        """The broker has the result: the directory may go, once its log has been shipped."""
        if entry.key in self._shippers:
            self._kept.add(entry.key)
        elif self._folder(entry).exists():
            self._attic.take_in(self._folder(entry), entry.folder)

    # ------------------------------------------------------------------ beginning

    async def _begin(self, entry: Entry) -> Tended | None:
        folder = self._folder(entry)
        work = folder / "work"
        # A former epoch or a crash before the start may have left something.
        shutil.rmtree(folder, ignore_errors=True)
        work.mkdir(mode=0o700, parents=True)
        if entry.offer.package is not None:
            began = time.time()
            try:
                await self._packages.unpack(
                    entry.offer.package, work, unless=lambda: entry.key in self._stops
                )
            except BrokerUnreachable:
                self._reporter.ended(entry, stopped(entry))
                return None
            self._traces.unpacked(entry, began)
        spec = entry.offer.spec
        if not isinstance(spec, LaunchSpec):
            raise TypeError("not a launched job")
        (work / "tmp").mkdir(exist_ok=True)
        records.made_in(folder)
        outputs.prepare(work)
        (folder / "bootstrap.sh").write_text(spec.bootstrap)
        (folder / "job.sh").write_text(spec.command)
        if spec.service is not None:
            deploy.choose_port(folder, spec.service)
        if spec.container is not None:
            await self._pull(entry, spec.container)
        if not spec.requirements.strip():
            return await self._start(entry, spec, work, None)
        task = "/".join(map(str, entry.key))
        wanted = self._environments.wanted(spec.requirements, entry.offer.package, task)
        with self._environments.held(wanted):
            venv = await self._build(entry, wanted, work)
            return await self._start(entry, spec, work, venv)

    async def _build(self, entry: Entry, wanted: Wanted, work: Path) -> Path | None:
        """The environment that the job requires; None: it was stopped meanwhile."""
        now, policy = datetime.datetime.now().astimezone().time(), self._policy()
        ready = self._environments.ready(
            wanted,
            work,
            limits=limits_of(entry, policy),
            deadline_s=time_limit_s(policy, now, entry.offer.deadline_s or None),
        )
        self._building[entry.key] = asyncio.create_task(ready, name=f"build.{entry.key[0]}")
        try:
            return await self._building[entry.key]
        except asyncio.CancelledError:
            if entry.key not in self._stops:
                raise  # the agent stops
            return None
        finally:
            self._building.pop(entry.key, None)

    async def _start(
        self, entry: Entry, spec: LaunchSpec, work: Path, venv: Path | None
    ) -> Tended | None:
        if entry.key in self._stops:
            self._reporter.ended(entry, stopped(entry))
            return None
        told = self._spec(entry, spec, work, venv)
        if (owner := _owner(spec, self._policy())) is not None:
            await asyncio.to_thread(_give_to, owner, work.parent)
        tended = await tending.start(work.parent, told)
        self._reporter.started(entry)
        return tended

    async def _pull(self, entry: Entry, container: Container) -> None:
        """Fetch the image; a stop meanwhile ends that."""
        fetching = containers.pull(_engine(self._policy()), container, self._home.private)
        pulling = asyncio.get_running_loop().create_task(fetching, name=f"image.{entry.key[0]}")
        self._pulls[entry.key] = pulling
        try:
            await pulling
        except asyncio.CancelledError:
            if entry.key not in self._stops:
                raise
        finally:
            pulling.cancel()
            self._pulls.pop(entry.key, None)

    def _spec(
        self, entry: Entry, spec: LaunchSpec, work: Path, venv: Path | None = None
    ) -> TaskSpec:
        offer, policy = entry.offer, self._policy()
        membership = self._home.membership()
        recorded = self._folder(entry) / records.FOLDER
        boxed = spec.container is not None
        inside = Path(containers.WORKSPACE) if boxed else work
        extra = {
            # A job on one machine; the broker says otherwise where it is one of several.
            "FEDML_CLIENT_RANK": "0",
            "FEDML_NUM_NODES": "1",
            "FEDML_NODE_0_ADDR": "127.0.0.1",
            "SKYPILOT_NODE_RANK": "0",
            "SKYPILOT_NUM_NODES": "1",
            "SKYPILOT_NODE_IPS": "127.0.0.1",
            **spec.env,
            **self._traces.environment(entry),
            records.ENV: containers.RECORDS if boxed else str(recorded),
            "FEDML_WORKSPACE": str(inside),
            **outputs.variables(inside),
            "FEDML_CURRENT_RUN_ID": offer.run,
            "FEDML_CURRENT_EDGE_ID": membership.device,
            "SKYPILOT_NUM_GPUS_PER_NODE": str(len(entry.gpus)),
            "FEDML_CURRENT_VERSION": VERSION,
            "FEDML_USING_MLOPS": "true",
            # Empty hides all: a job gets the GPUs that it holds, and no other.
            "CUDA_VISIBLE_DEVICES": ",".join(entry.gpus),
            "NVIDIA_VISIBLE_DEVICES": ",".join(entry.gpus) or "void",
        }
        if spec.service is not None:
            extra["PORT"] = str(deploy.port_of(self._folder(entry)))
        now = datetime.datetime.now().astimezone().time()
        deadline_s = time_limit_s(policy, now, offer.deadline_s or None)
        if spec.container is not None:
            return self._boxed(entry, spec, spec.container, extra, work, deadline_s)
        env = sandbox.clean_env(os.environ, extra, home=work)
        if venv is not None:
            env |= {"VIRTUAL_ENV": str(venv), "PATH": f"{venv / 'bin'}:{env['PATH']}"}
        shell = shutil.which("bash") or "/bin/sh"
        # Data sets are for federated runs: a job could carry them off.
        # What is not there, or not for the agent's user either, need not be hidden.
        data = tuple(Path(path) for path in policy.data.values() if os.access(path, os.F_OK))
        return TaskSpec(
            argv=(shell, "-c", _SCRIPT),
            env=env,
            secrets=tuple(secrets_of(env, spec.secrets, policy.log_hide)),
            cwd=work,
            limits=limits_of(entry, policy, disk_free=disk_free(self._home.tasks)),
            cgroup=sandbox.cgroup_of_tasks(),
            hide=(self._home.root, *data),
            show=(self._folder(entry), *([] if venv is None else [venv])),
            writable=(recorded,),
            optional=sandbox.optional(policy.require, network=not spec.offline),
            say_missing=True,
            network=not spec.offline,
            user=_user(policy),
            deadline_s=deadline_s,
            grace_s=offer.grace_s,
            marker=entry.folder,
        )

    def _boxed(
        self,
        entry: Entry,
        spec: LaunchSpec,
        container: Container,
        extra: dict[str, str],
        work: Path,
        deadline_s: float | None,
    ) -> TaskSpec:
        engine, device = _engine(self._policy()), self._home.membership().device
        env = {"HOME": containers.WORKSPACE, "TMPDIR": containers.SCRATCH, **extra}
        name, limits = container_name(device, entry), limits_of(entry, self._policy())
        words = containers.command(
            engine,
            container,
            name=name,
            agent=device,
            folder=self._folder(entry),
            env=env,
            gpus=entry.gpus,
            limits=limits,
            network=not spec.offline,
            script=_SCRIPT,
            user=_user(self._policy()),
        )
        return TaskSpec(
            argv=words,
            env=containers.engine_env(),
            secrets=tuple(secrets_of(env, spec.secrets, self._policy().log_hide)),
            cwd=work,
            # The rest is the engine's to enforce; what it cannot, `containers.cannot` tells of.
            limits=sandbox.Limits(nice=limits.nice),
            enclosed=False,
            after=containers.remove(engine, name),
            deadline_s=deadline_s,
            grace_s=entry.offer.grace_s,
            marker=entry.folder,
        )

    # ------------------------------------------------------------------ ending

    async def _see_to_its_end(self, entry: Entry, tended: Tended) -> None:
        self._tended[entry.key] = tended
        try:
            if entry.key in self._stops:
                tended.stop(self._stops[entry.key])
            async with asyncio.TaskGroup() as both:
                name = f"log.{entry.key[0]}"
                shipping = both.create_task(self._ship(entry, tended), name=name)
                found = await self._served(entry, tended)
                # A result does not wait for its log. What the job has recorded is looked for as
                # soon as it has ended, so that gets a moment.
                if records.Records(self._folder(entry)).size():
                    await asyncio.wait([shipping], timeout=_RECORDS_S)
                match found:
                    case Ended() as end:
                        await self._end(entry, end)
                    case Gone(why):
                        self.lose(entry, why)
                work = self._folder(entry) / "work"
                await asyncio.to_thread(shutil.rmtree, work, ignore_errors=True)
        finally:
            self._tended.pop(entry.key, None)
            self._stops.pop(entry.key, None)

    async def _served(self, entry: Entry, tended: Tended) -> End:
        """Its end; as long as it runs, whether it answers is looked at."""
        if (service := _service(entry)) is None:
            return await tended.ended()
        watching = asyncio.create_task(
            self._services.watch(
                self._folder(entry), service, lambda why: self.oust(entry.key[0], why)
            ),
            name=f"service.{entry.key[0]}",
        )
        try:
            return await tended.ended()
        finally:
            watching.cancel()

    async def ship_rest(self, entry: Entry) -> None:
        """The log of a job that has ended, when a former agent did not get to it."""
        if self._folder(entry).exists():
            end = await self._find(entry)
            if not isinstance(end, Tended):
                await self._ship(entry, Finished(self._folder(entry), end))

    async def end_stray(self, folder: Path) -> None:
        """A directory that the journal knows nothing of: whatever runs in it is ended."""
        try:
            found = await tending.adopt(folder)
        except (tending.ShimSilent, FileNotFoundError, ValueError):
            found = Gone("it was never one")
        if isinstance(found, Tended):
            log.warning("%s runs without a row in the journal: it is ended", folder.name)
            found.kill()
            await found.ended()
        task, _, epoch = folder.name.rpartition(".")
        known = epoch.isdigit() and self._journal.get(task, int(epoch)) is not None
        # Confirmed, and not all of its log was sent when the agent before this one ended.
        owed = (task, int(epoch)) if known else None
        await asyncio.to_thread(shutil.rmtree, folder / "work", ignore_errors=True)
        self._attic.take_in(folder, folder.name, owed)

    async def _ship(self, entry: Entry, logged: Logged) -> None:
        shipper = LogShipper(
            logged,
            *entry.key,
            https=self._https,
            journal=self._journal,
            watched=entry.offer.tail,
        )
        self._shippers[entry.key] = shipper
        try:
            await shipper.run()
        finally:
            self._shippers.pop(entry.key, None)
            if entry.key in self._kept:
                self._kept.discard(entry.key)
                self.clean(entry)

    async def _end(self, entry: Entry, end: Ended) -> None:
        began, ended = (end.record[when]["wall"] for when in ("started", "ended"))
        self._traces.ran(entry, began, ended, end.code)
        begun = (self._folder(entry) / "work" / containers.STARTED).exists()
        outside = await self._taken_away(entry, end) if begun else ""
        result = result_of(entry, end, begun=begun, outside=outside)
        if (why := self._ousted.pop(entry.key, None)) is not None:
            result = replace(result, state=TaskState.FAILED, cause=why)
        if result.state in (TaskState.FINISHED, TaskState.FAILED):
            try:
                left = await asyncio.to_thread(outputs.take, self._folder(entry))
                result = replace(result, artifacts=left)
            except (outputs.TooMuch, belongings.NotAFile) as error:
                cause = Cause(fault=Fault.TASK, message=str(error))
                result = replace(result, state=TaskState.FAILED, cause=result.cause or cause)
            except OSError as error:
                cause = Cause(fault=Fault.MACHINE, message=f"what it left was not read: {error}")
                result = replace(result, state=TaskState.FAILED, cause=result.cause or cause)
        self._reporter.ended(entry, result)

    async def _taken_away(self, entry: Entry, end: Ended) -> str:
        """How its container was ended from outside, if it has just ended and that can be shown."""
        since_s = time.time() - end.record["ended"]["wall"]
        engine = containers.here(self._policy())
        # Later, a daemon that was restarted since proves nothing.
        if (
            isinstance(engine, str)
            or since_s > _ENDED_JUST_NOW_S
            or not may_be_taken_away(entry, end)
        ):
            return ""
        return await containers.taken_away(
            engine, container_name(self._home.membership().device, entry)
        )

    async def upload(self, entry: Entry, *, again: bool) -> None:
        """Send the files that a result names; see `outputs.upload`."""
        await outputs.upload(self._https, self._folder(entry), entry, again=again)

    def _fail(self, entry: Entry, cause: Cause) -> None:
        self._reporter.ended(
            entry,
            Result(task=entry.key[0], epoch=entry.key[1], state=TaskState.FAILED, cause=cause),
        )

    def lose(self, entry: Entry, why: str) -> None:
        """The machine did not bring it to an end: the broker may offer it again."""
        cause = Cause(fault=Fault.MACHINE, message=why)
        self._reporter.ended(
            entry, Result(task=entry.key[0], epoch=entry.key[1], state=TaskState.LOST, cause=cause)
        )

    def _folder(self, entry: Entry) -> Path:
        return self._home.tasks / entry.folder


def limits_of(entry: Entry, policy: Policy, *, disk_free: int | None = None) -> sandbox.Limits:
    """What a task may use of the machine; `disk_free`: bytes, where it writes."""
    file_bytes = None if disk_free is None else max(disk_free - policy.disk_reserve // 2, _LEAST)
    return sandbox.Limits(
        file_bytes=file_bytes,
        memory_bytes=entry.offer.needs.memory_bytes or policy.memory or None,
        processes=policy.processes,
        cpus=None if policy.cpus is None else max(1, int(policy.cpus)),
    )


def _user(policy: Policy) -> tuple[int, int] | None:
    """As whom jobs run; None: as the agent itself."""
    return None if policy.user is None else sandbox.ids_of(policy.user)


def _service(entry: Entry) -> Service | None:
    """How a job that stays up answers; None: it is not one."""
    spec = entry.offer.spec
    return spec.service if isinstance(spec, LaunchSpec) else None


def _owner(spec: LaunchSpec, policy: Policy) -> tuple[int, int] | None:
    """Who must own what a job works in; None: the agent. Of rootless engines it is root there."""
    return None if spec.container is not None and _engine(policy).rootless else _user(policy)


def _give_to(user: tuple[int, int], folder: Path) -> None:
    """Let another user's job work in its directory, record there, and read its scripts."""
    own = (folder / "work", folder / records.FOLDER)
    sandbox.give_to(user, *own, readable=(folder / "bootstrap.sh", folder / "job.sh"))


def container_name(device: str, entry: Entry) -> str:
    """The container of a task: one of this machine, whatever else its engine runs."""
    return f"fedml-{device}-{entry.folder}"


def _engine(policy: Policy) -> containers.Engine:
    engine = containers.found(policy.engine)
    if isinstance(engine, str):  # it was there when the offer was taken
        raise tending.TaskRefused(f"this machine runs no containers: {engine}")
    return engine
