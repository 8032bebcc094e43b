# SPDX-License-Identifier: Apache-2.0
"""What a task records reaches the broker: once, whole, and whoever dies on the way."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedml import session
from tests.place import APP, Place, command

PYTHON = f"PYTHONPATH={Path(__file__).parents[2]}:{Path(__file__).parents[2] / 'protocol'} "
PYTHON += sys.executable


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    # A machine that is busy with other tests does not lose its task: that would record again.
    with Place(tmp_path, heartbeat_s=5, lease_s=30) as place:
        place.agent("one")
        yield place


def _job(code: str) -> str:
    return f"{PYTHON} - <<'EOF'\n{code}\nEOF\n"


def _get(place: Place, run: str, what: str) -> Any:
    return place.client.call("GET", f"/v1/runs/{run}/{what}")


def _recorded(place: Place, run: str, where: str = "count(*)") -> Any:
    query = f"SELECT {where} FROM metrics WHERE run = :run AND name = 'n'"
    return place.query(query, run=run)[0][0]


def _until_recorded(place: Place, run: str, count: int) -> None:
    """Follow the run, whose bell rings with every piece of its records, until so many are there."""
    while _recorded(place, run) < count:
        place.wait(0.1)


def test_a_job_logs_metrics_params_artifacts_models_and_events(place: Place) -> None:
    run = place.launch(
        _job(
            """
from pathlib import Path
from fedml import mlops
mlops.log_params({"lr": 0.1})
for step in range(5):
    mlops.log({"loss": 1 / (step + 1), "nested": {"n": float("nan")}}, step=step)
Path("out").mkdir()
Path("out/a.txt").write_text("one")
Path("out/b.txt").write_text("two")
mlops.log_artifact("out", "files")
mlops.log_model("classifier", "out/a.txt")
Path("out/a.txt").write_text("changed afterwards")
mlops.event("training", started=True, value="x")
"""
        )
    )
    place.finishes(run)
    found = {s["name"]: s["points"] for s in _get(place, run, "metrics")["series"]}
    assert [p[:2] for p in found["loss"]] == [[n, 1 / (n + 1)] for n in range(5)]
    assert [p[1] for p in found["nested/n"]] == [None] * 5
    assert _get(place, run, "params")["params"] == [{"name": "lr", "source": "", "value": "0.1"}]
    artifacts = _get(place, run, "artifacts")["artifacts"]
    assert [(a["name"], a["type"], a["here"]) for a in artifacts] == [
        ("classifier/a.txt", "model", True),
        ("files/a.txt", "artifact", True),
        ("files/b.txt", "artifact", True),
    ]
    into = place.folder / "got"
    place.client.download(artifacts[0]["sha256"], into)
    assert into.read_text() == "one"
    events = [i["event"] for i in place.client.follow(run, logs=False) if "event" in i]
    recorded = [e["data"] for e in events if e["kind"] == "recorded"]
    assert recorded == [{"name": "training", "data": {"started": True, "value": "x"}}]


def test_two_thousand_metrics_arrive_exactly_once_whoever_is_killed(place: Place) -> None:
    """Agent and broker are killed, one after the other and both, while the job logs."""
    one = place.agents["one"]
    go = place.folder / "go"
    run = place.launch(
        _job(
            f"""
import time
from pathlib import Path
from fedml import mlops
for n in range(2000):
    mlops.log({{"n": n}}, step=n)
    if n in (500, 1000, 1500):
        while not Path("{go}" + str(n)).exists():
            time.sleep(0.02)
"""
        )
    )
    _until_recorded(place, run, 501)
    one.kill()
    Path(f"{go}500").touch()
    one.start()
    _until_recorded(place, run, 1001)
    place.broker.kill()
    Path(f"{go}1000").touch()
    place.start_broker()
    _until_recorded(place, run, 1501)
    one.kill()
    place.broker.kill()
    Path(f"{go}1500").touch()
    place.start_broker()
    one.start()
    place.finishes(run)
    _until_recorded(place, run, 2000)
    assert _recorded(place, run) == 2000
    assert _recorded(place, run, "count(DISTINCT step)") == 2000


def test_lines_that_are_no_records_are_counted_and_skipped(place: Place) -> None:
    run = place.launch(
        _job(
            """
import json, os
from fedml import mlops
mlops.log({"n": 1})
with open(os.environ["FEDML_MLOPS_DIR"] + "/records.ndjson", "ab") as file:
    file.write(b"garbage\\n" + b"\\xff\\n" + b'{"kind":"metrics"}\\n' + b"[" * 70000 + b"\\n")
    bad = {"kind": "artifact", "at": 0, "name": "../x", "sha256": "0" * 64, "size": 1}
    file.write(json.dumps(bad).encode() + b"\\n")
