# SPDX-License-Identifier: Apache-2.0
"""Algorithms without rounds: the server steps with each update that comes.

``clients.per_round`` clients are at work at any time. Each starts from the newest model; when one
answers, the aggregator hears how many versions old its model was, and another client starts. A
version of the model is kept as a round is, in one transaction with the word that these updates are
in it: after a crash, those that are in none are given to the next aggregator. A client whose
machine went away keeps no place; when it is back, what it sends counts all the same.
"""

from functools import partial
from typing import TYPE_CHECKING

from fedml_broker import rounds, tasks
from fedml_broker.aggregator import Aggregator
from fedml_broker.rounds import Round, Tally
from fedml_broker.runs import RunFailed
from fedml_broker.tasks import Answer, Task
from fedml_protocol.cause import Cause, Fault
from fedml_protocol.federate import (
    BeginRound,
    FinishRound,
    ModelMade,
    PlanRound,
    RoundBegun,
    RoundPlan,
    StageKind,
)

if TYPE_CHECKING:
    from fedml_broker.driver import Driver


class Versions:
    """The versions of the model of one run."""

    def __init__(self, driver: "Driver", aggregator: Aggregator, buffer: int) -> None:
        """
        Args:
            buffer: Updates that make a version.
        """
        self._driver = driver
        self._buffer = buffer
        self._aggregator = aggregator
        limit = driver.request.clients
        self._at_work = limit.per_round or limit.count
        self._minimum = limit.minimum or self._at_work
        self._starts = 0
        # Of the version that is being made: tasks that are in it, and clients that have failed.
        self._heard: dict[str, Answer] = {}
        self._bad: dict[int, Cause] = {}
        self._received_bytes = 0

    async def walk(self, latest: Round, opened: Round | None) -> Round:
        """From the latest version to the last one; `opened` is the one that was being made."""
        driver, limit = self._driver, self._driver.request.clients
        if limit.over_select or limit.deadline_s:
            raise RunFailed(
                Cause(
                    fault=Fault.TASK,
                    message=f"{driver.request.algorithm} has no rounds to over-select for or to "
                    "close at a deadline",
                    hint="leave out clients.over_select and clients.deadline_s, or choose fedavg",
                )
            )
        self._starts = await driver.store.read(lambda tx: tasks.starts(tx, driver.run))
        while latest.number < driver.request.rounds:
            latest = await self._version(latest, begun=opened is not None)
            opened = None
        await driver.go_on_without(None)
        return latest

    async def _version(self, latest: Round, *, begun: bool) -> Round:
        driver, number = self._driver, latest.number + 1
        if not begun:
            await driver.store.write(
                lambda tx: rounds.begin(tx, driver.run, number, (), count=self._buffer)
            )
        begin = BeginRound(
            round=number,
            model_path=driver.path(latest.kept.model),
            state_path=driver.path(latest.kept.state),
            clients=tuple(sorted(driver.clients)),
        )
        await self._aggregator.ask(begin, RoundBegun)
        self._heard, self._bad, self._received_bytes = {}, {}, 0
        while True:
            driver.told.clear()
            bell = driver.all.fleet.bell()
            driver.check_stop()
            if await self._listen(number):
                return await self._made(number)
            left = len(driver.clients) - len(self._bad)
            if left < self._minimum:
                first = next(iter(self._bad.values()))
                raise RunFailed.too_few(f"version {number}", self._minimum, left, first)
            await self._fill(latest)
            driver.wait_in_round(
                partial(self._missing, number),
                number=number,
                asked=self._buffer,
                answered=len(self._heard) - len(self._bad),
                received=self._received_bytes,
            )
            # A machine that fell silent rings no bell.
            await driver.either(
                driver.told, bell, within_s=driver.all.dispatcher.timing.heartbeat_s
            )

    async def _listen(self, number: int) -> bool:
        """Give what has come to the aggregator, until that makes a model."""
        driver = self._driver
        come = await driver.store.read(lambda tx: tasks.uncounted(tx, driver.run, {*self._heard}))
        for answer in come:
            result = answer.result
            added = await driver.add(
                self._aggregator, answer.client, result, staleness=number - 1 - answer.version
            )
            self._heard[answer.task] = answer
            self._received_bytes += sum(a.blob.size for a in result.artifacts)
            if added.refusal is not None:
                self._bad[answer.client] = added.refusal
                await driver.complain(number, answer.client, added.refusal)
            elif added.stepped:
                return True
        return False

    async def _made(self, number: int) -> Round:
        driver, heard = self._driver, self._heard
        finish = FinishRound(out_dir=str(driver.out_dir(number)))
        made = await self._aggregator.ask(finish, ModelMade)
        driver.done_waiting()
        return await driver.finish(
            number,
            made,
            Tally(
                replies=len(heard) - len(self._bad),
                refused=len(self._bad),
                received_bytes=self._received_bytes,
            ),
            turns=[a.start for a in heard.values()],
            counted=[*heard],
        )

    # ------------------------------------------------------------------ who is at work

    def _busy(self) -> list[Task]:
        return self._driver.all.dispatcher.of_run(self._driver.run)

    async def _fill(self, latest: Round) -> None:
        """Start clients until enough are at work."""
        driver = self._driver
        away, working = set[int](), 0
        busy = {task.client for task in self._busy()}
        for client, device in driver.clients.items():
            machine = driver.all.fleet.get(device)
            if machine is None or driver.all.fleet.away(machine):
                away.add(client)
            elif client in busy:
                working += 1
        free = {*driver.clients} - busy - away - {*self._bad}
        new: list[Task] = []
        while free and working + len(new) < self._at_work:
            self._starts += 1
            plan = PlanRound(round=self._starts, clients=tuple(sorted(free)), count=1)
            client = (await self._aggregator.ask(plan, RoundPlan)).clients[0]
            free.discard(client)
            new.append(
                driver.task(
                    self._starts, client, latest.kept, StageKind.TRAIN, version=latest.number
                )
            )
        if new:
            await driver.queue(new, lambda tx: tasks.insert(tx, new))

    def _missing(self, number: int) -> str:
        names = self._driver.names(task.client for task in self._busy())
        return (
            f"version {number}: {len(self._heard)} have answered; "
            f"waiting for {names or 'machines to come online'}"
        )
