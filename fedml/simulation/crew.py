# SPDX-License-Identifier: Apache-2.0
"""The processes that run a simulation's clients: who gets which, and what becomes of the dead.

A round's clients are divided before it begins, the longest first, each to whom has least so far
(Graham 1969). The division depends on sizes alone, never on who happens to be quick: with the same
number of members, the same clients are added up in the same order.

A member that dies is replaced once a round, and the replacement runs the same clients from the
beginning: what the dead one had summed up is gone with it.
"""

from __future__ import annotations

import dataclasses
import heapq
import multiprocessing.connection
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import fedml
from fedml.errors import RunFailed
from fedml.federate.application import Application
from fedml.federate.arrays import Arrays
from fedml.simulation.arena import Arena, Board, Boards, Place
from fedml.simulation.member import Member, hear, in_doubles, say
from fedml.simulation.order import Done, Order, Setup

_MEMBER = "from fedml.simulation.member import main; main()"
_GRACE_S = 2.0

Report = Callable[[Sequence[Done]], None]


class Hand(Protocol):
    """A member as the crew knows it, wherever it lives.

    Attributes:
        number: No two of a run have the same.
        told: Clients whose data it knows where to find.
        talk: What to wait at for news, if it is a connection.
    """

    number: int
    told: set[int]
    talk: Connection | None

    @property
    def sum(self) -> Mapping[str, Any]:
        """What it has summed up; empty if it writes a file."""

    def start(self, setup: Setup) -> None:
        """Tell it what it needs."""

    def ready(self) -> None:
        """Wait until it has made ready."""

    def begin(self, order: Order) -> None:
        """Tell it an order."""

    def hear(self) -> tuple[list[Done], bool]:
        """Wait for news: who is done, and whether that is all; `EOFError` if it is dead."""

    def close(self) -> None:
        """End it."""

    def wait(self) -> str:
        """Wait until it has ended; says how."""