mlops.log({"n": 2})
"""
        )
    )
    place.finishes(run)
    _until_recorded(place, run, 2)
    found = _get(place, run, "metrics")
    assert found["refused"] == 5
    assert [p[1] for s in found["series"] if s["name"] == "n" for p in s["points"]] == [1, 2]


def test_clients_of_a_federated_run_log_apart(place: Place) -> None:
    app = APP.replace("def train(", "from fedml import mlops\n\ndef train(", 1).replace(
        'model["seen"] += 1', 'model["seen"] += 1; mlops.log({"n": len(x)})', 1
    )
    run = place.federate(app, rounds=2)
    place.finishes(run)
    _until_recorded(place, run, 2)
    series = [s for s in _get(place, run, "metrics")["series"] if s["name"] == "n"]
    assert [(s["source"], len(s["points"])) for s in series] == [("client 0", 2)]


OUTSIDE = """
import sys
from pathlib import Path
from fedml import mlops
print(mlops.start("from outside", home=sys.argv[1]), flush=True)
for n in range(100):
    mlops.log({"n": n})
Path("x.txt").write_text("x")
mlops.log_artifact("x.txt")
if len(sys.argv) > 2:
    sys.stdin.readline()
"""


def test_a_program_outside_any_task_is_a_run_that_it_ends_itself(place: Place) -> None:
    done = subprocess.run(
        [sys.executable, "-c", OUTSIDE, str(place.folder / "me")],
        cwd=place.folder,
        capture_output=True,
        text=True,
        check=True,
    )
    run = done.stdout.strip()
    assert run in done.stderr
    assert place.client.call("GET", f"/v1/runs/{run}")["state"] == "FINISHED"
    assert place.client.call("GET", f"/v1/runs/{run}")["kind"] == "tracked"
    assert _recorded(place, run) == 100
    assert [a["here"] for a in _get(place, run, "artifacts")["artifacts"]] == [True]


def test_what_a_killed_program_recorded_is_sent_by_the_next(place: Place) -> None:
    home = place.folder / "me"
    words = [sys.executable, "-c", OUTSIDE, str(home)]
    with subprocess.Popen(
        [*words, "wait"], cwd=place.folder, stdin=-1, stdout=-1, stderr=-3, text=True
    ) as first:
        assert first.stdout is not None
        run = first.stdout.readline().strip()
        file = home / "mlops" / run / "records.ndjson"
        while not file.exists() or file.read_bytes().count(b"\n") < 101:
            place.wait(0.02)
        place.broker.freeze()
        first.kill()
        place.broker.wake()
    subprocess.run(words, cwd=place.folder, capture_output=True, check=True)
    assert _recorded(place, run) == 100
    end = place.client.call("GET", f"/v1/runs/{run}")
    assert (end["state"], end["cause"]["message"]) == ("FAILED", "its process was killed")
    assert not (home / "mlops" / run).exists()


def test_without_a_login_nothing_is_started(tmp_path: Path) -> None:
    from fedml import mlops
    from fedml.errors import NotLoggedIn

    with pytest.raises(NotLoggedIn):
        mlops.start(home=tmp_path)
    assert session.find_home(str(tmp_path)) == tmp_path
    assert json.dumps([*tmp_path.iterdir()]) == "[]"


def test_the_commands_show_metrics_and_bring_files(place: Place) -> None:
    run = place.launch(
        _job(
            """
from pathlib import Path
from fedml import mlops
for n in range(50):
    mlops.log({"n": n})
Path("a.bin").write_bytes(b"a" * 3_000_000)
mlops.log_artifact("a.bin", "deep/a.bin")
"""
        )
    )
    place.finishes(run)
    _until_recorded(place, run, 50)

    def fedml(*words: str) -> str:
        done = subprocess.run(
            [*command("fedml", "run", *words), "--home", str(place.folder / "me")],
            cwd=place.folder,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout

    (line,) = [line for line in fedml("metrics", run).splitlines() if line.startswith("n ")]
    assert line.split() == ["n", "49", "49", "0", "49", "50", "▁▁▂▂▂▂▃▃▃▄▄▄▅▅▅▆▆▆▆▇▇▇██"]
    series = json.loads(fedml("metrics", run, "n", "--points", "10", "--json"))["series"]
    assert [p[:2] for p in series[0]["points"]][:2] == [[0, 0.0], [9, 9.0]]
    # What an earlier process was cut at is gone on with.
    target = place.folder / run / "deep"
    target.mkdir(parents=True)
    sha256 = _get(place, run, "artifacts")["artifacts"][0]["sha256"]
    (target / f".a.bin.{sha256[:12]}.part").write_bytes(b"a" * 2_000_000)
    fedml("download", run, "deep")
    assert (target / "a.bin").read_bytes() == b"a" * 3_000_000
    assert [path.name for path in target.iterdir()] == ["a.bin"]
