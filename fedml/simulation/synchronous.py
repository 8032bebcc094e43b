# SPDX-License-Identifier: Apache-2.0
"""Algorithms in rounds: ask a cohort, add up what it sends, make the next model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fedml.errors import RunFailed
from fedml.federate import cohort
from fedml.federate.arrays import Arrays
from fedml.federate.census import facts_of
from fedml.federate.layout import BadUpdate
from fedml.federate.round import Made, ServerRound
from fedml.simulation import grouped
from fedml.simulation.devices import online
from fedml.simulation.order import Done, Order, Task
from fedml.simulation.sums import added_up, barren

if TYPE_CHECKING:
    from fedml.simulation.run import Simulation

_AHEAD = 16  # cohorts chosen at once: in the middle of a round, one takes twice as long


@dataclass(frozen=True, slots=True)
class _Cohort:
    """Whose answers a round takes, how many were asked of how many, and when on the clock it ends.

    `epochs` are those of clients that have no time for all.
    """

    clients: tuple[int, ...]
    asked: int
    available: int
    ends: float
    epochs: Mapping[int, int] = field(default_factory=dict)


def walk(run: Simulation) -> None:
    """Walk a simulation of a synchronous algorithm to its last round."""
    stages = run.algorithm.stages
    known: dict[int, _Cohort] = {}
    # The end of a round, which is written down while others train in the next one.
    ended: list[Callable[[], None]] = []

    def meanwhile() -> None:
        while ended:
            ended.pop()()
        run.listener.begins(run.turn // stages + 1, len(taken.clients) * run.passes)
        # With devices it depends on when this round ends.
        if run.plan.devices is None and not known:
            later = range(run.turn // stages + 1, run.plan.rounds)
            known.update((index, _cohort(run, index)) for index in later[:_AHEAD])

    taken = _Cohort((), 0, 0, run.clock)
    try:
        while run.turn < run.plan.rounds * stages:
            stage, index = run.turn % stages, run.turn // stages
            if stage == 0:
                taken = known.pop(index) if index in known else _cohort(run, index)
            good, made = _turn(run, taken, meanwhile, first=stage == 0)
            # All stages of a round are served by the same clients.
            asked = taken.asked
            taken = replace(taken, clients=tuple(one.client for one in good))
            if stage == stages - 1:
                told = dict(made.told)
                if taken.epochs:
                    told["partial.clients"] = float(len(taken.epochs))
                ended.append(partial(run.ended, index + 1, good, asked, made.metrics, told))
    finally:
        while ended:
            ended.pop()()


def _turn(
    run: Simulation,
    taken: _Cohort,
    meanwhile: Callable[[], None],
    *,
    first: bool,
) -> tuple[list[Done], Made]:
    plan = run.plan
    number = run.turn // run.algorithm.stages + 1
    evaluate = first and run.evaluates_clients and (number - 1) % plan.every == 0
    least = min(plan.minimum, len(taken.clients))
    if run.nested is not None:
        meanwhile()
        good, made = grouped.turn(run, number, taken.clients, least=least, evaluate=evaluate)
    else:
        order = Order(
            task=Task.EACH if run.wants_each else Task.SUM,
            turn=run.turn,
            clients=taken.clients,
            version=0,
            evaluate=evaluate,
            kept=run.kept_turn,
            epochs=taken.epochs,
        )
        shares = run.crew.run(order, run.heard, meanwhile)
        good = run.settle(number, [one for _, each in shares for one in each], least=least)
        if run.wants_each:
            good, made = _each(run, number, taken, good, least)
        else:
            made = _summed(run, number, [place for place, _ in shares], good)
    run.model, run.state = made.model, made.state
    run.turn += 1
    run.clock = taken.ends
    run.publish(0)
    if evaluate:
        run.add_devices(number - 1, good)
    return good, made


def _each(
    run: Simulation, number: int, taken: _Cohort, good: Sequence[Done], least: int
) -> tuple[list[Done], Made]:
    """The next model of updates that are looked at one by one, and whose they are."""
    this = ServerRound(
        run.algorithm,
        run.treatment,
        run.model,
        run.state,
        seed=run.plan.seed,
        index=run.turn,
        asked=taken.asked,
        population=run.plan.clients,
        available=taken.available,
        groups=run.members,
        noise=cohort.server_generator(run.plan.seed, run.turn),
    )
    if run.treatment.rule is None and not math.fsum(one.weight for one in good) > 0:
        raise barren(number, len(good))
    files = {one.client: run.update_file(run.turn, one.client) for one in good}
    done = []
    try:
        lies = _lies(run, files)
        for one in good:
            given = lies.get(one.client, files[one.client])
            try:
                this.add(one.client, given, one.weight, one.metrics)
            except BadUpdate as error:
                one = one._replace(cause=(f"its update was refused: {error.what}", ""))
            done.append(one)
        left = run.settle(number, done, least=least)
        return left, this.finish()
    finally:
        for file in files.values():
            file.unlink(missing_ok=True)


def _lies(run: Simulation, files: Mapping[int, Path]) -> Mapping[int, Arrays]:
    """What is sent in the place of some clients' updates."""
    liars = run.liars
    if liars is None or not liars.among(list(files)) or liars.attack is None:
        return {}
    seen = files if liars.attack.colludes else liars.among(list(files))
    updates = {c: run.treatment.decoded(c, files[c], run.update) for c in seen}
    return liars.forged(run.turn, updates)


