# SPDX-License-Identifier: Apache-2.0
"""Rounds in a real store: what is written with each step is what a restarted broker reads."""

import asyncio
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from fedml_broker import rounds, runs, tasks
from fedml_broker.accounts import User
from fedml_broker.rounds import Kept, Round, Start, Tally
from fedml_broker.store import Store
from fedml_broker.tables import blob_refs, events
from fedml_broker.tasks import Task
from fedml_protocol.blob import Blob
from fedml_protocol.federate import StageKind, StageSpec
from fedml_protocol.tasks import Offer, Result, TaskState
from tests.fakes.messages import LAW

RUN = "r-12345678"


def blob(name: str) -> Blob:
    return Blob(sha256=name.encode().hex().rjust(64, "0"), size=len(name))


class Book:
    """A run's rounds, step by step; each step is a transaction."""

    def __init__(self, store: Store) -> None:
        self.store = store

    async def start(self) -> None:
        user = User("ann", "acme", "member")
        more: dict[str, Any] = {"kind": "federate", "name": "f", "spec": {}, "package": None}
        await self.store.write(lambda tx: runs.create(tx, user, run=RUN, **more))

    async def begin(self, number: int, *clients: int) -> None:
        await self.store.write(lambda tx: rounds.begin(tx, RUN, number, clients))

    async def finish(
        self, number: int, *, state: str = "", sent: str = "", **more: Any
    ) -> list[str]:
        """Model `m{number}`; the names of the blobs that are idle now."""
        facts: dict[str, Any] = {"metrics": {"loss": 0.5}, "tally": Tally(replies=2)}
        facts |= {"turns": [number], **more}
        idle = await self.store.write(
            lambda tx: rounds.finish(
                tx,
                RUN,
                number,
                Kept(
                    model=blob(f"m{number}"),
                    state=blob(state) if state else None,
                    sent=blob(sent) if sent else None,
                ),
                **facts,
            )
        )
        return [bytes.fromhex(sha).decode().strip("\0") for sha in idle]

    async def update(self, number: int, name: str) -> None:
        """A client's update has come."""
        owner = f"run/{RUN}/updates/{number}"
        await self.store.write(lambda tx: runs.refer(tx, blob(name).sha256, owner))

    async def load(self) -> list[Round]:
        return await self.store.read(lambda tx: rounds.load(tx, RUN))

    async def kept(self) -> set[str]:
        """What nobody may delete."""
        query = sa.select(blob_refs.c.sha256)
        hashes = await self.store.read(lambda tx: set(tx.execute(query).scalars()))
        return {bytes.fromhex(sha).decode().strip("\0") for sha in hashes}

    async def told(self, kind: str) -> list[dict[str, Any]]:
        query = sa.select(events.c.data).where(events.c.kind == kind).order_by(events.c.id)
        return await self.store.read(lambda tx: list(tx.execute(query).scalars()))


@pytest.fixture
async def book(tmp_path: Path) -> AsyncIterator[Book]:
    store = await asyncio.to_thread(Store.open, tmp_path / "broker.db")
    book = Book(store)
    await book.start()
    yield book
    await asyncio.to_thread(store.close)


def stage(number: int, client: int) -> Task:
    spec = StageSpec(
        session=RUN,
        kind=StageKind.TRAIN,
        round=number,
        client=client,
        clients=9,
        seed=1,
        app="app.py",
        model=blob("m0"),
    )
    return Task(
        offer=Offer(task=f"s-{number}-{client}", epoch=1, run=RUN, spec=spec),
        tenant="acme",
        tries_left=1,
        device=f"d-{client}",
        bound=True,
        round=number,
        client=client,
    )


