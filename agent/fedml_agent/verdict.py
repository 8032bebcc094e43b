# SPDX-License-Identifier: Apache-2.0
"""How a job ended, as the broker and whoever launched it are told; and whose fault it was."""

import signal

from fedml_agent.journal import Entry
from fedml_agent.policy import Policy
from fedml_agent.tending import Ended
from fedml_protocol.cause import Cause, Fault
from fedml_protocol.launch import Container, LaunchSpec
from fedml_protocol.tasks import Result, TaskState

GIB = 1 << 30
_ASK_MEMORY = "say in the job file what it needs (`computing.memory`): it then goes where that is"


# What an engine's command ends with when its daemon goes, and a container that it takes along.
_OF_ENGINE = (125, 128 + signal.SIGTERM, 128 + signal.SIGKILL)


def may_be_taken_away(entry: Entry, end: Ended) -> bool:
    """Whether a job's container may have ended with its engine, and not by itself."""
    by_itself = end.reason != "exited" or end.code not in _OF_ENGINE
    return _container(entry) is not None and not by_itself


def result_of(entry: Entry, end: Ended, *, begun: bool = True, outside: str = "") -> Result:
    """What the broker is told of a job's end.

    Args:
        entry: The job.
        end: Of its shim.
        begun: A container of its own began to run.
        outside: How that was ended from outside, if it was (`containers.taken_away`).
    """
    cause: Cause | None = None
    state = TaskState.FINISHED
    if end.reason == "stopped":
        state, cause = TaskState.STOPPED, Cause(fault=Fault.TASK, message="it was stopped")
    elif end.reason == "deadline":
        state = TaskState.FAILED
        cause = out_of_time(entry, end.duration_s)
    elif end.reason == "refused":
        state, cause = TaskState.FAILED, Cause(fault=Fault.MACHINE, message=end.error)
    elif end.reason == "killed" and end.oom == "no":
        # Nobody here asked for it: a third party killed what watches over the task.
        state = TaskState.LOST
        cause = Cause(fault=Fault.MACHINE, message="it was killed from outside")
    elif end.oom == "yes":
        state, cause = TaskState.FAILED, out_of_memory(entry, end)
    elif end.signal is not None or end.reason == "killed":
        name = signal.Signals(end.signal or signal.SIGKILL).name
        memory = ", and the machine had run out of memory" if end.oom != "no" else ""
        if end.signal == signal.SIGXFSZ:
            memory = f": {_too_large(end)}"
        state = TaskState.FAILED
        cause = Cause(
            fault=Fault.TASK,
            message=f"it was ended by {name}{memory}",
            hint=_ASK_MEMORY if end.oom != "no" else "",
        )
    elif end.code and outside:
        state, cause = TaskState.LOST, Cause(fault=Fault.MACHINE, message=outside)
    elif end.code and _container(entry) is not None:
        state, cause = TaskState.FAILED, _of_container(entry, end, begun)
    elif end.code:
        state = TaskState.FAILED
        message = f"its command ended with exit code {end.code}"
        if (number := end.code - 128) in signal.valid_signals():
            message += f" (a program in it was ended by {signal.Signals(number).name})"
        if number == signal.SIGXFSZ:
            message += f"; {_too_large(end)}"
        if refused := end.record.get("forks_refused", 0):
            most = end.record["limits"]["processes"]
            message += f"; {refused} times it wanted more than {most} processes at once"
        cause = Cause(fault=Fault.TASK, message=message)
    return Result(
        task=entry.key[0],
        epoch=entry.key[1],
        state=state,
        exit_code=end.code,
        signal=end.signal,
        cause=cause,
        stdout_bytes=end.logs.out.size,
        stderr_bytes=end.logs.err.size,
    )


def _container(entry: Entry) -> Container | None:
    spec = entry.offer.spec
    return spec.container if isinstance(spec, LaunchSpec) else None


def _of_container(entry: Entry, end: Ended, begun: bool) -> Cause:
    """Why a job in a container failed: the engine's fault, or as a shell tells a signal."""
    if not begun:
        message = f"its container did not start ({end.code}); the engine's words are in its log"
        return Cause(fault=Fault.MACHINE, message=message)
    message = f"its command ended with exit code {end.code}"
    memory = entry.offer.needs.memory_bytes
    if (number := (end.code or 0) - 128) in signal.valid_signals():
        message = f"it was ended by {signal.Signals(number).name} (exit code {end.code})"
        if number == signal.SIGKILL and memory:
            message += f"; perhaps it used more than its {memory / GIB:.3g} GiB of memory"
    return Cause(fault=Fault.TASK, message=message)


def _too_large(end: Ended) -> str:
    size = end.record["limits"].get("file_bytes", 0)
    return f"it wrote a file of more than the {size / 1e9:.2g} GB that the machine has for it"


def full_disk(used: int, free: int, policy: Policy) -> Cause:
    """Why a job was ended whose files filled the machine's disk."""
    message = (
        f"its files grew to {used / 1e9:.2g} GB, and the machine's disk ran low: "
        f"{free / 1e9:.2g} GB are free, {policy.disk_reserve / 1e9:.2g} GB are to stay so"
    )
    hint = "say in the job file what it needs (`computing.disk`): it then goes where that is"
    return Cause(fault=Fault.TASK, message=message, hint=hint)


def out_of_memory(entry: Entry, end: Ended) -> Cause:
    """Why the kernel ended a task that has a control group: its own limit, or its machine's."""
    limit = end.record["limits"].get("memory_bytes", 0)
    if not limit:
        message = "the machine ran out of memory, and the kernel ended it"
        return Cause(fault=Fault.TASK, message=message, hint=_ASK_MEMORY)
    message = f"it used more than its {limit / GIB:.3g} GiB of memory and was ended by the kernel"
    hint = "ask for more: `computing.memory` in the job file"
    if not entry.offer.needs.memory_bytes:
        hint += "; a job that names none gets what the machine's owner gives (resources.memory)"
    return Cause(fault=Fault.TASK, message=message, hint=hint)


def out_of_time(entry: Entry, ran_s: float) -> Cause:
    """Why a task was ended by the clock: by its own deadline, or by the machine owner's."""
    own_s = entry.offer.deadline_s
    if own_s and ran_s >= own_s:
        message = f"it ran longer than its {own_s:g} s and was ended"
        return Cause(fault=Fault.TASK, message=message)
    message = (
        f"it was ended after {ran_s:.0f} s: the machine's owner lets no task run longer "
        "(tasks.run_time, tasks.hours)"
    )
    return Cause(fault=Fault.POLICY, message=message)


def stopped(entry: Entry) -> Result:
    """What is said of one that was stopped before it began."""
    cause = Cause(fault=Fault.TASK, message="it was stopped before it began")
    return Result(task=entry.key[0], epoch=entry.key[1], state=TaskState.STOPPED, cause=cause)
