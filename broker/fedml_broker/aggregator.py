# SPDX-License-Identifier: Apache-2.0
"""The broker's end of one aggregator: a worker process of `fedml` that opens the tensors.

The process keeps nothing that cannot be had again from blobs: when it dies, another one is started
and told the same round.
"""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from fedml_protocol.cause import Cause
from fedml_protocol.codec import parse
from fedml_protocol.federate import (
    AddUpdate,
    AggregatorFrame,
    BeginRound,
    Failed,
    FinishRound,
    MakeModel,
    OpenRun,
    PlanRound,
)
from fedml_protocol.frames import HEAD_BYTES, frame, frame_length

Answer = TypeVar("Answer")
Question = OpenRun | MakeModel | PlanRound | BeginRound | AddUpdate | FinishRound


class AggregatorDied(Exception):
    """The process is gone; the text ends with the last lines it wrote."""


class AggregatorRefused(Exception):
    """The process could not do what was asked; `cause` says why."""

    def __init__(self, cause: Cause) -> None:
        super().__init__(cause.message)
        self.cause = cause


class Aggregator:
    """One process, asked one question at a time."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        log: Path,
        timed: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self._timed = timed
        self._process = process
        self._log = log
        self._call = 0
        self._turn = asyncio.Lock()

    @classmethod
    async def start(
        cls,
        work_dir: Path,
        *,
        home: Path,
        blobs: Path,
        timed: Callable[[float], None] = lambda seconds: None,
    ) -> "Aggregator":
        """Start the process.

        It runs users' code, so it is locked in (see `fedml_agent.enclosed`): of the broker's
        `home`, which holds the CA's key and everybody's runs, it can read its `work_dir` and
        `blobs`; it can write to the first only, and has no network.

        Args:
            work_dir: Holds its log and whatever it writes; called as the run is.
            timed: Is called with the seconds of each answer.
        """
        work_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        log = work_dir / "aggregator.log"
        # Of the broker's own environment, only what a Python program needs: user code runs there.
        kept = ("PATH", "LANG", "LC_ALL", "TZ", "VIRTUAL_ENV", "PYTHONPATH", "OPENBLAS_CORETYPE")
        environment = {name: os.environ[name] for name in kept if name in os.environ}
        environment |= {"HOME": str(work_dir), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        environment["FEDML_CURRENT_RUN_ID"] = work_dir.name
        environment["FEDML_HOME"] = str(home.parent)  # where `fedml data fetch` puts data sets
        facts = {
            "hidden": [str(home)],
            "show": [str(blobs), str(work_dir)],
            "writable": [str(work_dir)],
        }
        with log.open("ab") as errors:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "fedml_agent.enclosed", json.dumps(facts)),
                *(sys.executable, "-m", "fedml.federate.aggregator"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                cwd=work_dir,
                env=environment,
                start_new_session=True,
            )
        return cls(process, log, timed)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    async def ask(self, question: Question, answer: type[Answer]) -> Answer:
        """Put one question.

        Raises:
            AggregatorRefused: It answered that it cannot.
            AggregatorDied: It did not answer.
        """
        async with self._turn:
            self._call += 1
            begun = time.perf_counter()
            stdin, stdout = self._process.stdin, self._process.stdout
            if stdin is None or stdout is None:  # pragma: no cover - both are pipes
                raise AggregatorDied("it has no streams")
            try:
                stdin.write(frame(AggregatorFrame(call=self._call, body=question)))
                await stdin.drain()
                head = await stdout.readexactly(HEAD_BYTES)
                data = await stdout.readexactly(frame_length(head))
            except (OSError, asyncio.IncompleteReadError) as error:
                code = await self._process.wait()
                how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
                raise AggregatorDied(f"it ended with {how}\n{self._last_lines()}") from error
            self._timed(time.perf_counter() - begun)
        body = parse(AggregatorFrame, data).body
        if isinstance(body, Failed):
            raise AggregatorRefused(body.cause)
        if not isinstance(body, answer):
            raise AggregatorDied(f"it answered {type(body).__name__}, not {answer.__name__}")
        return body

    async def close(self) -> None:
        """End the process: first its input, then itself."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            async with asyncio.timeout(5):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    def _last_lines(self) -> str:
        try:
            return self._log.read_text(errors="replace")[-2000:]
        except OSError:
            return ""
