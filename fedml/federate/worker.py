# SPDX-License-Identifier: Apache-2.0
"""The client role: a warm process in which one device trains for one federated run.

    python -m fedml.federate.worker SESSION

It listens on `worker.sock` in its working directory, says a line when it does, and takes one stage
at a time. The user's code is imported and his data loaded once. What a stage has produced lies in
its output directory before the answer is sent; asked again, the same answer is given from there.
A stage that is given up leaves nothing there.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedml.federate.pace import Pace
from fedml_protocol.cause import Cause, Fault
from fedml_protocol.codec import parse, serialise
from fedml_protocol.federate import (
    StageCancel,
    StageDone,
    StageKind,
    StageOrder,
    StageSpec,
    WorkerFrame,
    WorkerReady,
)
from fedml_protocol.frames import HEAD_BYTES, frame, frame_length

SOCKET = "worker.sock"


class StageCancelled(BaseException):
    """Raised inside of a stage that nobody waits for; users' `except Exception` lets it pass."""


class Worker:
    """The stages of one session."""

    def __init__(self, session: str, root: Path) -> None:
        self._session = session
        self._root = root
        self._application: Any = None
        self._key: tuple[str, str] | None = None
        self._data: Any = None
        self._module: Any = None
        self._moved = self._said = False
        self._pace = Pace()
        self._orders: queue.SimpleQueue[tuple[socket.socket, StageOrder]] = queue.SimpleQueue()
        self._running: tuple[str, int] | None = None
        self._cancelled: set[tuple[str, int]] = set()

    def serve(self) -> None:
        """Answer whoever connects, for ever. Only the agent can reach the socket.

        Threads listen; the stages run in the main thread, where a signal can end one. An agent
        that was restarted is heard while a stage runs that its predecessor asked for.
        """
        signal.signal(signal.SIGINT, self._interrupted)
        path = self._root / SOCKET
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            # Relative: the whole path may not fit into a socket address.
            listener.bind(SOCKET)
            listener.listen(4)
            threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
            sys.stderr.write(f"fedml: the worker of {self._session} is ready\n")
            sys.stderr.flush()
            while True:
                connection, order = self._orders.get()
                answer = frame(WorkerFrame(body=self._answer(order)))
                with contextlib.suppress(OSError):  # the agent has gone; the next one asks again
                    connection.sendall(answer)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=self._hear, args=(connection,), daemon=True).start()

    def _hear(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError, EOFError), connection.makefile("rb") as stream:
            connection.sendall(frame(WorkerFrame(body=WorkerReady(session=self._session))))
            while head := stream.read(HEAD_BYTES):
                body = parse(WorkerFrame, stream.read(frame_length(head))).body
                if isinstance(body, StageOrder):
                    self._orders.put((connection, body))
                elif isinstance(body, StageCancel):
                    self._cancelled.add((body.task, body.epoch))
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def _interrupted(self, number: int, where: object) -> None:
        """In the main thread: end the stage that runs, if it is the one to be given up."""
        if self._running is not None and self._running in self._cancelled:
            self._cancelled.discard(self._running)  # once: what ends the stage is not ended too
            raise StageCancelled

    def _answer(self, order: StageOrder) -> StageDone:
        out = Path(order.out_dir)
        # By boot: after a power cut, what it speaks of may be there by name only.
        done_file = out / f"done-{_boot()}"
        if done_file.exists():
            return parse(StageDone, done_file.read_bytes())
        key = (order.task, order.epoch)
        try:
            done = self._guarded(key, order, out)
        except StageCancelled:
            cause = Cause(fault=Fault.TASK, message="it was given up: nobody waits for it")
            return StageDone(task=order.task, epoch=order.epoch, cause=cause)
        except Exception as error:  # the user's code may raise anything, and it is his to read
            traceback.print_exc()
            done = StageDone(task=order.task, epoch=order.epoch, cause=_cause(error))
        _replaced(done_file, lambda file: file.write_bytes(serialise(done)))
        return done

    def _guarded(self, key: tuple[str, int], order: StageOrder, out: Path) -> StageDone:
        """The stage, which a cancel ends from within; before and after it a cancel does nothing."""
        try:
            self._running = key
            if key in self._cancelled:  # before it began
                raise StageCancelled
            return self._stage(order, out)
        finally:
            self._running = None
            self._cancelled.discard(key)

    def _stage(self, order: StageOrder, out: Path) -> StageDone:
        from fedml.federate import algorithm, cohort, hierarchical
        from fedml.federate.application import UserTraining, set_weights
        from fedml.federate.tensor_file import mapped
        from fedml.federate.treatment import Treatment

        spec = order.spec
        until = time.monotonic() + (order.deadline_s or math.inf)
        application = self._prepared(spec)
        model = mapped(order.model_path)
        metrics: dict[str, float] = {}
        if spec.evaluate or spec.kind is StageKind.EVALUATE:
            self._place_for(application.evaluator)
            set_weights(self._module, model)
            found = application.evaluate(self._module, self._data)
            metrics |= {f"eval.{name}": value for name, value in found.items()}
        if spec.kind is StageKind.EVALUATE:
            return StageDone(task=order.task, epoch=order.epoch, metrics=metrics)
        chosen = algorithm.create(spec.algorithm, json.loads(spec.algorithm_config))
        self._place_for(application.trainer)
        epochs, most = self._epochs(application, until - time.monotonic())
        deadline = until if order.deadline_s else None
        local = UserTraining(
            application, self._module, self._data, epochs if epochs < most else None, deadline
        )
        algorithm.require_support(chosen, local, f"train() in {spec.app}")
        sent = mapped(order.sent_path) if order.sent_path else {}
        before = self._state_before(spec.round)
        # Rounds count from 1 on the wire; generators, as in the simulator, from 0.
        rng = cohort.generator(spec.seed, spec.round - 1, spec.client)
        if spec.kind is StageKind.TRAIN_IN_GROUP:
            rng = hierarchical.member_generator(
                spec.seed, spec.round - 1, spec.turns, spec.group, spec.client
            )
        treatment = Treatment.parse(spec.treatment)
        with self._pace.measured(epochs):
            update = treatment.client_update(chosen, model, sent, before, local, rng)
        if local.partial is not None:
            metrics["partial.epochs"] = float(local.partial)
        self._write_update(out / "update.safetensors", update.arrays)
        self._keep_state(spec.round, update.client_state)
        return StageDone(
            task=order.task,
            epoch=order.epoch,
            files=("update",),
            metrics={**metrics, **update.metrics},
            weight=update.weight,
        )

    def _epochs(self, application: Any, seconds: float) -> tuple[int, int]:
        """How many epochs a `train` of the user's own has time for, and how many it is to do.

        The built-in one looks at the clock itself.
        """
        from fedml.federate.local_sgd import LocalSGD

        most = application.config.get("epochs")
        if isinstance(application.trainer, LocalSGD) or not isinstance(most, int) or most < 1:
            return 1, 1
        return self._pace.fitting(most, seconds), most

    def _write_update(self, path: Path, arrays: Any) -> None:
        """Write over the update before, if the agent has deleted it: the broker has that one."""
        from fedml.federate.tensor_file import write

        before = self._root / "update-before.safetensors"
        with contextlib.suppress(OSError):  # there is none, or no second name for a file here
            if before.stat().st_nlink == 1:
                before.rename(path)
            else:
                before.unlink()
        write(path, arrays, over=True)
        with contextlib.suppress(OSError):
            before.hardlink_to(path)

    def _prepared(self, spec: StageSpec) -> Any:
        """The user's code imported and his data loaded, once for a session."""
        from fedml.federate.application import Application, Client

        if self._key != (spec.app, spec.config):
            config = json.loads(spec.config)
            application = Application(self._root / "package" / spec.app, config)
            client = Client(
                index=spec.client,
                count=spec.clients,
                labels=spec.labels,
                paths=json.loads(os.environ.get("FEDML_DATA", "{}")),
            )
            self._data = application.data(client)
            if "fedml.data" in sys.modules:
                # What `load` keeps for the next client; here there is but one.
                sys.modules["fedml.data"].forget()
            self._module = application.new_model(spec.seed)
            self._application, self._key = application, (spec.app, spec.config)
        return self._application

    def _place_for(self, function: Any) -> None:
        """Put the model on the GPU that this run holds, for functions that are built in.

        The user's own find it where they left it, or where `model` has put it.
        """
        from fedml.federate.local_sgd import Evaluation, LocalSGD

        if not os.environ.get("CUDA_VISIBLE_DEVICES") or isinstance(self._module, dict):
            return
        if not isinstance(function, LocalSGD | Evaluation):
            if self._moved:
                self._module.to("cpu")
                self._moved = False
            return
        import torch

        from fedml.simulation import accelerator

        if not torch.cuda.is_available():
            if not self._said:
                said = f"torch {torch.__version__} cannot use it: the processors train"
                sys.stderr.write(f"fedml: this run holds a GPU, and {said}\n")
            self._said = True
            return
        accelerator.prepare("cuda")
        self._module.to("cuda")
        self._moved = True

    def _state_before(self, round_n: int) -> Any:
        """What this client kept after its last round before this one."""
        from safetensors.numpy import load_file

        folder = self._root / "state"
        kept = [int(f.stem) for f in folder.glob("*.safetensors")] if folder.exists() else []
        before = [n for n in kept if n < round_n]
        return load_file(folder / f"{max(before)}.safetensors") if before else None

    def _keep_state(self, round_n: int, state: Any) -> None:
        from fedml.federate.tensor_file import write

        if state is None:
            return
        folder = self._root / "state"
        folder.mkdir(exist_ok=True)
        kept = folder / f"{round_n}.safetensors"
        _replaced(kept, lambda file: write(file, state), synced=True)
        for old in sorted(folder.glob("*.safetensors"), key=lambda f: int(f.stem))[:-2]:
            old.unlink()


def _cause(error: Exception) -> Cause:
    from fedml.federate import blame

    text = f"{type(error).__name__}: {error}"
    shown = "" if blame.says_all(error) else blame.trace(error)
    return Cause(fault=Fault.TASK, message=text[:2000], traceback=shown)


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]


def _replaced(path: Path, make: Callable[[Path], object], *, synced: bool = False) -> None:
    """Replace a file as a whole; `synced`: also for a power cut."""
    beside = path.with_name(path.name + ".new")
    make(beside)
    if synced:
        with beside.open("rb") as file:
            os.fsync(file.fileno())
    beside.replace(path)


if __name__ == "__main__":
    Worker(sys.argv[1], Path.cwd()).serve()
