# SPDX-License-Identifier: Apache-2.0
"""Workflows on a real broker with two machines: files handed on, failures, resuming, stopping."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedml import session
from fedml.client import Client
from fedml.errors import BrokerRefused
from fedml.workflows import WorkflowRun, delete, resume, submit
from tests.place import APP, Place, command

# Until the file is there.
HOLD = "while [ ! -e {} ]; do read -t 0.1 <> <(:); done; true"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with Place(tmp_path_factory.mktemp("place")) as place:
        place.agent("one")
        place.agent("two")
        yield place


def fedml(place: Place, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command("fedml", *words),
        env={**os.environ, "FEDML_HOME": str(place.folder / "me")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
    return done


def started(place: Place, file: Path) -> WorkflowRun:
    """Submit a workflow file."""
    return WorkflowRun.find(place.client, submit(place.client, file))


def until(flow: WorkflowRun, step: str, state: str) -> dict[str, Any]:
    """Follow until a step is in a state; the event's data."""
    for item in flow.follow():
        data: dict[str, Any] = item.get("event", {}).get("data", {})
        if (data.get("step"), data.get("state")) == (step, state):
            return data
    raise AssertionError(f"{step} was never {state}")


def write(folder: Path, text: str) -> Path:
    file = folder / "flow.yaml"
    file.write_text(text)
    return file


def states(flow: WorkflowRun) -> dict[str, str]:
    return {name: step["state"] for name, step in flow.refresh().steps.items()}


ALL_OF_IT = """
steps:
  prepare:
    job:
      job: |
        echo rounds=2 >> "$FEDML_OUTPUT"
        echo rate=0.05 >> "$FEDML_OUTPUT"
        echo "three lines" > "$FEDML_OUTPUT_DIR/rows.txt"
  train:
    federate: run.yaml
    inputs: {rows.txt: prepare/rows.txt}
    config:
      rate: ${{ steps.prepare.outputs.rate }}
  report:
    needs: [prepare]
    env:
      LOSS: "${{ steps.train.outputs.devices.loss }} after ${{steps.train.outputs.round}}"
    inputs:
      all: prepare
      model.safetensors: train/model.safetensors
    job: report.yaml
"""
REPORT = """
workspace: code
job: |
  echo "$LOSS"
  echo "$FEDML_INPUTS"
  cat here.txt all/rows.txt
  wc -c < model.safetensors
"""
RUN = """
app: app.py
workspace: app
rounds: 2
clients: {count: 2}
"""


def test_values_files_and_the_model_go_from_step_to_step(place: Place, tmp_path: Path) -> None:
    app = APP + (
        "\n_plain = train\n"
        "def train(model, data, config, rng):\n"
        "    from pathlib import Path\n"
        "    assert config['rate'] == 0.05, config\n"
        "    return _plain(model, data, config, rng)\n"
    )
    (tmp_path / "app").mkdir()
    (tmp_path / "app/app.py").write_text(app)
    (tmp_path / "code").mkdir()
    (tmp_path / "code/here.txt").write_text("here\n")
    (tmp_path / "run.yaml").write_text(RUN)
    (tmp_path / "report.yaml").write_text(REPORT)
    done = fedml(place, "workflow", "run", str(write(tmp_path, ALL_OF_IT)))
    assert "FINISHED after" in done.stderr
    flow = WorkflowRun.find(place.client, "flow")
    assert states(flow) == {"prepare": "FINISHED", "train": "FINISHED", "report": "FINISHED"}
    runs = [step["run"] for step in flow.steps.values()]
    assert runs[1] in done.stdout
    loss, inputs, *rest = place.stdout(runs[2]).splitlines()
    assert loss.endswith(" after 2")
    assert float(loss.split()[0]) > 0
    assert json.loads(inputs)["prepare"] == {"rounds": "2", "rate": "0.05"}
    model = place.client.call("GET", f"/v1/runs/{runs[1]}")["rounds"][2]["model"]
    assert rest == ["here", "three lines", str(model["size"])]
    # As the runs are listed.
    assert place.client.call("GET", f"/v1/runs/{runs[2]}")["name"] == "flow.report"
    assert "report" in fedml(place, "workflow", "logs", "flow").stderr
    assert "three lines" in fedml(place, "workflow", "logs", "flow", "report").stdout


