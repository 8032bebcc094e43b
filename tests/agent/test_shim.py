# SPDX-License-Identifier: Apache-2.0
"""The shim alone, as a process: started by hand, spoken to over its socket.

`Shim` below is all that an agent needs to know of it. To see the end of a process that the test
does not own, the process holds a named pipe open for writing: reading it gives EOF when it dies.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedml_agent import processes, shim
from fedml_agent.capped_log import LogReader

MIB = 1 << 20
# Set in the runs of this file as another user, or on a machine with less to offer.
INSIDE = "FEDML_TEST_INSIDE" in os.environ

# Run as another user, who cannot see into the home of root: the interpreter is put back.
AS_NOBODY = """
set -e
for at in $(echo {prefix} | tr / ' '); do
  path=$path/$at
  if ! setpriv --reuid 65534 --regid 65534 --clear-groups test -x $path; then break; fi
done
mkdir {aside} && mount --bind {prefix} {aside}
if [ $path != {prefix} ]; then mount -t tmpfs -o mode=755 none $path; fi
mkdir -p {prefix} && mount --bind {aside} {prefix}
exec setpriv --reuid 65534 --regid 65534 --clear-groups "$@"
"""


class Shim:
    """Starts a shim in a directory and listens to it."""

    def __init__(self, taskdir: Path) -> None:
        self.taskdir = taskdir
        self.work = taskdir / "work"
        self.work.mkdir()
        self._open = contextlib.ExitStack()

    def specify(self, *argv: str, **fields: Any) -> None:
        spec = {
            "version": 1,
            "argv": argv,
            "env": {"PATH": os.environ["PATH"], "HOME": str(self.work)},
            "cwd": str(self.work),
            "optional": ["read_only"],  # so that these tests run without namespaces too
        }
        (self.taskdir / "spec.json").write_text(json.dumps(spec | fields))

    def launch(self) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-I", "-S", shim.__file__, str(self.taskdir)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def start(self, *argv: str, **fields: Any) -> "Shim":
        self.specify(*argv, **fields)
        launched = self.launch()
        assert launched.returncode == 0, launched.stderr
        return self

    def connect(self) -> Iterator[dict[str, Any]]:
        """Every message of the shim's, until it closes."""
        self.socket = self._open.enter_context(socket.socket(socket.AF_UNIX))
        folder = os.open(self.taskdir, os.O_PATH)
        try:
            self.socket.connect(f"/proc/self/fd/{folder}/s")
        finally:
            os.close(folder)
        return map(json.loads, self._open.enter_context(self.socket.makefile("r")))

    def say(self, **order: object) -> None:
        self.socket.sendall(json.dumps(order).encode() + b"\n")

    def wait(self) -> dict[str, Any]:
        """Its exit record, once it has told everybody."""
        with contextlib.suppress(FileNotFoundError, ConnectionError):  # it may be over already
            for _ in self.connect():
                pass
        record: dict[str, Any] = json.loads((self.taskdir / "exit.json").read_text())
        return record

    def pid(self, role: str) -> int:
        pid: int = json.loads((self.taskdir / "shim.json").read_text())[role]["pid"]
        return pid

    def leave(self) -> None:
        """Close what is open, and leave no task behind if a test has failed."""
        self._open.close()
        for role in ("shim", "guard", "task"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, KeyError):
                recorded = json.loads((self.taskdir / "shim.json").read_text())[role]
                if processes.process_start(recorded["pid"]) == recorded["start"]:
                    os.kill(recorded["pid"], signal.SIGKILL)

    def read_log(self, stream: str = "out") -> bytes:
        reader, text, offset = LogReader(self.taskdir, stream), b"", 0
        while True:
            offset, piece, _ = reader.read(offset, MIB)
            if not piece:
                return text
            text += piece
            offset += len(piece)


@pytest.fixture
def task(tmp_path: Path) -> Iterator[Shim]:
    it = Shim(tmp_path)
    yield it
    it.leave()


def held_pipe(folder: Path) -> tuple[Path, Any]:
    """A named pipe and our end of it: reading it returns when nobody holds the other one."""
    path = folder / "held"
    os.mkfifo(path)
    ours = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")
    return path, ours


