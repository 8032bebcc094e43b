# SPDX-License-Identifier: Apache-2.0
"""Algorithms in rounds: ask a cohort, take what it sends, make the next model.

A round of an algorithm with several stages takes a turn for each, with the same clients; what a
stage has made is in the store before the next one begins. Where groups of clients have rounds of
their own, a round of the whole takes the turns of these, all groups side by side.
"""

import asyncio
import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from sqlalchemy import Connection

from fedml_broker import rounds, tasks
from fedml_broker.aggregator import Aggregator
from fedml_broker.rounds import Kept, Round, Tally
from fedml_broker.runs import RunFailed
from fedml_protocol.blob import Blob
from fedml_protocol.cause import Cause
from fedml_protocol.federate import (
    BeginRound,
    FinishRound,
    GroupFiles,
    ModelMade,
    PlanRound,
    RoundBegun,
    RoundPlan,
    StageKind,
)
from fedml_protocol.tasks import Result, TaskState

if TYPE_CHECKING:
    from fedml_broker.driver import Driver


class Rounds:
    """The rounds of one run."""

    def __init__(self, driver: "Driver", aggregator: Aggregator, stages: int) -> None:
        """
        Args:
            stages: Turns in one round.
        """
        self._driver = driver
        self._aggregator = aggregator
        self._stages = stages
        self._tally = Tally()

    async def walk(self, latest: Round, opened: Round | None) -> Round:
        """From the latest round that is done to the last one; `opened` is one that was begun."""
        while latest.number < self._driver.request.rounds:
            latest = await self._round(latest, opened)
            opened = None
        return latest

    async def _round(self, latest: Round, opened: Round | None) -> Round:
        number = latest.number + 1
        if opened is None:
            opened = await self._begin(number, latest)
        while True:
            before = latest.kept if opened.stage == 0 else opened.kept
            turn = (number - 1) * self._stages + opened.stage + 1
            model = before.model or latest.kept.model
            replies, made = await self._turn(number, turn, before, model, opened.clients)
            if opened.stage + 1 == self._stages:
                break
            opened = await self._next_stage(opened, turn, replies, made)
        partial = sum("partial.epochs" in result.metrics for result in replies.values())
        if partial:
            made = replace(made, metrics={**made.metrics, "partial.clients": float(partial)})
        return await self._driver.finish(
            number,
            made,
            self._tally,
            # In a round of several stages the model was evaluated in the first one.
            devices=_evaluated(replies) if self._stages == 1 else {},
            turns=(turn,),
        )

    async def _begin(self, number: int, latest: Round) -> Round:
        driver, limit = self._driver, self._driver.request.clients
        driver.check_stop()
        per_round = limit.per_round or limit.count
        asked = min(math.ceil(per_round * (1 + limit.over_select)), len(driver.clients))
        plan = PlanRound(round=number, clients=tuple(sorted(driver.clients)), count=asked)
        cohort = (await self._aggregator.ask(plan, RoundPlan)).clients
        evaluate = driver.request.evaluate
        new = [
            driver.task(
                (number - 1) * self._stages + 1,
                client,
                latest.kept,
                StageKind.TRAIN,
                evaluate=evaluate.devices and (number - 1) % evaluate.every == 0,
            )
            for client in cohort
        ]

        def commit(tx: Connection) -> None:
            rounds.begin(tx, driver.run, number, cohort)
            tasks.insert(tx, new)

        await driver.queue(new, commit)
        return Round(number=number, clients=cohort, kept=Kept(model=None), done=False)

    async def _turn(
        self, number: int, turn: int, before: Kept, model: Blob | None, cohort: tuple[int, ...]
    ) -> tuple[dict[int, Result], ModelMade]:
        """All updates of one turn, and what the aggregator makes of them."""
        driver = self._driver
        begin = BeginRound(
            round=turn,
            model_path=driver.path(model),
            state_path=driver.path(before.state),
            clients=cohort,
            groups=tuple(
                GroupFiles(group=g, model_path=driver.path(start.model))
                for g, start in before.groups.items()
                if start.model is not None
            ),
        )
        await self._aggregator.ask(begin, RoundBegun)
        replies = await self._collect(number, turn, cohort)
        finish = FinishRound(out_dir=str(driver.out_dir(turn)))
        return replies, await self._aggregator.ask(finish, ModelMade)

    async def _next_stage(
        self, opened: Round, turn: int, replies: Mapping[int, Result], made: ModelMade
    ) -> Round:
        """Keep what a stage made, and ask those who have answered for the next one."""
        driver, number, stage = self._driver, opened.number, opened.stage + 1
        devices = _evaluated(replies) if stage == 1 else {}
        clients = tuple(replies)
        driver.check_stop()
        kept = await driver.adopt(made)
        found = Round(number=number, clients=clients, done=False, stage=stage, kept=kept)
        new = [driver.task(turn + 1, client, kept, StageKind.TRAIN) for client in clients]

        def step(tx: Connection) -> list[str]:
            tasks.insert(tx, new)
            rounds.add_metrics(tx, driver.run, number - 1, devices)
            return rounds.stage_done(
                tx, driver.run, number, stage=stage, clients=clients, turn=turn, kept=kept
            )

        await driver.commit(kept, step)
        driver.all.dispatcher.added(new)
        return found

    async def _collect(self, number: int, turn: int, cohort: tuple[int, ...]) -> dict[int, Result]:
        """Give every update to the aggregator as it comes, until the round may close."""
        driver, limit = self._driver, self._driver.request.clients
        what = self._what(number, turn)
        enough = min(limit.per_round or limit.count, len(cohort))
        minimum = limit.minimum or enough
        loop = asyncio.get_running_loop()
        deadline = loop.time() + limit.deadline_s if limit.deadline_s else math.inf
        good: dict[int, Result] = {}
        bad: dict[int, Cause] = {}
        received_bytes = 0
        while True:
            driver.told.clear()
            driver.check_stop()
            for client, _, result in await results(driver, turn, {*good, *bad}):
                if len(good) == enough:
                    break
                added = await driver.add(self._aggregator, client, result)
                received_bytes += sum(a.blob.size for a in result.artifacts)
                if added.refusal is None:
                    good[client] = result
                else:
                    bad[client] = added.refusal
                    await driver.complain(number, client, added.refusal)
            left = len(cohort) - len(bad)
            if left < minimum:
                first = next(iter(bad.values()))
                raise RunFailed.too_few(what, minimum, left, first)
            self._require_groups(what, cohort, bad)
            late = loop.time() >= deadline
            if len(good) >= min(enough, left) or (late and len(good) >= minimum):
                break
            answered = {*good, *bad}
            driver.wait_in_round(
                partial(_missing, driver, what, cohort, answered, minimum if late else 0),
                number=number,
                asked=len(cohort),
                answered=len(answered),
                received=received_bytes,
            )
            await driver.either(driver.told, within_s=None if late else deadline - loop.time())
        driver.done_waiting()
        await driver.go_on_without(turn)
        self._tally = Tally(replies=len(good), refused=len(bad), received_bytes=received_bytes)
        return dict(sorted(good.items()))

    def _what(self, number: int, turn: int) -> str:
        """A turn, in words."""
        if self._stages == 1:
            return f"round {number}"
        return f"round {number}, turn {(turn - 1) % self._stages + 1} of {self._stages}"

    def _require_groups(self, what: str, cohort: tuple[int, ...], bad: Mapping[int, Cause]) -> None:
        """A group of which everybody has failed, as against answered late, ends the run."""
        groups = self._driver.groups
        for group in sorted({groups[client] for client in cohort if client in groups}):
            members = [client for client in cohort if groups[client] == group]
            if all(client in bad for client in members):
                raise RunFailed.too_few(f"{what}, group {group}", 1, 0, bad[members[0]])


