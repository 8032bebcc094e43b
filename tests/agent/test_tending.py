# SPDX-License-Identifier: Apache-2.0
"""The agent's side of its shims, with real tasks. An agent that must die is another process."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from fedml_agent import processes, tending
from fedml_agent.sandbox import clean_env
from fedml_agent.tending import (
    Detached,
    Ended,
    Gone,
    LogGrown,
    ShimSilent,
    StreamSize,
    TaskRefused,
    TaskSpec,
    Tended,
    adopt,
    start,
)


def specify(taskdir: Path, *argv: str, **fields: Any) -> TaskSpec:
    work = taskdir / "work"
    work.mkdir(parents=True)
    env = clean_env(os.environ, {}, home=work)
    return TaskSpec(argv=argv, env=env, cwd=work, **fields)


async def begin(taskdir: Path, *argv: str, **fields: Any) -> Tended:
    return await start(taskdir, specify(taskdir, *argv, **fields))


@pytest.fixture
async def taskdir(tmp_path: Path) -> AsyncIterator[Path]:
    folder = tmp_path / "task"
    yield folder
    # A test that failed must not leave its task behind.
    if (folder / "shim.json").exists() and not (folder / "exit.json").exists():
        who = json.loads((folder / "shim.json").read_text()).get("shim")
        if who and is_running(who):
            os.kill(who["pid"], signal.SIGKILL)


def is_running(who: dict[str, int]) -> bool:
    """Whether a process on record is alive: neither gone, nor replaced, nor a zombie."""
    try:
        started = processes.process_start(who["pid"])
        state = Path(f"/proc/{who['pid']}/stat").read_text().rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False
    return started == who["start"] and state != "Z"


def as_ended(end: object) -> Ended:
    assert isinstance(end, Ended), end
    return end


def sizes(out: int, err: int) -> LogGrown:
    return LogGrown(StreamSize(out, 0), StreamSize(err, 0))


def a_bystander() -> subprocess.Popen[bytes]:
    """A process that has nothing to do with any task, and leads a group of its own."""
    return subprocess.Popen(["sleep", "infinity"], start_new_session=True)


async def until_it_says(task: Tended, size: int) -> None:
    async for event in task.events():
        assert isinstance(event, LogGrown), event
        if event.out.size >= size:
            return


async def test_a_task_is_started_followed_and_ends(taskdir: Path) -> None:
    task = await begin(taskdir, "sh", "-c", "echo one; echo two >&2; exit 3", marker="t-1/2")
    events = [event async for event in task.events()]
    end = as_ended(events.pop())
    assert (end.reason, end.code, end.signal) == ("exited", 3, None)
    assert end.logs == sizes(4, 4) == task.logs
    assert events == [] or events[-1] == end.logs
    assert task.facts["marker"] == end.record["marker"] == "t-1/2"
    assert await task.ended() is end
    assert task.log("out").read(0, 100) == (0, b"one\n", 0)


async def test_starting_returns_only_when_the_program_runs(taskdir: Path) -> None:
    task = await begin(taskdir, "sleep", "infinity")
    command = Path(f"/proc/{task.facts['task']['pid']}/cmdline").read_bytes()
    assert command == b"sleep\0infinity\0"
    task.kill()
    assert as_ended(await task.ended()).reason == "killed"


async def test_the_specification_is_readable_by_its_owner_only(taskdir: Path) -> None:
    task = await begin(taskdir, "true")
    await task.ended()
    for name in ("spec.json", "shim.json", "exit.json"):
        assert (taskdir / name).stat().st_mode & 0o077 == 0


async def test_stop_is_term_and_what_the_task_makes_of_it(taskdir: Path) -> None:
    os.mkfifo(taskdir.parent / "never")
    script = f"trap 'exit 4' TERM; echo up; while :; do read x < {taskdir.parent}/never; done"
    task = await begin(taskdir, "bash", "-c", script)
    await until_it_says(task, 3)
    task.stop(30.0)
    end = as_ended(await task.ended())
    assert (end.reason, end.code) == ("stopped", 4)


async def test_a_program_that_is_not_there_is_refused(taskdir: Path) -> None:
    with pytest.raises(TaskRefused, match="No such file or directory: 'no-such-program'"):
        await begin(taskdir, "no-such-program")
    assert as_ended(await adopt(taskdir)).reason == "refused"


async def test_a_wrong_specification_is_refused_with_its_reason(taskdir: Path) -> None:
    with pytest.raises(TaskRefused, match="log_cap_bytes: must hold"):
        await begin(taskdir, "true", log_cap_bytes=5)


async def test_a_directory_serves_one_task_only(taskdir: Path) -> None:
    spec = specify(taskdir, "true")
    await (await start(taskdir, spec)).ended()
    with pytest.raises(FileExistsError):
        await start(taskdir, spec)


async def test_paths_longer_than_a_socket_address_work(taskdir: Path) -> None:
    deep = taskdir / ("d" * 100) / ("e" * 100)
    task = await begin(deep, "sleep", "infinity")
    other = await adopt(deep)
    assert isinstance(other, Tended)
    other.kill()
    assert as_ended(await task.ended()).reason == as_ended(await other.ended()).reason == "killed"


async def test_many_tasks_need_no_thread_and_no_task_of_asyncio(tmp_path: Path) -> None:
    before = threading.active_count()
    tasks = [await begin(tmp_path / str(n), "sleep", "infinity") for n in range(8)]
    assert threading.active_count() == before
    assert asyncio.all_tasks() == {asyncio.current_task()}
    for task in tasks:
        task.kill()
    assert {as_ended(await task.ended()).reason for task in tasks} == {"killed"}


async def test_whoever_detaches_hears_no_more_and_the_task_goes_on(taskdir: Path) -> None:
    task = await begin(taskdir, "sleep", "infinity")
    waiting = asyncio.create_task(task.ended())
    await asyncio.sleep(0)
    task.detach()
    with pytest.raises(Detached):
        await waiting
    again = await adopt(taskdir)
    assert isinstance(again, Tended)
    assert again.facts["task"] == task.facts["task"]
    again.kill()
    await again.ended()


AN_AGENT = """
import asyncio, os, sys
from pathlib import Path
from fedml_agent.sandbox import clean_env
from fedml_agent.tending import TaskSpec, start
async def main():
    taskdir = Path(sys.argv[1])
    work = taskdir / "work"
    work.mkdir(parents=True)
    env = clean_env(os.environ, {}, home=work)
    deadline = float(sys.argv[3]) if len(sys.argv) > 3 else None
    await start(taskdir, TaskSpec(argv=["sh", "-c", sys.argv[2]], env=env, cwd=work,
                                  deadline_s=deadline))
    print("started", flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


def an_agent_that_is_killed(taskdir: Path, script: str, *deadline: str) -> None:
    """Let another process start a task, and kill it as soon as the task runs."""
    command = [sys.executable, "-c", AN_AGENT, str(taskdir), script, *deadline]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as agent:
        assert agent.stdout is not None
        assert agent.stdout.readline() == b"started\n"
        agent.kill()


async def test_a_task_outlives_its_agent_and_is_adopted_with_its_exit_code(taskdir: Path) -> None:
    os.mkfifo(taskdir.parent / "go")
    an_agent_that_is_killed(
        taskdir, f"echo before; read x < {taskdir.parent}/go; echo after; exit 42"
    )
    task = await adopt(taskdir)
    assert isinstance(task, Tended)
    (taskdir.parent / "go").write_text("\n")
    end = as_ended(await task.ended())
    assert (end.reason, end.code) == ("exited", 42)
    assert task.log("out").read(0, 100) == (0, b"before\nafter\n", 0)


async def test_what_ended_while_no_agent_ran_is_found_with_its_exit_code(taskdir: Path) -> None:
    os.mkfifo(taskdir.parent / "go")
    an_agent_that_is_killed(taskdir, f"read x < {taskdir.parent}/go; exit 43")
    onlooker = await adopt(taskdir)
    assert isinstance(onlooker, Tended)
    (taskdir.parent / "go").write_text("\n")
    await onlooker.ended()
    assert as_ended(await adopt(taskdir)).code == 43


async def test_the_deadline_holds_with_the_agent_dead(taskdir: Path) -> None:
    an_agent_that_is_killed(taskdir, "exec sleep infinity", "0.5")
    found = await adopt(taskdir)
    end = await found.ended() if isinstance(found, Tended) else found
    assert as_ended(end).reason == "deadline"


async def test_a_shim_that_is_killed_is_gone_and_so_is_all_of_its_task(taskdir: Path) -> None:
    task = await begin(taskdir, "sh", "-c", "trap '' TERM; setsid sleep infinity & wait")
    os.kill(task.facts["shim"]["pid"], signal.SIGKILL)
    assert await task.ended() == Gone("its shim was killed")
    assert not any(is_running(task.facts[role]) for role in ("shim", "guard", "task"))
    assert [event async for event in task.events()] == [Gone("its shim was killed")]
    assert await adopt(taskdir) == Gone("its shim was killed")


async def test_what_is_left_of_a_dead_shims_task_is_killed_when_it_is_on_record(
    taskdir: Path,
) -> None:
    # Stands in for a task whose guard was killed together with its shim, on a machine without
    # namespaces: it lives, and its directory is all that is known of it.
    taskdir.mkdir()
    with a_bystander() as left:
        who = {"pid": left.pid, "start": processes.process_start(left.pid)}
        nobody = {"pid": 2**22 + 1, "start": 1}
        record = {"boot_id": processes.boot_id(), "shim": nobody, "guard": nobody, "task": who}
        (taskdir / "shim.json").write_text(json.dumps(record))
        assert await adopt(taskdir) == Gone("its shim was killed")
        assert left.wait() == -signal.SIGKILL


async def test_a_process_that_has_the_pid_of_a_dead_one_is_left_alone(taskdir: Path) -> None:
    taskdir.mkdir()
    with a_bystander() as other:
        who = {"pid": other.pid, "start": processes.process_start(other.pid) - 1}
        record = {"boot_id": processes.boot_id(), "shim": who, "guard": who, "task": who}
        (taskdir / "shim.json").write_text(json.dumps(record))
        assert await adopt(taskdir) == Gone("its shim was killed")
        assert other.poll() is None
        other.kill()


async def test_after_a_reboot_nothing_is_adopted_and_nothing_is_killed(taskdir: Path) -> None:
    taskdir.mkdir()
    with a_bystander() as other:
        who = {"pid": other.pid, "start": processes.process_start(other.pid)}
        record = {"boot_id": "another boot", "shim": who, "guard": who, "task": who}
        (taskdir / "shim.json").write_text(json.dumps(record))
        assert await adopt(taskdir) == Gone("the machine was restarted while it ran")
        assert other.poll() is None
        other.kill()


async def test_an_end_on_record_counts_also_after_a_reboot(taskdir: Path) -> None:
    await (await begin(taskdir, "sh", "-c", "exit 9")).ended()
    record = json.loads((taskdir / "shim.json").read_text()) | {"boot_id": "another boot"}
    (taskdir / "shim.json").write_text(json.dumps(record))
    assert as_ended(await adopt(taskdir)).code == 9


async def test_a_shim_that_comes_too_late_runs_nothing(taskdir: Path) -> None:
    spec = specify(taskdir, "touch", "it-ran")
    (taskdir / "spec.json").write_text(spec.to_json())
    assert await adopt(taskdir) == Gone("its shim never began")
    await tending._spawn(taskdir)  # what the dead agent had under way
    assert await adopt(taskdir) == Gone("its shim never began")
    assert not (taskdir / "work" / "it-ran").exists()
    assert not (taskdir / "exit.json").exists()


async def test_a_frozen_shim_is_neither_adopted_nor_given_up(taskdir: Path) -> None:
    task = await begin(taskdir, "sleep", "infinity")
    os.kill(task.facts["shim"]["pid"], signal.SIGSTOP)
    with pytest.raises(ShimSilent, match="silently"):
        await adopt(taskdir, answer_within_s=0.05)
    os.kill(task.facts["shim"]["pid"], signal.SIGCONT)
    again = await adopt(taskdir)
    assert isinstance(again, Tended)
    again.kill()
    await again.ended()


async def test_a_stranger_on_the_socket_is_not_taken_for_the_shim(taskdir: Path) -> None:
    task = await begin(taskdir, "sleep", "infinity")
    (taskdir / "s").unlink()
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.bind(str(taskdir / "s"))
        stranger.listen()
        assert await adopt(taskdir) == Gone("its shim was killed")
    assert await task.ended() == Gone("its shim was killed")


async def test_slow_readers_of_events_get_the_newest_state_and_the_end(taskdir: Path) -> None:
    task = await begin(taskdir, "sh", "-c", "for i in 1 2 3 4 5; do echo $i; done")
    await task.ended()
    events = [event async for event in task.events()]
    assert events[0] == sizes(10, 0)
    assert [type(event) for event in events] == [LogGrown, Ended]
