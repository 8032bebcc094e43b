# SPDX-License-Identifier: Apache-2.0
"""Stages of federated runs: one warm worker per run, one stage at a time.

    sessions/RUN/shim-N/       of the shim of the N-th worker
    sessions/RUN/work/         the worker's own: package, models, client state, its socket

The worker (`warm_worker`) has no network and no credentials: models come and updates go through
this module.
"""

import asyncio
import datetime
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path

from fedml_agent import belongings, processes, records, sandbox, tending
from fedml_agent.attic import Attic, mark_owed
from fedml_agent.errors import AgentError
from fedml_agent.home import Home
from fedml_agent.https import BlobChanged, Https, file_blob, patiently
from fedml_agent.journal import Entry, Journal
from fedml_agent.launch import Reporter, limits_of
from fedml_agent.observe import LogShipper
from fedml_agent.outbox import FilesSpoilt, send_file
from fedml_agent.packages import BadPackage, Packages
from fedml_agent.policy import Policy, time_limit_s
from fedml_agent.redact import Secrets
from fedml_agent.room import Room
from fedml_agent.secret_names import secrets_of
from fedml_agent.tending import TaskSpec, Tended
from fedml_agent.verdict import out_of_time, result_of
from fedml_agent.warm_worker import SOCKET, Session, WorkerDied
from fedml_protocol.blob import Blob, NamedBlob
from fedml_protocol.cause import Cause, Fault
from fedml_protocol.federate import StageOrder, StageSpec
from fedml_protocol.tasks import Needs, Result, TaskState

log = logging.getLogger(__name__)

# A worker that dies so often without finishing a stage dies of the user's code.
_DEATHS = 5
# Of this round and the one before: a model, and what the algorithm sends with it.
_MODELS_KEPT = 4
# What a stage frees, up to so much, stays with its worker: the next stage asks for it again, and
# memory that comes from the system is cleared page by page first.
_KEPT_FREE_BYTES = 256 << 20
_ALLOCATOR = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")  # of the GNU C library
# Of the time until a round closes: the rest is for messages, hashes and a busy broker.
_ON_TIME = 0.9
# A worker that nobody has used for so long gives its memory back.
_IDLE_S = 3600.0


