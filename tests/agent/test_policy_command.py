# SPDX-License-Identifier: Apache-2.0
"""`fedml-agent policy`: the owner writes, checks and mends his file."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from fedml_agent.cli.policy import policy
from fedml_agent.policy import Policy
from fedml_agent.policy_file import load


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "agent").mkdir()
    return tmp_path


def command(home: Path, *words: str) -> Result:
    return CliRunner().invoke(policy, [*words, "--home", str(home)])


def check(home: Path, *words: str) -> tuple[int, dict[str, Any]]:
    done = command(home, "check", "--json", *words)
    return done.exit_code, json.loads(done.stdout)


def test_output_writes_the_file_as_a_whole_for_its_owner_only(home: Path) -> None:
    file = home / "agent" / "policy.toml"
    assert command(home, "show", "--output", str(file)).exit_code == 0
    assert load(file) == Policy()
    assert file.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in file.parent.iterdir()] == ["policy.toml"]


def test_output_onto_the_policy_itself_keeps_what_it_says(home: Path) -> None:
    file = home / "agent" / "policy.toml"
    file.write_text("tasks.at_once = 3\n")
    assert command(home, "show", "--output", str(file)).exit_code == 0
    assert load(file) == Policy(at_once=3)
    assert "# How many tasks may run at the same time" in file.read_text()


def test_output_of_a_broken_policy_leaves_the_file_alone(home: Path) -> None:
    file = home / "agent" / "policy.toml"
    file.write_text("tasks.at_onec = 3\n")
    done = command(home, "show", "--output", str(file))
    assert done.exit_code == 1
    assert "did you mean tasks.at_once?" in str(done.exception)
    assert file.read_text() == "tasks.at_onec = 3\n"


def test_output_where_nothing_can_be_written_says_so(home: Path) -> None:
    done = command(home, "show", "--output", str(home / "none" / "policy.toml"))
    assert "cannot write" in str(done.exception)


def test_the_help_warns_of_the_shells_arrow() -> None:
    said = CliRunner().invoke(policy, ["show", "--help"]).stdout
    assert "--output" in said
    assert "let the shell empty the file" in said.replace("\n  ", " ")


def test_check_says_rule_by_rule_what_would_happen(home: Path) -> None:
    code, said = check(home)
    assert (code, said["taken"], said["broken"]) == (0, True, None)
    assert all(rule["ok"] for rule in said["rules"])

    (home / "agent" / "policy.toml").write_text('publishers.allow = ["ada"]\n')
    code, said = check(home, "--publisher", "bob")
    assert (code, said["taken"]) == (1, False)
    assert [rule["rule"] for rule in said["rules"] if not rule["ok"]] == ["publishers.allow"]
    assert check(home, "--publisher", "ada")[0] == 0


def test_check_asks_for_a_container_a_network_and_another_tenants_user(home: Path) -> None:
    (home / "agent" / "policy.toml").write_text(
        'publishers.allow = ["ward/*"]\nnetwork.jobs = false\n'
        '[containers]\nallow = true\nimages = ["docker.io/library/*"]\nmounts = ["/srv/scans"]\n'
    )
    words = ("--publisher", "ward/dr-lee", "--no-network", "--image", "python:3.12")
    assert check(home, *words, "--mount", "/srv/scans")[0] == 0

    def refused(*words: str) -> list[str]:
        return [rule["rule"] for rule in check(home, *words)[1]["rules"] if not rule["ok"]]

    assert check(home, *words)[1]["engine"]
    assert "engine" not in check(home)[1]
    assert refused(*words, "--mount", "/srv/scans:rw") == ["containers.mounts"]
    assert refused(*words, "--image", "ghcr.io/a/b") == ["containers.images"]
    assert refused(*words, "--network") == ["network.jobs"]
    assert refused("--no-network") == ["publishers.allow"]  # of this machine's own tenant
    assert refused(*words, "--disk-gb", "1e9") == ["resources.disk_reserve"]


def test_check_is_a_table_for_people_with_a_verdict(home: Path) -> None:
    done = command(home, "check", "--kind", "federate")
    assert re.search(r"^RULE +SAYS +ASKED FOR +MAY BE$", done.stdout, re.M)
    assert re.search(r"^tasks\.kinds +ok +kind federate +launch, federate$", done.stdout, re.M)
    assert "such a task of default/somebody would be taken" in done.stderr


@pytest.mark.parametrize(
    "words", [("--gpus=-1",), ("--memory-gb=nan",), ("--cpus=-2",), ("--publisher=a/b/c",)]
)
def test_check_of_what_nobody_can_ask_for_is_typed_wrongly(home: Path, words: list[str]) -> None:
    done = command(home, "check", *words)
    assert done.exit_code == 2
    assert "Error: " in done.stderr


def test_check_of_a_broken_file_is_json_too(home: Path) -> None:
    (home / "agent" / "policy.toml").write_text("\ntasks.comands = false\n")
    code, said = check(home)
    assert (code, said["taken"]) == (1, False)
    assert "policy.toml:2: unknown setting tasks.comands" in said["broken"]


def test_the_whole_command_exits_with_1_and_no_traceback(home: Path) -> None:
    (home / "agent" / "policy.toml").write_text("[tasks\n")
    words = [sys.executable, "-c", "from fedml_agent.cli import main; main()"]
    done = subprocess.run(
        [*words, "policy", "check"],
        env={**os.environ, "FEDML_HOME": str(home)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "the agent refuses every task" in done.stderr