def _summed(run: Simulation, number: int, places: Sequence[int], good: Sequence[Done]) -> Made:
    """The next model of what the members added up."""
    combined = added_up(run, number, places, good)
    weights = {one.client: one.weight for one in good}
    facts, remembered = facts_of(run.state, weights, run.plan.clients)
    model, state = run.algorithm.server_update(run.model, run.server_state, combined, facts)
    return Made(model, state | remembered, combined.metrics, {})


def _cohort(run: Simulation, index: int) -> _Cohort:
    """Who takes part in a round, as the deployed rounds choose; devices may drop out or be late.

    Raises:
        RunFailed: Too few are online, or answer.
    """
    plan, devices = run.plan, run.plan.devices
    everybody = range(plan.clients)
    if devices is None:
        chosen = cohort.choose(plan.seed, index, everybody, plan.per_round)
        return _Cohort(tuple(chosen), len(chosen), plan.clients, run.clock)
    there, at = online(devices, everybody, run.clock)
    while len(there) < plan.minimum:
        later = min(
            (t for c in everybody if (t := devices.next_online(c, at)) > at), default=math.inf
        )
        if math.isinf(later):
            raise RunFailed(
                f"round {index + 1}: {len(there)} clients are online and no more ever will be, "
                f"clients.minimum is {plan.minimum}",
                "a longer trace, or a smaller clients.minimum",
            )
        there, at = online(devices, everybody, later)
    count = min(math.ceil(plan.per_round * (1 + plan.over_select)), len(there))
    asked = cohort.choose(plan.seed, index, there, count)
    answering = [c for c in asked if not devices.drops_out(c, index)]
    if len(answering) < plan.minimum:
        raise RunFailed(
            f"round {index + 1}: {len(asked) - len(answering)} of {len(asked)} dropped out, "
            f"{len(answering)} answer and clients.minimum is {plan.minimum}",
            "clients.over_select asks more; or a smaller clients.minimum",
        )
    deadline = at + plan.deadline_s if plan.deadline_s else math.inf
    epochs = _fitting(run, answering, deadline - at) if run.partial else {}
    arrivals = sorted((at + run.duration(c, epochs.get(c)), c) for c in answering)
    arrivals = arrivals[: plan.per_round]
    # At its deadline a round closes with enough answers, or waits until there are.
    taken = [(t, c) for i, (t, c) in enumerate(arrivals) if t <= deadline or i < plan.minimum]
    ends = taken[-1][0]
    if len(taken) < min(plan.per_round, len(asked)) and plan.deadline_s:
        ends = max(ends, deadline)  # it hopes for the others until then
    clients = tuple(sorted(c for _, c in taken))
    less = {client: epochs[client] for client in clients if client in epochs}
    return _Cohort(clients, len(asked), len(there), ends, less)


def _fitting(run: Simulation, clients: Sequence[int], seconds: float) -> dict[int, int]:
    """Of clients with too little time for all epochs, how many they have time for, if for one."""
    found = {}
    for client in clients:
        if run.duration(client) > seconds:
            whole = range(math.ceil(run.epochs) - 1, 0, -1)
            fit = next((k for k in whole if run.duration(client, k) <= seconds), None)
            if fit is not None:
                found[client] = fit
    return found