FAILS = """
steps:
  load: {job: {job: 'echo n=1 >> "$FEDML_OUTPUT"'}}
  aside: {job: {job: "true"}}
  work: {needs: [load], job: {workspace: code, job: "sh work.sh"}}
  after:
    needs: [work, aside]
    job: {job: "echo $N", environment_variables: {N: "${{ steps.load.outputs.n }}"}}
  sorry: {needs: [work], when: failed, job: {job: "true"}}
  always: {needs: [after], when: always, job: {job: "true"}}
"""


def test_a_failed_step_stops_what_hangs_on_it_and_resume_runs_only_that(
    place: Place, tmp_path: Path
) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code/work.sh").write_text("exit 3")
    file = write(tmp_path, FAILS)
    done = fedml(place, "workflow", "run", str(file), code=7)
    assert "work FAILED: its command ended with exit code 3" in done.stderr
    assert "after SKIPPED: work failed" in done.stdout
    flow = WorkflowRun.find(place.client, "flow")
    before = flow.steps
    assert states(flow) == {
        "load": "FINISHED",
        "aside": "FINISHED",
        "work": "FAILED",
        "after": "SKIPPED",
        "sorry": "FINISHED",
        "always": "FINISHED",
    }
    (tmp_path / "code/work.sh").write_text("exit 0")
    done = fedml(place, "workflow", "resume", flow.id, str(file))
    assert "runs again: work, after, sorry, always\n" in done.stderr
    assert "load" not in done.stdout
    assert states(flow) | {"sorry": "SKIPPED"} == dict.fromkeys(before, "FINISHED") | {
        "sorry": "SKIPPED"
    }
    after = flow.steps
    for kept in ("load", "aside"):
        assert after[kept]["runs"] == before[kept]["runs"]
    assert after["work"]["runs"][0] == before["work"]["run"]
    assert len(after["work"]["runs"]) == 2
    assert place.stdout(after["after"]["run"]) == "1\n"
    # Again: nothing has changed, nothing runs.
    done = fedml(place, "workflow", "resume", flow.id, str(file))
    assert "nothing runs again" in done.stderr
    # A finished step that has changed runs again, with what hangs on it.
    file.write_text(FAILS.replace("n=1", "n=2"))
    again = resume(place.client, flow.id, file)["again"]
    assert again == ["load", "work", "after", "sorry", "always"]
    assert flow.wait().state == "FINISHED"
    assert place.stdout(flow.steps["after"]["run"]) == "2\n"
    actions = place.client.call("GET", "/v1/audit?limit=100")["entries"]
    mine = [e["action"] for e in actions if e["object"] == flow.id]
    assert mine.count("workflow.resume") == 2
    assert mine[-1] == "workflow.submit"


def test_a_value_that_was_not_left_fails_the_step_with_what_was(
    place: Place, tmp_path: Path
) -> None:
    file = write(
        tmp_path,
        "steps:\n"
        "  one: {job: {job: 'echo rate=1 >> \"$FEDML_OUTPUT\"'}}\n"
        '  two: {env: {X: "${{ steps.one.outputs.raet }}"}, job: {job: "true"}}\n',
    )
    flow = started(place, file).wait()
    assert flow.state == "FAILED"
    assert "one has left no value raet; its values: rate" in flow.steps["two"]["cause"]


def test_steps_run_side_by_side_and_a_stop_ends_them_and_begins_nothing(
    place: Place, tmp_path: Path
) -> None:
    hold = "touch {}; " + HOLD.format(tmp_path / "never")
    file = write(
        tmp_path,
        "steps:\n"
        f"  a: {{job: {{grace: 1, job: '{hold.format(tmp_path / 'a')}'}}}}\n"
        f"  b: {{job: {{grace: 1, job: '{hold.format(tmp_path / 'b')}'}}}}\n"
        "  c: {needs: [a, b], when: always, job: {job: 'true'}}\n",
    )
    flow = started(place, file)
    for step in ("a", "b"):
        run = until(flow, step, "RUNNING")["run"]
        place.until(run, lambda item: item.get("event", {}).get("kind") == "started")
    done = fedml(place, "workflow", "stop", flow.id, "--wait")
    assert "STOPPED" in done.stderr
    assert states(flow) == {"a": "STOPPED", "b": "STOPPED", "c": "SKIPPED"}
    for step in ("a", "b"):
        run = flow.steps[step]["run"]
        assert place.client.call("GET", f"/v1/runs/{run}")["state"] == "STOPPED"
    assert "stopped by admin" in fedml(place, "workflow", "status", flow.id).stdout


