# SPDX-License-Identifier: Apache-2.0
"""`Run`, `Device` and `Cluster`, blocking and for asyncio; with a real broker and real agents."""

import asyncio
import inspect
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.numpy import load_file

import fedml
from fedml import aio
from fedml.errors import BrokerRefused, ConfigError, NotLoggedIn, RunFailed
from tests.place import APP, Place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A broker with two agents."""
    with Place(tmp_path_factory.mktemp("place")) as place:
        place.agent("one")
        place.agent("two")
        yield place


@pytest.fixture
def home(place: Place, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the admin is logged in, as FEDML_HOME says."""
    monkeypatch.setenv("FEDML_HOME", str(place.folder / "me"))
    return place.folder / "me"


def _job(folder: Path, text: str) -> Path:
    (folder / "job.yaml").write_text(f"job: |\n  {text}\njob_name: mine\n")
    return folder / "job.yaml"


def _federated(folder: Path) -> Path:
    (folder / "app.py").write_text(APP)
    (folder / "run.yaml").write_text("app: app.py\nrounds: 2\nclients: {count: 1}\n")
    return folder / "run.yaml"


def _threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "fedml.aio"]


async def _no_threads_are_left() -> None:
    for thread in _threads():
        await asyncio.to_thread(thread.join, 10)
    assert _threads() == []


@pytest.mark.parametrize("name", ["Run", "Cluster", "Device"])
def test_both_kinds_have_the_same_methods_with_the_same_arguments(name: str) -> None:
    blocking, awaited = getattr(fedml, name), getattr(aio, name)
    verbs = [
        verb
        for verb, found in vars(blocking).items()
        if not verb.startswith("_") and verb != "of" and callable(getattr(blocking, verb))
        if not isinstance(found, property)
    ]
    assert "find" in verbs
    for verb in verbs:
        ours, theirs = getattr(blocking, verb), getattr(awaited, verb)
        assert list(inspect.signature(ours).parameters.values()) == list(
            inspect.signature(theirs).parameters.values()
        ), verb
        assert theirs.__doc__, verb


# ---------------------------------------------------------------------- blocking


@pytest.mark.usefixtures("home")
def test_a_job_is_submitted_read_and_waited_for(place: Place, tmp_path: Path) -> None:
    run = fedml.Run.submit(_job(tmp_path, "echo hello; exit 3"))
    assert "".join(run.logs(follow=True)) == "hello\n"
    assert (run.wait().state, run.exit_code, run.name, run.kind) == ("FAILED", 3, "mine", "launch")
    assert "exit code 3" in run.cause
    assert run.url == f"{place.client.url}/v1/runs/{run.id}"
    assert run.id in [found.id for found in fedml.Run.list()]
    assert fedml.Run.find(run.id, at=place.client).state == "FAILED"
    assert [line["text"] for line in run.log_lines("hel")["lines"]] == ["hello"]
    with pytest.raises(RunFailed, match="exit code 3"):
        run.wait(check=True)
    with pytest.raises(BrokerRefused, match="has no model"):
        run.download(tmp_path / "model")
    with pytest.raises(ConfigError, match="not a job"):
        fedml.Run.current()
    with pytest.raises(NotLoggedIn):
        fedml.Run.list(at=tmp_path)


@pytest.mark.usefixtures("home")
def test_a_federated_file_is_submitted_by_the_same_name(tmp_path: Path) -> None:
    run = fedml.Run.submit(_federated(tmp_path)).wait(check=True)
    assert (run.kind, len(run.metrics)) == ("federate", 3)
    assert len(next(r for r in fedml.Run.list() if r.id == run.id).metrics) == 3


