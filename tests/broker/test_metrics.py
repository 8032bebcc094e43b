# SPDX-License-Identifier: Apache-2.0
"""What Prometheus scrapes of a broker at work, and the files that name its metrics."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import urllib3
import yaml
from prometheus_client.parser import text_string_to_metric_families

from fedml import session
from fedml.workflows import WorkflowRun
from tests.place import Place

ROOT = Path(__file__).parents[2]
FILES = ROOT / "docs" / "prometheus"


class Scraper:
    """Asks a broker for its numbers."""

    def __init__(self, place: Place) -> None:
        self.place = place
        ca = str(place.home / "broker" / "identity" / "ca.pem")
        self._pool = urllib3.PoolManager(ca_certs=ca, retries=False, timeout=20)

    def ask(
        self, path: str = "/metrics", method: str = "GET", **headers: str
    ) -> urllib3.BaseHTTPResponse:
        return self._pool.request(method, self.place.client.url + path, headers=headers)

    def numbers(self) -> dict[str, float]:
        """Every sample, as ``name{label="value"}``."""
        response = self.ask()
        assert response.status == 200
        assert response.headers["Content-Type"].startswith("text/plain")
        found = {}
        for family in text_string_to_metric_families(response.data.decode()):
            for sample in family.samples:
                labels = ",".join(f'{k}="{v}"' for k, v in sample.labels.items())
                found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
        return found

    def bearer(self, name: str, tenant: str) -> str:
        """The token of a new viewer."""
        call = self.place.client.call
        call("POST", "/v1/users", {"name": name, "role": "viewer", "tenant": tenant})
        token = call("POST", f"/v1/users/{name}/tokens", {})["key"]
        return f"Bearer {session.login(self.place.folder / name, token).token}"


@pytest.fixture(scope="module")
def scraper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scraper]:
    """A broker with one machine that has run two workflows, a job and two rounds."""
    with Place(tmp_path_factory.mktemp("place")) as place:
        place.agent("one")
        for command in ("true", "false"):
            step = {"name": "only", "job": {"command": command}}
            asked = {"name": "flow", "steps": [step]}
            flow = place.client.call("POST", "/v1/workflows", asked)["workflow"]
            WorkflowRun.find(place.client, flow).wait()
        place.finishes(place.launch("true"))
        place.finishes(place.federate(rounds=2))
        yield Scraper(place)


def test_the_numbers_are_those_of_what_was_done(scraper: Scraper) -> None:
    found = scraper.numbers()
    assert found["fedml_broker_agents"] == found["fedml_broker_agents_online"] == 1
    assert found['fedml_broker_tasks_ended_total{state="FINISHED"}'] >= 3
    assert found['fedml_broker_tasks{state="QUEUED"}'] == 0
    assert found["fedml_broker_rounds_total"] == 2
    assert found["fedml_broker_wait_seconds_count"] == 3  # jobs, and no stages of federated runs
    assert 0 < found["fedml_broker_wait_seconds_sum"] < 30
    assert found["fedml_broker_workflows"] == 0
    for state, count in (("FINISHED", 1), ("FAILED", 1), ("STOPPED", 0)):
        assert found[f'fedml_broker_workflows_ended_total{{state="{state}"}}'] == count
    assert found["fedml_broker_aggregator_seconds_count"] >= 4
    assert found["fedml_broker_aggregator_seconds_sum"] > 0
    for way in ("in", "out"):
        assert found[f'fedml_broker_messages_total{{direction="{way}"}}'] >= 3
        assert found[f'fedml_broker_blob_bytes_total{{direction="{way}"}}'] > 500
    assert found["fedml_broker_store_commit_seconds_count"] > 10
    pieces = found["fedml_broker_store_batch_pieces_sum"]
    assert pieces >= found["fedml_broker_store_batch_pieces_count"]
    launched = 'fedml_broker_requests_total{method="POST",route="/v1/launch",status="2xx"}'
    assert found[launched] == 1
    assert found['fedml_broker_request_seconds_count{route="/v1/launch"}'] == 1
    assert found["fedml_broker_mqtt_connected"] == 1
    assert found["process_resident_memory_bytes"] > 1e6


def test_nobody_fills_the_memory_with_paths_and_methods_of_his_own(scraper: Scraper) -> None:
    before = set(scraper.numbers())
    for n in range(20):
        assert scraper.ask(f"/nowhere/{n}").status == 404
        scraper.ask("/v1/health", f"M{n}")
        scraper.ask(f"/v1/runs/r-{n:08}", Authorization="Bearer 00")
    new = [name for name in set(scraper.numbers()) - before if not name.endswith("_created")]
    assert len(new) < 60
    assert not [name for name in new if "nowhere" in name or "M1" in name or "r-0" in name]


def test_from_elsewhere_a_token_of_the_first_tenant_is_needed(scraper: Scraper) -> None:
    # A proxy on this machine passes on what comes from anywhere.
    for name in ("Forwarded", "X-Forwarded-For", "X-Real-IP", "Via"):
        assert scraper.ask(**{name: "192.0.2.1"}).status == 401
    ours = scraper.bearer("scraper", "default")
    assert scraper.ask(Authorization=ours, Via="a proxy").status == 200
    assert scraper.ask(Authorization=scraper.bearer("spy", "acme")).status == 403


@pytest.mark.parametrize("file", sorted(FILES.iterdir()), ids=lambda file: file.name)
def test_alerts_and_dashboard_name_metrics_that_there_are(scraper: Scraper, file: Path) -> None:
    text = file.read_text()
    expressions = (
        [t["expr"] for panel in json.loads(text)["panels"] for t in panel["targets"]]
        if file.suffix == ".json"
        else [r["expr"] for group in yaml.safe_load(text)["groups"] for r in group["rules"]]
    )
    there = {name.partition("{")[0] for name in scraper.numbers()}
    named = {
        name
        for expression in expressions
        for name in re.findall(r"\b(?:fedml_broker|process)_\w+", expression)
    }
    assert len(named) >= 6
    assert named <= there


def test_the_page_names_every_number_there_is(scraper: Scraper) -> None:
    page = (ROOT / "docs" / "prometheus.md").read_text()
    for name in scraper.numbers():
        bare = re.sub(r"_(bucket|sum|count|created)$", "", name.partition("{")[0])
        if bare.startswith("fedml_broker_"):
            assert f"`{bare.removeprefix('fedml_broker_')}" in page, bare
