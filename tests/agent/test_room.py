# SPDX-License-Identifier: Apache-2.0
"""Which accelerators a task gets."""

from fedml_agent.room import Device, Room
from fedml_protocol.tasks import Needs

GIB = 2**30


def test_a_task_that_names_a_model_gets_no_other_even_where_that_is_smaller() -> None:
    small = Device("GPU-1", "Tesla T4", 16 * GIB, ())
    large = Device("GPU-2", "NVIDIA A100 80GB PCIe", 80 * GIB, ())
    room = Room((small, large), slots=4)
    assert room.take("t-1", Needs(gpus=1, gpu_model="A100-80G")) == ("GPU-2",)
    assert room.free_devices(Needs(gpus=1, gpu_model="A100-80G")) == []
    assert room.take("t-2", Needs(gpus=1)) == ("GPU-1",)
