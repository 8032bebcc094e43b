# SPDX-License-Identifier: Apache-2.0
"""What a task can and cannot do, asked of real tasks: each runs a script and prints what it found.

"Outside" is the test, in the role of the agent.
"""

import contextlib
import json
import os
import pwd
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from fedml_agent.sandbox import Limits, clean_env
from fedml_agent.tending import Ended, TaskRefused, TaskSpec, Tended, start

MIB = 1 << 20
ROOT = os.geteuid() == 0
only_root = pytest.mark.skipif(not ROOT, reason="only user 0 could do that")

PRELUDE = """
import ctypes, errno, json, os, resource, socket, subprocess, sys
libc = ctypes.CDLL(None, use_errno=True)
def attempt(work, *given):
    try:
        return work(*given)
    except OSError as error:
        return errno.errorcode[error.errno]
def call(result):
    return "done" if result == 0 else errno.errorcode[ctypes.get_errno()]
def read(path):
    with open(path, "rb") as file:
        return file.read(100).decode("latin-1")
def tell(found):
    print(json.dumps(found))
"""


class Tasks:
    """Runs scripts as tasks; each gets a directory of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[Tended] = []

    async def start(self, *argv: str, env: dict[str, str] | None = None, **spec: Any) -> Tended:
        taskdir = self.folder / f"t{len(self.started)}"
        work = taskdir / "work"
        work.mkdir(parents=True)
        env = clean_env(os.environ, env or {}, home=work)
        tended = await start(taskdir, TaskSpec(argv=argv, env=env, cwd=work, **spec))
        self.started.append(tended)
        return tended

    async def ask(self, script: str, **spec: Any) -> Any:
        """What the script tells, once it has ended."""
        task = await self.start(sys.executable, "-c", PRELUDE + script, **spec)
        end = await task.ended()
        said = task.log("out").read(0, MIB)[1]
        assert isinstance(end, Ended)
        assert end.code == 0, (end, task.log("err").read(0, MIB)[1].decode())
        return json.loads(said)


@pytest.fixture
async def tasks(tmp_path: Path) -> AsyncIterator[Tasks]:
    those = Tasks(tmp_path)
    yield those
    for task in those.started:
        task.kill()
        await task.ended()


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """The agent's key, in a directory that tasks are not to see."""
    folder = tmp_path / "agent"
    folder.mkdir()
    (folder / "device.key").write_text("the key")
    return folder / "device.key"


async def test_a_hidden_key_cannot_be_read_by_any_way_we_know(tasks: Tasks, secret: Path) -> None:
    agent = os.getpid()
    script = f"""
key, folder, agent = {str(secret)!r}, {str(secret.parent)!r}, {agent}
found = {{}}
found["path"] = attempt(read, key)
found["listing"] = attempt(os.listdir, folder)
found["root of the agent"] = attempt(read, f"/proc/{{agent}}/root{{key}}")
found["root of process 1"] = attempt(read, f"/proc/1/root{{key}}")
found["directory of process 1"] = attempt(os.listdir, "/proc/1/cwd")
found["memory of process 1"] = attempt(read, "/proc/1/mem")
found["environment of process 1"] = attempt(read, "/proc/1/environ")
found["umount"] = call(libc.umount2(folder.encode(), 2))
found["bind over"] = call(libc.mount(b"/tmp", folder.encode(), None, 4096, None))
found["new namespaces"] = call(libc.unshare(0x10000000 | 0x00020000))
found["umount in them"] = call(libc.umount2(folder.encode(), 2))
found["and the key"] = attempt(read, key)
tell(found)
"""
    found = await tasks.ask(script, hide=[secret.parent])
    assert found.pop("listing") == []
    assert found.pop("new namespaces") == "done"  # harmless, as what follows shows
    assert set(found.pop("bind over").split()) <= {"EPERM", "EACCES"}
    assert set(found.values()) <= {"ENOENT", "EPERM", "EACCES", "EINVAL", "ENXIO"}, found
    assert secret.read_text() == "the key"


