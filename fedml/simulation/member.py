# SPDX-License-Identifier: Apache-2.0
"""One member of the crew that runs a simulation's clients.

The user's file is imported while the process that started this one does the same. Orders come
in over one descriptor, what clients did goes back; sums and updates go through the arena. When
the other descriptor ends, whoever started this process is gone, and it ends too, whatever it is
doing.

Client by client it makes the calls that `federate.worker` makes on a device.
"""

from __future__ import annotations

import os
import pickle
import select
import shutil
import signal
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from fedml.federate import algorithm, blame, cohort
from fedml.federate.aggregate import PartialSum
from fedml.federate.application import (
    Application,
    Client,
    UserTraining,
    set_weights,
)
from fedml.federate.arrays import Arrays
from fedml.federate.layout import BadUpdate, Spec, admit
from fedml.federate.local_sgd import Evaluation
from fedml.federate.tensor_file import write
from fedml.federate.treatment import Treatment
from fedml.simulation import accelerator
from fedml.simulation import engine as engines
from fedml.simulation.arena import Board, Place, Shelf
from fedml.simulation.order import Done, Order, Setup, Task
from fedml.simulation.states import States

_SPIN_S = 0.0003  # how long to look for the next order before sleeping for it
REPORT_S = 0.2
_LOOK_EVERY = 64  # clients between two looks at the memory that this process takes


