# SPDX-License-Identifier: Apache-2.0
"""MLflow's own client logs to our broker; it lives in an environment of its own, made once.

Its dependencies are heavy and pin what ours leave open, so it is no dependency of the tests.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest
import urllib3

from fedml import session
from tests.place import Place

VERSION = "3.17.2"
SCRIPT = Path(__file__).parent / "mlflow" / "client.py"


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with Place(tmp_path) as place:
        yield place


def _environment() -> Path:
    """The Python of an environment with mlflow-skinny."""
    python = Path(tempfile.gettempdir()) / f"fedml-tests-mlflow-{VERSION}" / "bin" / "python"
    ready = python.parent.parent / "ready"
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", python.parent.parent], check=True)
        wanted = f"mlflow-skinny=={VERSION}"
        subprocess.run([python, "-m", "pip", "install", "--quiet", wanted], check=True)
        ready.touch()
    return python


@pytest.mark.long
@pytest.mark.timeout(300)
def test_an_unmodified_mlflow_client_logs_and_reads_here(place: Place) -> None:
    me = session.load(place.folder / "me")
    python = _environment()
    done = subprocess.run(
        [python, SCRIPT],
        env={
            **os.environ,
            "MLFLOW_TRACKING_URI": me.url,
            "MLFLOW_TRACKING_TOKEN": me.token,
            "MLFLOW_TRACKING_SERVER_CERT_PATH": str(place.home / "broker/identity/ca.pem"),
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        },
        cwd=place.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run = done.stdout.splitlines()[-1]
    shown = place.client.call("GET", f"/v1/runs/{run}")
    assert (shown["kind"], shown["name"], shown["state"]) == ("tracked", "first", "FINISHED")
    series = place.client.call("GET", f"/v1/runs/{run}/metrics")["series"]
    assert {s["name"]: s["count"] for s in series} == {"loss": 10, "auc": 1, "odd": 1, "late": 1}


class Mlflow:
    """The API as it goes over the wire."""

    def __init__(self, place: Place) -> None:
        me = session.load(place.folder / "me")
        self._url = f"{me.url}/api/2.0"
        self._headers = {"Authorization": f"Bearer {me.token}"}
        self._pool = urllib3.PoolManager(ssl_context=me.context(), retries=False)

    def __call__(self, method: str, path: str, **body: object) -> tuple[int, dict[str, object]]:
        url, data = f"{self._url}/mlflow/{path}", json.dumps(body).encode()
        if method == "GET":
            answer = self._pool.request("GET", f"{url}?{urlencode(body)}", headers=self._headers)
        else:
            answer = self._pool.request(method, url, body=data, headers=self._headers)
        return answer.status, json.loads(answer.data)

    def put(self, path: str, data: bytes) -> int:
        url = f"{self._url}/mlflow-artifacts/artifacts/{path}"
        return self._pool.request("PUT", url, body=data, headers=self._headers).status


def test_refusals_have_the_shape_that_mlflow_clients_read(place: Place) -> None:
    flow = Mlflow(place)
    status, said = flow("GET", "experiments/get-by-name", experiment_name="none")
    assert (status, said["error_code"]) == (404, "RESOURCE_DOES_NOT_EXIST")
    assert flow("POST", "experiments/create", name="trees") == (200, {"experiment_id": "1"})
    status, said = flow("POST", "experiments/create", name="trees")
    assert (status, said["error_code"]) == (400, "RESOURCE_ALREADY_EXISTS")
    for path, body in (
        ("experiments/create", {"name": ""}),
        ("experiments/create", {"name": "x", "tags": [7]}),
        ("experiments/update", {"experiment_id": "1"}),
        ("runs/create", {"experiment_id": "x"}),
        ("runs/search", {"experiment_ids": ["1"], "filter": "metrics.loss <"}),
        ("runs/search", {"experiment_ids": ["1"], "page_token": "x"}),
    ):
        status, said = flow("POST", path, **body)
        assert (status, said["error_code"]) == (400, "INVALID_PARAMETER_VALUE"), (path, body)
    status, said = flow("POST", "runs/log-metric", run_id="r-nothing00", key="a", value=1)
    assert (status, said["error_code"]) == (404, "RESOURCE_DOES_NOT_EXIST")


def test_a_repeated_batch_counts_once_and_files_stay_below_their_run(place: Place) -> None:
    flow = Mlflow(place)
    _, said = flow("POST", "runs/create", experiment_id="0")
    run = said["run"]["info"]["run_id"]  # type: ignore[index]
    batch = [{"key": "a", "value": 1.5, "step": n, "timestamp": 1000} for n in range(3)]
    for _ in range(2):
        assert flow("POST", "runs/log-batch", run_id=run, metrics=batch)[0] == 200
    _, said = flow("GET", "metrics/get-history", run_id=run, metric_key="a")
    assert len(said["metrics"]) == 3  # type: ignore[arg-type]
    assert flow.put(f"0/{run}/artifacts/a/b.txt", b"here") == 200
    assert flow.put(f"0/{run}/artifacts/a/%2E%2E/b.txt", b"there") == 400
    assert flow.put(f"0/{run}/elsewhere/b.txt", b"there") == 400
    found = place.client.call("GET", f"/v1/runs/{run}/artifacts")["artifacts"]
    assert [(a["name"], a["size"], a["here"]) for a in found] == [("a/b.txt", 4, True)]
    assert flow("POST", "runs/log-parameter", run_id=run, key="lr", value="1")[0] == 200
    assert flow("POST", "runs/log-parameter", run_id=run, key="lr", value="2")[0] == 400


def test_what_runs_record_is_sent_on_and_a_killed_broker_sends_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The MLflow server is a second broker of ours."""
    for name in ("there", "here"):
        (tmp_path / name).mkdir()
    with Place(tmp_path / "there") as there:
        other = session.load(there.folder / "me")
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", other.token)
        ca = there.home / "broker/identity/ca.pem"
        monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(ca))
        with Place(tmp_path / "here", more=["--forward-mlflow", other.url]) as here:
            run = "r-forwarded"
            here.client.call("POST", "/v1/tracked", {"run": run, "name": "mine"})
            offset = _record(here, run, 0, range(1500))
            _until_counted(there, 1500)
            there.broker.kill()
            offset = _record(here, run, offset, range(1500, 2000))
            here.broker.kill()
            there.start_broker()
            here.start_broker()
            _record(here, run, offset, range(2000, 2100))
            here.client.call("POST", f"/v1/runs/{run}/end", {"state": "FINISHED"})
            _until_counted(there, 2100)
            while there.query("SELECT state FROM runs")[0][0] != "FINISHED":
                there.wait(0.05)
        assert there.query("SELECT count(DISTINCT step), count(*) FROM metrics") == [(2100, 2100)]
        assert there.query("SELECT name, value FROM params") == [("lr", "0.1")]
        assert there.query("SELECT name FROM runs") == [("mine",)]


def _record(place: Place, run: str, offset: int, steps: range) -> int:
    lines = [{"kind": "params", "at": 1.0, "params": {"lr": "0.1"}}]
    lines += [{"kind": "metrics", "at": 1.0, "step": n, "metrics": {"a": n}} for n in steps]
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    return place.client.put_records(run, offset, data)


def _until_counted(place: Place, count: int) -> None:
    while place.query("SELECT count(*) FROM metrics")[0][0] < count:
        place.wait(0.05)
