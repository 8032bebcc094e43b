# SPDX-License-Identifier: Apache-2.0
"""`make demo`: a broker, four agents, a job, a federated run on real data.

On a terminal everything stays up until Ctrl-C, and you are told what to try; without one it ends by
itself. Kill any process of it: it is started again, as systemd would, and goes on where it was.
All state lies in `.demo/` of the checkout (or in the folder that is named as an argument), made
anew each time but for the data that was fetched.
"""

import asyncio
import contextlib
import ctypes
import fcntl
import json
import os
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
HOME = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT / ".demo"
SETS = HOME / "sets"
BIN = Path(sys.executable).parent
ROUNDS = 10

# What ends by itself so soon after its start will not get better by being started again; nor does
# what is killed so often in a row, by whomever.
TOO_SOON_S, TOO_OFTEN = 3.0, 5
# How often a command is tried that was killed, or found no broker: that is being started again.
TRIES, PAUSE_S = 15, 1.0
NO_BROKER = 5  # the exit code of `fedml` and `fedml-agent`
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_prctl = ctypes.CDLL(None).prctl


class Broken(Exception):
    """The demo cannot go on; the text says why."""


class Service:
    """A process that is started again whenever it dies."""

    def __init__(self, name: str, home: Path, *words: str) -> None:
        self.name = name
        self.home = home
        self.log = HOME / f"{name}.log"
        self.process: asyncio.subprocess.Process | None = None
        self.said: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._words = words

    async def keep(self) -> None:
        """Start it, and start it again, for ever. `said` becomes its first line of output."""
        killed = 0
        while True:
            began = time.monotonic()
            with self.log.open("a") as log:
                self.process = await asyncio.create_subprocess_exec(
                    str(BIN / self._words[0]),
                    *self._words[1:],
                    env=env(self.home),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C is for the demo, which then ends all in order
                    preexec_fn=die_with_parent,
                )
            async for line in self.process.stdout:
                if not self.said.done():
                    self.said.set_result(line.decode())
            code = await self.process.wait()
            how = f"ended with code {code}" if code >= 0 else f"got {signal.Signals(-code).name}"
            soon = time.monotonic() - began < TOO_SOON_S
            killed = killed + 1 if soon and code == -signal.SIGKILL else 0
            if soon and not 0 < killed < TOO_OFTEN:
                lines = "\n".join(self.log.read_text().splitlines()[-8:])
                raise Broken(f"{self.name} {how}; the end of {self.log}:\n{lines}")
            say(f"{self.name} {how}; it is started again and goes on where it was")


