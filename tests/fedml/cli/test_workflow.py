# SPDX-License-Identifier: Apache-2.0
"""`fedml workflow` as a person types it: on a terminal, in a pipe, for scripts."""

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.fedml.cli.conftest import Fedml

HOLD = "while [ ! -e {} ]; do read -t 0.1 <> <(:); done; true"


def test_on_a_terminal_a_table_shows_every_step_and_stays(fedml: "Fedml") -> None:
    flag = fedml.folder / "go"
    file = fedml.file(
        "table.yaml",
        "steps:\n"
        f"  first: {{job: {{job: '{HOLD.format(flag)}'}}}}\n"
        "  second: {needs: first, job: {job: exit 5}}\n"
        "  third: {needs: second, job: {job: 'true'}}\n",
    )
    terminal = fedml.on_terminal("workflow", "run", file)
    terminal.until(r"first +RUNNING +r-\w+ +\d.*\n.*second +WAITING +–")
    flag.touch()
    assert terminal.end() == 7
    last = terminal.text.replace("\r", "").rpartition("STEP")[2]
    assert "second  FAILED" in last
    assert "third   SKIPPED   –" in last


def test_ctrl_c_leaves_the_workflow_which_is_found_again_and_followed(fedml: "Fedml") -> None:
    flag = fedml.folder / "go"
    file = fedml.file(
        "left.yaml",
        "steps:\n"
        f"  a: {{job: {{job: '{HOLD.format(flag)}'}}}}\n"
        "  b: {needs: a, job: {job: echo second}}\n",
    )
    terminal = fedml.on_terminal("workflow", "run", file)
    terminal.until("RUNNING")
    terminal.press("\x03")
    terminal.until("too?")
    terminal.press("n\n")
    assert terminal.end() == 130
    assert "goes on without you" in terminal.text
    told = json.loads(fedml("workflow", "status", "left", "--json").stdout)
    assert told["state"] == "RUNNING"
    follows = fedml.start("workflow", "logs", "left", "b", "-f")
    flag.touch()
    out, err = follows.communicate(timeout=30)
    assert (out, follows.returncode) == ("second\n", 0), err
    assert "FINISHED" in fedml("workflow", "wait", "left").stderr


def test_for_scripts_each_line_is_json(fedml: "Fedml") -> None:
    file = fedml.file("json.yaml", "steps: {a: {job: {job: 'true'}}}\n")
    items = [json.loads(x) for x in fedml("workflow", "run", file, "--json").stdout.splitlines()]
    assert items[0]["workflow"].startswith("w-")
    steps = [i["event"]["data"]["state"] for i in items if i.get("event", {}).get("kind") == "step"]
    assert steps == ["STARTING", "RUNNING", "FINISHED"]
    assert items[-1]["end"]["state"] == "FINISHED"
    listed = json.loads(fedml("workflow", "list", "--json").stdout)
    assert listed[0]["steps"] == {"a": "FINISHED"}


def test_what_is_not_there_is_named(fedml: "Fedml") -> None:
    assert "no such workflow" in fedml("workflow", "status", "nobody", code=6).stderr
    file = fedml.file("one.yaml", "steps: {a: {job: {job: 'true'}}}\n")
    fedml("workflow", "run", file)
    said = fedml("workflow", "logs", "one", "b", code=2).stderr
    assert "one has no step b" in said
    assert "nothing runs again" in fedml("workflow", "resume", "one").stderr
