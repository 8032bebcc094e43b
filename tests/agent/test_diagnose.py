# SPDX-License-Identifier: Apache-2.0
"""What `diagnose` says of a machine itself; its way to a real broker is tested end to end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedml_agent import containers, sandbox
from fedml_agent.containers import Engine
from fedml_agent.diagnose import NOTE, OK, WRONG, Diagnosis, Finding
from fedml_agent.home import Home
from fedml_agent.journal import Journal
from fedml_agent.sandbox import Capability
from tests.fakes.nvml import FakeGpu, FakeNvml


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path)
    home.make()
    return home


def look(home: Home, nvml: object = None) -> dict[str, Finding]:
    findings = list(Diagnosis(home, nvml=nvml or FakeNvml([])).findings())
    for finding in findings:
        assert finding.state == OK or finding.next, f"{finding} does not say what to do"
    return {finding.name: finding for finding in findings}


def test_a_machine_that_never_joined_is_told_to(tmp_path: Path) -> None:
    found = look(Home(tmp_path / "none"))
    assert found["home"].state == NOTE
    assert found["login"].state == WRONG
    assert "fedml-agent login KEY" in found["login"].next
    assert not {"https port", "tls", "mqtt", "certificate"} & set(found)
    assert found["disk"].state == OK
    assert not (tmp_path / "none").exists(), "looking creates nothing"


def test_a_home_that_others_can_write_is_wrong(home: Home) -> None:
    home.root.chmod(0o777)
    found = look(home)["home"]
    assert found.state == WRONG
    assert found.next == f"chmod 700 {home.root}"


@pytest.mark.skipif(os.geteuid() == 0, reason="user 0 may look everywhere")
def test_a_home_of_somebody_else_is_told_apart_from_none(home: Home) -> None:
    home.root.parent.chmod(0)
    try:
        assert "cannot be looked at" in look(home)["home"].text
    finally:
        home.root.parent.chmod(0o700)


def test_an_agent_that_holds_the_home_and_is_silent_is_found(home: Home) -> None:
    hold = (
        "import sys\nfrom pathlib import Path\nfrom fedml_agent.home import Home\n"
        "with Home(Path(sys.argv[1])).locked():\n    print('held', flush=True)\n    input()\n"
    )
    words = [sys.executable, "-c", hold, str(home.root.parent)]
    with subprocess.Popen(words, stdin=-1, stdout=-1, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        found = look(home)["agent"]
        process.communicate("\n")
    assert found.state == WRONG
    assert str(process.pid) in found.text
    assert look(home)["agent"].state == NOTE


def test_a_broken_policy_is_shown_with_its_line(home: Home) -> None:
    home.policy.write_text("\ntasks.comands = false\n")
    found = look(home)["policy"]
    assert found.state == WRONG
    assert "policy.toml:2: unknown setting tasks.comands" in found.text


def test_a_disk_below_the_reserve_says_that_no_task_is_taken(home: Home) -> None:
    home.policy.write_text('resources.disk_reserve = "1000000TB"\n')
    found = look(home)["disk"]
    assert found.state == WRONG
    assert "no task is taken" in found.text


def test_a_damaged_journal_is_found_and_an_earlier_one_mentioned(home: Home) -> None:
    path = home.private / "journal.db"
    Journal(path).close()
    assert look(home)["journal"].state == OK
    good = path.read_bytes()
    path.write_bytes(good[:2000] + b"\xff" * (len(good) - 2000))
    found = look(home)["journal"]
    assert found.state == WRONG
    assert "sets the damaged file aside" in found.next
    Journal(path).close()
    found = look(home)["journal"]
    assert found.state == NOTE
    assert "journal.db.damaged-" in found.text


def test_a_journal_in_use_can_be_looked_at(home: Home) -> None:
    journal = Journal(home.private / "journal.db")
    assert look(home)["journal"].state == OK
    journal.close()


def test_gpus_are_shown_one_by_one_and_none_is_no_fault(home: Home) -> None:
    assert look(home)["gpu"].state == OK
    nvml = FakeNvml([FakeGpu(uuid="GPU-1"), FakeGpu(uuid="GPU-2", lost=True)])
    found = look(home, nvml)
    assert found["gpu 0"].state == OK
    assert "GPU-1" in found["gpu 0"].text
    assert found["gpu 1"].state == WRONG


def test_protections_that_are_missing_weigh_as_the_policy_says(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = (*sandbox.PROTECTIONS, *sandbox.PROMISED)
    nothing = {name: Capability(False, "no namespaces") for name in names}
    monkeypatch.setattr(sandbox, "capabilities", lambda: nothing)
    found = look(home)
    states = {name: found[f"sandbox {name}"].state for name in sandbox.PROMISED}
    assert states == dict.fromkeys(sandbox.PROMISED, NOTE) | {"hide": WRONG, "network": WRONG}
    assert "Delegate=yes" in found["sandbox cgroups"].next
    assert "`[sandbox] require = []`" in found["sandbox hide"].next
    assert "`[network] federated = true`" in found["sandbox network"].next

    home.policy.write_text("sandbox.require = []\nnetwork.federated = true\n")
    found = look(home)
    assert {found[f"sandbox {name}"].state for name in sandbox.PROMISED} == {NOTE}


def test_a_machine_says_whether_jobs_may_bring_images(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(name="podman", program="podman", version="4.3.1", rootless=True, limits=True)
    monkeypatch.setattr(containers, "found", lambda chosen: "it has no container engine")
    assert "apt-get install podman" in look(home)["containers"].next
    monkeypatch.setattr(containers, "found", lambda chosen: engine)
    assert "allow = true" in look(home)["containers"].next
    home.policy.write_text("containers.allow = true\n")
    found = look(home)["containers"]
    assert (found.state, "podman 4.3.1 (rootless)" in found.text) == (OK, True)
    home.policy.write_text('[containers]\nallow = true\nengine = "docker"\n')
    monkeypatch.setattr(containers, "found", lambda chosen: f"{chosen} is not installed")
    found = look(home)["containers"]
    assert (found.text, "mend docker" in found.next) == ("docker is not installed", True)


def test_the_command_gives_json_and_an_exit_code(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from fedml_agent.cli import main; main()", "diagnose", "--json"],
        env={**os.environ, "FEDML_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    said = json.loads(done.stdout)
    assert (done.returncode, said["ok"]) == (1, False)
    assert {"name", "state", "text", "next"} == set(said["checks"][0])