@pytest.mark.usefixtures("home")
def test_machines_and_clusters_are_objects(tmp_path: Path) -> None:
    assert [device.name for device in fedml.Device.list()] == ["one", "two"]
    assert fedml.Device.find("two").status == "online"
    cluster = fedml.Cluster.create("lab", ["one"])
    run = fedml.Run.submit(_job(tmp_path, "echo"), cluster="lab").wait(check=True)
    assert run.details["tasks"][0]["device"] == fedml.Device.find("one").id
    assert [c.name for c in fedml.Cluster.list()] == ["lab"]
    assert cluster.stop().status == fedml.Cluster.find("lab").status == "stopped"
    assert cluster.start().autostop(5).refresh().devices == ["one"]
    assert cluster.kill() == []


# ---------------------------------------------------------------------- asyncio


@pytest.mark.usefixtures("home")
async def test_awaited_a_job_is_submitted_read_and_waited_for(tmp_path: Path) -> None:
    run = await aio.Run.submit(_job(tmp_path, "echo hello; exit 3"))
    assert [text async for text in run.logs(follow=True)] == ["hello\n"]
    assert (await run.wait()).state == "FAILED"
    assert (run.exit_code, run.name, run.ended) == (3, "mine", True)
    found = await aio.Run.find(run.id)
    assert found.cause == run.cause
    assert run.id in [one.id for one in await aio.Run.list()]
    assert len((await run.log_lines("hel"))["lines"]) == 1
    ends = [item async for item in run.follow() if "end" in item]
    assert len(ends) == 1
    with pytest.raises(RunFailed, match="exit code 3"):
        await run.wait(check=True)
    with pytest.raises(BrokerRefused, match="no such run"):
        await aio.Run.find("r-00000000")
    with pytest.raises(ConfigError, match="not a job"):
        await aio.Run.current()


@pytest.mark.usefixtures("home")
async def test_awaited_a_model_is_downloaded(tmp_path: Path) -> None:
    run = await aio.Run.submit(_federated(tmp_path))
    await run.wait(check=True)
    assert len(run.metrics) == 3
    assert await run.download(tmp_path / "model") == 2
    assert load_file(tmp_path / "model")["seen"].tolist() == [2.0]


@pytest.mark.usefixtures("home")
async def test_awaited_machines_and_clusters() -> None:
    assert [device.name for device in await aio.Device.list()] == ["one", "two"]
    assert (await aio.Device.find("one")).status == "online"
    cluster = await aio.Cluster.create("lab", ["one"])
    assert [c.name for c in await aio.Cluster.list()] == ["lab"]
    assert (await cluster.stop()).status == "stopped"
    assert (await (await cluster.start()).autostop(5)).status == "up"
    assert (await (await aio.Cluster.find("lab")).refresh()).devices == ["one"]
    assert await cluster.kill() == []


async def test_many_runs_are_waited_for_at_the_same_time(place: Place, tmp_path: Path) -> None:
    """More than the threads of asyncio's own pool."""
    file = _job(tmp_path, "true")
    client = place.client
    runs = [await aio.Run.submit(file, at=client) for _ in range(12)]
    ended = await asyncio.gather(*(run.wait(check=True) for run in runs))
    assert [run.state for run in ended] == ["FINISHED"] * 12


async def test_who_is_cancelled_leaves_no_thread_and_stops_no_run(
    place: Place, tmp_path: Path
) -> None:
    run = await aio.Run.submit(_job(tmp_path, "echo begun; sleep 600"), at=place.client)
    logs = run.logs(follow=True)
    assert await anext(logs) == "begun\n"
    waiting = [asyncio.ensure_future(run.wait()), asyncio.ensure_future(anext(logs))]
    await asyncio.sleep(0)  # both have begun
    assert len(_threads()) >= 2
    for one in waiting:
        one.cancel()
    await asyncio.wait(waiting)
    await _no_threads_are_left()
    assert not (await run.refresh()).ended
    await run.stop()
    assert (await run.wait()).state == "STOPPED"


async def test_an_abandoned_log_is_closed(place: Place, tmp_path: Path) -> None:
    run = await aio.Run.submit(_job(tmp_path, "echo begun; sleep 600"), at=place.client)
    async for text in (logs := run.logs(follow=True)):
        assert text == "begun\n"
        break
    await logs.aclose()
    await _no_threads_are_left()
    await run.stop()
