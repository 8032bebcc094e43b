# SPDX-License-Identifier: Apache-2.0
"""Services on a real broker with two machines: when they answer, where, and what ends them."""

import json
import socket
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedml import Run
from fedml.workflow import ModelDeployJob, ModelInferenceJob, Workflow
from fedml.workflows import WorkflowRun, resume, submit
from tests.end_to_end.test_workflow import fedml
from tests.place import Place

# Answers GET /ready with 200 while the file of its first argument is there, POST /predict with the
# sum of what it gets.
SERVER = """
import http.server, json, os, pathlib, sys

class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if pathlib.Path(sys.argv[1]).exists() else 503)
        self.end_headers()
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = json.dumps({"sum": sum(asked["x"]), "by": sys.argv[2]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

http.server.ThreadingHTTPServer(("", int(os.environ["PORT"])), Answer).serve_forever()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with Place(tmp_path_factory.mktemp("place")) as place:
        place.agent("one")
        place.agent("two")
        yield place


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A workspace with the server."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code/serve.py").write_text(SERVER)
    return tmp_path


def job(folder: Path, ready: Path, *, by: str = "first", name: str = "serve.yaml") -> Path:
    """The file of a service that is ready as soon as a file is there."""
    file = folder / name
    file.write_text(
        f"job_type: serve\nworkspace: code\nservice: {{readiness_probe: /ready}}\n"
        f"job: exec {sys.executable} serve.py {ready} {by}\n"
    )
    return file


def ask(url: str, *numbers: int) -> Any:
    body = json.dumps({"x": numbers}).encode()
    with urllib.request.urlopen(urllib.request.Request(f"{url}/predict", body)) as answer:
        return json.load(answer)


def answers(place: Place, run: str) -> str:
    """Wait until a service answers; where."""
    item = place.until(run, lambda item: item.get("event", {}).get("kind") == "answers")
    return str(item["event"]["data"]["url"])


def kinds(place: Place, run: str) -> list[str]:
    """The events of a run so far."""
    items = place.client.follow(run, logs=False, stay=False)
    return [item["event"]["kind"] for item in items if "event" in item]


def test_a_service_answers_once_it_is_ready_and_until_it_is_stopped(
    place: Place, code: Path
) -> None:
    ready = code / "ready"
    run = fedml(place, "launch", str(job(code, ready)), "--detach").stdout.strip()
    place.until(run, lambda item: item.get("event", {}).get("kind") == "started")
    found = Run.find(run, at=place.client)
    assert (found.endpoint, found.outputs) == (None, {})
    ready.touch()
    url = answers(place, run)
    assert ask(url, 1, 2) == {"sum": 3, "by": "first"}
    assert found.refresh().endpoint == url
    assert found.outputs["url"] == url
    assert url in fedml(place, "run", "status", run).stderr
    assert url in fedml(place, "run", "show", run).stdout
    assert json.loads(fedml(place, "run", "status", run, "--json").stdout)["endpoint"]["url"] == url
    fedml(place, "run", "stop", run)
    assert place.end(run)["state"] == "STOPPED"
    assert found.refresh().endpoint is None
    with pytest.raises(OSError, match="refused"):
        ask(url, 1)


def test_who_follows_a_service_is_told_where_it_answers(place: Place, code: Path) -> None:
    (code / "ready").touch()
    file = job(code, code / "ready")
    file.write_text(file.read_text().replace("exec", "timeout 5"))
    done = fedml(place, "launch", str(file), code=124)
    assert "it answers at http://" in done.stderr


def test_a_service_that_is_not_ready_in_time_has_failed(place: Place) -> None:
    run = place.launch("sleep 600", service={"path": "/ready", "within_s": 0.3})
    end = place.end(run)
    assert end["state"] == "FAILED"
    assert "not ready within 0.3 s" in end["cause"]["message"]
    assert "$PORT" in end["cause"]["hint"]


def test_a_taken_port_is_the_machines_fault_and_named(place: Place) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        end = place.end(place.launch("sleep 600", service={"port": port}, retries=0))
    assert end["state"] == "LOST"
    assert f"port {port} is in use on this machine" in end["cause"]["message"]


def test_an_agent_and_a_broker_that_die_leave_a_service_answering(place: Place, code: Path) -> None:
    (code / "ready").touch()
    file = job(code, code / "ready")
    run = fedml(place, "launch", str(file), "--detach").stdout.strip()
    url = answers(place, run)
    device = Run.find(run, at=place.client).details["endpoint"]["name"]
    place.agents[device].kill()
    place.broker.kill()
    assert ask(url, 4) == {"sum": 4, "by": "first"}
    place.start_broker()
    place.agents[device].start()
    other = place.launch("true", labels={})
    place.finishes(other)
    assert Run.find(run, at=place.client).endpoint == url
    told = kinds(place, run)
    assert [told.count(kind) for kind in ("started", "answers", "silent")] == [1, 1, 0]
    fedml(place, "run", "stop", run)
    assert place.end(run)["state"] == "STOPPED"


def test_an_owner_may_say_no_to_services(tmp_path: Path) -> None:
    with Place(tmp_path) as place:
        place.agent("strict", policy="[network]\nservices = false\n")
        place.finishes(place.launch("true"))
        run = place.launch("sleep 600", service={})
        item = place.until(run, lambda item: "network.services" in item.get("waiting", ""))
        assert "a service; may be: no service" in item["waiting"]


FLOW = """
steps:
  prepare:
    job:
      job: echo by=NAME >> "$FEDML_OUTPUT"
  serve:
    needs: [prepare]
    env: {BY: "${{ steps.prepare.outputs.by }}"}
    deploy:
      workspace: code
      service: {readiness_probe: /ready}
      job: exec PYTHON serve.py READY $BY
  ask:
    env:
      URL: ${{ steps.serve.outputs.url }}
    job:
      workspace: code
      job: |
        PYTHON - <<'EOF'
        import os
        from urllib.request import urlopen
        print(urlopen(os.environ["URL"] + "/predict", b'{"x": [20, 22]}').read().decode())
        EOF
