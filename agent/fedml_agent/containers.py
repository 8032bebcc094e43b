# SPDX-License-Identifier: Apache-2.0
"""Jobs in containers, run by Podman or Docker, as its owner says, asked by the command line.

The engine is what such a job is locked in by, so its shim puts up no walls of its own: the task's
program is `podman run` (or `docker run`), and what the job is lies in there.

shim ── guard ── podman run
              └─ conmon ── the container's process 1 (ENTRY below) ── the job

With Podman all of it descends from the guard, and ends with it. A container of Docker belongs to
its daemon: `remove` ends that one, and is asked by the shim when its task is over, by the agent
when a shim is dead, and for all that nobody knows when an agent starts. Both engines get the same
words. `remove` is always asked: it also forgets what Podman remembers.
"""

import asyncio
import base64
import contextlib
import functools
import json
import os
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedml_agent import records
from fedml_agent.errors import AgentError
from fedml_agent.namespaces import CGROUPS
from fedml_agent.policy import ENGINES, Policy
from fedml_agent.sandbox import Limits
from fedml_protocol.launch import Container

WORKSPACE = "/workspace"
SCRATCH = f"{WORKSPACE}/tmp"  # noqa: S108 - in there
STARTED = "tmp/.started"  # in the workspace: the engine has done its part
RECORDS = "/mlops"
NONE = "it has no container engine (Podman or Docker)"
ENV_FILE = "env"
_LABEL = "org.fedml.agent"
_ASK_S = 30.0
_ENGINES_OWN = ("PATH", "HOME", "LANG", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_DATA_HOME")
_ENGINES_PREFIXES = ("DOCKER_", "CONTAINERS_", "CONTAINER_", "REGISTRY_", "HTTP_PROXY", "HTTPS_")
# What package managers need to install something as the container's root, and no more.
_CAPABILITIES = ("CHOWN", "DAC_OVERRIDE", "FOWNER", "SETGID", "SETUID")
# Above this, an engine's own default is what it would get anyway.
_CEILING = 1 << 20
_LIMITS = (("nofile", resource.RLIMIT_NOFILE), ("nproc", resource.RLIMIT_NPROC))

# Process 1 of a container has no default for TERM, so it hands it on to everybody; `wait` returns
# at once when a signal came, and once more with the job's own status.
ENTRY = f"""\
: > {STARTED}
trap 'got=1; kill -TERM -1' TERM INT
/bin/sh -c "$1" & job=$!
while wait "$job"; code=$?; [ "$got" ]; do got=; done
exit "$code"
"""


# What the command says when nobody answers.
_NO_DAEMON = (b"cannot connect to the docker daemon", b"error during connect", b"eof")
_EVENTS_KEPT = 256
_STOPPED = "its container was stopped from outside, with Docker's daemon it may be"
_RESTARTED = "Docker's daemon, which ran its container, was restarted"


class NoImage(AgentError):
    """The image cannot be had.

    Attributes:
        passing: It is not the job's fault: nobody answered.
    """

    def __init__(self, text: str, *, passing: bool) -> None:
        super().__init__(text)
        self.passing = passing


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """What runs containers here.

    Attributes:
        name: `podman` or `docker`.
        program: Its command.
        rootless: It runs as the agent's user, and the container's root is that user.
        limits: It can limit memory, processes and processors of a container.
    """

    name: str
    program: str
    version: str
    rootless: bool
    limits: bool

    def __str__(self) -> str:
        return f"{self.name} {self.version}{' (rootless)' if self.rootless else ''}"


@functools.cache
def found(chosen: str | None = None) -> Engine | str:
    """The engine of this machine, or why there is none. It takes about 0.2 s the first time.

    Args:
        chosen: The one that its owner wants, of `ENGINES`; None: the first of them that works.
    """
    reasons = []
    for name in ENGINES if chosen is None else (chosen,):
        if (program := shutil.which(name)) is None:
            if chosen is not None:
                reasons.append(f"{name} is not installed, and is what containers.engine says")
            continue
        try:
            return (_podman if name == "podman" else _docker)(program)
        except (OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
            said = getattr(error, "stderr", None) or str(error)
            reasons.append(f"{name} is installed, but: {said.strip().rpartition(chr(10))[2]}")
    return "; ".join(reasons) or NONE


def here(policy: Policy) -> Engine | str:
    """The engine for jobs, or why none runs in a container; one that may not is not even asked."""
    if not any(shutil.which(name) for name in ENGINES):
        return NONE
    return (
        found(policy.engine)
        if policy.containers
        else "its owner lets none run ([containers] in policy.toml)"
    )


def _ask(*words: str) -> str:
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=_ASK_S, check=True, env=engine_env()
    )
    return done.stdout


def _podman(program: str) -> Engine:
    info = json.loads(_ask(program, "info", "--format=json"))
    host = info["host"]
    rootless = bool(host["security"]["rootless"])
    can = {"memory", "pids"} <= set(host.get("cgroupControllers") or ())
    return Engine(
        name="podman",
        program=program,
        version=info["version"]["Version"],
        rootless=rootless,
        limits=can and (host["cgroupVersion"] == "v2" or not rootless),
    )


def _docker(program: str) -> Engine:
    info = json.loads(_ask(program, "info", "--format={{json .}}"))
    if not info.get("ServerVersion"):
        raise ValueError("; ".join(info.get("ServerErrors") or ()) or "its daemon does not answer")
    rootless = any("rootless" in one for one in info.get("SecurityOptions") or ())
    return Engine(
        name="docker",
        program=program,
        version=info["ServerVersion"],
        rootless=rootless,
        limits=bool(info.get("MemoryLimit")) and bool(info.get("PidsLimit")),
    )


def engine_env() -> dict[str, str]:
    """What of the agent's environment an engine's command gets."""
    return {
        key: value
        for key, value in os.environ.items()
        if key in _ENGINES_OWN or key.startswith(_ENGINES_PREFIXES)
    }


def full_name(image: str) -> str:
    """An image with its registry, as Docker completes it: `python:3` is of docker.io/library."""
    first, slash, _ = image.partition("/")
    if slash and (set(first) & set(".:") or first == "localhost"):
        return image
    return f"docker.io/{image}" if slash else f"docker.io/library/{image}"


def cannot(policy: Policy) -> dict[str, str]:
    """The protections that a job in a container goes without here, each with its reason."""
    engine = here(policy)
    if isinstance(engine, str) or engine.limits:
        return {}
    return {CGROUPS: f"{engine} cannot limit what a container uses"}


async def pull(engine: Engine, container: Container, private: Path) -> None:
    """Fetch the image, unless it is there.

    Args:
        engine: Of this machine.
        container: What to fetch, and as whom.
        private: A directory that only the agent reads; the password lies there meanwhile.

    Raises:
        NoImage: It could not be had; the text is the engine's.
    """
    image, env = full_name(container.image), engine_env()
    code, _ = await _run(engine.program, "image", "inspect", "--format={{.Id}}", image, env=env)
    if code == 0:
        return
    with tempfile.TemporaryDirectory(dir=private) as folder:
        if container.username:
            secret = f"{container.username}:{container.password}".encode()
            login = {"auth": base64.b64encode(secret).decode()}
            registry = container.registry or image.partition("/")[0]
            (Path(folder) / "config.json").write_text(json.dumps({"auths": {registry: login}}))
            # Podman reads the first, Docker the second.
            env |= {"REGISTRY_AUTH_FILE": f"{folder}/config.json", "DOCKER_CONFIG": folder}
        code, said = await _run(engine.program, "pull", "--quiet", image, env=env)
    if code:
        why = said.strip().rpartition("\n")[2][-600:]
        known = ("unauthorized", "denied", "not found", "unknown", "authentication", "invalid")
        passing = not any(word in why.lower() for word in known)
        raise NoImage(f"the image {image} cannot be had: {why}", passing=passing)


async def _run(*words: str, env: Mapping[str, str]) -> tuple[int, str]:
    pipe = asyncio.subprocess.PIPE
    nothing = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(
        *words, env=env, stdin=nothing, stdout=nothing, stderr=pipe
    )
    try:
        _, said = await process.communicate()
    except asyncio.CancelledError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        raise
    assert process.returncode is not None
    return process.returncode, said.decode(errors="replace")


def command(
    engine: Engine,
    container: Container,
    *,
    name: str,
    agent: str,
    folder: Path,
    env: Mapping[str, str],
    gpus: Sequence[str],
    limits: Limits,
    network: bool,
    script: str,
    user: tuple[int, int] | None,
) -> list[str]:
    """The words that run a script of the shell on a job, whose files and `work` lie in `folder`.

    The variables of the job are in a file: everybody on a machine sees command lines, and in the
    environment of the engine's command a name such as LD_PRELOAD would mean something to that.
    """
    (folder / ENV_FILE).write_text(
        "".join(f"{name}={value}\n" for name, value in env.items() if "\n" not in name + value)
    )
    words = [engine.program, "run", "--rm", f"--name={name}", f"--label={_LABEL}={agent}"]
    words += ["--pull=never", "--log-driver=none", "--security-opt=no-new-privileges"]
    # As for other jobs: the machine's network or none.
    words += [f"--network={'host' if network else 'none'}"]
    words += ["--cap-drop=all", *(f"--cap-add={one}" for one in _CAPABILITIES)]
    words += [f"--volume={folder}/work:{WORKSPACE}:rw"]
    words += [f"--volume={folder}/{records.FOLDER}:{RECORDS}:rw"]
    words += [f"--volume={folder}/{file}:/{file}:ro" for file in ("bootstrap.sh", "job.sh")]
    words += [
        f"--volume={one.source}:{one.target}:{'rw' if one.writable else 'ro'}"
        for one in container.mounts
    ]
    if engine.name == "podman":
        words += ["--security-opt=label=disable", *_ulimits()]
        words += [f"--device=nvidia.com/gpu={uuid}" for uuid in gpus]
    elif gpus:
        words += [f'--gpus="device={",".join(gpus)}"']
    if user is None and engine.name == "docker" and not engine.rootless and os.geteuid() != 0:
        user = os.geteuid(), os.getegid()
    if user is not None and not engine.rootless:
        words += [f"--user={user[0]}:{user[1]}"]
    if engine.limits:
        if limits.memory_bytes is not None:
            words += [f"--memory={limits.memory_bytes}", f"--memory-swap={limits.memory_bytes}"]
        if limits.processes is not None:
            words += [f"--pids-limit={limits.processes}"]
        if limits.cpus is not None:
            words += [f"--cpus={limits.cpus}"]
    words += [f"--env-file={folder}/{ENV_FILE}"]
    # A line of the file ends at its end, whatever one writes.
    words += [f"--env={key}={value}" for key, value in env.items() if "\n" in key + value]
    words += [f"--workdir={WORKSPACE}", "--entrypoint=/bin/sh", full_name(container.image)]
    return [*words, "-c", ENTRY, "fedml", script]


def _ulimits() -> list[str]:
    """The agent's own: Podman asks for more than one without CAP_SYS_RESOURCE may have.

    (It lowers its own number of processes to the kernel's `pid_max`, and cannot go above that.)
    """
    most = int(Path("/proc/sys/kernel/pid_max").read_text())
    words = []
    for name, kind in _LIMITS:
        soft, hard = resource.getrlimit(kind)
        if 0 <= hard < _CEILING:
            most_here = min(hard, most) if name == "nproc" else hard
            words.append(f"--ulimit={name}={min(soft, most_here)}:{most_here}")
    return words


def remove(engine: Engine, name: str) -> list[str]:
    """The words that end a container, if it is there, and forget it."""
    now = ["--time=0"] if engine.name == "podman" else []
    return [engine.program, "rm", "--force", *now, "--volumes", name]


async def taken_away(engine: Engine, name: str) -> str:
    """How a container that has just ended was ended from outside; "": nothing shows that it was.

    Podman has no daemon. Docker's keeps its last events in memory, so one that does not know that
    it has started this container is another one. No job reaches it, so none can make an event.
    """
    if engine.name != "docker":
        return ""
    words = ("events", "--since=0", f"--until={time.time():.3f}", "--format={{json .}}")
    process = await asyncio.create_subprocess_exec(
        engine.program,
        *words,
        env=engine_env(),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(_ASK_S):
            said, complaint = await process.communicate()
    except TimeoutError:
        return ""
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        gone = any(word in complaint.lower() for word in _NO_DAEMON)
        return "Docker's daemon, which ran its container, is gone" if gone else ""
    try:
        events = [json.loads(line) for line in said.splitlines()]
        own = [e["Action"] for e in events if e["Actor"]["Attributes"].get("name") == name]
    except (ValueError, KeyError, TypeError):  # not Docker's words: they show nothing
        return ""
    if "start" not in own:
        # Full, it may have forgotten the start.
        return _RESTARTED if len(events) < _EVENTS_KEPT else ""
    return _STOPPED if "kill" in own else ""


def remove_unknown(engine: Engine, agent: str, known: set[str]) -> list[str]:
    """End what former agents of this machine have left running and nobody knows; their names."""
    listed = _ask(
        engine.program, "ps", "--all", f"--filter=label={_LABEL}={agent}", "--format={{.Names}}"
    )
    strays = sorted(set(listed.split()) - known)
    for name in strays:
        _ask(*remove(engine, name))
    return strays
