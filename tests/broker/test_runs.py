# SPDX-License-Identifier: Apache-2.0
"""Submissions to a whole broker in this process, two at the same moment."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp.test_utils import make_mocked_request

from fedml_broker.accounts import User
from fedml_broker.api.call import Call
from fedml_broker.api.runs import Handlers
from fedml_broker.app import Broker, Settings
from fedml_broker.federate import FederateRequest
from fedml_broker.fleet import Machine
from fedml_broker.launch import LaunchRequest
from fedml_broker.match import Capacity
from fedml_broker.problems import Problem
from fedml_broker.tables import DEFAULT_TENANT
from fedml_protocol.package import Package
from fedml_protocol.topics import Address

RUN = "r-0123456789"
ANN = User(name="ann", tenant=DEFAULT_TENANT, role="member")


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    settings = Settings(home=tmp_path, https_port=0, mqtt_port=0, disk_reserve_bytes=0)
    async with Broker.running(settings) as broker:
        room = Capacity(slots=1, cpus=1, memory_bytes=1 << 30, disk_bytes=1 << 30)
        address = Address(DEFAULT_TENANT, "one")
        broker.fleet.put(Machine(address=address, name="one", labels={}, capacity=room))
        yield broker


async def _request(broker: Broker, word: str) -> Any:
    if word == "launch":
        return LaunchRequest(command="true", run=RUN)
    package = await broker.blobs.add(Package().manifest(), owner="u/ann")
    asked = {
        "run": RUN,
        "app": "app.py",
        "package": {"sha256": package.sha256, "size": package.size},
        "clients": {"count": 1},
        "rounds": 1,
    }
    return msgspec.convert(asked, FederateRequest)


async def _ask(broker: Broker, request: Any) -> Any:
    api = Handlers(broker)
    route = api.launch if isinstance(request, LaunchRequest) else api.federate
    return await route(Call(make_mocked_request("POST", "/v1/launch"), request, ANN))


async def _at_once(broker: Broker, monkeypatch: pytest.MonkeyPatch, *requests: Any) -> list[Any]:
    """The answers to requests that have all looked into the store before one writes to it."""
    write, looked = broker.store.write, asyncio.Barrier(len(requests))
    asking = {asyncio.create_task(_ask(broker, request)) for request in requests}

    async def together(work: Any) -> Any:
        if asyncio.current_task() in asking:
            await looked.wait()
        return await write(work)

    with monkeypatch.context() as patch:
        patch.setattr(broker.store, "write", together)
        return await asyncio.gather(*asking, return_exceptions=True)


@pytest.mark.parametrize("word", ["launch", "federate"])
async def test_two_equal_submissions_at_the_same_moment_start_one_run(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    request = await _request(broker, word)
    answers = await _at_once(broker, monkeypatch, request, request)
    assert answers == [{"run": RUN}] * 2
    assert [run["id"] for run in await broker.runs.newest(DEFAULT_TENANT)] == [RUN]
    if word == "launch":
        assert len(broker.dispatcher.of_run(RUN)) == len(await broker.runs.tasks(RUN)) == 1
    assert await _ask(broker, request) == {"run": RUN}  # and ever after


async def test_of_two_different_submissions_with_one_id_one_is_refused(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [LaunchRequest(command=text, run=RUN) for text in ("true", "false")]
    answers = await _at_once(broker, monkeypatch, *requests)
    assert {"run": RUN} in answers
    (refusal,) = (a for a in answers if isinstance(a, Problem))
    assert (refusal.status, refusal.title) == (409, "this run's id is taken")
    assert len(broker.dispatcher.of_run(RUN)) == 1


async def test_runs_are_found_by_name_state_and_user_and_paged_through(broker: Broker) -> None:
    for i in range(5):
        request = LaunchRequest(command="true", name=f"trial_{i}", run=f"r-{i:010d}")
        await broker.launcher.submit(ANN, request)
    await broker.dispatcher.stop_run("r-0000000003", "by hand")

    async def found(**which: Any) -> list[str]:
        return [row["id"][-1] for row in await broker.listed(DEFAULT_TENANT, **which)]

    assert await found(limit=2) == ["4", "3"]
    assert await found(limit=2, before="r-0000000003") == ["2", "1"]
    assert await found(states=["QUEUED"]) == ["4", "2", "1", "0"]
    assert await found(states=["STOPPED", "QUEUED"], name="l_3") == ["3"]
    assert await found(name="%") == [], "no wildcards"
    assert await found(name="r-0000000002") == ["2"]
    assert await found(user="bob") == []
    assert await broker.listed("another") == []
    assert await broker.runs.counts(DEFAULT_TENANT) == {"QUEUED": 4, "STOPPED": 1}
