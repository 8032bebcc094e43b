# SPDX-License-Identifier: Apache-2.0
"""The same members as actors of Ray, on several machines.

In a round, the model goes into Ray's object store once, and each actor sends one sum back. An
actor has an arena of its own on its machine, where it loads its clients' data. What clients keep
between rounds lies with the simulation, goes out with the order and comes back with the sum: so
an actor can be lost, and a run resumed, at no other cost than with processes.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedml.errors import ConfigError, RunFailed
from fedml.federate.application import Application
from fedml.federate.arrays import Array, Arrays
from fedml.simulation.arena import Arena, Boards
from fedml.simulation.crew import Crew, Hand
from fedml.simulation.member import REPORT_S, Member, cause_of
from fedml.simulation.order import Done, Order, Setup, Task
from fedml.simulation.states import States

LOCAL = "local"
_START_S = 300.0  # to ship the user's folder, to import torch, and for a node to have room
_REACH_S = 5.0
_GRACE_S = 2.0
_SINGLE = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class _Made(NamedTuple):
    """What an actor has made of an order; files as bytes.

    Attributes:
        sum: Of an engine, by name.
        sum_file: Of the exact engine.
        updates: Where each is wanted by itself, by file name.
        states: What clients keep.
    """

    sum: Mapping[str, Array]
    sum_file: Array | None
    updates: Mapping[str, Array]
    states: Mapping[int, Array]


class RayCrew(Crew):
    """A crew of actors."""

    def __init__(self, app: Path, count: int, arena: Arena, address: str) -> None:
        """Connect, and start the actors.

        Args:
            app: The user's file; its folder is shipped.
            count: How many; 0 for as many as the cluster has CPUs.
            arena: Where what comes back is put.
            address: Of the cluster, or `LOCAL`.

        Raises:
            ConfigError: Ray is not installed, nobody answers there, or there are too few CPUs.
        """
        self._ray = _installed()
        self._published: dict[int, Any] = {}
        _connect(self._ray, address, count, app.parent.resolve())
        try:
            cpus = int(self._ray.cluster_resources().get("CPU", 0))
            if max(count, 1) > cpus:
                raise ConfigError(
                    f"{count or 1} workers are asked for, and the Ray cluster has {cpus} CPUs",
                    "fewer `--workers`, or more nodes",
                )
            self._count = count or cpus
            self._actor = self._ray.remote(_Actor).options(
                num_cpus=1, max_restarts=0, scheduling_strategy="SPREAD"
            )
            super().__init__(app, self._count, arena)
        except BaseException:
            self._ray.shutdown()
            raise

    def publish(self, version: int, model: Arrays, sent: Arrays) -> None:
        """See `Crew`."""
        self._published[version] = self._ray.put((dict(model), dict(sent)))

    def close(self) -> None:
        """End all actors; and Ray, if it was started here."""
        try:
            super().close()
        finally:
            self._published.clear()
            self._ray.shutdown()

    def _hired(self) -> Hand:
        actor = self._actor.remote(self._app.name, self._count)
        return _Far(self._ray, actor, self._published, self._folder)

    def _next_to_hear(self, waiting: set[int]) -> Iterable[int]:
        news = {place: self.members[place] for place in sorted(waiting)}
        asked = {place: hand.news for place, hand in news.items() if isinstance(hand, _Far)}
        heard, _ = self._ray.wait(list(asked.values()), num_returns=1)
        return [place for place, one in asked.items() if any(one is other for other in heard)]


class _Far:
    """A member that is an actor."""

    talk: Connection | None = None

    def __init__(self, ray: Any, actor: Any, published: Mapping[int, Any], folder: Path) -> None:
        self.number = 0
        self.told: set[int] = set()
        self.sum: Mapping[str, Any] = {}
        self.news: Any = None
        self._ray = ray
        self._actor = actor
        self._published = published
        self._folder = folder
        self._lost = (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError)
        self._how = ""
        self._states: States
        self._order: Order
        self._starting: Any = None
        self._ending: Any = None
        self._until = 0.0

    def start(self, setup: Setup) -> None:
        self.number = setup.number
        self._states = States(Path(setup.states))
        self._starting = self._actor.start.remote(setup)

    def ready(self) -> None:
        try:
            said = self._ray.get(self._starting, timeout=_START_S)
        except self._ray.exceptions.GetTimeoutError as error:
            raise RunFailed(
                f"a Ray actor did not start within {_START_S:.0f} s",
                "`ray status` says whether a node has a CPU to spare",
            ) from error
        except (*self._lost, self._ray.exceptions.RuntimeEnvSetupError) as error:
            raise RunFailed(f"a Ray actor ended while it started: {error}") from error
        if said is not None:
            text, trace = said
            raise RunFailed(f"a Ray actor could not start: {text}\n{trace}".rstrip())

    def begin(self, order: Order) -> None:
        self._order = order
        states: dict[int, Array] = {}
        if order.task in (Task.SUM, Task.EACH):
            for client in order.clients:
                found = self._states.before(client, _turn(order, client))
                if found is not None:
                    states[client] = _bytes(found)
        self.news = self._actor.run.remote(order, self._published[order.version], states)

    def hear(self) -> tuple[list[Done], bool]:
        try:
            done, made = self._ray.get(next(self.news))
        except self._lost as error:
            self._how = str(error).strip().splitlines()[0]
            raise EOFError from error
        if made is None:
            return done, False
        self.sum = made.sum
        if made.sum_file is not None:
            made.sum_file.tofile(self._folder / f"sum-{self.number}")
        for name, update in made.updates.items():
            update.tofile(self._folder / name)
        for client, state in made.states.items():
            self._states.keep(client, _turn(self._order, client), self._order.kept, state.tofile)
        return done, True

    def close(self) -> None:
        self.news = None
        self._ending = self._actor.end.remote()
        self._until = time.monotonic() + _GRACE_S

    def wait(self) -> str:
        # It may be at work or dead; what it leaves then, the next arena there removes.
        with suppress(*self._lost, self._ray.exceptions.GetTimeoutError):
            self._ray.get(self._ending, timeout=max(self._until - time.monotonic(), 0.1))
        self._ray.kill(self._actor)
        return self._how


class _Actor:
    """Runs on its machine; the user's folder is its working directory."""

    def __init__(self, app: str, count: int) -> None:
        self._app = Path(app).resolve()
        self._count = count  # all might be on this machine
        self._arena = Arena()
        self._setup: Setup
        self._member: Member
        self._boards = Boards(self._arena.folder)

    def start(self, setup: Setup) -> tuple[str, str] | None:
        """Make ready; what went wrong, if something did."""
        folder = self._arena.folder
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        self._setup = dataclasses.replace(
            setup,
            folder=str(folder),
            states=str(folder / "state"),
            room=self._arena.room // (2 * self._count),
            memory=total // (2 * self._count),
        )
        try:
            self._member = Member(self._setup, Application(self._app, setup.config))
        except Exception as error:  # the user's file may raise anything when it is imported
            return cause_of(error)
        torch = sys.modules.get("torch")
        if torch is not None:
            torch.set_num_threads(1)
        return None

    def run(
        self, order: Order, published: tuple[Arrays, Arrays], before: Mapping[int, Array]
    ) -> Iterator[tuple[list[Done], _Made | None]]:
        """Carry out an order; says now and then who is done, and what came of all at the end."""
        self._boards.write(order.version, *published)
        states = States(Path(self._setup.states))
        for client, state in before.items():
            states.keep(client, _turn(order, client) - 1, -1, state.tofile)
        done: list[Done] = []
        said = time.perf_counter()
        for one in self._member.run(order):
            done.append(one._replace(place=None))  # of use here only
            if order.careful or time.perf_counter() - said > REPORT_S:
                yield done, None
                done, said = [], time.perf_counter()
        yield done, self._made(order, states)

    def end(self) -> None:
        """Leave nothing behind."""
        self._arena.close()

    def _made(self, order: Order, states: States) -> _Made:
        folder = self._arena.folder
        kept: dict[int, Array] = {}
        for client in order.clients:
            turn = _turn(order, client)
            if states.of(client, turn).exists():
                kept[client] = _bytes(states.of(client, turn))
            while (left := states.before(client, turn + 1)) is not None:
                left.unlink()
        whole = folder / f"sum-{self._setup.number}"
        exact = order.task is Task.SUM and not self._member.sum
        updates = {}
        for client in order.clients if order.task is Task.EACH else ():
            file = folder / f"update-{_turn(order, client)}-{client}"
            if file.exists():
                updates[file.name] = _bytes(file)
                file.unlink()
        total = self._member.sum if order.task is Task.SUM else {}
        return _Made(total, _bytes(whole) if exact else None, updates, kept)


