# SPDX-License-Identifier: Apache-2.0
"""Tasks in control groups of their own: limits of the whole task, and an end that nothing outruns.

A machine whose control groups are not of version 2 has a second kernel for this: the last test
boots Linux in user mode (Debian's `user-mode-linux`) and runs this file in there.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from fedml_agent import cgroups
from fedml_agent.journal import Entry
from fedml_agent.sandbox import Limits, SandboxError
from fedml_agent.tending import Ended, Gone, TaskRefused
from fedml_agent.verdict import result_of
from fedml_protocol.cause import Fault
from fedml_protocol.launch import LaunchSpec
from fedml_protocol.tasks import Needs, Offer, TaskState
from tests.agent.test_sandbox import Tasks

MIB = 1 << 20
HERE = Path(__file__)
# Each of them forks until it may not; the first one's end is the task's.
BOMB = """
import os
while True:
    try:
        os.fork()
    except OSError:
        os._exit(3)
"""
UML = shutil.which("linux.uml")


@pytest.fixture
async def tasks(tmp_path: Path) -> AsyncIterator[Tasks]:
    those = Tasks(tmp_path)
    yield those
    for task in those.started:
        task.kill()
        await task.ended()


@pytest.fixture
def plain() -> Iterator[Path]:
    """A control group of ours, without limits of its own and perhaps without controllers."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    roots = [Path(mount[1]) for mount in mounts if mount[2] == "cgroup2"]
    if not roots or not os.access(roots[0], os.W_OK):
        pytest.skip("needs a control group (version 2) that we may write to")
    folder = roots[0] / f"fedml-agent-test-{os.getpid()}"
    folder.mkdir()
    yield folder
    folder.rmdir()


@pytest.fixture
def cgroup() -> str:
    """The one that an agent on this machine would use."""
    try:
        return cgroups.prepare()
    except SandboxError as missing:
        pytest.skip(str(missing))


def entry(memory: int = 0) -> Entry:
    needs = Needs(memory_bytes=memory)
    offer = Offer(task="t", epoch=1, run="r", spec=LaunchSpec(command="true"), needs=needs)
    return Entry(offer=offer, counter=1, state=TaskState.RUNNING)


def groups(cgroup: str) -> list[Path]:
    return sorted(Path(cgroup).glob("task-*"))


async def test_a_task_lives_in_a_control_group_that_goes_with_it(tasks: Tasks, plain: Path) -> None:
    task = await tasks.start("sleep", "infinity", cgroup=str(plain))
    [own] = groups(str(plain))
    inside = {int(pid) for pid in (own / "cgroup.procs").read_text().split()}
    assert inside == {task.facts["guard"]["pid"], task.facts["task"]["pid"]}
    task.kill()
    await task.ended()
    assert not own.exists()


async def test_a_control_group_without_the_controller_for_a_limit_refuses_the_task(
    tasks: Tasks, plain: Path
) -> None:
    if (plain / "memory.max").exists():
        pytest.skip("this machine gives its control groups the memory controller")
    with pytest.raises(TaskRefused, match=r"control group cannot be used: .*memory\.max"):
        await tasks.start("true", cgroup=str(plain), limits=Limits(memory_bytes=MIB))
    assert groups(str(plain)) == []


async def test_memory_is_limited_for_the_task_as_a_whole_and_the_cause_says_how_much(
    tasks: Tasks, cgroup: str
) -> None:
    # Two processes, each of which would be within the limit.
    script = "a() { python3 -c 'b = bytearray(80 << 20); input()' < /dev/zero; }; a & a & wait"
    limits = Limits(memory_bytes=128 * MIB)
    script = script.replace("python3", sys.executable)
    task = await tasks.start("sh", "-c", script, cgroup=cgroup, limits=limits)
    end = await task.ended()
    assert isinstance(end, Ended)
    assert end.oom == "yes"
    cause = result_of(entry(128 * MIB), end).cause
    assert cause is not None
    assert cause.fault is Fault.TASK
    assert "it used more than its 0.125 GiB of memory" in cause.message
    assert "computing.memory" in cause.hint
    theirs = result_of(entry(), end).cause
    assert theirs is not None
    assert "resources.memory" in theirs.hint
    assert groups(cgroup) == []


