# SPDX-License-Identifier: Apache-2.0
"""`fedml launch`, and what can be asked of its runs."""

import json
import signal
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.fedml.cli.conftest import Fedml

SLOW = "job: |\n  echo begun\n  sleep 600\n"


def _run_of(said: str) -> str:
    return said.split()[0]


def test_output_and_exit_code_are_the_jobs_own(fedml: "Fedml") -> None:
    job = fedml.file("job.yaml", "job: |\n  echo to-out\n  echo to-err >&2\n  exit 3\n")
    done = fedml("launch", job, code=3)
    assert done.stdout == "to-out\n"
    assert "to-err\n" in done.stderr
    assert "FAILED" in done.stderr
    assert "exit code 3" in done.stderr


def test_a_signal_that_ends_the_job_is_told_as_a_shell_does(fedml: "Fedml") -> None:
    done = fedml("launch", fedml.file("job.yaml", "job: kill -KILL $$\n"), code=128 + 9)
    assert "SIGKILL" in done.stderr


def test_the_workspace_comes_along_and_what_is_ignored_stays(fedml: "Fedml") -> None:
    fedml.file("src/main.sh", "echo from the workspace; ls\n")
    fedml.file("src/.gitignore", "*.bin\n")
    fedml.file("src/large.bin", "x")
    job = fedml.file("job.yaml", "workspace: src\njob: sh main.sh\n")
    assert fedml("launch", job).stdout.split("\n")[:2] == ["from the workspace", "main.sh"]


def test_json_lines_tell_the_run_first_and_its_end_last(fedml: "Fedml") -> None:
    job = fedml.file("job.yaml", "job: echo hello\n")
    items = [json.loads(line) for line in fedml("launch", job, "--json").stdout.splitlines()]
    assert list(items[0]) == ["run"]
    assert "hello\n" in [item["log"]["text"] for item in items if "log" in item]
    assert (items[-1]["end"]["id"], items[-1]["end"]["state"]) == (items[0]["run"], "FINISHED")


def test_a_detached_run_can_be_waited_for_and_read_later(fedml: "Fedml") -> None:
    job = fedml.file("job.yaml", "job: echo hello; exit 4\n")
    run = fedml("launch", job, "--detach").stdout.strip()
    fedml("run", "wait", run, code=4)
    assert fedml("run", "status", run).stdout == "FAILED\n"
    assert fedml("run", "logs", run).stdout == "hello\n"
    assert fedml("run", "logs", "-f", run, code=4).stdout == "hello\n"
    shown = fedml("run", "show", run).stdout
    assert "exit code 4" in shown
    assert "FAILED on " in shown
    found = json.loads(fedml("run", "list", "--json").stdout)
    assert next(r for r in found if r["id"] == run)["state"] == "FAILED"
    assert run in fedml("run", "list").stdout
    assert json.loads(fedml("run", "wait", run, "--json", code=4).stdout)["exit_code"] == 4


def test_what_no_machine_has_is_refused_with_a_reason_for_each(fedml: "Fedml") -> None:
    job = fedml.file("job.yaml", "job: echo\ncomputing: {minimum_num_gpus: 99}\n")
    said = fedml("launch", job, code=6).stderr
    for name in ("one", "two"):
        assert f"  {name}: has no GPU, 99 are asked for" in said
    assert "try: ask for less" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("job: echo\nbootstrp: x\n", "line 2: unknown key `bootstrp`; did you mean `bootstrap`?"),
        ("job: echo\nworkspace: gone\n", "gone is not a directory"),
    ],
)
def test_a_wrong_job_file_ends_before_anything_is_sent(
    fedml: "Fedml", text: str, said: str
) -> None:
    before = fedml("run", "list", "--json").stdout
    assert said in fedml("launch", fedml.file("job.yaml", text), code=2).stderr
    assert fedml("run", "list", "--json").stdout == before


def test_what_has_no_effect_is_a_warning_for_people(fedml: "Fedml") -> None:
    job = fedml.file("job.yaml", "job: echo\nframework_type: pytorch\n")
    said = fedml("launch", job).stderr
    assert f"warning: {job}, line 2: `framework_type` has no effect" in said
    assert "file.py" not in said