class Stages:
    """The federated runs of this machine."""

    def __init__(
        self,
        home: Home,
        journal: Journal,
        packages: Packages,
        https: Callable[[], Https],
        reporter: Reporter,
        policy: Callable[[], Policy],
        room: Room,
        attic: Attic,
    ) -> None:
        """
        Args:
            room: A session keeps its place in it, between its stages too.
        """
        self._attic = attic
        self._home = home
        self._journal = journal
        self._packages = packages
        self._https = https
        self._reporter = reporter
        self._policy = policy
        self._room = room
        self._sessions: dict[str, Session] = {}
        self._stages: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._deaths: dict[str, int] = {}

    @property
    def open(self) -> set[str]:
        """Sessions that have a worker."""
        return set(self._sessions)

    def pids(self) -> dict[int, str]:
        """Whose the processes at the root of each worker are."""
        workers = ((name, session.tended) for name, session in self._sessions.items())
        return {pid: name for name, one in workers if one is not None for pid in one.pids}

    async def run(self, entry: Entry) -> None:
        """One stage from its offer to its result."""
        current = asyncio.current_task()
        if current is not None:
            self._stages[entry.key] = current
        try:
            result = await self._stage(entry)
        except asyncio.CancelledError:
            if entry.key in self._stages:
                raise  # the agent stops; the stage goes on in its worker
            self._reporter.ended(entry, _result(entry, TaskState.STOPPED, None))
            return
        except BadPackage as error:
            result = _failed(entry, Fault.MACHINE, str(error))
        except belongings.NotAFile as error:
            result = _failed(entry, Fault.TASK, str(error))
        except WorkerDied as error:
            result = self._worker_died(entry, error)
        except (AgentError, tending.TendingError, OSError) as error:
            result = _result(entry, TaskState.LOST, Cause(fault=Fault.MACHINE, message=str(error)))
        finally:
            self._stages.pop(entry.key, None)
        self._reporter.ended(entry, result)

    async def adopt(self, entry: Entry) -> None:
        """A stage that a former agent gave to a worker: it is asked for again."""
        session = await self._session(entry, only_adopt=True)
        if session is None:
            cause = Cause(fault=Fault.MACHINE, message="its worker did not survive")
            self._reporter.ended(entry, _result(entry, TaskState.LOST, cause))
            return
        await self.run(entry)

    def stop(self, entry: Entry) -> None:
        """Nobody waits for a stage any more: its worker gives it up, and stays warm if it does."""
        task = self._stages.pop(entry.key, None)
        if task is None:
            return
        task.cancel()
        session = self._sessions.get(entry.session)
        if session is not None:
            session.give_up(entry.key)

    def watch(self, task: str, on: bool) -> None:
        """Somebody watches a run: its workers' logs go out at once."""
        for session in self._sessions.values():
            if session.log_key[0] == task and session.shipper is not None:
                session.shipper.watch(on)

    async def close(self, name: str) -> None:
        """The run is over: end its worker, forget its files."""
        await self._rest(name)
        folder = self._home.sessions / name
        for shim in folder.glob("shim-*"):
            self._attic.take_in(shim, f"{name}.{shim.name}")
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    def kept(self) -> list[str]:
        """Runs of which there is something here."""
        return [folder.name for folder in self._home.sessions.iterdir()]

    async def _rest(self, name: str) -> None:
        """End the worker of a session and free what it holds; its files stay."""
        session = self._sessions.pop(name, None)
        if session is not None:
            await session.end()
        self._deaths.pop(name, None)
        self._room.give_back(name)

    async def take_up(self, folder: Path) -> None:
        """A session without an open stage: its worker stays warm if it lives.

        If not, its files wait for the next stage: algorithms keep the state of a client there.
        """
        session = Session(folder.name, folder)
        try:
            found = await session.find()
        except (tending.ShimSilent, ValueError) as error:
            log.warning("%s", error)
            found = None
        if isinstance(found, Tended) and folder.name not in self._sessions:
            lease = session.lease()
            self._room.take(folder.name, Needs(**lease["needs"]), tuple(lease["gpus"]))
            session.take(found, self._shipper(session, found))
            self._sessions[folder.name] = session

    async def close_idle(self) -> None:
        """End workers that nobody has used for long; the next stage starts another one."""
        now = asyncio.get_running_loop().time()
        for name, session in list(self._sessions.items()):
            if now - session.used_at > _IDLE_S and not self._journal.knows_session(name):
                log.info("the worker of %s was idle for %g s and is ended", name, _IDLE_S)
                await self._rest(name)

    def detach(self) -> None:
        """The agent stops; the workers go on without it."""
        for session in self._sessions.values():
            session.detach()

    async def upload(self, entry: Entry, *, again: bool) -> None:
        """Send the files that a result names; `again`: some may be there already.

        Raises:
            FilesSpoilt: They are not what they were.
            AgentError: They did not arrive.
        """
        if entry.result is None or not entry.result.artifacts:
            return
        out = self._out_dir(entry)
        for artifact in entry.result.artifacts:
            file = out / f"{artifact.name}.safetensors"
            try:
                with self._opened(file) as path:
                    await send_file(self._https, path, artifact, again=again)
            except (FileNotFoundError, belongings.NotAFile) as error:
                raise FilesSpoilt(f"{artifact.name} is gone from this machine's disk") from error

    def clean(self, entry: Entry) -> None:
        """The broker has the result: its files may go."""
        shutil.rmtree(self._out_dir(entry), ignore_errors=True)

    # ------------------------------------------------------------------ one stage

    async def _stage(self, entry: Entry) -> Result:
        spec = _stage_spec(entry)
        loop = asyncio.get_running_loop()
        came = loop.time()
        session, (model, sent, took) = await asyncio.gather(
            self._session(entry), self._models(spec)
        )
        if session is None:
            raise WorkerDied("it could not be started")
        out = self._out_dir(entry)
        await asyncio.to_thread(out.mkdir, mode=0o700, parents=True, exist_ok=True)
        began = loop.time()

        def order() -> StageOrder:
            left = 0.0
            if spec.deadline_s:  # the update takes as long to go as the model took to come
                left = _ON_TIME * spec.deadline_s - (loop.time() - came) - took
                left = max(left, 0.001)
            return StageOrder(
                task=entry.key[0],
                epoch=entry.key[1],
                spec=spec,
                model_path=model,
                sent_path=sent,
                out_dir=str(out),
                deadline_s=left,
            )

        now = datetime.datetime.now().astimezone().time()
        try:
            async with asyncio.timeout(time_limit_s(self._policy(), now)):
                done = await session.ask(order)
        except TimeoutError:
            await self._rest(spec.session)
            return _result(entry, TaskState.FAILED, out_of_time(entry, loop.time() - began))
        self._deaths.pop(spec.session, None)
        if done.cause is not None:
            return _result(
                entry, TaskState.FAILED, self._without_secrets(session, entry, done.cause)
            )
        artifacts = []
        for name in done.files:
            file = out / f"{name}.safetensors"
            with self._opened(file) as path:
                blob = await asyncio.to_thread(file_blob, path)
            artifacts.append(NamedBlob(name=name, blob=blob))
        return Result(
            task=entry.key[0],
            epoch=entry.key[1],
            state=TaskState.FINISHED,
            artifacts=tuple(artifacts),
            metrics=done.metrics,
            weight=done.weight,
        )

    async def _models(self, spec: StageSpec) -> tuple[str, str, float]:
        """Model and what the algorithm sends beside it, and how many seconds they took to come."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        model, sent = await asyncio.gather(
            self._model(spec.session, spec.model), self._model(spec.session, spec.sent)
        )
        return model, sent, loop.time() - began

    async def _model(self, session: str, blob: Blob | None) -> str:
        """A model or what the algorithm sends, in the session's directory."""
        if blob is None:
            return ""
        # By boot: a file from before a power cut may be there by its name only.
        # Not where the worker writes: it could leave a link there for us to write through.
        folder = self._home.sessions / session / f"models-{processes.boot_id()[:8]}"
        file = folder / f"{blob.sha256}.safetensors"
        if not file.exists():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # The worker has mapped what it uses. Kept longer, quick rounds would fill the disk.
            newest = sorted(folder.glob("*.safetensors"), key=lambda f: f.stat().st_mtime_ns)
            for old in newest[: 1 - _MODELS_KEPT]:
                old.unlink(missing_ok=True)
            try:
                await patiently(lambda: self._https().fetch(blob, file))
            except BlobChanged as error:
                raise BadPackage(f"the model is not the one that was offered: {error}") from error
        else:
            file.touch()  # used again: not the oldest any more
        return str(file)

    def _worker_died(self, entry: Entry, died: WorkerDied) -> Result:
        name = _stage_spec(entry).session
        self._sessions.pop(name, None)
        deaths = self._deaths[name] = self._deaths.get(name, 0) + 1
        how, hint = str(died), ""
        if died.end is not None:
            why = result_of(entry, died.end).cause
            how, hint = (why.message, why.hint) if why is not None else ("it ended by itself", "")
        times = f" {deaths} times" if deaths >= _DEATHS else ""
        cause = Cause(
            fault=Fault.TASK if times else Fault.MACHINE,
            message=f"its worker died{times}: {how}" + (f"\n{died.tail}" if died.tail else ""),
            hint=hint,
        )
        return _result(entry, TaskState.FAILED if times else TaskState.LOST, cause)

    # ------------------------------------------------------------------ sessions

    async def _session(self, entry: Entry, *, only_adopt: bool = False) -> Session | None:
        name = _stage_spec(entry).session
        session = self._sessions.get(name)
        if session is None:
            session = Session(name, self._home.sessions / name)
            self._sessions[name] = session
        try:
            async with session.starting:
                if session.tended is None:
                    await self._start(session, entry, only_adopt=only_adopt)
                if session.tended is None:
                    self._sessions.pop(name, None)
                    return None
        except BaseException:
            if session.tended is None:
                self._sessions.pop(name, None)
            raise
        return session

    async def _start(self, session: Session, entry: Entry, *, only_adopt: bool) -> None:
        found = await session.find()
        if isinstance(found, Tended):
            log.info("the worker of %s goes on", session.name)
            session.take(found, self._shipper(session, found))
            return
        if only_adopt:
            return
        work = session.folder / "work"
        if session.lease().get("boot_id") != processes.boot_id():
            # After a power cut its files may be there by name only.
            await asyncio.to_thread(shutil.rmtree, work / "package", ignore_errors=True)
        package = entry.offer.package
        if package is not None and not (work / "package").exists():
            work.mkdir(mode=0o700, parents=True, exist_ok=True)
            await self._packages.unpack(package, work / "package")
        (work / "tmp").mkdir(mode=0o700, parents=True, exist_ok=True)
        (work / SOCKET).unlink(missing_ok=True)
        lease = {
            "needs": asdict(entry.offer.needs),
            "gpus": entry.gpus,
            "boot_id": processes.boot_id(),
            # The log of a worker is filed under the stage that it was started for.
            "log": entry.key,
        }
        (session.folder / "lease.json").write_text(json.dumps(lease))
        shim_dir = session.next_shim_dir()
        mark_owed(shim_dir, *entry.key)
        recorded = records.made_in(shim_dir)
        tended = await tending.start(shim_dir, self._spec(session, entry, work, recorded))
        session.take(tended, self._shipper(session, tended))

    def _without_secrets(self, session: Session, entry: Entry, cause: Cause) -> Cause:
        """A traceback may show what no log does."""
        env = self._env(entry, session.folder / "work")
        secrets = Secrets(secrets_of(env, (), self._policy().log_hide))
        return replace(
            cause, message=secrets.hide(cause.message), traceback=secrets.hide(cause.traceback)
        )

    def _env(self, entry: Entry, work: Path) -> dict[str, str]:
        policy = self._policy()
        extra = {
            "FEDML_CURRENT_RUN_ID": entry.offer.run,
            "FEDML_CURRENT_EDGE_ID": self._home.membership().device,
            "FEDML_DATA": json.dumps(dict(policy.data)),
            "FEDML_HOME": str(self._home.root.parent),  # where `fedml data fetch` puts data sets
            "CUDA_VISIBLE_DEVICES": ",".join(entry.gpus),
            # Many workers share a machine's cores: one thread each, unless the user's code says
            # else.
            "OMP_NUM_THREADS": os.environ.get("FEDML_WORKER_THREADS", "1"),
            "PYTHONUNBUFFERED": "1",
            **{name: os.environ.get(name, str(_KEPT_FREE_BYTES)) for name in _ALLOCATOR},
        }
        if "OPENBLAS_CORETYPE" in os.environ:  # without it, some builds compute wrong results
            extra["OPENBLAS_CORETYPE"] = os.environ["OPENBLAS_CORETYPE"]
        return sandbox.clean_env(os.environ, extra, home=work)

    def _spec(self, session: Session, entry: Entry, work: Path, recorded: Path) -> TaskSpec:
        policy = self._policy()
        env = {**self._env(entry, work), records.ENV: str(recorded)}
        python = os.environ.get("FEDML_WORKER_PYTHON", sys.executable)
        return TaskSpec(
            argv=(python, "-m", "fedml.federate.worker", session.name),
            env=env,
            secrets=tuple(secrets_of(env, (), policy.log_hide)),
            cwd=work,
            limits=limits_of(entry, policy),
            cgroup=sandbox.cgroup_of_tasks(),
            hide=(self._home.root,),
            show=(session.folder,),
            writable=(recorded,),
            network=policy.federated_network,
            optional=sandbox.optional(policy.require, network=policy.federated_network),
            say_missing=True,
            marker=session.name,
        )

    def _shipper(self, session: Session, tended: Tended) -> LogShipper:
        return LogShipper(
            tended,
            *session.log_key,
            https=self._https,
            journal=self._journal,
            watched=True,
        )

    def _opened(self, file: Path) -> AbstractContextManager[Path]:
        """A file that the worker has made, and not what a link in its place points to."""
        parts = file.relative_to(self._home.sessions).parts
        return belongings.opened(self._home.sessions, *parts)

    def _out_dir(self, entry: Entry) -> Path:
        spec = _stage_spec(entry)
        return self._home.sessions / spec.session / "work" / "out" / entry.folder


def _stage_spec(entry: Entry) -> StageSpec:
    spec = entry.offer.spec
    if not isinstance(spec, StageSpec):
        raise TypeError("not a stage of a federated run")
    return spec


def _failed(entry: Entry, fault: Fault, message: str) -> Result:
    return _result(entry, TaskState.FAILED, Cause(fault=fault, message=message))


def _result(entry: Entry, state: TaskState, cause: Cause | None) -> Result:
    return Result(task=entry.key[0], epoch=entry.key[1], state=state, cause=cause)
