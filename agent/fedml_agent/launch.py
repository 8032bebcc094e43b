# SPDX-License-Identifier: Apache-2.0
"""A launched job: its workspace, its shim, its log, its result.

tasks/TASK.EPOCH/          of the shim: its records and the log
tasks/TASK.EPOCH/work/     the job's own: the unpacked workspace, where its command runs
"""

import asyncio
import datetime
import logging
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from fedml_agent import sandbox, tending
from fedml_agent.attic import Attic
from fedml_agent.environments import CannotBuild, Environments, Wanted
from fedml_agent.errors import AgentError, BrokerUnreachable
from fedml_agent.home import Home
from fedml_agent.https import Https
from fedml_agent.journal import Entry, Journal
from fedml_agent.observe import Finished, Logged, LogShipper
from fedml_agent.packages import BadPackage, Packages
from fedml_agent.policy import Policy, time_limit_s
from fedml_agent.secret_names import secrets_of
from fedml_agent.tending import Ended, Gone, TaskSpec, Tended
from fedml_agent.version import VERSION
from fedml_protocol.cause import Cause, Fault
from fedml_protocol.launch import LaunchSpec
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


# How long until a shim that does not answer is asked again.
_SILENCE_S = 10.0


class Reporter(Protocol):
    """Whom a job tells how it goes."""

    def started(self, entry: Entry) -> None:
        """It runs."""
        ...

    def ended(self, entry: Entry, result: Result) -> None:
        """It has ended; the result is to be written down and sent."""
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
    ) -> None:
        self._attic = attic
        self._home = home
        self._journal = journal
        self._packages = packages
        self._environments = environments
        self._https = https
        self._reporter = reporter
        self._policy = policy
        self._tended: dict[tuple[str, int], Tended] = {}
        self._shippers: dict[tuple[str, int], LogShipper] = {}
        self._stops: dict[tuple[str, int], float] = {}
        self._kept: set[tuple[str, int]] = set()
        self._building: dict[tuple[str, int], asyncio.Task[Path]] = {}

    async def run(self, entry: Entry) -> None:
        """One job from its offer, or from where a former agent left it, to its confirmed end."""
        try:
            tended = await self._begin(entry)
        except (BadPackage, tending.TaskRefused) as error:
            self._fail(entry, Cause(fault=Fault.MACHINE, message=str(error)))
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
                self._end(entry, found)
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
            try:
                await self._packages.unpack(
                    entry.offer.package, work, unless=lambda: entry.key in self._stops
                )
            except BrokerUnreachable:
                self._reporter.ended(entry, _stopped(entry))
                return None
        spec = entry.offer.spec
        if not isinstance(spec, LaunchSpec):
            raise TypeError("not a launched job")
        (work / "tmp").mkdir(exist_ok=True)
        (folder / "bootstrap.sh").write_text(spec.bootstrap)
        (folder / "job.sh").write_text(spec.command)
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
            self._reporter.ended(entry, _stopped(entry))
            return None
        tended = await tending.start(work.parent, self._spec(entry, spec, work, venv))
        self._reporter.started(entry)
        return tended

    def _spec(
        self, entry: Entry, spec: LaunchSpec, work: Path, venv: Path | None = None
    ) -> TaskSpec:
        offer, policy = entry.offer, self._policy()
        membership = self._home.membership()
        extra = {
            # A job on one machine; the broker says otherwise where it is one of several.
            "FEDML_CLIENT_RANK": "0",
            "FEDML_NUM_NODES": "1",
            "FEDML_NODE_0_ADDR": "127.0.0.1",
            "SKYPILOT_NODE_RANK": "0",
            "SKYPILOT_NUM_NODES": "1",
            "SKYPILOT_NODE_IPS": "127.0.0.1",
            **spec.env,
            "FEDML_WORKSPACE": str(work),
            "FEDML_CURRENT_RUN_ID": offer.run,
            "FEDML_CURRENT_EDGE_ID": membership.device,
            "SKYPILOT_NUM_GPUS_PER_NODE": str(len(entry.gpus)),
            "FEDML_CURRENT_VERSION": VERSION,
            "FEDML_USING_MLOPS": "true",
            # Empty hides all: a job gets the GPUs that it holds, and no other.
            "CUDA_VISIBLE_DEVICES": ",".join(entry.gpus),
            "NVIDIA_VISIBLE_DEVICES": ",".join(entry.gpus) or "void",
        }
        env = sandbox.clean_env(os.environ, extra, home=work)
        if venv is not None:
            env |= {"VIRTUAL_ENV": str(venv), "PATH": f"{venv / 'bin'}:{env['PATH']}"}
        shell = shutil.which("bash") or "/bin/sh"
        now = datetime.datetime.now().astimezone().time()
        # Data sets are for federated runs: a job could carry them off.
        # What is not there, or not for the agent's user either, need not be hidden.
        data = tuple(Path(path) for path in policy.data.values() if os.access(path, os.F_OK))
        return TaskSpec(
            argv=(shell, "-c", _SCRIPT),
            env=env,
            secrets=tuple(secrets_of(env, spec.secrets, policy.log_hide)),
            cwd=work,
            limits=limits_of(entry, policy),
            hide=(self._home.root, *data),
            show=(self._folder(entry), *([] if venv is None else [venv])),
            optional=sandbox.optional(policy.require),
            say_missing=True,
            deadline_s=time_limit_s(policy, now, offer.deadline_s or None),
            grace_s=offer.grace_s,
            marker=entry.folder,
        )

    # ------------------------------------------------------------------ ending

    async def _see_to_its_end(self, entry: Entry, tended: Tended) -> None:
        self._tended[entry.key] = tended
        try:
            if entry.key in self._stops:
                tended.stop(self._stops[entry.key])
            async with asyncio.TaskGroup() as both:
                both.create_task(self._ship(entry, tended), name=f"log.{entry.key[0]}")
                # A result does not wait for its log.
                match await tended.ended():
                    case Ended() as end:
                        self._end(entry, end)
                    case Gone(why):
                        self.lose(entry, why)
                work = self._folder(entry) / "work"
                await asyncio.to_thread(shutil.rmtree, work, ignore_errors=True)
        finally:
            self._tended.pop(entry.key, None)
            self._stops.pop(entry.key, None)

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

    def _end(self, entry: Entry, end: Ended) -> None:
        self._reporter.ended(entry, result_of(entry, end))

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


