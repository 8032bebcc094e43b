# SPDX-License-Identifier: Apache-2.0
"""The agent's numbers, over a real port and in a real file."""

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from fedml_agent.daemon import Daemon
from fedml_agent.home import Home
from fedml_agent.metrics import Metrics
from fedml_broker.identity import Identity
from fedml_protocol.tasks import TaskState
from tests.agent.test_daemon import Broker
from tests.fakes.https_server import HttpsServer
from tests.fakes.nvml import FakeGpu, FakeNvml

ROOT = Path(__file__).parents[2]


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Daemon]:
    """An agent that was never served: its broker is not there."""
    identity = Identity.open(tmp_path / "identity", names=["localhost"])
    with HttpsServer(identity) as server:
        Broker(server, Home(tmp_path), identity)
        daemon = Daemon(Home(tmp_path), "0.0")
        yield daemon
        daemon.journal.close()


def numbers(text: str) -> dict[str, float]:
    """As Prometheus' own parser reads them."""
    return {
        "".join(
            [sample.name, *(f" {k}={v}" for k, v in sorted(sample.labels.items()))]
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def fetch(port: int, path: str = "/metrics") -> tuple[str, str]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    return head.splitlines()[0], body


async def test_a_scraper_gets_the_state_of_agent_and_machine(daemon: Daemon) -> None:
    daemon.ended_tasks[TaskState.FAILED] += 2
    daemon.journal.set_shipped("t", 1, "stdout", 1000)
    daemon.journal.set_shipped("t", 1, "stdout", 1500)
    daemon.journal.set_shipped("t", 1, "stdout", 1500)
    metrics = Metrics(daemon, port=0, file=None)
    async with metrics.serving():
        assert metrics.port
        status, body = await fetch(metrics.port)
        assert (await fetch(metrics.port, "/"))[0] == "HTTP/1.1 404 Not Found"
    found = numbers(body)
    assert status == "HTTP/1.1 200 OK"
    assert found["fedml_agent_link_up"] == 0
    assert found["fedml_agent_tasks state=RUNNING"] == 0
    assert found["fedml_agent_tasks_ended_total state=FAILED"] == 2
    assert found["fedml_agent_log_bytes_total"] == 1500
    assert found["fedml_agent_disk_free_bytes"] > 0
    assert found["fedml_agent_memory_available_bytes"] > 0
    with pytest.raises(ConnectionRefusedError):
        await fetch(metrics.port)


async def test_it_listens_on_loopback_and_nowhere_else(daemon: Daemon) -> None:
    metrics = Metrics(daemon, port=0, file=None)
    async with metrics.serving():
        assert metrics._server is not None
        assert [s.getsockname()[0] for s in metrics._server.sockets] == ["127.0.0.1"]


async def test_the_file_is_there_at_once_whole_and_goes_with_the_agent(
    daemon: Daemon, tmp_path: Path
) -> None:
    file = tmp_path / "fedml.prom"
    async with Metrics(daemon, port=None, file=file).serving():
        assert numbers(file.read_text())["fedml_agent_link_up"] == 0
        assert file.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.glob("*fedml.prom*")) == []


async def test_gpus_are_told_and_what_they_do_not_say_is_left_out(daemon: Daemon) -> None:
    silent = {"nvmlDeviceGetPowerUsage": "NOT_SUPPORTED"}
    daemon.nvml = FakeNvml([FakeGpu(uuid="GPU-1", fails=silent), FakeGpu(uuid="GPU-2", lost=True)])
    found = numbers(await Metrics(daemon, port=None, file=None).page())
    assert found["fedml_agent_gpu_temperature_celsius gpu=0 uuid=GPU-1"] > 0
    assert not [name for name in found if "watts" in name]
    faults = {name: value for name, value in found.items() if "fault" in name}
    assert sorted(faults.values()) == [0, 1]


def _names(file: Path) -> set[str]:
    return set(re.findall(r"\bfedml_agent_\w+", file.read_text()))


async def test_alerts_dashboard_and_page_name_the_numbers_that_there_are(daemon: Daemon) -> None:
    there = set(
        re.findall(r"^# TYPE (\w+)", await Metrics(daemon, port=None, file=None).page(), re.M)
    )
    rules = yaml.safe_load((ROOT / "docs/prometheus/alerts.yml").read_text())["groups"]
    assert [group["name"] for group in rules] == ["fedml-broker", "fedml-agent"]
    for name in ("alerts.yml", "dashboard.json"):
        used = _names(ROOT / "docs/prometheus" / name)
        assert len(used) >= 5
        assert used <= there
    page = (ROOT / "docs/prometheus.md").read_text()
    for name in there:
        assert f"`{name.removeprefix('fedml_agent_')}" in page, name
