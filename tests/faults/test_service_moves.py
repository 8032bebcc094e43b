# SPDX-License-Identifier: Apache-2.0
"""A service whose machine vanishes: it answers on another one, and never at two addresses."""

import json
from pathlib import Path

from fedml import Run
from tests.place import Place


def test_a_service_answers_elsewhere_when_its_machine_vanishes(tmp_path: Path) -> None:
    program = 'exec python3 -m http.server --bind 127.0.0.1 "$PORT"'
    with Place(tmp_path, heartbeat_s=0.5, lease_s=2) as place:
        for name in ("one", "two"):
            place.agent(name)
        run = place.launch(program, service={"path": "/"}, needs={"cpus": 1})
        told = []
        for item in place.client.follow(run, logs=False):
            event = item.get("event", {})
            if event.get("kind") != "answers":
                continue
            told.append(event["data"]["name"])
            if len(told) == 2:
                break
            place.agents[told[0]].kill()
        assert sorted(told) == ["one", "two"]
        first, second = told
        assert Run.find(run, at=place.client).details["endpoint"]["name"] == second
        # The first comes back: what it has run meanwhile is no longer the service, and ends.
        place.agents[first].start()
        place.finishes(place.launch("true", labels={}))
        assert Run.find(run, at=place.client).details["endpoint"]["name"] == second
        place.client.call("POST", f"/v1/runs/{run}/stop")
        assert place.end(run)["state"] == "STOPPED"
        rows = place.query("SELECT count(*) FROM services")
        assert json.dumps([tuple(row) for row in rows]) == "[[0]]"