def limits_of(entry: Entry, policy: Policy) -> sandbox.Limits:
    """What a task may use of the machine."""
    return sandbox.Limits(
        memory_bytes=entry.offer.needs.memory_bytes or policy.memory or None,
        cpus=None if policy.cpus is None else max(1, int(policy.cpus)),
    )


def result_of(entry: Entry, end: Ended) -> Result:
    """What the broker is told of a job's end."""
    cause: Cause | None = None
    state = TaskState.FINISHED
    if end.reason == "stopped":
        state, cause = TaskState.STOPPED, Cause(fault=Fault.TASK, message="it was stopped")
    elif end.reason == "deadline":
        state = TaskState.FAILED
        cause = out_of_time(entry, end.duration_s)
    elif end.reason == "refused":
        state, cause = TaskState.FAILED, Cause(fault=Fault.MACHINE, message=end.error)
    elif end.reason == "killed" and end.oom == "no":
        # Nobody here asked for it: a third party killed what watches over the task.
        state = TaskState.LOST
        cause = Cause(fault=Fault.MACHINE, message="it was killed from outside")
    elif end.signal is not None or end.reason == "killed":
        name = signal.Signals(end.signal or signal.SIGKILL).name
        memory = " (out of memory)" if end.oom != "no" else ""
        state = TaskState.FAILED
        cause = Cause(fault=Fault.TASK, message=f"it was ended by {name}{memory}")
    elif end.code:
        state = TaskState.FAILED
        cause = Cause(fault=Fault.TASK, message=f"its command ended with exit code {end.code}")
    return Result(
        task=entry.key[0],
        epoch=entry.key[1],
        state=state,
        exit_code=end.code,
        signal=end.signal,
        cause=cause,
        stdout_bytes=end.logs.out.size,
        stderr_bytes=end.logs.err.size,
    )


def out_of_time(entry: Entry, ran_s: float) -> Cause:
    """Why a task was ended by the clock: by its own deadline, or by the machine owner's."""
    own_s = entry.offer.deadline_s
    if own_s and ran_s >= own_s:
        message = f"it ran longer than its {own_s:g} s and was ended"
        return Cause(fault=Fault.TASK, message=message)
    message = (
        f"it was ended after {ran_s:.0f} s: the machine's owner lets no task run longer "
        "(tasks.run_time, tasks.hours)"
    )
    return Cause(fault=Fault.POLICY, message=message)


def _stopped(entry: Entry) -> Result:
    cause = Cause(fault=Fault.TASK, message="it was stopped before it began")
    return Result(task=entry.key[0], epoch=entry.key[1], state=TaskState.STOPPED, cause=cause)