class Member:
    """Runs orders, in whichever process it is made."""

    def __init__(self, setup: Setup, application: Application) -> None:
        self._setup = setup
        self._folder = Path(setup.folder)
        self._application = application
        self._algorithm = algorithm.create(setup.algorithm, setup.algorithm_config)
        self._treatment = Treatment.parse(setup.treatment)
        self._modules: dict[str, Any] = {}
        # Only the built-in evaluation knows of other devices than the CPU.
        own = not isinstance(application.evaluator, Evaluation)
        self._evaluates_on = "cpu" if own else setup.device
        # Where memory is the engine's business, and not that of the user's own training.
        self._place = setup.device if setup.engine in accelerator.ENGINES else ""
        self._notes: list[str] = []
        self._engine: engines.Engine | None = None
        if setup.engine != "exact":
            module = application.new_model(setup.seed)
            trainer, config = application.trainer, setup.config
            self._engine = engines.build(setup.engine, trainer, config, module, setup.device)
        # Whether the engine itself adds clients up, or they walk one by one.
        self._direct = self._engine is not None and engines.averages(self._algorithm)
        self._boards: dict[int, tuple[Board, Board]] = {}
        self._states = States(Path(setup.states))
        self._shelf = Shelf(self._folder, f"data-{setup.number}", setup.room)
        self._places: dict[int, Place] = {}
        self._data: OrderedDict[int, Any] = OrderedDict()
        self._fresh: Place | None = None
        self._loads = 0
        self._sum: Board | None = None
        if self._engine is not None:
            path = self._folder / f"sum-{setup.number}"
            self._sum = Board(path, in_doubles(setup.update), create=True)

    @property
    def sum(self) -> Mapping[str, Any]:
        """Where this member leaves its sums; empty if they go through a file."""
        return {} if self._sum is None else self._sum.arrays

    def run(self, order: Order) -> Iterator[Done]:
        """Do what an order says, client by client."""
        self._places.update(order.places)
        if order.task is Task.COUNT:
            yield from self._each(order, lambda client: self._counted(client))
            return
        model, sent = self._board(order.version)
        if order.task is Task.EVALUATE:
            set_weights(self._module(self._evaluates_on), model)
            yield from self._each(order, lambda c: Done(c, metrics=self._evaluated(c)))
        elif self._direct and order.task is Task.SUM:
            yield from self._summed(order, model)
        else:
            yield from self._walked(order, model, sent)

    # ------------------------------------------------------------------ ways through an order

    def _each(self, order: Order, one: Any) -> Iterator[Done]:
        for client in order.clients:
            began = time.perf_counter()
            self._fresh = None
            try:
                done = one(client)
            except Exception as error:  # the user's code may raise anything, and it is his to read
                yield Done(client, cause=cause_of(error, self._place))
                continue
            seconds = time.perf_counter() - began
            yield Done(
                client, done.examples, done.weight, seconds, done.metrics, self._fresh, done.cause
            )

    def _walked(self, order: Order, model: Arrays, sent: Arrays) -> Iterator[Done]:
        """The calls of a device, for one client after the other."""
        partial = PartialSum(self._algorithm.layout(model))
        if self._sum is not None:
            for array in self._sum.arrays.values():
                array.fill(0)

        def one(client: int) -> Done:
            data = self._client_data(client)
            metrics: Mapping[str, float] = {}
            if order.evaluate:
                # The last client has trained in it.
                set_weights(self._module(self._evaluates_on), model)
                metrics = self._evaluated(client)
            data = self._learned_from(client, data)
            module = self._module(self._setup.device)
            local = UserTraining(self._application, module, data, order.epochs.get(client))
            algorithm.require_support(self._algorithm, local, "train()")
            turn = order.starts.get(client, order.turn)
            rng = cohort.generator(*(order.draw or (self._setup.seed, turn)), client)
            before = self._state_before(client, turn)
            update = self._treatment.client_update(self._algorithm, model, sent, before, local, rng)
            layout = self._algorithm.layout(model)
            if order.task is Task.EACH:
                given = self._treatment.incoming(client, update.arrays, layout)
                admit(client, given, update.weight, self._treatment.layout(layout))
                write(self._folder / f"update-{turn}-{client}", update.arrays)
            elif self._sum is None:
                partial.add(client, update.arrays, update.weight)
            else:
                admit(client, update.arrays, update.weight, layout)
                for name, total in self._sum.arrays.items():
                    total += update.weight * update.arrays[name].astype(np.float64)
            self._keep_state(client, turn, order.kept, update.client_state)
            examples = local.examples
            return Done(client, examples, update.weight, metrics={**metrics, **update.metrics})

        yield from self._each(order, one)
        if order.task is Task.SUM and self._sum is None:
            write(self._folder / f"sum-{self._setup.number}", partial.to_arrays())

    def _summed(self, order: Order, model: Arrays) -> Iterator[Done]:
        """The engine trains and adds up."""
        engine = self._engine
        if engine is None or self._sum is None:
            raise RuntimeError("only an engine adds up")
        engine.begin(model)
        if order.evaluate:
            set_weights(self._module(self._evaluates_on), model)
        start = 0
        while start < len(order.clients):  # a chunk may become smaller on the way
            chunk = order.clients[start : start + engine.chunk]
            start += len(chunk)
            yield from self._chunk(engine, order, chunk)
        engine.finish(self._sum.arrays)

    def _chunk(
        self, engine: engines.Engine, order: Order, clients: tuple[int, ...]
    ) -> Iterator[Done]:
        began = time.perf_counter()
        ready: list[int] = []
        data: list[Any] = []
        rngs: list[engines.Rng] = []
        fresh: dict[int, Place | None] = {}
        metrics: dict[int, Mapping[str, float]] = {}
        for client in clients:
            self._fresh = None
            try:
                data.append(self._learned_from(client, self._client_data(client)))
                metrics[client] = self._evaluated(client) if order.evaluate else {}
            except Exception as error:  # as in `_each`
                del data[len(ready) :]
                yield Done(client, cause=cause_of(error, self._place))
                continue
            ready.append(client)
            rngs.append(_later(*(order.draw or (self._setup.seed, order.turn)), client))
            fresh[client] = self._fresh
        if not ready:
            return
        failed: tuple[tuple[str, str], bool] | None = None
        try:
            found = engine.train(ready, data, rngs)
        except Exception as error:  # as in `_each`
            failed = cause_of(error, self._place), accelerator.is_out_of_memory(error)
        if failed is not None:
            # Not in the handler: the traceback holds what the failed training had in memory.
            cause, memory = failed
            place = fresh[ready[0]]
            yield from self._again(engine, order, tuple(ready), place, cause, memory=memory)
            return
        seconds = (time.perf_counter() - began) / len(ready)
        for client, numbers in zip(ready, found, strict=True):
            examples = numbers.pop("examples")
            del numbers["steps"], numbers["lr"]
            numbers |= metrics[client]
            note, self._notes = "; ".join(self._notes), []
            yield Done(client, int(examples), examples, seconds, numbers, fresh[client], None, note)

    def _again(
        self,
        engine: engines.Engine,
        order: Order,
        clients: tuple[int, ...],
        place: Place | None,
        cause: tuple[str, str],
        *,
        memory: bool,
    ) -> Iterator[Done]:
        """After a failure: with less in memory, or one by one."""
        out = f"out of memory on {self._setup.device}"
        if memory and engine.free():
            size = len(clients)
            self._notes.append(f"{out}: no examples are kept there any more")
        elif len(clients) == 1:
            yield Done(clients[0], place=place, cause=cause)
            return
        elif memory:
            size = len(clients) // 2
            engine.chunk = min(engine.chunk, size)
            self._notes.append(f"{out} with {len(clients)} clients at once: on with {size}")
        else:
            size = 1  # one of them spoils it for all: find out who
        for start in range(0, len(clients), size):
            yield from self._chunk(engine, order, clients[start : start + size])

    def _counted(self, client: int) -> Done:
        data = self._client_data(client)
        local = UserTraining(self._application, None, data)
        return Done(client, local.examples)

    def _evaluated(self, client: int) -> Mapping[str, float]:
        found = self._application.evaluate(
            self._module(self._evaluates_on), self._client_data(client)
        )
        return {f"eval.{name}": value for name, value in found.items()}

    # ------------------------------------------------------------------ what clients have

    def _client_data(self, client: int) -> Any:
        if client in self._data:
            self._data.move_to_end(client)
            return self._data[client]
        place = self._places.get(client)
        if place is not None:
            data = self._shelf.get(place)
        else:
            count, paths = self._setup.clients, self._setup.paths
            data = self._application.data(Client(index=client, count=count, paths=paths))
            place = self._shelf.put(data)
            if place is not None:
                # The shared copy, so that this process holds none of its own.
                data = self._shelf.get(place)
                self._places[client] = self._fresh = place
        self._data[client] = data
        self._loads += 1
        if self._loads % _LOOK_EVERY == 0 and _resident() > self._setup.memory:
            self._shed()
        return data

    def _learned_from(self, client: int, data: Any) -> Any:
        liars = self._setup.liars
        return data if liars is None else liars.learns_from(client, data)

    def _shed(self) -> None:
        """Let go of half of the data, the longest unused; it is loaded again when needed."""
        old = [client for client, _ in zip(self._data, range(len(self._data) // 2), strict=False)]
        for client in old:
            del self._data[client]
        if self._engine is not None:
            self._engine.forget(old)

    def _module(self, device: str) -> Any:
        """The model for everything but the engine, which has one of its own."""
        if device not in self._modules:
            module = self._application.new_model(self._setup.seed)
            self._modules[device] = module if device == "cpu" else module.to(device)
        return self._modules[device]

    def _board(self, version: int) -> tuple[Arrays, Arrays]:
        boards = self._boards.get(version)
        if boards is None:
            setup = self._setup
            boards = (
                Board(self._folder / f"model-{version}", setup.model),
                Board(self._folder / f"sent-{version}", setup.sent),
            )
            self._boards[version] = boards
        return boards[0].arrays, boards[1].arrays

    def _state_before(self, client: int, turn: int) -> Arrays | None:
        found = self._states.before(client, turn)
        return load_file(found) if found is not None else None

    def _keep_state(self, client: int, turn: int, kept: int, state: Arrays | None) -> None:
        if state is not None:
            self._states.keep(client, turn, kept, lambda file: write(file, state))


def in_doubles(specs: Mapping[str, Spec]) -> dict[str, Spec]:
    """The same arrays in float64."""
    return {name: Spec(spec.shape, np.dtype(np.float64)) for name, spec in specs.items()}


def _later(seed: int, turn: int, client: int) -> engines.Rng:
    return lambda: cohort.generator(seed, turn, client)


def cause_of(error: Exception, place: str = "") -> tuple[str, str]:
    """What to say of an error, and the traceback where it is the user's to read.

    Args:
        error: Of a client.
        place: The device, if it was an engine's business what lay there.
    """
    if place and accelerator.is_out_of_memory(error):
        other = "" if place == "cpu" else ", or --device cpu"
        return f"out of memory on {place} with this client alone: a smaller batch_size{other}", ""
    if isinstance(error, BadUpdate):
        return error.what, ""
    if blame.says_all(error) or isinstance(error, engines.Diverged):
        return str(error), ""
    text = f"{type(error).__name__}: {error}"
    if "vmap" in text:  # only `stacked` uses it, and on a GPU that may have been our choice
        text = f"the model cannot be trained side by side, --engine inplace does without: {text}"
    return text, blame.trace(error)


def _resident() -> int:
    """Bytes of this process that are its own."""
    try:
        pages = Path("/proc/self/statm").read_text().split()
    except OSError:
        return 0
    return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")


def _end_with(life: int, folders: list[str]) -> None:
    """Wait for the starter to end; then so does this process, leaving nothing behind."""

    def wait() -> None:
        with suppress(OSError):
            os.read(life, 1)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=wait, name="simulation.life", daemon=True).start()


def say(talk: Connection, thing: Any) -> None:
    """Send; half the time of `Connection.send`, which can do more."""
    talk.send_bytes(pickle.dumps(thing, 5))


def hear(talk: Connection) -> Any:
    """Receive what `say` said. In a round of microseconds, sleeping would cost more than looking.

    Raises:
        EOFError: Nobody will say anything any more.
    """
    until = time.perf_counter() + _SPIN_S
    news = select.poll()  # `Connection.poll` makes one for each look
    news.register(talk.fileno(), select.POLLIN)
    while not news.poll(0) and time.perf_counter() < until:
        os.sched_yield()  # to whoever else wants this core
    return pickle.loads(talk.recv_bytes())  # noqa: S301 - from our own process


def main() -> None:
    """The process: its arguments are two inherited file descriptors and the user's file."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that gives orders
    talk = Connection(int(sys.argv[1]))
    folder: list[str] = []
    place = ""
    _end_with(int(sys.argv[2]), folder)
    try:
        application = Application(Path(sys.argv[3]), {})
        setup: Setup = talk.recv()
        folder.append(setup.folder)
        place = setup.device
        application.config = dict(setup.config)
        member = Member(setup, application)
        torch = sys.modules.get("torch")
        if torch is not None:
            torch.set_num_threads(1)
    except EOFError:
        return
    except Exception as error:  # the user's file may raise anything when it is imported
        if place not in ("", "cpu") and accelerator.is_out_of_memory(error):
            full = f"{place} has no memory for it: is it full of others (`nvidia-smi`)?"
            talk.send((f"{full} --device cpu trains without it", ""))
            return
        talk.send(cause_of(error))
        return
    talk.send("ready")
    while True:
        try:
            order = hear(talk)
        except EOFError:
            return
        done: list[Done] = []
        said = time.perf_counter()
        for one in member.run(order):
            done.append(one)
            if order.careful or time.perf_counter() - said > REPORT_S:
                say(talk, (done, False))
                done, said = [], time.perf_counter()
        say(talk, (done, True))