"""


def test_what_a_workflow_deploys_serves_its_other_steps_and_stays(place: Place, code: Path) -> None:
    (code / "ready").touch()
    flow = FLOW.replace("PYTHON", sys.executable).replace("READY", str(code / "ready"))
    file = code / "flow.yaml"
    file.write_text(flow.replace("NAME", "old"))
    said = fedml(place, "workflow", "run", str(file))
    assert "FINISHED after" in said.stderr
    found = WorkflowRun.find(place.client, "flow")
    old = found.steps["serve"]
    assert (old["state"], old["kind"]) == ("FINISHED", "deploy")
    assert '{"sum": 42, "by": "old"}' in place.stdout(found.steps["ask"]["run"])
    url = old["outputs"]["values"]["url"]
    assert url in fedml(place, "workflow", "status", "flow").stdout
    assert Run.find(old["run"], at=place.client).state == "RUNNING"

    # With another definition, it is another service; the one before it goes when that answers.
    file.write_text(flow.replace("NAME", "new"))
    assert resume(place.client, found.id, file)["again"] == ["prepare", "serve", "ask"]
    found.refresh().wait(check=True)
    new = found.steps["serve"]
    assert '{"sum": 42, "by": "new"}' in place.stdout(found.steps["ask"]["run"])
    assert place.end(old["run"])["state"] == "STOPPED"
    assert ask(new["outputs"]["values"]["url"], 1) == {"sum": 1, "by": "new"}
    fedml(place, "run", "stop", new["run"])
    assert place.end(new["run"])["state"] == "STOPPED"


def test_a_step_whose_service_ends_before_it_answers_has_failed(place: Place, code: Path) -> None:
    file = code / "flow.yaml"
    file.write_text("steps: {serve: {deploy: {job: 'true', service: {}}}}\n")
    found = WorkflowRun.find(place.client, submit(place.client, file)).wait()
    assert found.steps["serve"]["state"] == "FAILED"
    assert found.steps["serve"]["cause"] == "it ended before it answered"


def test_fedmls_script_deploys_and_asks(place: Place, code: Path) -> None:
    (code / "ready").touch()
    file = job(code, code / "ready", by="endpoint")
    deploy = ModelDeployJob("deploy", "sums", job_yaml_absolute_path=str(file))
    question = ModelInferenceJob("ask", endpoint_name="sums")
    workflow = Workflow("sums", loop=False)
    deploy.home = workflow.home = place.folder / "me"
    workflow.add_job(deploy)
    workflow.add_job(question, dependencies=[deploy])
    question.set_inputs({"question": {"x": [1, 2, 3]}})
    workflow.run()
    assert workflow.get_workflow_output() == {"sum": 6, "by": "endpoint"}
    assert deploy.get_outputs()["endpoint_name"] == "sums"
    deploy.kill()
    assert place.end(str(deploy.run_id))["state"] == "STOPPED"