def await_end_of_holders(ours: Any) -> bytes:
    os.set_blocking(ours.fileno(), True)
    with ours:
        said: bytes = ours.read()
    return said


@pytest.mark.parametrize(
    ("script", "code", "number"),
    [
        ("exit 0", 0, None),
        ("exit 37", 37, None),
        ("kill -9 $$", None, 9),
        ("kill -15 $$", None, 15),
    ],
)
def test_exit_record_says_how_the_task_ended(
    task: Shim, script: str, code: int | None, number: int | None
) -> None:
    record = task.start("sh", "-c", script).wait()
    assert (record["reason"], record["code"], record["signal"]) == ("exited", code, number)
    assert record["ended"]["monotonic"] >= record["started"]["monotonic"]
    assert record["rusage"]["max_rss_bytes"] > 0


def test_both_streams_are_kept_apart_and_whole(task: Shim) -> None:
    record = task.start("sh", "-c", "echo to out; echo to err >&2; printf unfinished").wait()
    assert task.read_log("out") == b"to out\nunfinished"
    assert task.read_log("err") == b"to err\n"
    assert record["logs"]["out"] == {"size": 17, "dropped": 0}


def test_pids_are_on_record_before_the_program_runs(task: Shim) -> None:
    events = task.start("sleep", "infinity", marker="t-1/3").connect()
    snapshot = next(events)
    recorded = json.loads((task.taskdir / "shim.json").read_text())
    for role in ("shim", "guard", "task"):
        assert processes.process_start(recorded[role]["pid"]) == recorded[role]["start"]
        assert snapshot[role] == recorded[role]
    assert recorded["boot_id"] == processes.boot_id()
    assert recorded["marker"] == "t-1/3"
    assert os.getpgid(recorded["task"]["pid"]) == recorded["task"]["pid"]
    task.say(do="kill")
    assert list(events)[-1]["event"] == "ended"


def test_first_line_is_told_while_the_task_goes_on(task: Shim) -> None:
    for name in ("go", "never"):
        os.mkfifo(task.work / name)
    events = task.start("sh", "-c", "read line < go; echo first; read line < never").connect()
    assert next(events)["event"] == "snapshot"
    with (task.work / "go").open("w") as go:
        go.write("\n")
    told = next(events)
    assert (told["event"], told["logs"]["out"]["size"]) == ("log", 6)
    task.say(do="kill")
    assert next(events)["exit"]["reason"] == "killed"


def test_every_listener_hears_the_end_and_the_record_is_there_by_then(task: Shim) -> None:
    os.mkfifo(task.work / "go")
    first = task.start("sh", "-c", "read line < go; exit 3").connect()
    second = task.connect()
    assert {next(first)["event"], next(second)["event"]} == {"snapshot"}
    with (task.work / "go").open("w") as go:
        go.write("\n")
    for events in (first, second):
        assert next(events)["exit"] == json.loads((task.taskdir / "exit.json").read_text())


def test_stop_gives_the_task_time_to_end_by_itself(task: Shim) -> None:
    script = "trap 'echo saved; exit 4' TERM; echo up; while :; do read line < never; done"
    os.mkfifo(task.work / "never")
    events = task.start("sh", "-c", script).connect()
    while next(events)["logs"]["out"]["size"] < 3:
        pass
    task.say(do="stop", grace_s=30)
    record = list(events)[-1]["exit"]
    assert (record["reason"], record["code"]) == ("stopped", 4)
    assert task.read_log() == b"up\nsaved\n"


def test_a_task_that_ignores_term_is_killed_after_the_grace_period(task: Shim) -> None:
    events = task.start("sh", "-c", "trap '' TERM; echo up; exec sleep infinity").connect()
    while next(events)["logs"]["out"]["size"] < 3:
        pass
    task.say(do="stop", grace_s=0.05)
    record = list(events)[-1]["exit"]
    assert (record["reason"], record["code"], record["signal"]) == ("stopped", None, 9)


def test_a_second_stop_shortens_the_grace_period(task: Shim) -> None:
    events = task.start("sh", "-c", "trap '' TERM; echo up; exec sleep infinity").connect()
    while next(events)["logs"]["out"]["size"] < 3:
        pass
    task.say(do="stop", grace_s=1000)
    task.say(do="stop", grace_s=0)
    assert list(events)[-1]["exit"]["reason"] == "stopped"


