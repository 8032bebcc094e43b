# SPDX-License-Identifier: Apache-2.0
"""GPUs that a task computes on and does not hold: found out after the fact, and named.

`CUDA_VISIBLE_DEVICES` is a convention; a task that overwrites it sees every GPU of the machine.
NVML knows which processes compute where, and a process's parents lead to the shim of its task.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from fedml_agent.hardware import GpuProcess, GpuReading
from fedml_agent.processes import ancestors


class Use(NamedTuple):
    """One task that uses one accelerator (by UUID) without holding it."""

    task: str
    gpu: str


def unleased(
    gpus: Iterable[GpuReading],
    tasks: Mapping[int, str],
    held: Mapping[str, Collection[str]],
) -> set[Use]:
    """Every use that has no lease behind it.

    Args:
        gpus: As they were just read.
        tasks: Pids of shims, guards and first processes: whose each is.
        held: UUIDs by task.
    """
    found = set()
    for uuid, process in _uses(gpus):
        task = next((tasks[pid] for pid in ancestors(process.pid) if pid in tasks), None)
        if task is not None and uuid not in held.get(task, ()):
            found.add(Use(task, uuid))
    return found


def _uses(gpus: Iterable[GpuReading]) -> Iterator[tuple[str, GpuProcess]]:
    for gpu in gpus:
        # In MIG mode the GPU as a whole may list the processes of its instances once more.
        for part in gpu.instances or (gpu,):
            if part.uuid is not None:
                for process in part.processes or ():
                    yield part.uuid, process
