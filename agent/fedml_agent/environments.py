# SPDX-License-Identifier: Apache-2.0
"""Virtual environments of jobs: built once from what a job requires, shared by all that require it.

environments/KEY/          of the shim that builds it: its records and the log
environments/KEY/work/     the builder's own, and all that it can write
environments/KEY/work/venv the environment; scripts in it name this path, so it is built in place
environments/KEY/built     there when it is complete: its size; its time is that of the last use

KEY is a hash of the requirements, of the Python and of the platform; relative paths among them
count with the package in which they lie. The builder is locked in as a job is: what it installs
may run code of its own. A job sees its environment and cannot write to it. Where the machine cannot
promise that (see sandbox.py), the environment belongs to one task and goes with it.

`uv` builds it where there is one, else `venv` and `pip`.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

from fedml_agent import sandbox, tending
from fedml_agent.capped_log import LogReader
from fedml_agent.errors import AgentError
from fedml_agent.home import Home
from fedml_agent.policy import Policy
from fedml_agent.sandbox import Limits
from fedml_agent.tending import Ended, TaskSpec, Tended
from fedml_protocol.blob import Blob
from fedml_protocol.cause import Cause, Fault

log = logging.getLogger(__name__)

_BUILT = "built"
_LONGEST_S = 3600.0
_TOLD_BYTES = 4000

# Lines that mean something else in another workspace.
_LOCAL = re.compile(
    r"^\s*(?:-r|--requirement|-c|--constraint)\b"
    r"|(?:^|[\s=@])(?:file:|\.{1,2}(?:/|$))"
    r"|^\s*(?:-f|--find-links)[\s=]+(?![a-z]+://|/)"
    r"|^[^:#]+\.(?:whl|zip|tar\.gz)\s*$",
    re.MULTILINE,
)
# The machine owner's way to an index: the builder goes it, too.
_PASSED_ON = re.compile(
    r"(?i:https?_proxy|no_proxy|all_proxy)|SSL_CERT_(?:FILE|DIR)|REQUESTS_CA_BUNDLE"
    r"|PIP_(?:INDEX_URL|EXTRA_INDEX_URL|TRUSTED_HOST|CERT|CONFIG_FILE)"
    r"|UV_(?:INDEX|DEFAULT_INDEX|INDEX_URL|EXTRA_INDEX_URL|INSECURE_HOST|SYSTEM_CERTS|CONFIG_FILE)"
    r"|UV_HTTP_(?:RETRIES|TIMEOUT)"
)
# What resolvers say when it is not the requirements that are wrong.
_NO_WAY = re.compile(
    r"dns error|name resolution|error sending request|connection refused|timed out"
    r"|NewConnectionError|ConnectTimeout|no route to host|network is unreachable"
    r"|No space left on device|ensurepip is not available",
    re.IGNORECASE,
)
_HEADLINE = re.compile(r"^\s*(?:ERROR:|error:|×)\s*(.+)", re.MULTILINE)

_WITH_UV = """\
"$UV" venv -q --python "$PYTHON" "$VENV" || exit
cd "$WORKSPACE" || exit
exec "$UV" pip install --python "$VENV/bin/python" --compile-bytecode -r - <"$REQUIREMENTS"
"""
_WITH_PIP = """\
"$PYTHON" -m venv "$VENV" || exit
cd "$WORKSPACE" || exit
exec "$VENV/bin/python" -m pip install -r /dev/stdin <"$REQUIREMENTS"
"""


class CannotBuild(AgentError):
    """The environment cannot be built; the cause is for the person whose job it is."""

    def __init__(self, cause: Cause) -> None:
        super().__init__(cause.message)
        self.cause = cause


@dataclass(frozen=True, slots=True)
class Wanted:
    """One environment: its key, what is in it, and whether more than one task may use it."""

    key: str
    requirements: str
    shared: bool


class Environments:
    """The environments of one home."""

    def __init__(self, home: Home, policy: Callable[[], Policy]) -> None:
        self._root = home.environments
        self._home = home
        self._policy = policy
        self._building: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._in_use: Counter[str] = Counter()

    def wanted(self, requirements: str, package: Blob | None, task: str) -> Wanted:
        """Name the environment that a task requires."""
        lines = (line.partition(" #")[0].strip() for line in requirements.splitlines())
        text = "\n".join(line for line in lines if line and not line.startswith("#"))
        shared = sandbox.READ_ONLY not in sandbox.cannot()
        facts = [
            text,
            sys.version,
            sys.base_prefix,
            platform.machine(),
            *platform.libc_ver(),
            package.sha256 if package is not None and _LOCAL.search(text) else "",
            "" if shared else task,
        ]
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
        return Wanted(key, text + "\n", shared)

    @contextlib.contextmanager
    def held(self, wanted: Wanted) -> Iterator[None]:
        """Keep an environment until its task's specification names it."""
        self._in_use[wanted.key] += 1
        try:
            yield
        finally:
            self._in_use[wanted.key] -= 1
            self._in_use = +self._in_use

    async def ready(
        self, wanted: Wanted, workspace: Path, *, limits: Limits, deadline_s: float | None
    ) -> Path:
        """Build an environment unless it is there. Cancelled, it ends the builder.

        Args:
            workspace: What relative paths are relative to.
            deadline_s: The builder is ended after so long.

        Returns:
            The virtual environment.

        Raises:
            CannotBuild: With the resolver's own words.
        """
        folder = self._root / wanted.key
        lock = self._building.get(wanted.key) or asyncio.Lock()
        self._building[wanted.key] = lock
        async with lock:
            if not _is_built(folder):
                await _clear(folder)
                await self._build(folder, wanted, workspace, limits, deadline_s or _LONGEST_S)
            (folder / _BUILT).touch()
        await asyncio.to_thread(self.evict)
        return folder / "work" / "venv"

    async def take_up(self) -> None:
        """Remove what an earlier agent did not finish."""
        for folder in list(self._root.iterdir()):
            if not _is_built(folder) and not self._in_use[folder.name]:
                await _clear(folder)

    def evict(self, limit: int | None = None) -> None:
        """Remove the least recently used beyond the limit, bytes; None: the policy's."""
        limit = self._policy().environment_disk if limit is None else limit
        needed, total, found = self._needed(), 0, []
        for marker in self._root.glob(f"*/{_BUILT}"):
            with contextlib.suppress(OSError, ValueError, KeyError):
                said = json.loads(marker.read_text())
                found.append((marker.stat().st_mtime, int(said["size"]), said["shared"], marker))
        for _, size, shared, marker in sorted(found, reverse=True, key=lambda one: one[0]):
            total += size
            if (total > limit or not shared) and marker.parent.name not in needed:
                marker.unlink()  # first: half of an environment must not look like one
                shutil.rmtree(marker.parent, ignore_errors=True)
                total -= size

    def _needed(self) -> set[str]:
        """Those that a task uses, or is about to; also tasks that an earlier agent started."""
        needed = set(self._in_use)
        for spec in self._home.tasks.glob("*/spec.json"):
            with contextlib.suppress(OSError, ValueError, KeyError):
                venv = Path(json.loads(spec.read_text())["env"].get("VIRTUAL_ENV", ""))
                if venv.is_relative_to(self._root):
                    needed.add(venv.relative_to(self._root).parts[0])
        return needed

    async def _build(
        self, folder: Path, wanted: Wanted, workspace: Path, limits: Limits, deadline_s: float
    ) -> None:
        work = folder / "work"
        (work / "tmp").mkdir(mode=0o700, parents=True)
        (work / "requirements.txt").write_text(wanted.requirements)
        log.info("building an environment in %s", folder)
        tended = await tending.start(folder, self._spec(work, workspace, limits, deadline_s))
        try:
            end = await tended.ended()
        finally:
            if not tended.is_over:
                tended.kill()
        if not isinstance(end, Ended) or end.reason != "exited" or end.code:
            raise CannotBuild(_cause(folder, end, deadline_s))
        await asyncio.to_thread(_finish, folder, wanted)

    def _spec(self, work: Path, workspace: Path, limits: Limits, deadline_s: float) -> TaskSpec:
        policy, uv = self._policy(), find_uv()
        extra = {
            "VENV": str(work / "venv"),
            "PYTHON": sys.executable,
            "UV": uv,
            "REQUIREMENTS": str(work / "requirements.txt"),
            "WORKSPACE": str(workspace),
            # Of this builder alone: what one leaves in a cache, the next one would run.
            "UV_CACHE_DIR": str(work / "tmp" / "uv"),
            "UV_NO_PROGRESS": "1",
            "UV_PYTHON_DOWNLOADS": "never",
            "PIP_NO_CACHE_DIR": "1",
            "PIP_NO_INPUT": "1",
            "PIP_PROGRESS_BAR": "off",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }
        data = tuple(Path(path) for path in policy.data.values() if os.access(path, os.F_OK))
        return TaskSpec(
            argv=("/bin/sh", "-c", _WITH_UV if uv else _WITH_PIP),
            env=sandbox.clean_env(os.environ, _to_the_index(os.environ) | extra, home=work),
            cwd=work,
            limits=limits,
            hide=(self._home.root, *data),
            show=(work, workspace),
            optional=sandbox.optional(policy.require),
            deadline_s=deadline_s,
            marker=work.parent.name,
        )