def test_what_a_shell_started_gets_the_rest_of_the_grace_period(task: Shim) -> None:
    # The shell dies of TERM at once; the child that it started saves its work first.
    os.mkfifo(task.work / "never")
    save = "head -c 5000000 /dev/zero | sha256sum > model; echo saved; exit 0"
    child = f"trap '{save}' TERM; echo up; while :; do read line < never; done"
    events = task.start("sh", "-c", f'sh -c "{child}" & wait').connect()
    while next(events)["logs"]["out"]["size"] < 3:
        pass
    task.say(do="stop", grace_s=30)
    record = list(events)[-1]["exit"]
    assert (record["reason"], record["signal"]) == ("stopped", 15)
    assert task.read_log() == b"up\nsaved\n"


def test_a_grandchild_in_a_session_of_its_own_dies_with_the_task(task: Shim) -> None:
    path, ours = held_pipe(task.work)
    # It keeps the pipe of the log open as well: the task must end all the same.
    script = f"setsid sh -c 'trap \"\" TERM; exec 3> {path}; echo up >&3; sleep infinity' & "
    record = task.start("sh", "-c", script + f"read line < {path}; exit 6").wait()
    assert (record["reason"], record["code"]) == ("exited", 6)
    await_end_of_holders(ours)


def test_the_tree_dies_when_the_shim_is_killed(task: Shim) -> None:
    path, ours = held_pipe(task.work)
    script = f"exec 3> {path}; setsid sh -c 'trap \"\" TERM; echo up; sleep infinity' & wait"
    events = task.start("sh", "-c", script).connect()
    while next(events)["logs"]["out"]["size"] < 3:
        pass
    os.kill(task.pid("shim"), signal.SIGKILL)
    await_end_of_holders(ours)
    assert list(events) == []
    assert not (task.taskdir / "exit.json").exists()


def test_a_guard_that_is_killed_ends_the_task_and_that_is_recorded(task: Shim) -> None:
    events = task.start("sleep", "infinity").connect()
    next(events)
    os.kill(task.pid("guard"), signal.SIGKILL)
    record = next(events)["exit"]
    assert (record["reason"], record["signal"], record["oom"]) == ("killed", 9, "no")


def test_deadline_ends_the_task_with_nobody_listening(task: Shim) -> None:
    record = task.start("sleep", "infinity", deadline_s=0.1, grace_s=30).wait()
    assert (record["reason"], record["signal"]) == ("deadline", 15)
    assert record["ended"]["monotonic"] - record["started"]["monotonic"] >= 0.1


def test_term_to_the_shim_stops_the_task_and_is_recorded(task: Shim) -> None:
    events = task.start("sleep", "infinity").connect()
    next(events)
    os.kill(task.pid("shim"), signal.SIGTERM)
    assert next(events)["exit"]["reason"] == "stopped"


def test_whoever_hears_of_bytes_finds_their_place_in_the_order(task: Shim) -> None:
    """Also who comes between a line and the next time that all are told of lines."""
    task.start("sh", "-c", "while :; do echo x; sleep 0.002; done")
    for _ in range(40):
        told = next(task.connect())["logs"]["out"]["size"]
        noted = [end for _, end in struct.iter_unpack("<QQ", task.read_log("order"))]
        assert max(noted, default=0) >= told


def test_a_flood_is_capped_and_what_was_dropped_is_counted(task: Shim) -> None:
    flood, cap = 120 * MIB, 4 * MIB
    script = f"head -c {flood} /dev/zero; echo the end"
    record = task.start("sh", "-c", script, log_cap_bytes=cap, log_segment_bytes=MIB).wait()
    kept = sum(file.stat().st_size for file in task.taskdir.glob("out.*"))
    assert kept <= cap
    assert record["logs"]["out"] == {"size": flood + 8, "dropped": flood + 8 - kept}
    offset, piece, dropped = LogReader(task.taskdir, "out").read(0, 10)
    assert (offset, dropped) == (flood + 8 - kept, flood + 8 - kept)
    assert piece == bytes(10)
    assert LogReader(task.taskdir, "out").read(flood, 100) == (flood, b"the end\n", 0)


