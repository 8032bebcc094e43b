# SPDX-License-Identifier: Apache-2.0
"""What a task cannot do on a machine without namespaces, where it takes the rights from itself.

Such a machine is this one with a filter that refuses unshare(2); real tasks run in it.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedml_agent import confine
from fedml_agent.namespaces import HIDE, NETWORK, PIDS, READ_ONLY

WITHOUT_NAMESPACES = """
import asyncio, ctypes, json, struct, sys
from pathlib import Path
number = 272 if {machine!r} == "x86_64" else 97
code = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (6, 0, 0, 0x50001), (6, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in code))
program = struct.pack("HxxxxxxQ", 4, ctypes.addressof(code))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program, 0, 0) == 0
sys.path.insert(0, {tests!r})
from test_sandbox import Tasks
async def main():
    tasks = Tasks(Path({folder!r}))
    found = await tasks.ask({script!r}, hide=[Path({hidden!r})], **{spec!r})
    print(json.dumps([found, tasks.started[0].facts]))
asyncio.run(main())
"""


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """The agent's key, in a directory that tasks are not to see."""
    if confine.version() < 3:
        pytest.skip("needs a kernel with Landlock 3")
    (tmp_path / "agent").mkdir(mode=0o700)
    (tmp_path / "agent" / "device.key").write_text("the key")
    return tmp_path / "agent" / "device.key"


def ask(script: str, secret: Path, **spec: Any) -> tuple[Any, dict[str, Any]]:
    """What a task tells that runs the script without namespaces, and what its shim says of it."""
    whole = WITHOUT_NAMESPACES.format(
        machine=os.uname().machine,
        tests=str(Path(__file__).parent),
        folder=str(secret.parents[1]),
        hidden=str(secret.parent),
        script=script,
        spec=spec,
    )
    done = subprocess.run([sys.executable, "-c", whole], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, facts = json.loads(done.stdout)
    return found, facts


def test_a_hidden_key_cannot_be_read_or_changed_by_any_way_we_know(secret: Path) -> None:
    script = f"""
key, folder, agent = {str(secret)!r}, {str(secret.parent)!r}, {os.getpid()}
class Io(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]
io = Io(ctypes.addressof(ctypes.create_string_buffer(8)), 8)
tell({{
    "read": attempt(read, key),
    "write": attempt(open, key, "w"),
    "truncate": attempt(os.truncate, key, 0),
    "link": attempt(os.link, key, "mine"),
    "rename": attempt(os.rename, key, "mine"),
    "rename its folder": attempt(os.rename, folder, folder + "2"),
    "unlink": attempt(os.unlink, key),
    "beside": attempt(open, folder + "/new", "w"),
    "root of the agent": attempt(read, f"/proc/{{agent}}/root{{key}}"),
    "environment of the agent": attempt(read, f"/proc/{{agent}}/environ"),
    "memory of the agent": attempt(read, f"/proc/{{agent}}/mem"),
    "memory of the agent by call": call(
        libc.process_vm_readv(agent, ctypes.byref(io), 1, ctypes.byref(io), 1, 0)
    ),
    "ptrace": call(libc.ptrace(16, agent, 0, 0)),
    "bind": call(libc.mount(folder.encode(), b"/tmp", None, 4096, None)),
    "program of it": attempt(subprocess.call, [key]),
    "child": subprocess.call(["cat", key], stderr=subprocess.DEVNULL),
}})
"""
    found, facts = ask(script, secret)
    assert found.pop("child") == 1
    assert set(found.values()) <= {"EACCES", "EPERM", "EXDEV"}, found
    assert secret.read_text() == "the key"
    assert facts["walls"] == [HIDE, READ_ONLY]
    assert list(facts["missing"]) == [PIDS]


def test_only_its_own_directories_can_be_written(secret: Path) -> None:
    script = f"""
aside = "/var/tmp/fedml-test-" + str(os.getpid())
open(aside, "w").close()
os.unlink(aside)
open("own", "w").close()
open("/dev/null", "w").write("x")
os.makedirs("a/b")
os.rename("own", "a/b/own")
tell([attempt(open, p, "w") for p in (
    {str(secret.parents[1] / "new")!r}, "/root/x", "/etc/x", "/proc/sys/kernel/core_pattern"
)])
"""
    found, _ = ask(script, secret)
    assert set(found) <= {"EACCES", "ENOENT", "EROFS"}, found


def test_programs_and_libraries_still_work(secret: Path) -> None:
    script = """
import multiprocessing, ssl, tempfile
ends = socket.socketpair()
with tempfile.TemporaryFile() as file:
    file.write(b"x")
with multiprocessing.get_context("fork").Pool(1) as pool:
    four = pool.apply(pow, (2, 2))
tell([four, subprocess.check_output("ls / | grep -c etc; uname", shell=True, text=True),
      "proc" in os.listdir("/"), len(os.listdir("/usr/bin")) > 10])
"""
    found, _ = ask(script, secret, network=False)
    assert found == [4, "1\nLinux\n", True, True]


def test_without_the_network_there_are_unix_sockets_and_nothing_else(secret: Path) -> None:
    script = """
listener = socket.socket(socket.AF_UNIX)
listener.bind("s")
listener.listen()
socket.socket(socket.AF_UNIX).connect("s")
tell([attempt(socket.socket, family) for family in (socket.AF_INET, socket.AF_INET6, 17, 40)]
     + [call(libc.syscall(425, 1, 0))])
"""
    found, facts = ask(script, secret, network=False)
    assert found == ["EACCES"] * 4 + ["ENOSYS"]
    assert NETWORK in facts["walls"]


def test_with_the_network_it_is_the_one_of_the_machine(secret: Path) -> None:
    script = "tell(socket.socket(socket.AF_INET).connect_ex(('127.0.0.1', 1)))"
    assert ask(script, secret)[0] == 111


@pytest.mark.skipif(os.geteuid() != 0, reason="only user 0 has any")
def test_a_task_of_root_has_no_privilege_left(secret: Path) -> None:
    script = """
lines = open("/proc/self/status").read().splitlines()
tell([line.split()[1] for line in lines if line.startswith("Cap")]
     + subprocess.check_output("grep ^Cap /proc/self/status | cut -f2", shell=True, text=True)
     .split() + [attempt(os.chroot, "."), attempt(os.setuid, 1)])
"""
    found, _ = ask(script, secret)
    assert set(found[:10]) == {"0" * 16}
    assert found[10:] == ["EPERM", "EPERM"]


@pytest.mark.skipif(confine.version() < 6, reason="needs a kernel with Landlock 6")
def test_it_signals_nobody_outside(secret: Path) -> None:
    found, _ = ask(f"tell(attempt(os.kill, {os.getpid()}, 0))", secret)
    assert found == "EPERM"


def test_nothing_is_hidden_beside_a_socket_that_gives_more_than_the_user_has(
    tmp_path: Path,
) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        path = str(tmp_path / "docker.sock")
        listener.bind(path)
        assert path in confine.why_not(HIDE, [str(tmp_path / "none"), path])
        if confine.version() >= 3:
            assert confine.why_not(READ_ONLY, [path]) == ""
            assert confine.why_not(HIDE, [str(tmp_path / "none")]) == ""


def test_process_numbers_need_namespaces() -> None:
    assert confine.why_not(PIDS, []) == "only namespaces can do that"