async def test_a_fork_bomb_stays_within_its_number_and_nothing_of_it_is_left(
    tasks: Tasks, cgroup: str
) -> None:
    limits = Limits(processes=40)
    task = await tasks.start(sys.executable, "-c", BOMB, cgroup=cgroup, limits=limits)
    end = await task.ended()
    assert isinstance(end, Ended)
    assert (end.reason, end.code) == ("exited", 3)
    assert end.record["forks_refused"] > 0
    cause = result_of(entry(), end).cause
    assert cause is not None
    assert "times it wanted more than 40 processes at once" in cause.message
    assert groups(cgroup) == [], "a group is removed when it has no process any more"


async def test_processors_are_limited_in_a_way_that_a_task_cannot_undo(
    tasks: Tasks, cgroup: str
) -> None:
    await tasks.start("sleep", "infinity", cgroup=cgroup, limits=Limits(cpus=1))
    [own] = groups(cgroup)
    if (own / "cpu.max").exists():
        assert (own / "cpu.max").read_text().split() == ["100000", "100000"]


async def test_what_a_killed_shim_left_in_its_group_is_ended(tasks: Tasks, cgroup: str) -> None:
    task = await tasks.start("sleep", "infinity", cgroup=cgroup)
    [own] = groups(cgroup)
    os.kill(task.facts["shim"]["pid"], 9)
    assert isinstance(await task.ended(), Gone)
    assert (own / "cgroup.procs").read_text() == ""
    cgroups.prepare()
    assert not own.exists(), "the next agent removes it"


@pytest.mark.parametrize(
    ("mounts", "own", "says"),
    [
        ("proc /proc proc rw 0 0\n", "0::/\n", "version 2) are not mounted"),
        ("c {root} cgroup2 rw 0 0\n", "0::/user.slice/shell\n", "DelegateSubgroup=agent"),
        ("c {root} cgroup2 rw 0 0\n", "0::/gone/agent\n", "is not delegated to this user"),
        ("c {root} cgroup2 rw 0 0\n", "0::/here/agent\n", "lacks memory"),
    ],
)
def test_why_there_is_no_control_group_for_tasks_is_said(
    tmp_path: Path, mounts: str, own: str, says: str
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "cgroup.procs").touch()
    (tmp_path / "here" / "cgroup.controllers").write_text("cpu io pids\n")
    (tmp_path / "mounts").write_text(mounts.format(root=tmp_path))
    (tmp_path / "cgroup").write_text(own)
    with pytest.raises(SandboxError, match=says.replace(")", r"\)")):
        cgroups.delegated(proc=str(tmp_path))


INIT = """\
#!/bin/sh
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devpts pts /dev/pts
mount -t tmpfs tmp /dev/shm
mount -t cgroup2 cgroup2 /sys/fs/cgroup
ip link set lo up 2> /dev/null
cd {root}
{python} -m pytest -q -p no:cacheprovider --timeout=50 -k "not user_mode" --basetemp={temp}/inner \
  {file} > {temp}/said 2>&1
echo o > /proc/sysrq-trigger
sleep 9
"""


@pytest.mark.skipif(UML is None, reason="needs linux.uml (Debian: user-mode-linux)")
@pytest.mark.skipif(os.geteuid() != 0, reason="a file system of the host is root's in there")
def test_all_of_this_in_a_kernel_in_user_mode(tmp_path: Path) -> None:
    """Where it can be had, so that control groups are tested on machines that have other ones."""
    assert UML is not None
    init = tmp_path / "init.sh"
    python, root = sys.executable, HERE.parents[2]
    init.write_text(INIT.format(root=root, python=python, file=HERE, temp=tmp_path))
    init.chmod(0o755)
    words = [UML, "mem=1024M", "rootfstype=hostfs", "rootflags=/", "rw", f"init={init}"]
    with (tmp_path / "console").open("w") as console:
        subprocess.run(
            [*words, "con=null", "con0=null,fd:1"],
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            env={"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "PATH": os.environ["PATH"]},
            timeout=55,
            check=False,
        )
    said = (tmp_path / "said").read_text()
    assert " passed" in said, said
    assert " failed" not in said, said