class Demo:
    """Everything that runs."""

    def __init__(self, services: asyncio.TaskGroup) -> None:
        self._group = services
        self._keeping: list[asyncio.Task[None]] = []
        self.services: dict[str, Service] = {}

    def start(self, name: str, home: Path, *words: str) -> Service:
        """Another service."""
        service = self.services[name] = Service(name, home, *words)
        self._keeping.append(self._group.create_task(service.keep(), name=name))
        return service

    def leave(self) -> None:
        """From now on, what ends is not started again."""
        for task in self._keeping:
            task.cancel()

    async def show(self) -> str:
        """The story, from an empty folder to a trained model; the federated run."""
        say("UCI Heart Disease: the patients of four hospitals")
        await call(SETS, "fedml", "data", "fetch", "heart")
        from fedml import data as datasets

        heart = datasets.load("heart", home=SETS)
        say("a broker comes up")
        broker = self.start(
            "broker", HOME, "fedml-broker", "up", "--https-port=0", "--mqtt-port=0", "--json"
        )
        told = json.loads(await broker.said)
        print(f"{told['url']}, MQTT at {told['mqtt']}; log in {broker.log}")
        say("four agents join over TLS, one in each hospital")
        for name in heart.clients:
            home = HOME / name
            (home / "agent").mkdir(parents=True)
            # The machine's owner decides what federated code may read.
            (home / "agent" / "policy.toml").write_text(f'[data]\nheart = "{SETS}"\n')
            if name == heart.clients[0]:  # can tasks be locked in here? It says what to do
                check = ("fedml-agent", "policy", "check", "--kind", "federate")
                await call(home, *check, quiet=True)
            await call(home, "fedml-agent", "login", told["login_key"], "--name", name, quiet=True)
            self.start(name, home, "fedml-agent", "run")
            print(f"  {name}")
        await call(HOME, "fedml", "login", Path(told["admin_key_file"]).read_text())
        say("a job on one of them")
        (HOME / "hello.yaml").write_text("job: echo hello from $(uname -n)\n")
        await watch("launch", HOME / "hello.yaml")
        say(f"{ROUNDS} federated rounds across all four; no patient leaves his hospital")
        shutil.copytree(ROOT / "examples" / "heart", HOME / "heart", dirs_exist_ok=True)
        config = {"features": int(heart.train.x.shape[1]), "lr": 0.3, "steps": 20}
        run = {
            "app": "heart.py",
            "rounds": ROUNDS,
            "clients": {"count": len(heart.clients)},
            "config": config,
        }
        (HOME / "heart" / "run.yaml").write_text(json.dumps(run))
        trained = await watch("federate", HOME / "heart" / "run.yaml")
        rounds = json.loads(await answer("fedml", "run", "show", trained, "--json"))
        compare(heart, config, rounds["rounds"][ROUNDS]["metrics"]["devices.accuracy"])
        return trained

    def say_what_to_try(self, run: str) -> None:
        """Commands that work as they stand."""
        agent = next(s for name, s in self.services.items() if name != "broker")
        say("all of it is still up; in another terminal, try")
        for line in (
            f'export FEDML_HOME={shlex.quote(str(HOME))} PATH={shlex.quote(str(BIN))}:"$PATH"',
            "fedml run list",
            f"fedml run show {run}",
            "fedml device list",
            f"fedml launch {shlex.quote(str(HOME / 'hello.yaml'))}",
            f"fedml federate {shlex.quote(str(HOME / 'heart' / 'run.yaml'))}",
            "fedml-broker status",
            f"kill -9 {agent.process.pid}    # an agent; look here what happens",
        ):
            print(f"  {line}")
        print("\nCtrl-C ends the demo and everything that it has started.", flush=True)


def compare(heart, config, together: float) -> None:
    """The same training in one place, and in each hospital alone, on everybody's test patients."""
    sys.path.insert(0, str(ROOT / "examples" / "heart"))
    import heart as app

    say("how often each model is right about the test patients of all four hospitals")
    once = {**config, "steps": config["steps"] * ROUNDS}
    parts = {f"{name} alone": heart.of_client(name) for name in heart.clients}
    parts |= {"all patients in one place": heart}
    found = {}
    for name, part in parts.items():
        model = app.model(config)
        app.train(model, part, once, None)
        found[name] = app.evaluate(model, heart, config)["accuracy"]
    found["federated"] = together
    for name, accuracy in sorted(found.items(), key=lambda item: item[1]):
        print(f"  {name:<28}{100 * accuracy:5.1f} %")


async def call(home: Path, *words: str, quiet: bool = False) -> None:
    """A command, as a person would type it; again if it was killed or found no broker.

    Raises:
        Broken: It did not end with 0.
    """
    for left in reversed(range(TRIES)):
        code, _, errors = await attempt(home, *words, quiet=quiet)
        if left and code in (NO_BROKER, -signal.SIGKILL):
            await asyncio.sleep(PAUSE_S)
        elif code:
            raise Broken(f"`{' '.join(words[:3])}` ended with code {code}\n{errors}")
        else:
            return


async def watch(word: str, file: Path) -> str:
    """`fedml launch` or `fedml federate`; its run, which goes on when whoever watches it dies.

    Raises:
        Broken: It did not end well.
    """
    for left in reversed(range(TRIES)):
        code, _, _ = await attempt(HOME, "fedml", word, str(file))
        lost = code in (NO_BROKER, -signal.SIGKILL)
        if code and not (lost and left):
            raise Broken(f"`fedml {word} {file}` ended with code {code}")
        runs = json.loads(await answer("fedml", "run", "list", "--json"))
        begun = [str(run["id"]) for run in runs if run["kind"] == word]
        if lost and begun:
            say(f"`fedml {word}` has gone; {begun[0]} goes on without it")
            await call(HOME, "fedml", "run", "wait", begun[0])
            await call(HOME, "fedml", "run", "show", begun[0])
        if begun:
            return begun[0]
        await asyncio.sleep(PAUSE_S)
    raise AssertionError("unreachable")


