# SPDX-License-Identifier: Apache-2.0
"""A workflow whose broker is killed again and again: each step runs once, the end is the same."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from fedml.workflows import WorkflowRun, submit
from tests.place import Place

FLOW = """
steps:
  first: {{job: {{job: 'sleep 0.7; echo n=1 >> "$FEDML_OUTPUT"; echo first >> {told}'}}}}
  left:
    env: {{N: "${{{{ steps.first.outputs.n }}}}"}}
    job: {{job: 'sleep 0.7; echo left-$N >> {told}'}}
  right:
    needs: [first]
    job: {{job: 'sleep 1; echo right >> {told}'}}
  last:
    needs: [left, right]
    job: {{job: 'echo last >> {told}'}}
"""


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with Place(tmp_path) as place:
        place.agent("one")
        place.agent("two")
        yield place


def test_a_killed_broker_goes_on_with_the_step_it_was_in(place: Place, tmp_path: Path) -> None:
    told = tmp_path / "told"
    file = tmp_path / "flow.yaml"
    file.write_text(FLOW.format(told=told))
    flow = WorkflowRun.find(place.client, submit(place.client, file))
    kills = {("first", "STARTING"), ("first", "FINISHED"), ("left", "RUNNING"), ("last", "RUNNING")}
    for item in flow.follow():
        data = item.get("event", {}).get("data", {})
        if (data.get("step"), data.get("state")) in kills:
            kills.discard((data["step"], data["state"]))
            place.broker.kill()
            place.start_broker()
    assert not kills
    assert flow.refresh().state == "FINISHED"
    assert sorted(told.read_text().splitlines()) == ["first", "last", "left-1", "right"]
    runs = place.client.call("GET", "/v1/runs")["runs"]
    assert sorted(r["name"] for r in runs) == [f"flow.{s}" for s in sorted(flow.steps)]
    assert [len(step["runs"]) for step in flow.steps.values()] == [1, 1, 1, 1]


def test_a_workflow_that_was_stopped_as_its_broker_died_is_stopped_when_it_is_back(
    place: Place, tmp_path: Path
) -> None:
    file = tmp_path / "flow.yaml"
    file.write_text(
        "steps:\n"
        "  long: {job: {job: 'sleep 600', grace: 0}}\n"
        "  next: {needs: [long], job: {job: 'true'}}\n"
    )
    flow = WorkflowRun.find(place.client, submit(place.client, file))
    for item in flow.follow():
        if item.get("event", {}).get("data", {}).get("state") == "RUNNING":
            break

    for agent in place.agents.values():
        agent.freeze()  # nobody can answer before the broker is gone
    flow.stop()
    place.broker.kill()
    place.start_broker()
    for agent in place.agents.values():
        agent.wake()

    assert flow.wait().state == "STOPPED"
    assert {name: step["state"] for name, step in flow.steps.items()} == {
        "long": "STOPPED",
        "next": "SKIPPED",
    }
