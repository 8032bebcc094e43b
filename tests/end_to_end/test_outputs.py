# SPDX-License-Identifier: Apache-2.0
"""What jobs leave for others, on a real broker with a real agent."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedml.runs import Run
from tests.place import Place, command

LEAVES = """
echo "accuracy=0.91" >> "$FEDML_OUTPUT"
echo "no value" >> "$FEDML_OUTPUT"
mkdir "$FEDML_OUTPUT_DIR/deep"
printf hello > "$FEDML_OUTPUT_DIR/deep/hello.txt"
: > "$FEDML_OUTPUT_DIR/empty"
ln -s /etc/passwd "$FEDML_OUTPUT_DIR/link"
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with Place(tmp_path_factory.mktemp("place")) as place:
        place.agent("one")
        yield place


def test_files_and_values_of_a_job_are_there_when_it_has_ended(
    place: Place, tmp_path: Path
) -> None:
    run = Run.find(place.launch(LEAVES), at=place.client).wait(check=True)
    assert run.outputs == {"accuracy": "0.91"}
    said = subprocess.run(
        command("fedml", "run", "download", run.id, "--into", str(tmp_path / "out"), "--json"),
        env={**os.environ, "FEDML_HOME": str(place.folder / "me")},
        capture_output=True,
        text=True,
        check=True,
    )
    # The link is not taken: it leads out of what is the job's own.
    files = json.loads(said.stdout)["files"]
    assert files == [str(tmp_path / "out" / name) for name in ("deep/hello.txt", "empty")]
    assert (tmp_path / "out/deep/hello.txt").read_text() == "hello"
    assert (tmp_path / "out/empty").read_bytes() == b""


def test_a_folder_of_outputs_that_is_a_link_gives_away_nothing(place: Place) -> None:
    secret = place.agents["one"].home / "agent" / "private"
    run = place.launch(f'rm -r "$FEDML_OUTPUT_DIR"; ln -s {secret} "$FEDML_OUTPUT_DIR"')
    place.finishes(run)
    assert place.client.call("GET", f"/v1/runs/{run}")["outputs"]["files"] == []


def test_too_many_files_fail_the_job_with_what_to_do(place: Place) -> None:
    end = place.end(place.launch('for n in $(seq 201); do : > "$FEDML_OUTPUT_DIR/$n"; done'))
    assert end["state"] == "FAILED"
    assert "201 files in $FEDML_OUTPUT_DIR, at most 200 are taken" in end["cause"]["message"]


def test_outputs_outlive_the_agent_that_saw_the_job_and_go_with_the_run(place: Place) -> None:
    one = place.agents["one"]
    run = place.launch('echo begun; sleep 1; printf bytes > "$FEDML_OUTPUT_DIR/file"')
    place.until(run, lambda item: "begun" in item.get("log", {}).get("text", ""), logs=True)
    one.kill()
    one.start()
    place.finishes(run)
    (file,) = place.client.call("GET", f"/v1/runs/{run}")["outputs"]["files"]
    assert place.client.read(file["sha256"]) == b"bytes"
    place.client.call("DELETE", f"/v1/runs/{run}")
    assert not place.client.has(file["sha256"])