def test_the_first_file_is_written_runs_and_is_never_replaced(fedml: "Fedml") -> None:
    assert "fedml launch job.yaml" in fedml("launch", "init").stderr
    assert fedml("launch", "job.yaml").stdout.startswith("hello from ")
    fedml.file("job.yaml", "job: echo mine\n")
    assert "job.yaml exists already" in fedml("launch", "init", code=2).stderr
    assert fedml("launch", "job.yaml").stdout == "mine\n"
    fedml("launch", "init", "other.yaml")
    assert (fedml.folder / "other.yaml").read_text().startswith("# A job")


def test_a_file_called_as_a_verb_can_be_launched(fedml: "Fedml") -> None:
    fedml.file("init", "job: echo a file\n")
    assert fedml("launch", "--follow", "./init").stdout == "a file\n"


def test_a_dry_run_tells_of_each_machine_and_starts_nothing(fedml: "Fedml") -> None:
    fedml.file("src/main.sh", "echo\n")
    job = fedml.file("job.yaml", "workspace: src\njob: echo\ncomputing: {cpus: 1, memory: 0.01}\n")
    before = fedml("run", "list", "--json").stdout
    done = fedml("launch", job, "--dry-run")
    lines = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    assert lines[0] == ["MACHINE", "FITS", "WHY"]
    assert {line[0]: line[1] for line in lines[1:]} == {"one": "now", "two": "now"}
    said = sorted(line[2].partition(":")[0] for line in lines[1:])
    assert said == ["it goes here", "would do, too"]
    assert "no GPU, 1 CPUs, 10.7 MB of memory" in done.stderr
    told = json.loads(fedml("launch", job, "--dry-run", "--json").stdout)
    assert told["taken"] in [m["device"] for m in told["machines"]]
    assert fedml("run", "list", "--json").stdout == before


def test_a_dry_run_of_what_nobody_can_do_says_why_and_ends_with_6(fedml: "Fedml") -> None:
    job = fedml.file("job.yaml", "job: echo\ncomputing: {resource_type: RTX-4090}\n")
    done = fedml("launch", job, "--dry-run", code=6)
    assert "one      never  has no GPU, 1 are asked for" in done.stdout
    assert "it asks for 1 × RTX-4090" in done.stderr
    assert "--any-resource" in done.stderr
    assert "--any-resource" in fedml("launch", job, code=6).stderr
    told = json.loads(fedml("launch", job, "--dry-run", "--any-resource", "--json").stdout)
    assert told["needs"]["gpus"] == 0
    assert fedml("launch", job, "--any-resource").returncode == 0


def test_a_dry_run_of_several_machines_names_that_of_each_rank(fedml: "Fedml") -> None:
    job = fedml.file("job.yaml", "job: echo\nnum_nodes: 2\n")
    done = fedml("launch", job, "--dry-run")
    rows = [line.split(maxsplit=3) for line in done.stdout.splitlines()]
    assert rows[0] == ["MACHINE", "FITS", "RANK", "WHY"]
    assert sorted(row[2] for row in rows[1:]) == ["0", "1"]
    assert all(row[3].startswith("it goes here: ") for row in rows[1:])
    first, second = (row[0] for row in sorted(rows[1:], key=lambda row: row[2]))
    assert f"it would run on {first}, {second};" in done.stderr
    told = json.loads(fedml("launch", job, "--dry-run", "--json").stdout)
    foreseen = {m["rank"]: m["device"] for m in told["machines"]}
    run = fedml("launch", job, "--detach").stdout.strip()
    tasks = fedml.place.end(run) and fedml.place.client.call("GET", f"/v1/runs/{run}")["tasks"]
    assert {task["rank"]: task["device"] for task in tasks} == foreseen


def test_a_dry_run_of_several_machines_says_which_are_missing(fedml: "Fedml") -> None:
    job = fedml.file("job.yaml", "job: echo\nnum_nodes: 2\n")
    fedml("cluster", "create", "kept", "--device", "two")
    try:
        done = fedml("launch", job, "--dry-run")
        assert "one      later  –     free; 1 of 2 machines are" in done.stdout
        assert "two      later  –     is kept for the cluster kept" in done.stdout
        assert "it would wait for 2 of them" in done.stderr
    finally:
        fedml("cluster", "kill", "kept", "-y")
    fedml.file("job.yaml", "job: echo\nnum_nodes: 3\n")
    said = fedml("launch", job, "--dry-run", code=6).stderr
    assert "3 machines are asked for, 2 fit" in said


