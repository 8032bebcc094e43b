# SPDX-License-Identifier: Apache-2.0
"""`fedml device`: each machine, and what all have together."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedml.cli.device import _has
from fedml.devices import Device, resources
from fedml_protocol.gpus import is_model, short_name
from tests.fedml.cli.conftest import Fedml

GIB = 2**30


def _device(name: str, status: str, *gpus: tuple[str, int]) -> Device:
    capacity: dict[str, Any] = {
        "slots": 1, "cpus": 4, "memory_bytes": 8 * GIB, "disk_bytes": GIB, "kinds": ["launch"],
        "gpus": [{"uuid": str(i), "name": n, "memory_bytes": m} for i, (n, m) in enumerate(gpus)],
    }  # fmt: skip
    return Device.of(
        {"id": f"d-{name}", "name": name, "status": status, "labels": {}, "tasks": [],
         "capacity": capacity}
    )  # fmt: skip


def test_resources_of_all_machines_are_counted_by_model_and_memory() -> None:
    found = resources(
        [
            _device("a", "online", ("NVIDIA A100-SXM4-80GB", 80 * GIB), ("NVIDIA L4", 24 * GIB)),
            _device("b", "offline", *[("NVIDIA A100-SXM4-80GB", 80 * GIB - 1)] * 2),
        ]
    )
    told = [(r.resource_type, r.count, r.online, r.machines) for r in found]
    assert told == [
        ("CPU", 8, 4, ("a", "b")),
        ("A100-80GB", 3, 1, ("a", "b")),
        ("L4", 1, 1, ("a",)),
    ]
    assert resources([]) == []


def test_what_a_machine_has_is_counted_by_model() -> None:
    device = _device("a", "online", ("L4", GIB), ("A100 1g.5gb", GIB), ("L4", GIB))
    assert _has(device) == "4 CPUs, 8.6 GB, 2 × L4, 1 × A100 1g.5gb"


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("NVIDIA GeForce RTX 4070 Ti", "RTX-4070-TI"),
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("Tesla T4", "T4"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "A100-1g.5gb"),
        ("NVIDIA GH200 480GB", "GH200-480GB"),  # of which 96 are the GPU's
    ],
)
def test_what_to_ask_for_is_short(name: str, short: str) -> None:
    assert short_name(name) == short
    assert is_model(short, name, 80 * 10**9)


_WORDS = st.sampled_from(["NVIDIA", "A100-SXM4-40GB", "MIG", "1g.5gb", "H100", "80GB", "+me", "Ti"])


@given(st.text(max_size=40) | st.lists(_WORDS).map(" ".join), st.integers(0, 1 << 40))
def test_what_to_ask_for_is_that_model(name: str, memory: int) -> None:
    assert is_model(short_name(name), name, memory)


def test_the_command_lists_them(fedml: Fedml) -> None:
    shown = fedml("device", "resources").stdout.splitlines()
    assert shown[0].startswith("TO ASK FOR")
    assert shown[1].startswith("CPU")
    (cpus,) = json.loads(fedml("device", "resources", "--json").stdout)
    assert (cpus["resource_type"], cpus["machines"]) == ("CPU", ["one", "two"])
    assert fedml("device", "resource-type").stdout.splitlines() == shown
    assert "one" in fedml("device", "list").stdout
    assert "takes" in fedml("device", "show", "two").stdout
