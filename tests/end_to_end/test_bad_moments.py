# SPDX-License-Identifier: Apache-2.0
"""What people do at the wrong moment: each hears what has happened, nothing is lost or left behind.

What jobs do is in `test_bad_jobs.py`, dependencies that do not resolve in `test_requirements.py`,
files that are wrong in `test_bad_input.py` and `tests/fedml/test_jobfile.py`.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedml import Run, session
from fedml.client import Client
from fedml.errors import BrokerRefused
from fedml.parts import index
from tests.place import Place, command


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with Place(tmp_path_factory.mktemp("place")) as place:
        place.agent("one")
        yield place


def _user(place: Place, name: str, *, days: float | None = None) -> Client:
    """A member who has logged in, at home in a folder of his name."""
    call = place.client.call
    if name not in [user["name"] for user in call("GET", "/v1/users")["users"]]:
        call("POST", "/v1/users", {"name": name})
    key = call("POST", f"/v1/users/{name}/tokens", {"days": days})["key"]
    return Client(session.login(place.folder / name, key))


def _fedml(home: Path, *words: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command("fedml", *words),
        cwd=folder,
        env={**os.environ, "FEDML_HOME": str(home)},
        capture_output=True,
        text=True,
    )


def test_two_people_stop_the_same_run_at_the_same_moment(place: Place) -> None:
    people = {name: _user(place, name) for name in ("ann", "bob")}
    run = place.launch("trap 'echo bye; exit' TERM; echo begun; while :; do sleep 0.05; done")
    place.until(run, lambda item: "begun" in item.get("log", {}).get("text", ""), logs=True)
    together = threading.Barrier(len(people))
    told: dict[str, str] = {}

    def stop(name: str) -> None:
        together.wait()
        told[name] = people[name].call("POST", f"/v1/runs/{run}/stop")["state"]

    threads = [threading.Thread(target=stop, args=(name,)) for name in people]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told.keys() == people.keys()  # both are answered, and neither with an error
    end = place.end(run)
    assert (end["state"], end["stopped_by"] in people) == ("STOPPED", True)
    assert place.stdout(run) == "begun\nbye\n"  # its TERM came once
    entries = place.client.call("GET", "/v1/audit?action=run.stop")["entries"]
    (entry,) = [entry for entry in entries if entry["object"] == run]
    assert entry["actor"] == f"user/{end['stopped_by']}"
    late = _fedml(place.folder / "bob", "run", "stop", run)
    assert (late.returncode, late.stderr) == (0, f"{run} has ended already: STOPPED\n")


def test_a_launch_that_is_killed_while_it_sends_started_nothing_and_goes_on_from_there(
    place: Place, tmp_path: Path
) -> None:
    home = place.folder / "me"
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "large.bin").write_bytes(os.urandom(8_000_000))
    (tmp_path / "job.yaml").write_text("workspace: w\njob: wc -c < large.bin\njob_name: cut-off\n")
    program = (
        "import sys\nfrom pathlib import Path\nfrom fedml import api, launch\n"
        "def told(done, total):\n"
        "    if done > total / 2:\n        print('half', flush=True)\n        sys.stdin.read()\n"
        "launch.launch(api.connect(), Path('job.yaml'), told=told)\n"
    )
    half = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "FEDML_HOME": str(home)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with half:
        assert half.stdout is not None
        assert half.stdout.readline() == "half\n"
        half.kill()
    assert "cut-off" not in [run.name for run in Run.list(at=place.client)]
    (part,) = index(tmp_path / "w", tmp_path / "cache").package.parts
    assert place.client.lacks([part.sha256])[part.sha256] > 1_000_000  # that much is there
    done = _fedml(home, "launch", "job.yaml", folder=tmp_path)
    assert done.stdout.strip() == "8000000", done.stderr
    assert place.client.lacks([part.sha256]) == {}


def test_a_job_that_outlives_its_time_is_ended_with_all_that_it_started(
    place: Place, tmp_path: Path
) -> None:
    (tmp_path / "job.yaml").write_text(
        "deadline: 1\ngrace: 0.5\njob: |\n"
        "  trap '' TERM\n  setsid sleep 8765 &\n  echo begun\n  while :; do sleep 0.1; done\n"
    )
    done = _fedml(place.folder / "me", "launch", "job.yaml", folder=tmp_path)
    assert done.stdout == "begun\n"
    assert "FAILED" in done.stderr
    assert "it ran longer than its 1 s and was ended" in done.stderr
    assert done.returncode != 0
    assert not [line for line in place.left_running() if "8765" in line]
    place.finishes(place.launch("true"))


def test_a_token_that_expires_stops_no_run_and_loses_no_line(place: Place, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "go")
    lee = _user(place, "lee", days=1.5 / 86400)
    run = lee.submit("launch", {"command": f"echo begun; read x < {tmp_path}/go; echo $x"})
    watching = lee.follow(run)
    assert any("begun" in item.get("log", {}).get("text", "") for item in watching)
    place.wait(1.6)
    for method, path in (("GET", f"/v1/runs/{run}"), ("POST", f"/v1/runs/{run}/stop")):
        with pytest.raises(BrokerRefused, match="this token has expired: it was lee's") as caught:
            lee.call(method, path)
        assert "`fedml login` with a new key" in caught.value.hint
    said = _fedml(place.folder / "lee", "run", "logs", run)
    assert said.returncode == 6
    assert "this token has expired" in said.stderr
    (tmp_path / "go").write_text("on it went\n")
    place.finishes(run)
    # Who was watching went on watching, and with a new key all of it is there.
    assert [item["end"]["state"] for item in watching if "end" in item] == ["FINISHED"]
    again = _user(place, "lee")
    assert "".join(Run.find(run, at=again).logs()) == "begun\non it went\n"


def test_an_expired_token_of_a_browser_is_answered_as_a_problem(place: Place) -> None:
    """What the dashboard shows, and any other program that has a token of its own."""
    late = _user(place, "max", days=1e-9)
    with pytest.raises(BrokerRefused, match="this token has expired"):
        next(late.follow("r-00000000"))
    entries = place.client.call("GET", "/v1/audit?action=sign-in&limit=20")["entries"]
    assert "token has expired" in json.dumps(entries)