def test_a_dry_run_of_a_wrong_workspace_ends_like_the_run_would(fedml: "Fedml") -> None:
    (fedml.folder / "src").mkdir()
    (fedml.folder / "src" / "out").symlink_to("/etc")
    job = fedml.file("job.yaml", "workspace: src\njob: echo\n")
    assert "leads out of the workspace" in fedml("launch", job, "--dry-run", code=2).stderr


def test_without_a_terminal_ctrl_c_leaves_the_run_and_says_how_to_find_it(fedml: "Fedml") -> None:
    process = fedml.start("launch", fedml.file("job.yaml", SLOW))
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    run = said.partition("fedml run stop ")[2].strip()
    assert f"{run} goes on without you" in said
    assert f"fedml run logs -f {run}" in said
    assert fedml("run", "status", run).stdout == "RUNNING\n"
    assert "-f follows it" in fedml("run", "logs", run).stderr
    assert "STOPPED" in fedml("run", "stop", run, "--wait").stderr
    assert json.loads(fedml("run", "stop", run, "--json").stdout)[0]["state"] == "STOPPED"
    assert "has ended already: STOPPED" in fedml("run", "stop", run).stderr


def test_on_a_terminal_ctrl_c_asks_and_yes_stops_the_run(fedml: "Fedml") -> None:
    terminal = fedml.on_terminal("launch", fedml.file("job.yaml", SLOW))
    terminal.until("begun")
    terminal.press("\x03")
    terminal.until(r"Stop r-\w+ too\? \[y/N\]")
    terminal.press("y\n")
    assert terminal.end() == 7
    assert "STOPPED" in terminal.text
    assert terminal.text.count("begun") == 1


def test_on_a_terminal_a_second_ctrl_c_leaves_at_once(fedml: "Fedml") -> None:
    terminal = fedml.on_terminal("launch", fedml.file("job.yaml", SLOW))
    terminal.until("begun")
    terminal.press("\x03")
    terminal.until(r"too\?")
    terminal.press("\x03")
    assert terminal.end() == 130
    run = terminal.text.partition("fedml run stop ")[2].strip()
    assert fedml("run", "status", run).stdout == "RUNNING\n"
    fedml("run", "stop", run)


def test_a_run_that_is_not_there_is_an_error_with_the_next_step(fedml: "Fedml") -> None:
    for verb in ("show", "status", "logs", "stop", "wait", "download"):
        said = fedml("run", verb, "r-nothing", code=6).stderr
        assert "r-nothing" in said
        assert "fedml run list" in said


def test_a_job_that_has_left_nothing_has_nothing_to_download(fedml: "Fedml") -> None:
    run = fedml("launch", fedml.file("job.yaml", "job: echo\n"), "--detach").stdout.strip()
    fedml("run", "wait", run)
    assert "has left no files" in fedml("run", "download", run, code=6).stderr


def test_on_a_terminal_lists_are_tables_that_fit(fedml: "Fedml") -> None:
    terminal = fedml.on_terminal("device", "list")
    assert terminal.end() == 0
    lines = terminal.text.replace("\r", "").splitlines()
    assert lines[0].split()[:2] == ["NAME", "STATUS"]
    assert any(line.startswith("two ") for line in lines)
    assert max(map(len, lines)) <= 120


def test_devices_are_shown_by_name_and_id(fedml: "Fedml") -> None:
    found = {d["name"]: d for d in json.loads(fedml("device", "list", "--json").stdout)}
    assert {"one", "two"} <= found.keys()
    lines = fedml("device", "list").stdout.splitlines()
    assert lines[0].split() == ["NAME", "STATUS", "TASKS", "HAS", "TAKES", "LABELS", "SEEN"]
    assert any(line.startswith("one ") for line in lines)
    by_id = fedml("device", "show", found["one"]["id"]).stdout
    assert by_id.splitlines()[0].split() == ["name", "one"]
    assert json.loads(fedml("device", "show", "one", "--json").stdout)["hardware"]
    assert "'three' is unknown" in fedml("device", "show", "three", code=6).stderr
