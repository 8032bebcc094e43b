# SPDX-License-Identifier: Apache-2.0
"""Who computes on which GPU, against who holds it."""

from pathlib import Path

import pytest

from fedml_agent import hardware
from fedml_agent.trespass import Trespass, trespasses
from tests.fakes.nvml import FakeGpu, FakeMig, FakeNvml

TREES = {"a": [10, 11], "b": [20]}


@pytest.mark.parametrize(
    ("gpus", "leases", "found"),
    [
        ([FakeGpu(uuid="GPU-1", processes=[(11, None)])], {"a": ["GPU-1"]}, []),
        ([FakeGpu(uuid="GPU-1", processes=[(99, 5)])], {}, []),  # not ours
        (
            [FakeGpu(uuid="GPU-1", processes=[(11, 5), (20, 5)]), FakeGpu(uuid="GPU-2")],
            {"a": ["GPU-1"], "b": ["GPU-2"]},
            [Trespass("b", "GPU-1", 20)],
        ),
        ([FakeGpu(uuid="GPU-1", processes=[(10, 5)])], {"b": []}, [Trespass("a", "GPU-1", 10)]),
        (
            [
                FakeGpu(
                    uuid="GPU-1",
                    mig=[
                        FakeMig(uuid="MIG-1", processes=[(10, 5)]),
                        FakeMig(uuid="MIG-2", processes=[(20, 5)]),
                    ],
                )
            ],
            {"a": ["MIG-1"], "b": ["MIG-1"]},
            [Trespass("b", "MIG-2", 20)],
        ),
        ([FakeGpu(uuid="GPU-1", lost=True)], {"a": ["GPU-1"]}, []),
    ],
)
def test_who_uses_what_he_does_not_hold_is_named(
    tmp_path: Path, gpus: list[FakeGpu], leases: dict[str, list[str]], found: list[Trespass]
) -> None:
    read = hardware.readings(disk=tmp_path, nvml=FakeNvml(gpus))
    assert trespasses(read.gpus, leases, TREES) == found