def find_uv() -> str:
    """Where `uv` is, of the extra or of the machine; empty: nowhere."""
    beside_us = sysconfig.get_path("scripts")
    return shutil.which("uv", path=f"{beside_us}:{os.environ.get('PATH', os.defpath)}") or ""


def _to_the_index(env: Mapping[str, str]) -> dict[str, str]:
    found = {name: value for name, value in env.items() if _PASSED_ON.fullmatch(name)}
    if "PIP_INDEX_URL" in found:
        found.setdefault("UV_DEFAULT_INDEX", found["PIP_INDEX_URL"])
    return found


def _is_built(folder: Path) -> bool:
    # A Python that was upgraded away leaves a link to nothing.
    return (folder / _BUILT).exists() and (folder / "work" / "venv" / "bin" / "python").exists()


async def _clear(folder: Path) -> None:
    """Remove what is left of an environment, and end who may still be building it."""
    with contextlib.suppress(tending.ShimSilent, FileNotFoundError, NotADirectoryError, ValueError):
        found = await tending.adopt(folder)
        if isinstance(found, Tended):
            found.kill()
            await found.ended()
    await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


def _finish(folder: Path, wanted: Wanted) -> None:
    shutil.rmtree(folder / "work" / "tmp", ignore_errors=True)
    size = sum(
        path.lstat().st_blocks * 512 for path in (folder / "work").rglob("*") if not path.is_dir()
    )
    os.sync()  # after a power cut, what is marked must be all there
    (folder / _BUILT).write_text(json.dumps({"size": size, "shared": wanted.shared}))