async def test_a_restarted_broker_reads_where_it_was(book: Book) -> None:
    await book.begin(0)
    await book.finish(0, state="s0")
    await book.begin(1, 4, 7)
    await book.finish(1, state="s1", sent="x1")
    await book.begin(2, 4, 5)

    zero, one, two = await book.load()

    assert (zero.number, zero.done, zero.clients, zero.kept.sent) == (0, True, (), None)
    assert one == Round(
        number=1,
        clients=(4, 7),
        kept=Kept(model=blob("m1"), state=blob("s1"), sent=blob("x1")),
        done=True,
    )
    assert two == Round(number=2, clients=(4, 5), kept=Kept(model=None), done=False)
    assert await book.load() == [zero, one, two]
    assert await book.store.read(lambda tx: rounds.load(tx, "r-other")) == []


async def test_the_end_of_a_round_lets_go_of_what_made_it(book: Book) -> None:
    await book.begin(0)
    assert await book.finish(0, state="s0", sent="x0") == []
    await book.begin(1, 0, 1)
    for name in ("u1", "u2"):
        await book.update(1, name)
    assert await book.kept() == {"m0", "s0", "x0", "u1", "u2"}

    assert sorted(await book.finish(1, state="s1", sent="x1")) == ["s0", "u1", "u2", "x0"]

    # Every model stays; of the algorithm's own only the latest.
    assert await book.kept() == {"m0", "m1", "s1", "x1"}


async def test_a_turn_of_groups_is_read_back_and_goes_with_the_next_one(book: Book) -> None:
    await book.begin(0)
    await book.finish(0)
    await book.begin(1, 0, 1)
    for turn in (1, 2):
        await book.update(turn, f"u{turn}")
        kept = Kept(
            model=None,
            state=blob(f"s{turn}"),
            groups={g: Start(model=blob(f"g{g}t{turn}"), sent=blob(f"x{turn}")) for g in (0, 3)},
        )
        more: dict[str, Any] = {"stage": turn, "clients": (0, 1), "turn": turn}
        await book.store.write(
            lambda tx, more=more, kept=kept: rounds.stage_done(tx, RUN, 1, kept=kept, **more)
        )
        assert (await book.load())[1] == Round(
            number=1, clients=(0, 1), kept=kept, done=False, stage=turn
        )
        assert await book.kept() == {"m0", f"s{turn}", f"g0t{turn}", f"g3t{turn}", f"x{turn}"}
    await book.finish(1, turns=[3])
    assert await book.kept() == {"m0", "m1"}


async def test_bytes_that_somebody_else_still_needs_are_not_let_go(book: Book) -> None:
    await book.begin(0)
    await book.finish(0, state="same")
    await book.begin(1, 0)
    await book.update(1, "u1")
    await book.update(2, "u1")  # an update of another round with the very same bytes
    assert await book.finish(1, state="same") == []
    assert await book.kept() == {"m0", "m1", "same", "u1"}


async def test_rounds_of_similar_numbers_are_kept_apart(book: Book) -> None:
    for number in (1, 10, 11):
        await book.update(number, f"u{number}")
    await book.begin(1, 0)
    assert await book.finish(1) == ["u1"]
    assert await book.kept() == {"m1", "u10", "u11"}


async def test_a_round_begins_once(book: Book) -> None:
    await book.begin(1, 0)
    with pytest.raises(sa.exc.IntegrityError):
        await book.begin(1, 0)
    assert len(await book.told("round_begins")) == 1


async def test_each_step_is_told_with_its_numbers(book: Book) -> None:
    await book.begin(1, 3, 4)
    await book.finish(1, tally=Tally(replies=2, refused=1, received_bytes=99))
    assert await book.told("round_begins") == [{"round": 1, "clients": 2}]
    (end,) = await book.told("round_ends")
    assert end == {
        "round": 1,
        "metrics": {"loss": 0.5},
        "model": blob("m1").sha256,
        "replies": 2,
        "refused": 1,
        "received_bytes": 99,
    }


async def test_metrics_that_come_later_join_those_that_are_there(book: Book) -> None:
    await book.begin(1, 0)
    await book.finish(1)
    await book.store.write(lambda tx: rounds.add_metrics(tx, RUN, 1, {"accuracy": 0.9}))
    await book.store.write(lambda tx: rounds.add_metrics(tx, RUN, 1, {}))
    (row,) = await runs.Runs(book.store).rounds(RUN)
    assert row["metrics"] == {"loss": 0.5, "accuracy": 0.9}
    assert await book.told("metrics") == [{"round": 1, "metrics": {"accuracy": 0.9}}]