def test_a_listener_that_never_reads_does_not_hold_the_task_up(task: Shim) -> None:
    for turn in "ab":
        os.mkfifo(task.work / turn)
    task.start("sh", "-c", "read line < a; echo a; read line < b; echo b")
    deaf = task.connect()
    with contextlib.suppress(ConnectionError):  # in the end the shim has enough of us
        while True:
            task.socket.sendall(b'{"do": "ping"}\n' * 1000)
    for turn in "ab":
        with (task.work / turn).open("w") as go:
            go.write("\n")
    assert task.wait()["code"] == 0
    assert task.read_log() == b"a\nb\n"
    assert next(deaf)["event"] == "snapshot"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "spec.json is not JSON"),
        ("[]", "is not an object"),
        ('{"version": 99}', "version: this shim reads 1, got 99"),
        ('{"version": 1, "argv": [], "env": {}, "cwd": "/"}', "argv: names no program"),
        ('{"version": 1, "argv": "ls", "env": {}, "cwd": "/"}', "argv: must be a list of text"),
        ('{"version": 1, "argv": ["ls"], "env": {"A": 1}, "cwd": "/"}', "env: must map names"),
        ('{"version": 1, "argv": ["ls"], "env": {}, "cwd": "work"}', "paths must be absolute"),
        ('{"version": 1, "argv": ["ls"], "env": {}, "cwd": "/no/such"}', "no such directory"),
        (
            '{"version": 1, "argv": ["ls"], "env": {}, "cwd": "/", "deadline_s": -1}',
            "deadline_s: must be a number >= 0",
        ),
        (
            '{"version": 1, "argv": ["ls"], "env": {}, "cwd": "/", "optional": ["sleep"]}',
            "optional: knows",
        ),
        (
            '{"version": 1, "argv": ["ls"], "env": {}, "cwd": "/", "limits": {"pids": 3}}',
            "limits: knows",
        ),
        (
            '{"version": 1, "argv": ["ls"], "env": {}, "cwd": "/", "log_cap_bytes": 5}',
            "log_cap_bytes: must hold",
        ),
    ],
)
def test_a_specification_that_makes_no_sense_is_refused_with_the_reason(
    task: Shim, text: str, complaint: str
) -> None:
    (task.taskdir / "spec.json").write_text(text)
    launched = task.launch()
    assert launched.returncode == 2
    assert complaint in launched.stderr
    assert launched.stderr.count("\n") == 1, "a sentence, not a traceback"
    assert not (task.taskdir / "shim.json").exists()


def test_a_directory_without_specification_is_refused(task: Shim) -> None:
    launched = task.launch()
    assert (launched.returncode, launched.stderr) == (2, "no spec.json in this directory\n")


def test_a_program_that_does_not_exist_is_refused_by_name(task: Shim) -> None:
    record = task.start("no-such-program").wait()
    assert record["reason"] == "refused"
    assert "No such file or directory: 'no-such-program'" in record["error"]
    assert (record["code"], record["signal"]) == (None, None)


def test_a_second_shim_in_the_same_directory_does_nothing(task: Shim) -> None:
    record = task.start("sh", "-c", "echo once").wait()
    task.launch()
    assert json.loads((task.taskdir / "exit.json").read_text()) == record
    assert task.read_log() == b"once\n"


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"nonsense\n", "not a command"),
        (b"[1]\n", "not a command"),
        (b'{"do": "dance"}\n', "no such command"),
        (b'{"do": "stop", "grace_s": -1}\n', "no such command"),
        (b'{"do": "stop", "grace_s": "soon"}\n', "not a command"),
    ],
)
def test_a_bad_command_is_answered_and_harms_nothing(
    task: Shim, line: bytes, complaint: str
) -> None:
    events = task.start("sleep", "infinity").connect()
    next(events)
    task.socket.sendall(line)
    assert complaint in next(events)["why"]
    task.say(do="ping")
    assert next(events) == {"event": "pong"}
    task.say(do="kill")
    assert next(events)["event"] == "ended"