def _cause(folder: Path, end: tending.End, deadline_s: float) -> Cause:
    if not isinstance(end, Ended):
        return Cause(fault=Fault.MACHINE, message=f"its environment was not built: {end.why}")
    if end.reason == "refused":
        return Cause(fault=Fault.MACHINE, message=f"its environment was not built: {end.error}")
    if end.reason == "deadline":
        message = f"its requirements were not installed within {deadline_s:.0f} s"
        return Cause(fault=Fault.TASK, message=message, hint="require less, or a longer deadline")
    if end.reason == "killed" or end.signal is not None:
        memory = " (out of memory)" if end.oom != "no" else ""
        message = f"the installation of its requirements was killed{memory}"
        return Cause(fault=Fault.TASK if memory else Fault.MACHINE, message=message)
    said = _tail(folder, "out") + _tail(folder, "err")
    headline = found[1].strip() if (found := _HEADLINE.search(said)) else f"exit code {end.code}"
    if _NO_WAY.search(said):
        return Cause(
            fault=Fault.MACHINE,
            message=f"its requirements could not be installed on this machine: {headline}",
            hint="ask its owner: does it reach a package index, and has its disk room?",
            traceback=said[-_TOLD_BYTES:],
        )
    return Cause(
        fault=Fault.TASK,
        message=f"its requirements cannot be installed: {headline}",
        hint="mend `requirements` in the job file",
        traceback=said[-_TOLD_BYTES:],
    )


def _tail(folder: Path, stream: tending.Stream) -> str:
    reader, at, said = LogReader(folder, stream), 0, b""
    while (piece := reader.read(at, 1 << 16))[1]:
        at = piece[0] + len(piece[1])
        said = (said + piece[1])[-4 * _TOLD_BYTES :]
    return said.decode(errors="replace")