def _turn(order: Order, client: int) -> int:
    return order.starts.get(client, order.turn)


def _bytes(file: Path) -> Array:
    """A file as an array, which Ray moves without pickling it."""
    return np.fromfile(file, np.uint8)


def _installed() -> Any:
    try:
        # Not an import statement: types are checked without Ray, too.
        return importlib.import_module("ray")
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ConfigError(
            "--ray needs Ray, which is not installed", "pip install 'fedml-agent[ray]'"
        ) from error


def _reach(address: str) -> None:
    """See that somebody listens: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"--ray {address}: not HOST:PORT", "`ray start --head` says the address")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _REACH_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"no Ray cluster answers at {address}: {error}",
            "`ray start --head` starts one, and says its address",
        ) from error


def _connect(ray: Any, address: str, count: int, folder: Path) -> None:
    if ray.is_initialized():
        raise ConfigError(
            "this process is connected to Ray already, without the files that actors need",
            "`ray.shutdown()` first; the simulation connects by itself",
        )
    if address not in (LOCAL, "auto"):
        _reach(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody asked to be counted
    # Ray would warn of what later releases do in any case: leave accelerators as they are.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    own = {"num_cpus": count or None, "include_dashboard": False} if address == LOCAL else {}
    shipped = {
        "working_dir": str(folder),
        "excludes": ["simulations", ".venv", ".git"],
        "env_vars": _SINGLE,
    }
    try:
        with _our_sigterm():
            ray.init(address=address, logging_level="warning", runtime_env=shipped, **own)
    except ray.exceptions.RuntimeEnvSetupError as error:
        ray.shutdown()  # it is half connected
        raise ConfigError(
            f"Ray does not ship {folder}: {error}",
            "what is large in it belongs elsewhere, or into a .gitignore or .rayignore there",
        ) from error
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"no Ray cluster can be used at {address}: {error}",
            "`ray start --head` starts one, and says its address",
        ) from error


@contextmanager
def _our_sigterm() -> Iterator[None]:
    """Ray takes the handler, and would exit without a checkpoint."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