def test_signals_that_the_agent_blocks_or_ignores_do_reach_the_task(task: Shim) -> None:
    task.specify("sh", "-c", "(exit 3); kill -TERM $$; exit 4")
    caller = "import os, signal, sys; signal.pthread_sigmask(0, {15, 17}); "
    caller += "signal.signal(17, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-I", "-S", shim.__file__, str(task.taskdir)]
    subprocess.run([sys.executable, "-c", caller, *command], check=True)
    assert task.wait()["signal"] == signal.SIGTERM


def test_a_shim_is_small_and_runs_one_thread(task: Shim) -> None:
    events = task.start("sleep", "infinity").connect()
    next(events)
    status = Path(f"/proc/{task.pid('shim')}/status").read_text()
    resident_kb = int(status.partition("VmRSS:")[2].split()[0])
    assert resident_kb < 20_000
    assert "Threads:\t1\n" in status
    task.say(do="kill")
    assert next(events)["event"] == "ended"


WITHOUT_NAMESPACES = """
echo 0 > /proc/sys/user/max_user_namespaces
exec "$@"
"""


@pytest.mark.skipif(INSIDE, reason="this is that run")
def test_all_of_it_holds_without_namespaces(tmp_path: Path) -> None:
    run_inside(
        ["unshare", "--user", "--map-root-user", "sh", "-c", WITHOUT_NAMESPACES, "sh"],
        f"--basetemp={tmp_path}/t",
        "-k",
        "not full_disk",
        __file__,
    )


ON_A_FULL_DISK = """
import json, os, subprocess, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
small = Path({small!r})
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=777", "none", small], check=True)
from test_shim import Shim
task = Shim(small)
os.mkfifo(task.work / "go")
task.start(
    "sh", "-c", {script!r},
    log_cap_bytes=64 << 20, log_segment_bytes=4 << 20, env={{"PATH": {path!r}}},
)
if "< go" in {script!r}:  # room comes back once the shim has met the full disk
    events = task.connect()
    while next(events)["logs"]["out"]["size"] < 8:
        pass
    (task.work / "go").write_text("go" + chr(10))
record = task.wait()
task.leave()
print(json.dumps(record))
"""


@pytest.mark.parametrize(
    ("script", "size", "least_dropped"),
    [
        ("head -c 3000000 /dev/zero; echo the end", 3_000_008, 1_900_000),
        ("cat /dev/zero > hog; echo the end", 8, 8),
        ("cat /dev/zero > hog; echo the end; read line < go; rm hog; echo room", 13, 8),
    ],
    ids=["by its log", "by the task", "for a while"],
)
def test_a_full_disk_costs_log_lines_and_neither_the_task_nor_its_record(
    tmp_path: Path, script: str, size: int, least_dropped: int
) -> None:
    (tmp_path / "small").mkdir()
    script = ON_A_FULL_DISK.format(
        script=script,
        tests=str(Path(__file__).parent),
        small=str(tmp_path / "small"),
        path=os.environ["PATH"],
    )
    # A mount namespace of our own: the small disk goes when the script does.
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
    )
    record = json.loads(done.stdout)
    assert (record["reason"], record["code"]) == ("exited", 0)
    assert record["logs"]["out"]["size"] == size
    assert least_dropped <= record["logs"]["out"]["dropped"] <= size


@pytest.mark.skipif(os.geteuid() != 0 or INSIDE, reason="this is such a run, or one beside it")
@pytest.mark.parametrize(
    "module",
    [
        "test_shim.py",
        "test_tending.py",
        "test_sandbox.py",
        "test_capabilities.py",
        "test_confine.py",
    ],
)
def test_all_of_it_holds_for_an_ordinary_user(module: str) -> None:
    if not shutil.which("setpriv"):
        pytest.skip("needs setpriv (util-linux)")
    # Not below pytest's own directory: it is closed to others, and closed again when opened.
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)  # noqa: PTH101
        script = AS_NOBODY.format(prefix=sys.base_prefix, aside=f"{folder}/python")
        run_inside(
            ["unshare", "--mount", "sh", "-c", script, "sh"],
            f"--basetemp={folder}/t",
            str(Path(__file__).with_name(module)),
        )


def run_inside(command: list[str], *arguments: str) -> None:
    """Run pytest itself by way of a command that changes what the machine allows."""
    tests = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(
        [*command, *tests],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"FEDML_TEST_INSIDE": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