class Crew:
    """Some members, all told the same; use it as a context manager or `close` it."""

    def __init__(self, app: Path, count: int, arena: Arena) -> None:
        """Start the processes; `start` tells them what for.

        Args:
            app: The user's file, which each imports.
            count: How many.
            arena: What they share.
        """
        self._app = app
        self._setup: Setup
        self._made = 0
        self._arena = arena
        self._room = 0
        self._devices: Sequence[str] = ("cpu",)
        self._sizes: dict[int, int] = {}
        self._places: dict[int, Place] = {}
        self._folder = arena.folder
        self._boards = Boards(arena.folder)
        self.members: list[Hand] = [self._hired() for _ in range(count)]

    def start(
        self, setup: Setup, inside: Application | None = None, devices: Sequence[str] = ("cpu",)
    ) -> None:
        """Tell each member what it needs, and wait until all are ready.

        Args:
            setup: Number, room and device are set here.
            inside: The user's file, if the first member shall be this very process: that saves
                handing over where a round takes less than a millisecond.
            devices: Where members train, each on one, in turn.

        Raises:
            RunFailed: A member could not start.
        """
        self._setup = setup
        if inside is not None:
            self.members.insert(0, _Inside(inside))
        self._devices = devices
        self._room = self._arena.room // (2 * len(self.members))
        for place, member in enumerate(self.members):
            member.start(self._next(place))
        for member in self.members:
            member.ready()

    def resize(self, count: int) -> None:
        """Before the start: end processes that are not needed after all, or start more."""
        self.members, surplus = self.members[:count], self.members[count:]
        for member in surplus:
            member.close()
        for member in surplus:
            member.wait()
        self.members += [self._hired() for _ in range(count - len(self.members))]

    def publish(self, version: int, model: Arrays, sent: Arrays) -> None:
        """Put a model, and what is sent with it, where members read it."""
        self._boards.write(version, model, sent)

    def run(
        self,
        order: Order,
        report: Report | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> list[tuple[int, list[Done]]]:
        """Have an order carried out by all.

        Args:
            order: Its clients are divided; places are filled in here.
            report: Hears of clients as they are done, not always one by one. Where a member died,
                its clients are heard of again.
            meanwhile: Called once, as soon as everybody but this very process is at work.

        Returns:
            For each member that had something to do, its place and what it did.

        Raises:
            RunFailed: A member died twice.
        """
        shares = divide(order.clients, self._sizes, len(self.members))
        busy = [place for place, share in enumerate(shares) if share]
        # Children first: they work while this process does its own share.
        for place in sorted(busy, key=lambda place: isinstance(self.members[place], _Inside)):
            self.members[place].begin(self._order_for(place, order, shares[place]))
        if meanwhile is not None:
            meanwhile()  # what is in this process has only been told, and begins when it is heard
        done: dict[int, list[Done]] = {place: [] for place in busy}
        tries = dict.fromkeys(busy, 1)
        waiting = set(busy)
        lost: dict[int, str] = {}
        while waiting:
            for place in self._next_to_hear(waiting):
                try:
                    found, last = self.members[place].hear()
                except EOFError:
                    lost[place] = self._replace(place, tries, done[place], shares[place])
                    done[place] = []
                    again = order._replace(careful=True)
                    self.members[place].begin(self._order_for(place, again, shares[place]))
                    continue
                if found and place in lost:
                    found = [found[0]._replace(note=lost.pop(place)), *found[1:]]
                done[place] += found
                self._learn(place, found)
                if report is not None and found:
                    report(found)
                if last:
                    waiting.discard(place)
        return [(place, done[place]) for place in busy]

    def sum_of(self, place: int) -> Mapping[str, Any]:
        """The board where a member leaves its sums; empty if it writes a file."""
        return self.members[place].sum

    def sum_file(self, place: int) -> Path:
        """Where a member of the exact engine leaves its sums."""
        return Path(self._setup.folder) / f"sum-{self.members[place].number}"

    def sizes(self) -> Mapping[int, int]:
        """Examples of every client met so far."""
        return self._sizes

    def know(self, sizes: Mapping[int, int]) -> None:
        """Take over sizes from an earlier part of the run: the division depends on them."""
        self._sizes.update(sizes)

    def close(self) -> None:
        """End all processes."""
        for member in self.members:
            member.close()
        for member in self.members:
            member.wait()
        self.members = []

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _hired(self) -> Hand:
        return _Child(self._app)

    def _next(self, place: int) -> Setup:
        self._made += 1
        device = self._devices[place % len(self._devices)]
        return dataclasses.replace(self._setup, number=self._made, room=self._room, device=device)

    def _order_for(self, place: int, order: Order, share: tuple[int, ...]) -> Order:
        told = self.members[place].told
        new = {c: self._places[c] for c in share if c not in told and c in self._places}
        told.update(new)
        return order._replace(clients=share, places=new)

    def _learn(self, place: int, found: Iterable[Done]) -> None:
        told = self.members[place].told
        for one in found:
            if one.examples >= 0:
                self._sizes[one.client] = one.examples
            if one.place is not None:
                self._places[one.client] = one.place
                told.add(one.client)

    def _next_to_hear(self, waiting: set[int]) -> Iterable[int]:
        own = self._own(waiting)
        if own:
            return own
        children = {self.members[place].talk: place for place in sorted(waiting)}
        if len(children) == 1:
            return list(children.values())  # `hear` waits
        heard = multiprocessing.connection.wait([t for t in children if t is not None])
        return [children[talk] for talk in heard if isinstance(talk, Connection)]

    def _own(self, places: Iterable[int]) -> list[int]:
        return [place for place in places if isinstance(self.members[place], _Inside)]

    def _replace(
        self, place: int, tries: dict[int, int], done: list[Done], share: tuple[int, ...]
    ) -> str:
        """A new member in the place of a dead one; what to say of it.

        Raises:
            RunFailed: It is the second one over these clients.
        """
        dead = self.members[place]
        dead.close()
        how = dead.wait()
        tries[place] += 1
        left = [client for client in share if client not in {one.client for one in done}]
        if tries[place] > 2:
            raise RunFailed(
                f"a worker process died twice over the same clients ({how}); "
                f"it was at client {left[0] if left else share[0]}",
                "memory? `--workers 1` needs least",
            )
        self.members[place] = self._hired()
        self.members[place].start(self._next(place))
        self.members[place].ready()
        return f"a worker process died ({how}); its clients are run once more"


class _Inside:
    """A member in this very process."""

    talk: Connection | None = None

    def __init__(self, application: Application) -> None:
        self.number = 0
        self.told: set[int] = set()
        self._application = application
        self._member: Member
        self._work: Iterator[Done] = iter(())

    @property
    def sum(self) -> Mapping[str, Any]:
        return self._member.sum

    def start(self, setup: Setup) -> None:
        self.number = setup.number
        self._member = Member(setup, self._application)

    def ready(self) -> None:
        """It is."""

    def begin(self, order: Order) -> None:
        self._work = self._member.run(order)

    def hear(self) -> tuple[list[Done], bool]:
        return list(self._work), True

    def close(self) -> None:
        """Nothing runs."""

    def wait(self) -> str:
        return ""


class _Child:
    """A member in a process of its own."""

    def __init__(self, app: Path) -> None:
        self.number = 0
        self.told: set[int] = set()
        self._setup: Setup
        self._sum: Mapping[str, Any] | None = None
        mine, its = socket.socketpair()
        life, self._life = os.pipe()
        # One thread each: on a busy machine two are slower than one, and sums depend on it.
        environment = dict(os.environ)
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            environment[name] = "1"
        ours = str(Path(fedml.__file__).parents[1])
        environment["PYTHONPATH"] = os.pathsep.join(
            [ours, *filter(None, [environment.get("PYTHONPATH")])]
        )
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _MEMBER, str(its.fileno()), str(life), str(app)],
            pass_fds=(its.fileno(), life),
            stdin=subprocess.DEVNULL,
            stdout=2,  # what user code prints is talk; our stdout is for results
            env=environment,
            start_new_session=True,  # Ctrl-C in a terminal is for us, not for them
        )
        os.close(life)
        its.close()
        self.talk: Connection | None = Connection(mine.detach())

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def sum(self) -> Mapping[str, Any]:
        if self._setup.engine == "exact":
            return {}
        if self._sum is None:
            path = Path(self._setup.folder) / f"sum-{self.number}"
            self._sum = Board(path, in_doubles(self._setup.update)).arrays
        return self._sum

    def start(self, setup: Setup) -> None:
        self.number, self._setup = setup.number, setup
        # If it is dead already, `ready` finds out.
        with suppress(ConnectionError):
            self._talk().send(setup)

    def ready(self) -> None:
        try:
            said = self._talk().recv()
        except (EOFError, ConnectionError) as error:
            raise RunFailed(f"a worker process ended while it started ({self.wait()})") from error
        if said != "ready":
            text, trace = said
            raise RunFailed(f"a worker process could not start: {text}\n{trace}".rstrip())

    def begin(self, order: Order) -> None:
        # If it is dead already, `hear` finds out.
        with suppress(ConnectionError):
            say(self._talk(), order)

    def hear(self) -> tuple[list[Done], bool]:
        try:
            found: tuple[list[Done], bool] = hear(self._talk())
        except ConnectionError as error:
            raise EOFError from error
        return found

    def close(self) -> None:
        if self.talk is not None:
            self.talk.close()
            self.talk = None
            os.close(self._life)

    def wait(self) -> str:
        try:
            code = self._process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        return f"killed by signal {-code}" if code < 0 else f"exit code {code}"

    def _talk(self) -> Connection:
        if self.talk is None:
            raise EOFError
        return self.talk


def divide(clients: Sequence[int], sizes: Mapping[int, int], members: int) -> list[tuple[int, ...]]:
    """Each member's clients, the longest first.

    Args:
        clients: Distinct.
        sizes: Examples of those that are known; the others count like the mean of these.
        members: How many, >= 1.
    """
    known = [sizes[client] for client in clients if client in sizes]
    usual = sum(known) / len(known) if known else 1.0
    shares: list[list[int]] = [[] for _ in range(members)]
    loads = [(0.0, place) for place in range(members)]
    for client in sorted(clients, key=lambda client: (-sizes.get(client, usual), client)):
        load, place = heapq.heappop(loads)
        shares[place].append(client)
        # One more, so that clients with nothing are spread, too.
        heapq.heappush(loads, (load + sizes.get(client, usual) + 1, place))
    return [tuple(share) for share in shares]