async def test_who_has_not_answered_is_stopped_and_who_has_is_read(book: Book) -> None:
    stages = [stage(1, n) for n in range(3)] + [stage(2, 0)]
    await book.store.write(lambda tx: tasks.insert(tx, stages))
    result = Result(task="s-1-1", epoch=1, state=TaskState.FINISHED, weight=5)
    await book.store.write(lambda tx: tasks.offered(tx, "s-1-0", 1, "d-0"))
    await book.store.write(lambda tx: tasks.offered(tx, "s-1-1", 1, "d-1"))
    assert await book.store.write(lambda tx: tasks.ended(tx, "d-1", result))

    stopped = await book.store.write(lambda tx: rounds.stop_waiting(tx, RUN, 1))

    assert sorted(stopped) == ["s-1-0", "s-1-2"]
    assert await book.store.read(lambda tx: tasks.results(tx, RUN, 1)) == [(1, "d-1", result)]
    assert await book.store.read(lambda tx: tasks.results(tx, RUN, 1, known=[1])) == []
    left = await book.store.read(tasks.load_open)
    assert [task.id for task in left] == ["s-2-0"]
    late = Result(task="s-1-0", epoch=1, state=TaskState.FINISHED)
    assert not await book.store.write(lambda tx: tasks.ended(tx, "d-0", late))


async def test_clients_keep_their_devices_for_the_whole_run(book: Book) -> None:
    await book.store.write(lambda tx: rounds.set_clients(tx, RUN, ["d-b", "d-a"]))
    assert await runs.Runs(book.store).clients(RUN) == {0: "d-b", 1: "d-a"}
    with pytest.raises(sa.exc.IntegrityError):
        await book.store.write(lambda tx: rounds.set_clients(tx, RUN, ["d-c"]))


async def test_a_run_that_is_removed_leaves_nothing(book: Book) -> None:
    await book.begin(0)
    await book.finish(0, state="s0")
    await book.store.write(lambda tx: tasks.insert(tx, [stage(1, 0)]))
    idle = await book.store.write(lambda tx: runs.remove(tx, RUN, "ann"))
    assert len(idle) == 2
    assert await book.kept() == set()
    assert await book.load() == []
    assert await book.store.read(tasks.load_open) == []
    assert await book.told("round_ends") == []


# ---------------------------------------------------------------------- metrics of many clients


def test_metrics_are_averaged_by_the_examples_that_they_stand_for() -> None:
    reports = [
        {"eval.examples": 10, "eval.accuracy": 0.5, "train.loss": 7.0},
        {"eval.examples": 30, "eval.accuracy": 0.9, "eval.loss": 2.0},
        {"train.loss": 3.0},
    ]
    assert rounds.mean_metrics(reports, "eval.") == pytest.approx(
        {"accuracy": 0.8, "loss": 2.0, "examples": 40}
    )
    assert rounds.mean_metrics(reports, "other.") == {}
    assert rounds.mean_metrics([{"eval.accuracy": 1.0}], "eval.") == {}  # of nothing
    empty = {"eval.examples": 0, "eval.accuracy": math.nan}
    assert rounds.mean_metrics([empty, reports[0]], "eval.") == {"accuracy": 0.5, "examples": 10}


@LAW
@given(
    values=st.lists(
        st.tuples(st.integers(1, 100), st.floats(-10, 10, allow_nan=False)), min_size=1, max_size=8
    )
)
def test_a_mean_lies_between_what_it_is_made_of(values: list[tuple[int, float]]) -> None:
    reports = [{"e.examples": n, "e.loss": x} for n, x in values]
    mean = rounds.mean_metrics(reports, "e.")
    losses = [x for _, x in values]
    assert min(losses) - 1e-9 <= mean["loss"] <= max(losses) + 1e-9
    assert mean["examples"] == sum(n for n, _ in values)
