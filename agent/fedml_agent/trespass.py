# SPDX-License-Identifier: Apache-2.0
"""GPUs in use against GPUs leased: what NVML reports of processes, and whose those are.

`CUDA_VISIBLE_DEVICES` is a convention, and a program may set another one. So each heartbeat's
reading is compared with the leases: a process that descends from a task's guard and computes on a
GPU that the task does not hold is named. In a pid namespace, and in a container, NVML may report
no process at all, and containers of Docker descend from nobody here: those are not seen.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from fedml_agent.hardware import GpuProcess, GpuReading


class Trespass(NamedTuple):
    """A process of a task or session, on a GPU that this does not hold."""

    holder: str
    gpu: str
    pid: int


def users(gpus: Iterable[GpuReading]) -> Iterator[tuple[frozenset[str], int]]:
    """Each process that computes, with all names under which what it uses may be leased."""
    for gpu in gpus:
        whole: tuple[GpuProcess, ...] = gpu.processes or ()
        if not gpu.instances:
            yield from ((frozenset({gpu.uuid or ""}), one.pid) for one in whole)
        for part in gpu.instances:
            for one in part.processes or ():
                yield frozenset({gpu.uuid or "", part.uuid or ""}), one.pid


def trespasses(
    gpus: Iterable[GpuReading],
    leases: Mapping[str, Iterable[str]],
    trees: Mapping[str, Iterable[int]],
) -> list[Trespass]:
    """Who uses what he does not hold.

    Args:
        gpus: As just read.
        leases: UUIDs by task or session.
        trees: Its processes, likewise. Others on the machine are none of ours.
    """
    whose = {pid: holder for holder, pids in trees.items() for pid in pids}
    found = []
    for names, pid in users(gpus):
        holder = whose.get(pid)
        if holder is not None and not names & set(leases.get(holder, ())):
            found.append(Trespass(holder, max(names), pid))
    return found
