# SPDX-License-Identifier: Apache-2.0
"""The outbox with a real journal and a clock moved by hand: when what is owed is sent again."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from fedml_agent.errors import BrokerUnreachable
from fedml_agent.journal import Entry, Journal
from fedml_agent.link import LinkDown
from fedml_agent.outbox import WINDOW, FilesSpoilt, Outbox
from fedml_protocol.errors import MalformedMessage
from fedml_protocol.launch import LaunchSpec
from fedml_protocol.tasks import Offer, Result, TaskState
from tests.fakes.standing_time import StandingTime, turns


class Desk:
    """An outbox, the journal that it reads, and where its results and files go."""

    def __init__(self, folder: Path) -> None:
        self.time = StandingTime()
        self.journal = Journal(folder / "journal.db")
        self.said: list[tuple[float, str]] = []
        self.lost: list[tuple[str, str]] = []
        self.trouble: dict[str, Exception] = {}
        self.slow: dict[str, asyncio.Event] = {}
        self.outbox = Outbox(self, self.journal, self.upload, self.lose)  # type: ignore[arg-type]
        self.serving = asyncio.create_task(self.outbox.serve())
        self._counter = 0

    def _note(self, what: str) -> None:
        self.said.append((self.time.now() - 1000, what))

    async def upload(self, entry: Entry, *, again: bool) -> None:
        name = entry.key[0]
        self._note(f"files {name}{' again' if again else ''}")
        if name in self.slow:
            await self.slow[name].wait()
        if (error := self.trouble.get(f"files {name}")) is not None:
            raise error

    async def task(self, body: Any) -> None:
        self._note(body.task)
        if (held_back := self.slow.get(f"result {body.task}")) is not None:
            await held_back.wait()
        if (error := self.trouble.get(body.task)) is not None:
            raise error

    def lose(self, entry: Entry, why: str) -> None:
        self.lost.append((entry.key[0], why))
        self.journal.end(entry, Result(task=entry.key[0], epoch=1, state=TaskState.LOST))

    async def ends(self, name: str) -> Entry:
        """A task ends; its result is owed."""
        self._counter += 1
        offer = Offer(task=name, epoch=1, run="r-1", spec=LaunchSpec(command="true"))
        entry = Entry(offer=offer, counter=self._counter, state=TaskState.RUNNING)
        self.journal.add(entry)
        self.journal.end(entry, Result(task=name, epoch=1, state=TaskState.FINISHED))
        self.outbox.new(entry)
        await turns()
        return entry

    def sent(self, name: str) -> list[float]:
        """When a result was sent."""
        return [at for at, what in self.said if what == name]


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    desk = Desk(tmp_path)
    await turns()
    yield desk
    desk.serving.cancel()
    await turns()
    desk.journal.close()


async def test_files_go_first_and_the_result_until_it_is_confirmed(desk: Desk) -> None:
    await desk.ends("t-1")
    await desk.time.pass_by(200)
    assert desk.said[:4] == [(0, "files t-1"), (0, "t-1"), (5, "files t-1 again"), (5, "t-1")]
    assert desk.sent("t-1") == [0, 5, 15, 35, 75, 155]  # the pause doubles
    desk.journal.confirm("t-1", 1)
    desk.outbox.confirmed(("t-1", 1))
    await desk.time.pass_by(500)
    assert len(desk.sent("t-1")) == 6


async def test_a_pause_grows_to_two_minutes(desk: Desk) -> None:
    await desk.ends("t-1")
    await desk.time.pass_by(1000)
    sent = desk.sent("t-1")
    assert sent[-1] - sent[-2] == 120


async def test_a_new_connection_sends_everything_at_once(desk: Desk) -> None:
    desk.trouble["t-1"] = LinkDown("away")
    await desk.ends("t-1")
    await desk.time.pass_by(100)
    desk.trouble.clear()
    desk.outbox.again()
    await turns()
    assert desk.sent("t-1")[-1] == 100
    await desk.time.pass_by(5)
    assert desk.sent("t-1")[-1] == 105  # from the first pause on


async def test_a_slow_upload_holds_no_other_result_and_is_not_begun_twice(desk: Desk) -> None:
    desk.slow["slow"] = asyncio.Event()
    await desk.ends("slow")
    await desk.ends("quick")
    await desk.time.pass_by(300)
    assert desk.sent("slow") == []
    assert desk.sent("quick")[0] == 0
    assert [what for _, what in desk.said].count("files slow") == 1
    desk.slow["slow"].set()
    await turns()
    assert desk.sent("slow") == [300]


async def test_spoilt_files_make_it_the_result_of_a_lost_task(desk: Desk) -> None:
    desk.trouble["files t-1"] = FilesSpoilt("model is gone")
    await desk.ends("t-1")
    assert desk.lost[0] == ("t-1", "model is gone")


async def test_an_unreachable_broker_is_asked_again_at_a_steady_pace(desk: Desk) -> None:
    desk.trouble["files t-1"] = BrokerUnreachable("nobody answers")
    await desk.ends("t-1")
    await desk.time.pass_by(12)
    assert desk.sent("t-1") == []
    assert len(desk.said) >= 4
    desk.trouble.clear()
    await desk.time.pass_by(5)
    assert desk.sent("t-1")


@pytest.mark.parametrize("error", [MalformedMessage("too large"), RuntimeError("a bug")])
async def test_what_can_never_be_sent_is_not_tried_again_and_holds_nobody(
    desk: Desk, error: Exception
) -> None:
    desk.trouble["dead"] = error
    await desk.ends("dead")
    await desk.ends("alive")
    await desk.time.pass_by(100)
    assert desk.sent("dead") == [0]
    assert len(desk.sent("alive")) > 3


@pytest.mark.parametrize("slow", ["", "result "])
async def test_no_more_than_the_window_is_on_its_way_and_the_oldest_goes_first(
    desk: Desk, slow: str
) -> None:
    """`slow`: whether files take their time, or the broker's word that it has the message."""
    names = [f"t-{n:02}" for n in range(3 * WINDOW)]
    for name in names:
        desk.slow[slow + name] = asyncio.Event()
    for name in names:
        await desk.ends(name)
    await desk.time.pass_by(300)

    def begun() -> list[str]:
        return [what.removeprefix("files ") for _, what in desk.said if "files" in what]

    assert begun() == names[:WINDOW]
    # They get through one after the other, the third first: each makes room for the next.
    through = [names[2], *names[:2], *names[3:]]
    for n, name in enumerate(through):
        desk.slow[slow + name].set()
        await turns()
        desk.journal.confirm(name, 1)
        desk.outbox.confirmed((name, 1))
        assert begun() == names[: WINDOW + n + 1]
    results = [what for _, what in desk.said if "files" not in what]
    assert results == (names if slow else through)


async def test_after_a_cut_they_go_again_in_their_order_a_window_at_a_time(desk: Desk) -> None:
    names = [f"t-{n:02}" for n in range(2 * WINDOW + 5)]
    for name in names:
        desk.trouble[name] = LinkDown("away")
        await desk.ends(name)
    desk.trouble.clear()
    desk.said.clear()
    desk.outbox.again()
    await turns()
    assert [what for _, what in desk.said if "files" not in what] == names
