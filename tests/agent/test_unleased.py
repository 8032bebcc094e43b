# SPDX-License-Identifier: Apache-2.0
"""Who computes on a GPU without holding it, by the pids that NVML tells of."""

import os
import subprocess
from collections.abc import Iterator

import pytest

from fedml_agent import hardware
from fedml_agent.unleased import Use, unleased
from tests.fakes.nvml import FakeGpu, FakeMig, FakeNvml

ME = os.getpid()


@pytest.fixture(scope="module")
def child() -> Iterator[int]:
    """A process that descends from this one."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        yield process.pid


def found(*gpus: FakeGpu, tasks: dict[int, str], held: dict[str, list[str]]) -> set[Use]:
    return unleased(hardware.readings(nvml=FakeNvml(gpus)).gpus, tasks, held)


def test_a_process_below_a_task_is_the_tasks_own(child: int) -> None:
    a, b = FakeGpu(uuid="GPU-a"), FakeGpu(uuid="GPU-b", processes=[(child, None), (ME, 5)])
    assert found(a, b, tasks={ME: "t"}, held={}) == {Use("t", "GPU-b")}
    assert found(a, b, tasks={ME: "t"}, held={"t": ["GPU-a"]}) == {Use("t", "GPU-b")}
    assert found(a, b, tasks={ME: "t"}, held={"t": ["GPU-a", "GPU-b"]}) == set()
    assert found(a, b, tasks={child: "t"}, held={}) == {Use("t", "GPU-b")}


def test_processes_that_are_no_tasks_are_left_alone() -> None:
    busy = FakeGpu(uuid="GPU-a", processes=[(ME, None), (1, None), (2**22 + 1, None)])
    assert found(busy, tasks={}, held={}) == set()
    assert found(busy, tasks={2**22: "t"}, held={}) == set()


def test_an_instance_is_held_by_its_own_name_though_the_whole_lists_its_processes_too() -> None:
    mig = FakeMig(uuid="MIG-1", processes=[(ME, None)])
    cut = FakeGpu(uuid="GPU-a", mig=[mig, FakeMig(uuid="MIG-2")], processes=[(ME, None)])
    assert found(cut, tasks={ME: "t"}, held={"t": ["MIG-1"]}) == set()
    assert found(cut, tasks={ME: "t"}, held={"t": ["MIG-2"]}) == {Use("t", "MIG-1")}