def test_what_can_never_run_is_refused_before_anything_has_run(
    place: Place, tmp_path: Path
) -> None:
    file = write(
        tmp_path,
        "steps:\n"
        "  one: {job: {job: 'true'}}\n"
        "  two: {needs: [one], job: {job: 'true', computing: {minimum_num_gpus: 64}}}\n",
    )
    before = len(place.client.call("GET", "/v1/runs?limit=1000")["runs"])
    with pytest.raises(BrokerRefused, match="the step two: no machine can ever run this"):
        submit(place.client, file)
    assert len(place.client.call("GET", "/v1/runs?limit=1000")["runs"]) == before


def test_a_deleted_workflow_leaves_nothing_at_the_broker_but_its_runs(
    place: Place, tmp_path: Path
) -> None:
    file = write(tmp_path, "steps: {one: {job: {job: 'echo x > \"$FEDML_OUTPUT_DIR/x\"'}}}\n")
    flow = started(place, file).wait(check=True)
    run = flow.steps["one"]["run"]
    fedml(place, "workflow", "delete", flow.id)
    assert (
        place.query(
            "SELECT owner FROM blob_refs WHERE owner LIKE 'workflow/' || :w || '%'", w=flow.id
        )
        == []
    )
    assert flow.id not in fedml(place, "workflow", "list").stdout
    assert place.client.call("GET", f"/v1/runs/{run}")["outputs"]["files"][0]["path"] == "x"


def _as(place: Place, name: str, role: str) -> Client:
    """Another user of the tenant."""
    place.client.call("POST", "/v1/users", {"name": name, "role": role})
    token = place.client.call("POST", f"/v1/users/{name}/tokens", {})["key"]
    return Client(session.login(place.folder / name, token))


def test_steps_run_in_the_name_of_who_submitted_as_he_is_then(place: Place, tmp_path: Path) -> None:
    flag = tmp_path / "go"
    file = write(
        tmp_path,
        "name: anns\n"
        "steps:\n"
        f"  one: {{job: {{job: '{HOLD.format(flag)}'}}}}\n"
        "  two: {needs: one, job: {job: 'true'}}\n",
    )
    ann, bob = _as(place, "ann", "member"), _as(place, "bob", "member")
    flow = WorkflowRun.find(ann, submit(ann, file))
    until(flow, "one", "RUNNING")
    run = flow.refresh().steps["one"]["run"]
    assert place.client.call("GET", f"/v1/runs/{run}")["user"] == "ann"
    place.client.call("PUT", "/v1/users/ann/role", {"role": "viewer"})
    flag.touch()
    flow.wait()
    assert "ann starts no runs any more" in flow.steps["two"]["cause"]
    assert flow.steps["two"]["runs"] == []
    with pytest.raises(BrokerRefused, match="the workflow anns is ann's"):
        resume(bob, flow.id)
    assert resume(place.client, flow.id)["again"] == ["two"]
    assert flow.wait().state == "FINISHED"
    run = flow.steps["two"]["run"]
    assert place.client.call("GET", f"/v1/runs/{run}")["user"] == "admin"


def test_a_request_that_comes_again_is_one_workflow_and_shows_no_secret(place: Place) -> None:
    job = {
        "command": 'test "$PASSWORD" = open-sesame',
        "env": {"PASSWORD": "open-sesame"},
        "secrets": ["PASSWORD"],
    }
    body = {
        "workflow": "w-0123456789",
        "name": "twice",
        "steps": [{"name": "a", "job": job}, {"name": "b", "needs": ["a"], "job": job}],
    }
    for _ in range(3):
        assert place.client.call("POST", "/v1/workflows", body) == {"workflow": "w-0123456789"}
    other = {**body, "steps": body["steps"][:1]}
    with pytest.raises(BrokerRefused, match="this workflow's id is taken"):
        place.client.call("POST", "/v1/workflows", other)
    flow = WorkflowRun.find(place.client, "twice").wait(check=True)
    assert [len(step["runs"]) for step in flow.steps.values()] == [1, 1]
    told = [flow.details, *flow.follow(), *place.client.call("GET", "/v1/runs?limit=5")["runs"]]
    assert "open-sesame" not in json.dumps(told)


def test_what_goes_on_is_neither_resumed_nor_deleted(place: Place, tmp_path: Path) -> None:
    flag = tmp_path / "go"
    file = write(tmp_path, f"steps: {{a: {{job: {{job: '{HOLD.format(flag)}'}}}}}}\n")
    flow = started(place, file)
    for ask in (lambda: resume(place.client, flow.id), lambda: delete(place.client, flow.id)):
        with pytest.raises(BrokerRefused, match="has not ended"):
            ask()
    flag.touch()
    assert flow.wait().state == "FINISHED"
