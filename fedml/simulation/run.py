# SPDX-License-Identifier: Apache-2.0
"""One simulation from start to end: the server's part of the rounds, with a crew of clients.

`Simulation` is to a simulated run what the broker's driver and `federate.aggregator` are to a
deployed one, and calls the algorithm in the same way: with the engine `exact`, the models of every
round have the same bits.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from fedml.errors import ConfigError
from fedml.federate import algorithm as algorithms
from fedml.federate.algorithm import Kind, UnsupportedByTraining
from fedml.federate.application import Application, ApplicationError, UserTraining
from fedml.federate.arrays import Arrays, without_tags
from fedml.federate.group_turns import GROUPS
from fedml.federate.layout import Layout
from fedml.federate.local_sgd import Evaluation
from fedml.federate.round import algorithms_own
from fedml.federate.treatment import Treatment
from fedml.protect.privacy import NotPrivate
from fedml.simulation import (
    accelerator,
    asynchronous,
    checkpoint,
    engine,
    evaluation,
    synchronous,
)
from fedml.simulation.arena import Arena
from fedml.simulation.checkpoint import Checkpoint
from fedml.simulation.crew import Crew
from fedml.simulation.evaluation import Central
from fedml.simulation.order import Done, Order, Setup, Task
from fedml.simulation.plan import Plan
from fedml.simulation.ray_crew import RayCrew
from fedml.simulation.record import Record
from fedml.simulation.result import ClientFailed, Listener, Result, Round


class Simulation:
    """One run of a plan."""

    def __init__(
        self,
        plan: Plan,
        *,
        folder: Path | None = None,
        resume: bool = False,
        debug: bool = False,
        listener: Listener | None = None,
        application: Application | None = None,
    ) -> None:
        """Make ready to run.

        Args:
            plan: What.
            folder: Where results and checkpoints go; None keeps them in memory.
            resume: Go on from the checkpoint in ``folder``.
            debug: One member, in this process: breakpoints and profilers work.
            listener: Hears how it goes.
            application: In the place of the plan's file; with it, all is in this process.
        """
        self.plan = plan
        self.algorithm = plan.create_algorithm()
        self.treatment = plan.create_treatment()
        self.groups = plan.create_groups(self.algorithm, self.treatment)
        self.liars = plan.create_liars(self.algorithm, self.groups)
        # Groups with rounds of their own; those that only relay are the server's business.
        self.nested = self.groups if self.groups is not None and not self.groups.relay else None
        self.members = self.groups.assigned(plan.clients, plan.seed) if self.groups else []
        # What clients run, and how often in one turn of the server.
        self.within = self.nested.within() if self.nested is not None else self.algorithm
        self.passes = self.nested.rounds * self.within.stages if self.nested is not None else 1
        self.listener = listener or Listener()
        self.clock = 0.0  # simulated seconds
        self.turn = 0
        self.model: Arrays = {}
        self.state: Arrays = {}
        self.engine = ""
        self.device = ""
        self.crew: Crew
        self.record: Record
        self.update: Layout
        self.bytes_down = 0
        self.bytes_up = 0
        self._folder = folder
        self._resume = resume
        self._debug = debug or application is not None
        self._given = application
        self._application: Application
        self._central: Central | None = None
        self._sent_specs: Layout
        self._arena: Arena
        self._saved = 0.0
        self.kept_turn = -1
        self._trained = 0
        self._began = 0.0
        self._wall_before = 0.0
        self._previous: tuple[int, float] = (0, 0.0)

    # ------------------------------------------------------------------ from start to end

    def run(self) -> Result:
        """All rounds.

        Raises:
            ConfigError: The run cannot be; the text says why and the hint what to change.
            ClientFailed: With the client, the round and the traceback.
            RunFailed: It ended otherwise.
            KeyboardInterrupt: Somebody stopped it; the last round that was done is kept.
        """
        found, new = None, self._folder is not None and not self._folder.exists()
        if self._folder is not None:
            found = checkpoint.prepare(
                self._folder,
                self.plan,
                self.algorithm,
                passes=self.passes,
                resume=self._resume,
                say=self.listener.say,
            )
        with ExitStack() as stack:
            if new:
                stack.callback(self._leave_no_empty_folder)
            self._arena = stack.enter_context(Arena())
            self.crew = stack.enter_context(self._hire())
            self._open(found, stack)
            self.record = Record(self._folder)
            stack.callback(self.record.close)
            self._note(found)
            self._began = time.monotonic()
            self._saved = self._began
            self._previous = (self.turn, self._began)
            try:
                if found is None:
                    self._first_model()
                if self.algorithm.kind is Kind.ASYNCHRONOUS:
                    asynchronous.walk(self)
                else:
                    synchronous.walk(self)
                self._last_evaluation()
            finally:
                # Ctrl-C and failures too: what is done is kept.
                self.save(force=True)
            return self._result()

    def _leave_no_empty_folder(self) -> None:
        """What could not begin is not what `--resume` goes on with."""
        if self._folder is not None:
            with suppress(OSError):  # there is something in it
                self._folder.rmdir()

    def _hire(self) -> Crew:
        """The crew: processes here, or actors of Ray's."""
        plan = self.plan
        if not plan.ray:
            # How many GPUs there are is known for sure once torch is imported; that takes as long
            # as the processes need to start, so they start beside it.
            count = 0 if self._debug else plan.processes(accelerator.guess(plan.device))
            return Crew(plan.app, count, self._arena)
        if self._debug:
            raise ConfigError("--debug is one process, and --ray is several machines")
        return RayCrew(plan.app, plan.workers, self._arena, plan.ray)

    def _open(self, found: Checkpoint | None, stack: ExitStack) -> None:
        """Everything that the first round needs."""
        plan = self.plan
        try:
            self._application = self._given or Application(plan.app, plan.config)
            model = self._application.first_model(plan.seed)
            local = UserTraining(self._application, None, None)
            algorithms.require_support(self.within, local, f"train() in {plan.app.name}")
        except (ApplicationError, UnsupportedByTraining) as error:
            raise ConfigError(str(error)) from error
        torch = sys.modules.get("torch")
        if torch is not None:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(1)
        own_model = self._application.new_model(plan.seed)
        trainer = self._application.trainer
        there = accelerator.CPU if plan.ray else accelerator.found(plan.device)
        self.engine, why = engine.choose(
            plan.engine,
            trainer,
            own_model,
            self.within,
            plan.config,
            each=self.wants_each,
            device=there[0],
            insisted=plan.device not in ("auto", "cpu"),
        )
        devices, why_there = accelerator.choose(plan.device, there, self.engine, why)
        if plan.ray:
            why_there = "Ray's actors train on processors"
        self.device = ", ".join(devices)
        if devices != accelerator.CPU and isinstance(self._application.evaluator, Evaluation):
            own_model.to(devices[0])
        self.state = self.treatment.start(self.algorithm.start(model))
        self.model = model
        if found is not None:
            self._take_up(found)
        sent = self._sent()
        self.update = self.within.layout(self.model)
        model_specs, self._sent_specs = Layout.of(self.model), Layout.of(sent)
        self.bytes_down = _bytes(model_specs) + _bytes(self._sent_specs)
        try:
            self.bytes_up = self.treatment.size(self.update, self.state)
        except NotPrivate as error:
            raise ConfigError(str(error)) from error
        self.publish(0)
        states = (self._folder or self._arena.folder) / checkpoint.STATES
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        said = self.nested or plan
        setup = Setup(
            number=0,
            config=plan.config,
            algorithm=said.algorithm,
            algorithm_config=said.algorithm_config,
            treatment=json.dumps(plan.treatment),
            liars=self.liars,
            seed=plan.seed,
            clients=plan.clients,
            engine=self.engine,
            device="",
            folder=str(self._arena.folder),
            paths=plan.paths,
            states=str(states),
            room=0,
            memory=total // (2 * max(plan.processes(devices), 1)),
            model=model_specs.tensors,
            sent=self._sent_specs.tensors,
            update=self.update.tensors,
        )
        # A round of a linear model is over before another process has woken up.
        quick = self.engine == "closed_form" and _blas_is_single() and not plan.ray
        inside = self._debug or quick
        if not self._debug and not plan.ray:
            self.crew.resize(plan.processes(devices) - inside)
        self.crew.start(setup, self._application if inside else None, devices)
        members = len(self.crew.members)
        one, more = ("Ray actor", "s") if plan.ray else ("process", "es")
        processes = f"{members} {one}{more if members > 1 else ''}"
        self.listener.say(
            f"engine {self.engine} on {processes}: {why}; "
            f"device {', '.join(devices[:members])}: {why_there}"
        )
        if self.plan.on_central and self._application.evaluates:
            self._central = Central(self._application, own_model)

    @property
    def partial(self) -> bool:
        """Whether who runs out of time sends what he has; groups with rounds of their own wait."""
        return self.algorithm.partial and self.nested is None

    @property
    def epochs(self) -> float:
        """Of each client's training, as far as `config` says."""
        said = self.plan.config.get("epochs", 1)
        return said if isinstance(said, int | float) and said > 0 else 1

    def duration(self, client: int, epochs: float | None = None) -> float:
        """Simulated seconds of one client's part; of so many epochs, or of all."""
        devices = self.plan.devices
        if devices is None:
            return 1.0
        sizes = self.crew.sizes()
        if client not in sizes:
            self._count()
        examples = sizes.get(client, 0) * (self.epochs if epochs is None else epochs)
        once = devices.duration(client, examples, self.bytes_down, self.bytes_up)
        return self.passes * once

    def _count(self) -> None:
        """How many examples every client has: devices take time by them."""
        order = Order(task=Task.COUNT, turn=self.turn, clients=tuple(range(self.plan.clients)),
                      version=0)  # fmt: skip
        shares = self.crew.run(order)
        done = [one for _, each in shares for one in each]
        self.settle(self.turn // self.algorithm.stages + 1, done, least=self.plan.clients)

    def settle(self, number: int, done: Sequence[Done], *, least: int) -> list[Done]:
        """Those whose part went well, in the order of clients.

        Raises:
            ClientFailed: A client failed, and fewer than ``least`` are left without it.
        """
        for one in done:
            if one.note:
                self.listener.say(f"round {number}: {one.note}")
        good = sorted((one for one in done if one.cause is None), key=lambda one: one.client)
        bad = sorted((one for one in done if one.cause is not None), key=lambda one: one.client)
        for one in bad:
            text, traceback = one.cause or ("", "")
            if len(good) < least:
                raise ClientFailed(one.client, number, text, traceback)
            self.listener.say(f"round {number} goes on without client {one.client}: {text}")
        return good

    # ------------------------------------------------------------------ what the rounds make

    @property
    def wants_each(self) -> bool:
        """Whether the server looks at updates one by one, instead of at their sum."""
        forges = self.liars is not None and self.liars.forges
        relay = self.groups is not None and self.groups.relay
        return forges or relay or self.treatment != Treatment()

    @property
    def server_state(self) -> Arrays:
        """What the algorithm itself keeps of `state`, beside the treatment and the groups."""
        return without_tags(algorithms_own(self.state), [GROUPS])

    def _sent(self) -> Arrays:
        if self.nested is not None:  # each group sends its own; this has its form
            return self.within.sent(self.model, self.within.start(self.model))
        return self.treatment.sent(self.algorithm.sent(self.model, self.server_state), self.state)

    def publish(
        self, version: int, model: Arrays | None = None, sent: Arrays | None = None
    ) -> None:
        """Put the model, or another one, and what is sent with it, where members read it."""
        self.crew.publish(
            version,
            self.model if model is None else model,
            self._sent() if sent is None else sent,
        )

    def update_file(self, turn: int, client: int) -> Path:
        """Where an update of `Task.EACH` is."""
        return self._arena.folder / f"update-{turn}-{client}"

    @property
    def evaluates_clients(self) -> bool:
        """Whether models are evaluated on clients' data."""
        return self.plan.on_clients and self._application.evaluates

    def ended(
        self,
        number: int,
        good: Sequence[Done],
        asked: int,
        trained: Mapping[str, float],
        told: Mapping[str, float] | None = None,
    ) -> None:
        """Write a round down and say so."""
        now = time.monotonic()
        metrics = {f"train.{name}": value for name, value in trained.items()}
        metrics |= told or {}
        lying = self.liars.among([one.client for one in good]) if self.liars is not None else []
        if self.liars is not None:
            metrics["attack.liars"] = float(len(lying))
        if number % self.plan.every == 0 or number == self.plan.rounds:
            metrics |= self._central_metrics()
        self._trained += len(good)
        took = now - self._previous[1]
        self._previous = (self.turn, now)
        simulated = self.clock if self.plan.devices is not None else None
        in_rounds = self.algorithm.kind is Kind.SYNCHRONOUS
        turns = self.passes * self.algorithm.stages
        self.record.add_round(
            number,
            wall_s=self._wall_before + now - self._began,
            simulated_s=simulated,
            asked=asked,
            answered=len(good),
            bytes_down=asked * self.bytes_down * turns,
            bytes_up=len(good) * self.bytes_up * turns,
            metrics=metrics,
        )
        self.record.add_clients(
            number,
            (
                (
                    one.client,
                    one.examples,
                    one.seconds,
                    {**one.metrics, "lies": 1.0} if one.client in lying else one.metrics,
                )
                for one in good
            ),
        )
        self.listener.ended(
            Round(
                number=number,
                rounds=self.plan.rounds,
                asked=asked,
                answered=len(good),
                metrics=metrics,
                wall_s=self._wall_before + now - self._began,
                simulated_s=simulated,
                clients_per_s=len(good) / took if took > 0 else 0.0,
                follows=self.evaluates_clients
                and (number == self.plan.rounds or (in_rounds and number % self.plan.every == 0)),
            )
        )
        self.save()

    def heard(self, done: Sequence[Done]) -> None:
        """Clients are done, as the crew reports them."""
        self.listener.done(len(done))

    def _first_model(self) -> None:
        self.record.add_round(
            0,
            wall_s=0.0,
            simulated_s=0.0 if self.plan.devices is not None else None,
            metrics=self._central_metrics(),
        )

    def _central_metrics(self) -> dict[str, float]:
        return {} if self._central is None else self._central.metrics(self.model)

    def add_devices(self, number: int, done: Sequence[Done]) -> None:
        """What clients found of the model of round ``number``."""
        found = evaluation.of_clients(done)
        self.record.add_metrics(number, found)
        self.listener.evaluated(number, found)

    def _last_evaluation(self) -> None:
        """The last model on every client's data, as in deployed runs."""
        if not self.evaluates_clients:
            return
        clients = tuple(range(self.plan.clients))
        order = Order(task=Task.EVALUATE, turn=self.turn, clients=clients, version=0)
        self.publish(0)
        self.listener.begins(self.plan.rounds, len(clients))
        shares = self.crew.run(order, self.heard)
        done = [one for _, each in shares for one in each]
        good = self.settle(self.plan.rounds, done, least=0)
        self.add_devices(self.turn // self.algorithm.stages, good)

    # ------------------------------------------------------------------ to go on later

    def save(self, *, force: bool = False) -> None:
        """Keep a checkpoint, if it is time for one."""
        now = time.monotonic()
        due = force or now - self._saved >= self.plan.checkpoint_s
        # In the middle of a round of several stages there is nothing to go on from.
        if self._folder is None or not due or self.turn % self.algorithm.stages:
            return
        Checkpoint(
            turn=self.turn,
            model=self.model,
            state=self.state,
            simulated_s=self.clock,
            sizes=self.crew.sizes(),
            identity=self.plan.identity(),
            engine=self.engine,
        ).save(self._folder)
        self.record.flush()
        self.kept_turn = self.turn * self.passes - 1
        self._saved = now

    def _take_up(self, found: Checkpoint) -> None:
        if Layout.of(found.model) != Layout.of(self.model):
            raise ConfigError(
                f"the checkpoint in {self._folder} is of another model",
                "another --out starts anew",
            )
        self.model, self.state = found.model, found.state
        self.turn, self.clock = found.turn, found.simulated_s
        self.kept_turn = found.turn * self.passes - 1
        self.crew.know(found.sizes)

    def _note(self, found: Checkpoint | None) -> None:
        plan = self.plan
        self.record.set(
            name=plan.name,
            algorithm=self.algorithm.name,
            algorithm_config=dict(plan.algorithm_config),
            treatment=dict(plan.treatment),
            groups=dict(plan.groups),
            attack=dict(plan.attack),
            liars=list(self.liars.clients) if self.liars is not None else [],
            config=dict(plan.config),
            rounds=plan.rounds,
            clients=plan.clients,
            per_round=plan.per_round,
            seed=plan.seed,
            engine=self.engine,
            device=self.device,
            workers=len(self.crew.members),
        )
        if self.liars is not None:
            who = ", ".join(map(str, self.liars.clients)) or "nobody"
            self.listener.say(f"attack {self.liars.kind} by clients {who} of {plan.clients}")
        if found is not None:
            done = self.turn // self.algorithm.stages
            self.record.drop_after(done)
            self._wall_before = max((row["wall_s"] for row in self.record.rounds()), default=0.0)
            self.listener.say(f"going on after round {done}")
        if plan.devices is None and (plan.over_select or plan.deadline_s):
            self.listener.say(
                "clients.over_select and clients.deadline_s have no effect without "
                "simulation.devices: nobody is late"
            )

    def _result(self) -> Result:
        took = time.monotonic() - self._began
        return Result(
            model=self.model,
            metrics=self.record.last(),
            rounds=self.turn // self.algorithm.stages,
            engine=self.engine,
            clients_per_s=self._trained / took if took > 0 else 0.0,
            simulated_s=self.clock if self.plan.devices is not None else None,
            history=self.record.rounds(),
            folder=self._folder,
        )


def _bytes(layout: Layout) -> int:
    return sum(spec.size * spec.dtype.itemsize for spec in layout.tensors.values())


def _blas_is_single() -> bool:
    return any(os.environ.get(n) == "1" for n in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"))