async def answer(*words: str) -> str:
    """What a command of the person's prints.

    Raises:
        Broken: It did not end with 0.
    """
    for _ in range(TRIES):
        code, text, errors = await attempt(HOME, *words, quiet=True)
        if not code:
            return text
        await asyncio.sleep(PAUSE_S)
    raise Broken(f"`{' '.join(words[:3])}` ended with code {code}\n{errors}")


async def attempt(home: Path, *words: str, quiet: bool = False) -> tuple[int, str, str]:
    """Run a command: its exit code, and if `quiet` its output and what it said."""
    sys.stdout.flush()
    pipe = asyncio.subprocess.PIPE if quiet else None
    process = await asyncio.create_subprocess_exec(
        str(BIN / words[0]),
        *words[1:],
        env=env(home),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=pipe,
        stderr=pipe,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )
    try:
        said, errors = await process.communicate()
    except asyncio.CancelledError:
        process.terminate()
        await process.wait()
        raise
    code = process.returncode
    return code or 0, (said or b"").decode(), (errors or b"").decode()


def say(text: str) -> None:
    """One line of the story."""
    print(f"\n== {text}", flush=True)


def env(home: Path) -> dict[str, str]:
    """The environment, with a home of its own, and nothing written outside the checkout."""
    kept = {"TMPDIR": str(HOME / "tmp"), "PIP_CACHE_DIR": str(HOME / "tmp" / "pip")}
    return {**os.environ, **kept, "FEDML_HOME": str(home)}


def die_with_parent() -> None:
    """Called in a child: should the demo be killed, the kernel ends its children."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def fresh_folder() -> int:
    """An empty `.demo`, but for data that was fetched; the lock that says whose it is.

    Raises:
        Broken: Another demo works there.
    """
    HOME.mkdir(exist_ok=True)
    lock = os.open(HOME / "lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise Broken(f"another demo is running in {HOME}; end it with Ctrl-C there") from error
    for path in HOME.iterdir():
        if path.is_dir() and path != SETS:
            shutil.rmtree(path)
        elif path.is_file() and path.name != "lock":
            path.unlink()
    (HOME / "tmp").mkdir()
    return lock


async def end(demo: Demo) -> None:
    """End the agents, then the broker, then whatever they have left behind."""
    services = list(demo.services.values())
    for group in (services[1:], services[:1]):
        running = [s.process for s in group if s.process and s.process.returncode is None]
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5):
                await asyncio.gather(*(process.wait() for process in running))
    sweep()


def sweep() -> None:
    """Kill what is left: shims and workers outlive their agents on purpose."""
    left = psutil.Process().children(recursive=True)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=10)


def guard() -> None:
    """Go on as a child of a process that does nothing but clean up, should this one be killed.

    It hands signals on. Killed itself, it takes this one along, which then ends as on SIGTERM.
    """
    # Orphans of our children come to us, so that none is missed.
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    child = os.fork()
    if child == 0:
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        die_with_parent()
        return
    for number in SIGNALS:
        signal.signal(number, lambda received, _: os.kill(child, received))
    _, status = os.waitpid(child, 0)
    sweep()
    code = os.waitstatus_to_exitcode(status)
    sys.exit(code if code >= 0 else 128 - code)


async def main(stay: bool) -> int:
    """Run the demo; its exit code."""
    got: list[int] = []
    story = asyncio.current_task()

    def stop(number: int) -> None:
        if not got and story is not None:
            story.cancel()
        got.append(number)

    for number in SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    shown = False
    services = asyncio.TaskGroup()
    demo = Demo(services)
    try:
        async with services:
            try:
                run = await demo.show()
                shown = True
                if stay:
                    demo.say_what_to_try(run)
                    await asyncio.Event().wait()
            finally:
                demo.leave()
    except asyncio.CancelledError:
        if not got:
            raise
    finally:
        await end(demo)
    say("everything has been stopped")
    return 0 if shown else 128 + got[0]


if __name__ == "__main__":
    guard()
    try:
        lock = fresh_folder()
        code = asyncio.run(main(sys.stdin.isatty() and sys.stdout.isatty()))
    except* Broken as broken:
        for error in broken.exceptions:
            print(f"\nthe demo cannot go on: {error}", file=sys.stderr)
        code = 1
    sys.exit(code)