def test_a_key_that_is_mounted_elsewhere_too_is_hidden_there(secret: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    script = f"""
import subprocess, sys
subprocess.run(["mount", "--bind", {str(secret.parent)!r}, {str(elsewhere)!r}], check=True)
sys.path.insert(0, {str(Path(__file__).parent)!r})
import asyncio
from pathlib import Path
from test_sandbox import Tasks
from fedml_agent.namespaces import HIDE
async def main():
    tasks = Tasks(Path({str(tmp_path)!r}))
    ask = "tell([attempt(read, p) for p in {[str(secret), str(elsewhere / "device.key")]}])"
    print(await tasks.ask(ask, hide=[Path({str(secret.parent)!r})]))
asyncio.run(main())
"""
    inside = ["unshare", "--user", "--map-root-user", "--mount"]
    done = subprocess.run([*inside, sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "['ENOENT', 'ENOENT']\n", done.stderr


async def test_a_hidden_file_reads_as_nothing(tasks: Tasks, secret: Path) -> None:
    assert await tasks.ask(f"tell(attempt(read, {str(secret)!r}))", hide=[secret]) in ("", "EACCES")


async def test_shown_directories_stay_visible_inside_hidden_ones(
    tasks: Tasks, tmp_path: Path, secret: Path
) -> None:
    data = secret.parent / "deep" / "data"
    data.mkdir(parents=True)
    (data / "set.csv").write_text("1,2")
    script = f"""
tell([attempt(os.listdir, {str(secret.parent)!r}), attempt(read, {str(data / "set.csv")!r}),
      attempt(open, {str(data / "new")!r}, "w")])
"""
    found = await tasks.ask(script, hide=[secret.parent], show=[data])
    assert found == [["deep"], "1,2", "EROFS"]


async def test_the_task_sees_nothing_of_its_shim(tasks: Tasks) -> None:
    script = """
os.kill(os.getpid(), 0)
tell([os.listdir(".."), sorted(os.listdir(".")), [p for p in os.listdir("/proc") if p.isdigit()],
      os.getpid(), os.readlink("/proc/self"), attempt(os.kill, 1, 9)])
"""
    above, own, processes, pid, self_link, kill = await tasks.ask(script)
    assert above == ["work"]
    assert own == ["tmp"]
    assert sorted(processes) == ["1", str(pid)] == ["1", self_link]
    assert kill in (None, "EPERM")  # and it was still there to tell


async def test_a_hidden_directory_must_exist(tasks: Tasks, tmp_path: Path) -> None:
    with pytest.raises(TaskRefused, match=r"cannot hide .*no such directory"):
        await tasks.start("true", hide=[tmp_path / "missing"])


@only_root
async def test_a_task_of_root_reaches_no_disk_and_no_kernel_setting(tasks: Tasks) -> None:
    disks = [
        device
        for line in Path("/proc/partitions").read_text().splitlines()[2:]
        if (device := f"/dev/{line.split()[3]}") and Path(device).exists()
    ]
    script = f"""
found = {{path: attempt(read, path) for path in {disks!r}}}
for path in ("/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger"):
    found[path] = attempt(os.open, path, os.O_WRONLY)
found["mknod"] = attempt(os.mknod, "disk", 0o60600, os.makedev(254, 0))
tell(found)
"""
    found = await tasks.ask(script)
    assert found.pop("mknod") == "EPERM"
    assert found.pop("/proc/sys/kernel/core_pattern") == "EROFS"
    assert found.pop("/proc/sysrq-trigger") in ("EROFS", "ENOENT")
    assert set(found.values()) <= {"", "ENXIO", "ENOMEDIUM", "EACCES"}, "nothing of any disk"


@only_root
async def test_a_fresh_proc_does_not_bring_kernel_settings_back(tasks: Tasks) -> None:
    script = """
assert libc.unshare(0x10000000 | 0x00020000 | 0x20000000) == 0
pid = os.fork()
if pid == 0:
    os.mkdir("proc")
    tell(call(libc.mount(b"proc", b"proc", b"proc", 0, None)))
    sys.stdout.flush()
    os._exit(0)
os.waitpid(pid, 0)
"""
    assert await tasks.ask(script) == "EPERM"


async def test_only_its_own_directories_can_be_written(tasks: Tasks, tmp_path: Path) -> None:
    outside, allowed = tmp_path / "outside", tmp_path / "allowed"
    outside.mkdir()
    allowed.mkdir()
    # /tmp is for everybody, so the test needs a directory elsewhere to see the difference.
    script = f"""
def write(path):
    with open(path, "w") as file:
        file.write("x")
tell([attempt(write, path) for path in (
    "own", {str(allowed / "x")!r}, "/tmp/fedml-agent-test", "/dev/shm/fedml-agent-test",
    os.environ["TMPDIR"] + "/x", "/dev/null", {str(Path(__file__))!r}, "/etc/hostname",
    os.path.expanduser("~root/x"))])
for path in ("/tmp/fedml-agent-test", "/dev/shm/fedml-agent-test"):
    os.unlink(path)
"""
    found = await tasks.ask(script, writable=[allowed])
    assert found[:6] == [None] * 6
    assert set(found[6:]) <= {"EROFS", "EACCES", "ENOENT"}


async def test_without_the_network_there_is_loopback_and_nothing_else(tasks: Tasks) -> None:
    with socket.create_server(("127.0.0.1", 0)) as outside:
        script = f"""
found = {{"outside": attempt(socket.create_connection, {outside.getsockname()!r}, 5)}}
mine = socket.create_server(("127.0.0.1", 0))
socket.create_connection(mine.getsockname(), 5).close()
found["interfaces"] = [name for _, name in socket.if_nameindex()]
tell(found)
"""
        found = await tasks.ask(script, network=False)
    assert found == {"outside": "ECONNREFUSED", "interfaces": ["lo"]}


async def test_with_the_network_it_is_the_one_of_the_machine(tasks: Tasks) -> None:
    with socket.create_server(("127.0.0.1", 0)) as outside:
        script = (
            f"socket.create_connection({outside.getsockname()!r}, 5).close(); tell('connected')"
        )
        assert await tasks.ask(script) == "connected"


async def test_a_worker_listens_in_its_directory_and_the_agent_connects(tasks: Tasks) -> None:
    script = (
        PRELUDE
        + """
server = socket.socket(socket.AF_UNIX)
server.bind("worker")
server.listen()
print("up", flush=True)
connection, _ = server.accept()
connection.sendall(b"hello from " + connection.recv(100))
"""
    )
    task = await tasks.start(sys.executable, "-c", script, network=False)
    async for event in task.events():
        assert not isinstance(event, Ended), task.log("err").read(0, MIB)
        break
    folder = os.open(task.taskdir / "work", os.O_PATH)
    with socket.socket(socket.AF_UNIX) as agent:
        agent.connect(f"/proc/self/fd/{folder}/worker")
        os.close(folder)
        agent.sendall(b"inside")
        assert agent.recv(100) == b"hello from inside"


async def test_what_it_writes_belongs_to_the_agent(tasks: Tasks) -> None:
    script = """
with open("model.bin", "w") as file:
    file.write("weights")
os.makedirs("deep/er")
tell([os.getuid(), os.getgid(), os.stat(".").st_uid])
"""
    seen = await tasks.ask(script)
    assert seen == [os.geteuid(), os.getegid(), os.geteuid()]
    work = tasks.started[0].taskdir / "work"
    assert (work / "model.bin").read_text() == "weights"
    for path in (work / "model.bin", work / "deep" / "er"):
        assert (path.stat().st_uid, path.stat().st_gid) == (os.geteuid(), os.getegid())
        assert path.stat().st_mode & 0o077 == 0, "umask 077"


async def test_it_knows_who_it_is(tasks: Tasks) -> None:
    task = await tasks.start("whoami")
    await task.ended()
    name = pwd.getpwuid(os.geteuid()).pw_name
    assert task.log("out").read(0, 100)[1].decode().strip() == name


async def test_it_inherits_nothing_but_its_streams(tasks: Tasks) -> None:
    os.environ["A_SECRET_OF_THE_AGENT"] = "x"
    inherited = os.open(os.devnull, os.O_RDONLY)
    os.set_inheritable(inherited, True)
    before = signal.signal(signal.SIGQUIT, signal.SIG_IGN)  # as in a shell's background job
    script = """
mask = os.umask(0)
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status"))
tell([sorted(os.environ), sorted(map(int, os.listdir("/proc/self/fd")))[:-1], mask,
      status["NoNewPrivs"].strip(), status["SigIgn"].strip(), status["SigBlk"].strip(),
      os.getsid(0) == os.getpid() == os.getpgid(0), os.getcwd() == os.environ["HOME"]])
"""
    try:
        found = await tasks.ask(script, env={"MINE": "1"})
    finally:
        signal.signal(signal.SIGQUIT, before)
        os.close(inherited)
        del os.environ["A_SECRET_OF_THE_AGENT"]
    passed_on = {"LANGUAGE", "LC_CTYPE", *(name for name in os.environ if name[:3] == "LC_"), "TZ"}
    assert set(found[0]) - passed_on == {"HOME", "LANG", "MINE", "PATH", "TMPDIR"}
    # Signals 32 and 33 are glibc's own: its posix_spawn, which make uses, leaves them ignored, and
    # sigaction(2) through it refuses to change them. Every signal that a program can set counts.
    found[4] = f"{int(found[4], 16) & ~(0b11 << 31):016x}"
    # Python ignores two signals by itself: SIGPIPE (bit 12) and SIGXFSZ (bit 24).
    assert found[1:] == [[0, 1, 2], 0o077, "1", f"{1 << 12 | 1 << 24:016x}", "0" * 16, True, True]


async def test_limits_hold(tasks: Tasks) -> None:
    script = """
found = {name: resource.getrlimit(getattr(resource, "RLIMIT_" + name))
         for name in ("CORE", "NOFILE", "FSIZE")}
found["nice"] = os.nice(0)
try:
    bytearray(512 << 20)
except MemoryError:
    found["memory"] = "refused"
# What CUDA does at start: address space without memory.
import mmap
with mmap.mmap(-1, 64 << 30, prot=0, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000):
    found["addresses"] = "given"
def write():
    with open("big", "wb") as file:
        file.write(bytes(2 << 20))
found["file"] = attempt(write)
tell(found)
"""
    limits = Limits(memory_bytes=256 * MIB, open_files=64, file_bytes=MIB, nice=5)
    assert await tasks.ask(script, limits=limits) == {
        "CORE": [0, 0],
        "NOFILE": [64, 64],
        "FSIZE": [MIB, MIB],
        "nice": os.nice(0) + 5,
        "memory": "refused",
        "addresses": "given",
        "file": "EFBIG",
    }


async def test_a_task_runs_on_so_many_processors(tasks: Tasks) -> None:
    script = "tell(len(os.sched_getaffinity(0)))"
    assert await tasks.ask(script, limits=Limits(cpus=1)) == 1
    assert await tasks.ask(script, limits=Limits(cpus=4096)) == len(os.sched_getaffinity(0))


async def test_a_task_has_so_many_processes_and_no_more(tasks: Tasks) -> None:
    # For user 0 the kernel knows only a coarse limit, of 300 at least.
    script = """
import signal
made = 0
while made < 1000:
    try:
        pid = os.fork()
    except BlockingIOError:
        break
    if pid == 0:
        signal.pause()
    made += 1
tell(made)
"""
    made = await tasks.ask(script, limits=Limits(processes=40))
    assert made < 305 if ROOT else made == 39


async def test_a_fork_bomb_is_bounded_and_cleared_away(tasks: Tasks) -> None:
    holder = tasks.folder / "held"
    os.mkfifo(holder)
    ours = os.open(holder, os.O_RDONLY | os.O_NONBLOCK)
    bomb = f"exec 9> {holder}; echo lit; b() {{ b | b & }}; b; exec sleep infinity"
    task = await tasks.start(
        "bash", "-c", bomb, deadline_s=0.5, grace_s=0.0, limits=Limits(processes=30)
    )
    end = await task.ended()
    assert isinstance(end, Ended)
    assert end.reason == "deadline"
    os.set_blocking(ours, True)
    with os.fdopen(ours, "rb") as pipe:
        assert pipe.read() == b""  # EOF: not one of them is left


async def test_devices_and_shared_memory_are_there(tasks: Tasks) -> None:
    script = """
from multiprocessing import shared_memory
block = shared_memory.SharedMemory(create=True, size=4096)
block.buf[0] = 7
block.close(); block.unlink()
a, b = os.openpty()
tell([len(read("/dev/urandom")), os.path.exists("/dev/tty"), os.isatty(b)])
"""
    assert await tasks.ask(script) == [100, True, True]


async def test_a_virtual_environment_can_be_made_and_used(tasks: Tasks) -> None:
    script = """
subprocess.run([sys.executable, "-m", "venv", "venv"], check=True)
out = subprocess.run(["venv/bin/python", "-m", "pip", "--version"], check=True, text=True,
                     capture_output=True).stdout
tell(os.path.realpath("venv") in out)
"""
    assert await tasks.ask(script, network=False) is True


def test_clean_env_takes_the_language_and_the_path_and_nothing_else(tmp_path: Path) -> None:
    base = {"PATH": "/p", "TZ": "UTC", "LC_ALL": "C", "TOKEN": "x", "HOME": "/root", "TMPDIR": "/t"}
    assert clean_env(base, {"LC_ALL": "de", "A": "1"}, home=tmp_path) == {
        "PATH": "/p",
        "LANG": "C.UTF-8",
        "TZ": "UTC",
        "LC_ALL": "de",
        "HOME": str(tmp_path),
        "TMPDIR": str(tmp_path / "tmp"),
        "A": "1",
    }


@pytest.mark.parametrize("wrong", [{"memory_bytes": 0}, {"processes": -1}, {"nice": 20}])
def test_limits_that_make_no_sense_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Limits(**wrong)


HARDENED = """
import ctypes, os, sys
from fedml_agent.sandbox import harden_process
if sys.argv[1] == "yes":
    harden_process()
print(os.getpid(), flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(ROOT, reason="root may look into every process")
@pytest.mark.parametrize(("hardened", "readable"), [("no", True), ("yes", False)])
def test_a_hardened_process_keeps_others_of_its_user_out(hardened: str, readable: bool) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HARDENED, hardened], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        seen = []
        for what in ("environ", "root/etc/passwd", "mem"):
            with contextlib.suppress(PermissionError), Path(f"/proc/{pid}/{what}").open("rb"):
                seen.append(what)
        assert bool(seen) == readable
        process.stdin.close() if process.stdin else None