async def evaluate_last(driver: "Driver", latest: Round, opened: Round | None, turn: int) -> None:
    """The last model, evaluated on the devices; it has no next round to be evaluated in."""
    number = latest.number + 1
    cohort = tuple(sorted(driver.clients))
    if opened is None:
        new = [driver.task(turn, client, latest.kept, StageKind.EVALUATE) for client in cohort]

        def commit(tx: Connection) -> None:
            rounds.begin(tx, driver.run, number, cohort)
            tasks.insert(tx, new)

        await driver.queue(new, commit)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + (driver.request.clients.deadline_s or math.inf)
    while True:
        driver.told.clear()
        driver.check_stop()
        replies = await results(driver, turn)
        if len(replies) == len(cohort) or loop.time() >= deadline:
            break
        answered = {client for client, _, _ in replies}
        driver.wait_in_round(
            partial(_missing, driver, f"round {number}", cohort, answered, 0),
            number=number,
            asked=len(cohort),
            answered=len(answered),
        )
        await driver.either(driver.told, within_s=deadline - loop.time())
    driver.done_waiting()
    await driver.go_on_without(turn)
    for client, _, result in replies:
        if result.state is not TaskState.FINISHED and result.cause is not None:
            await driver.complain(number, client, result.cause)
    devices = _evaluated({client: result for client, _, result in replies})
    await driver.store.write(lambda tx: rounds.add_metrics(tx, driver.run, latest.number, devices))


async def results(
    driver: "Driver", turn: int, known: Collection[int] = ()
) -> list[tuple[int, str, Result]]:
    """What has come in a turn, but for clients that are known already."""
    return await driver.store.read(lambda tx: tasks.results(tx, driver.run, turn, known))


def _evaluated(replies: Mapping[int, Result]) -> dict[str, float]:
    found = rounds.mean_metrics([result.metrics for result in replies.values()], "eval.")
    return {f"devices.{name}": value for name, value in found.items()}


def _missing(
    driver: "Driver",
    what: str,
    cohort: tuple[int, ...],
    answered: Collection[int],
    minimum: int,
) -> str:
    """Whom a turn waits for; `minimum`: it is past its deadline and needs so many."""
    names = driver.names(client for client in cohort if client not in answered)
    late = f", past its deadline; it needs {minimum}" if minimum else ""
    return f"{what}: {len(answered)} of {len(cohort)} have answered{late}; waiting for {names}"
