# SPDX-License-Identifier: Apache-2.0
"""What a job requires is installed apart from all else, once, and what cannot be is said.

No index is asked: the wheels are made here, a few hundred bytes each.
"""

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedml import launch as submit
from tests.fakes.wheels import wheel
from tests.place import Agent, Place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """One machine, and the wheels that there are."""
    with pytest.MonkeyPatch.context() as patch, Place(tmp_path_factory.mktemp("place")) as place:
        patch.setenv("UV_HTTP_RETRIES", "0")
        wheels = place.folder / "wheels"
        wheel(wheels, "hello", "1.0")
        wheel(wheels, "hello", "2.0")
        wheel(wheels, "needs_one", "1.0", "hello==1.0")
        place.agent("one")
        yield place


def offline(place: Place, *lines: str) -> str:
    """Requirements that are met from the folder of wheels alone."""
    return "\n".join(("--no-index", f"--find-links {place.folder / 'wheels'}", *lines, ""))


def environments(agent: Agent) -> list[Path]:
    return sorted(
        marker.parent for marker in (agent.home / "agent" / "environments").glob("*/built")
    )


SAY = "python -c 'import hello, sys; print(hello.VERSION, sys.prefix)'"


def test_jobs_with_the_same_requirements_share_what_none_of_them_can_change(place: Place) -> None:
    told = []
    for command in (SAY, f"{SAY}; echo x > $VIRTUAL_ENV/x || echo no"):
        run = place.launch(command, requirements=offline(place, "hello", "# and that is all"))
        place.finishes(run)
        told.append(place.stdout(run).split())
    assert told[0][0] == "2.0"
    assert told[1] == [*told[0], "no"]
    assert told[0][1].endswith("/work/venv")
    other = place.launch(SAY, requirements=offline(place, "hello==1.0"))
    place.finishes(other)
    assert place.stdout(other).split()[0] == "1.0"
    assert place.stdout(other).split()[1] != told[0][1]


def test_the_bootstrap_is_in_the_environment_too(place: Place) -> None:
    run = place.launch("true", bootstrap=SAY, requirements=offline(place, "hello"))
    place.finishes(run)
    assert place.stdout(run).startswith("2.0")


def test_a_wheel_in_the_workspace_counts_with_that_workspace(place: Place, tmp_path: Path) -> None:
    for version in ("7.0", "8.0"):
        folder = tmp_path / version
        wheel(folder / "wheels", "ours", version)
        (folder / "r.txt").write_text("--no-index\n--find-links ./wheels\nours\n")
        job = tmp_path / f"{version}.yaml"
        say = 'python -c "import ours; print(ours.VERSION)"'
        job.write_text(f"workspace: '{folder}'\nrequirements: r.txt\njob: {say}\n")
        run = submit.launch(place.client, job)
        place.finishes(run)
        assert place.stdout(run).strip() == version


def test_two_versions_that_exclude_each_other_are_the_job_files_fault(place: Place) -> None:
    end = place.end(place.launch("true", requirements=offline(place, "needs-one", "hello==2.0")))
    assert end["cause"]["fault"] == "task"
    assert "hello==1.0" in end["cause"]["traceback"]


def test_an_index_out_of_reach_is_the_machines_fault(place: Place) -> None:
    lines = "--index-url http://127.0.0.1:9/simple\nhello\n"
    end = place.end(place.launch("true", requirements=lines))
    assert (end["state"], end["cause"]["fault"]) == ("FAILED", "machine")
    assert "ask its owner" in end["cause"]["hint"]


def test_an_owner_who_forbids_installs_is_named_and_jobs_without_run(tmp_path: Path) -> None:
    with Place(tmp_path) as place:
        place.agent("one", policy="[tasks]\ninstalls = false\n")
        run = place.launch("true", requirements="hello\n")
        place.until(run, lambda item: "tasks.installs" in json.dumps(item))
        place.finishes(place.launch("true"))


def test_a_job_is_stopped_while_its_requirements_are_installed(place: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        lines = f"--index-url http://127.0.0.1:{silent.getsockname()[1]}/simple\nhello\n"
        run = place.launch("true", requirements=lines)
        silent.settimeout(30)
        connection, _ = silent.accept()
        place.client.call("POST", f"/v1/runs/{run}/stop")
        assert place.end(run)["state"] == "STOPPED"
        connection.settimeout(30)
        while connection.recv(1000):  # it ends when the builder does
            pass
        connection.close()


def test_an_environment_in_use_stays_and_the_others_give_way(tmp_path: Path) -> None:
    with Place(tmp_path) as place:
        wheels = place.folder / "wheels"
        wheel(wheels, "hello", "1.0")
        wheel(wheels, "hello", "2.0")
        one = place.agent("one", policy='[cache]\nenvironments = "1B"\n')
        os.mkfifo(place.folder / "go")
        first = place.launch(
            f"echo begun; read x < {place.folder / 'go'}; {SAY}",
            requirements=offline(place, "hello==1.0"),
        )
        place.until(first, _says("begun"), logs=True)
        (kept,) = environments(one)
        one.kill()
        one.start()
        for version in ("2.0", "1.0"):
            place.finishes(place.launch(SAY, requirements=offline(place, f"hello=={version}")))
            assert kept in environments(one)
        (place.folder / "go").write_text("x\n")
        place.finishes(first)
        assert place.stdout(first).split()[1] == "1.0"
        for _ in range(20):  # until the agent knows that the broker has the result
            place.finishes(place.launch(SAY, requirements=offline(place, "hello==2.0")))
            if kept not in environments(one):
                return
        raise AssertionError("what nobody uses any more did not give way")


def _says(wanted: str) -> Any:
    return lambda item: "log" in item and wanted in item["log"]["text"]
