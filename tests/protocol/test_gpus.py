# SPDX-License-Identifier: Apache-2.0
"""Names of accelerators: as NVML tells them, and as people ask for them."""

import pytest

from fedml_protocol.gpus import is_model

GB = 10**9
# As NVML reports them: name, bytes of memory.
CARDS = {
    "4090": ("NVIDIA GeForce RTX 4090", 24564 * 2**20),
    "4090 laptop": ("NVIDIA GeForce RTX 4090 Laptop GPU", 16376 * 2**20),
    "4070": ("NVIDIA GeForce RTX 4070", 12282 * 2**20),
    "4070 Ti": ("NVIDIA GeForce RTX 4070 Ti", 12282 * 2**20),
    "A100 40": ("NVIDIA A100-SXM4-40GB", 40960 * 2**20),
    "A100 80": ("NVIDIA A100 80GB PCIe", 81920 * 2**20),
    "A100 slice": ("NVIDIA A100-SXM4-40GB 1g.5gb", 4864 * 2**20),
    "H100": ("NVIDIA H100 80GB HBM3", 81559 * 2**20),
    "H100 PCIe": ("NVIDIA H100 PCIe", 81559 * 2**20),
    "V100 16": ("Tesla V100-SXM2-16GB", 16160 * 2**20),
    "T4": ("Tesla T4", 15360 * 2**20),
    "A10": ("NVIDIA A10", 23028 * 2**20),
    "A10G": ("NVIDIA A10G", 23028 * 2**20),
    "L4": ("NVIDIA L4", 23034 * 2**20),
    "L40S": ("NVIDIA L40S", 46068 * 2**20),
    "A6000": ("NVIDIA RTX A6000", 49140 * 2**20),
    "6000 Ada": ("NVIDIA RTX 6000 Ada Generation", 49140 * 2**20),
}


@pytest.mark.parametrize(
    ("wanted", "cards"),
    [
        ("RTX-4090", {"4090"}),
        ("RTX4090", {"4090"}),
        ("nvidia geforce rtx 4090", {"4090"}),
        ("RTX-4090-Laptop", {"4090 laptop"}),
        ("RTX-4070", {"4070"}),
        ("RTX-4070-Ti", {"4070 Ti"}),
        ("A100", {"A100 40", "A100 80"}),
        ("A100-80G", {"A100 80"}),
        ("A100-80GB-SXM", {"A100 80"}),
        ("A100-40G", {"A100 40", "A100 80"}),
        ("H100", {"H100", "H100 PCIe"}),
        ("H100-80GB-HBM3", {"H100", "H100 PCIe"}),
        ("V100-32GB", set()),
        ("T4", {"T4"}),
        ("A10", {"A10"}),
        ("A10G", {"A10G"}),
        ("L4", {"L4"}),
        ("L40S", {"L40S"}),
        ("RTXA6000", {"A6000"}),
        ("RTX-A6000", {"A6000"}),
        ("RTX6000-Ada", {"6000 Ada"}),
        ("", set(CARDS)),
    ],
)
def test_a_model_is_found_however_it_is_spelled(wanted: str, cards: set[str]) -> None:
    assert {name for name, card in CARDS.items() if is_model(wanted, *card)} == cards
