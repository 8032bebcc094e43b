# SPDX-License-Identifier: Apache-2.0
"""`make demo`, as a person and as a script meet it: what it shows, and that it leaves nothing."""

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]


def _running(folder: Path) -> list[psutil.Process]:
    """Every process that works in the folder, or was started for it."""
    found = []
    for process in psutil.process_iter():
        try:
            words = [*process.cmdline(), process.cwd(), *process.environ().values()]
        except psutil.Error:
            continue
        if process.pid != os.getpid() and any(str(folder) in word for word in words):
            found.append(process)
    return found


class Demo:
    """One demo in a folder of its own, with or without a terminal."""

    def __init__(self, folder: Path, *, terminal: bool) -> None:
        self.folder = folder
        self.person = folder.parent / "person"
        self.person.mkdir()
        self.text = ""
        ours, theirs = pty.openpty() if terminal else os.pipe()
        self._out = ours
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "examples" / "demo.py"), str(folder)],
            # Whatever is written into a person's home by mistake can be seen.
            env={k: v for k, v in os.environ.items() if k != "FEDML_HOME"}
            | {"HOME": str(self.person), "COLUMNS": "120", "TERM": "xterm"}
            # pip asks a Rust compiler for its version, and rustup then makes itself a folder.
            | {"RUSTUP_HOME": str(folder.parent / "rustup")},
            stdin=theirs if terminal else subprocess.DEVNULL,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)

    def read_until(self, wanted: str) -> str:
        """Read its output until a line has `wanted`; all of it so far."""
        while not re.search(wanted, self.text):
            try:
                data = os.read(self._out, 65536)
            except OSError:  # how a terminal says that nobody is left on the other side
                data = b""
            assert data, f"it ended before {wanted!r}:\n{self.text}"
            self.text += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", data.decode(errors="replace"))
        return self.text

    def read_all(self) -> str:
        """Read until it has nothing more to say."""
        try:
            while data := os.read(self._out, 65536):
                self.text += data.decode(errors="replace")
        except OSError:
            pass
        return self.text

    def close(self) -> None:
        """Whatever a failed test has left."""
        for process in _running(self.folder):
            process.kill()
        self.process.kill()
        self.process.wait()
        os.close(self._out)


@pytest.fixture
def demo(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Demo]:
    demo = Demo(tmp_path / "demo", terminal=getattr(request, "param", False))
    try:
        yield demo
    finally:
        demo.close()


def test_without_a_terminal_it_shows_the_result_and_ends(demo: Demo) -> None:
    text = demo.read_all()

    assert demo.process.wait(20) == 0, text
    assert "hello from" in text
    accuracy = {
        name: float(value) for name, value in re.findall(r"^  (\S.*?)\s+([\d.]+) %$", text, re.M)
    }
    alone = [value for name, value in accuracy.items() if name.endswith("alone")]
    assert len(alone) == 4
    assert accuracy["federated"] > max(alone)
    table = re.findall(r"^ +(\d+) +0\.\d{4} +0\.\d{4} +[\d.–]+ +\S", text, re.M)
    assert [int(number) for number in table] == list(range(11))
    assert _running(demo.folder) == []
    assert list(demo.person.iterdir()) == []


@pytest.mark.parametrize("demo", [True], indirect=True)
def test_on_a_terminal_it_stays_and_each_command_that_it_names_works(demo: Demo) -> None:
    text = demo.read_until(r"Ctrl-C ends the demo").replace("\r", "")
    commands = re.findall(r"^  (.+)$", text.partition("in another terminal, try")[2], re.M)
    assert commands[0].startswith("export FEDML_HOME=")
    assert commands[-1].startswith("kill -9 ")

    script = "\n".join(["set -e", *commands[:-1]])
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=demo.person)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10" in done.stdout

    subprocess.run(["bash", "-c", commands[-1]], check=True)
    demo.read_until(r"Cleveland got SIGKILL; it is started again")
    demo.process.send_signal(signal.SIGINT)
    text = demo.read_all()
    assert demo.process.wait(20) == 0, text
    assert "everything has been stopped" in text
    assert _running(demo.folder) == []


def test_a_killed_broker_comes_back_and_a_closed_terminal_ends_it_all(demo: Demo) -> None:
    demo.read_until(r"\n +2 +0\.")
    next(p for p in _running(demo.folder) if "--https-port=0" in p.cmdline()).kill()

    demo.read_until(r"broker got SIGKILL; it is started again")
    demo.read_until(r"\n +5 +0\.")
    demo.process.send_signal(signal.SIGHUP)
    assert demo.process.wait(30) == 128 + signal.SIGHUP
    assert _running(demo.folder) == []


def test_whatever_is_killed_at_whatever_age_no_run_is_lost(demo: Demo) -> None:
    def kill(*words: str) -> None:
        for process in _running(demo.folder):
            with contextlib.suppress(psutil.Error):
                if all(any(word in part for part in process.cmdline()) for word in words):
                    process.kill()

    demo.read_until("a job on one of them")
    kill("fedml-agent", "run")  # all four, seconds old
    kill("fedml-broker", "up")
    demo.read_until("4 clients: ")
    kill("fedml", "federate")
    text = demo.read_all()
    assert demo.process.wait(20) == 0, text
    assert text.count("got SIGKILL; it is started again") == 5
    assert re.search(r"`fedml federate` has gone; r-\w+ goes on without it", text)
    assert "hello from" in text
    assert re.search(r"^  federated +[\d.]+ %$", text, re.M)


@pytest.mark.parametrize("inner", [False, True])
def test_whichever_of_its_two_processes_is_killed_the_other_cleans_up(
    demo: Demo, inner: bool
) -> None:
    demo.read_until(r"\n +1 +0\.")
    outer = psutil.Process(demo.process.pid)
    (outer.children()[0] if inner else outer).kill()
    demo.process.wait(30)
    _, left = psutil.wait_procs(_running(demo.folder), timeout=20)
    assert left == []


def test_a_second_demo_in_one_folder_is_told_of_the_first(demo: Demo) -> None:
    demo.read_until("a broker comes up")
    second = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "demo.py"), str(demo.folder)],
        capture_output=True,
        text=True,
    )
    assert second.returncode == 1
    assert "another demo is running" in second.stderr
    demo.process.terminate()
    assert demo.process.wait(20) == 128 + signal.SIGTERM
    assert _running(demo.folder) == []


def test_a_broker_that_cannot_start_is_shown_with_its_own_words(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    broken = tmp_path / "bin" / "sitecustomize.py"
    broken.write_text(
        "import sys\nif 'up' in sys.argv: sys.exit('port 8443 on 127.0.0.1 is taken')\n"
    )
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "demo.py"), str(tmp_path / "demo")],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "bin")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "broker ended with code 1" in done.stderr
    assert "port 8443 on 127.0.0.1 is taken" in done.stderr
    assert _running(tmp_path) == []
