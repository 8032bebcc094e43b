# SPDX-License-Identifier: Apache-2.0
"""Machines that have joined, and what they have."""

from fedml import devices
from fedml.api.account import Home, connect
from fedml.devices import Device


def device_list(*, home: Home = None) -> list[Device]:
    """Every machine that you may use."""
    return Device.list(at=connect(home=home))


def device_show(device: str, *, home: Home = None) -> Device:
    """One machine, by name or id."""
    return Device.find(device, at=connect(home=home))


def resource_type(*, home: Home = None) -> list[tuple[str, str]]:
    """The accelerators that there are: what a job file's `resource_type` says, and their name."""
    found = devices.resources(device_list(home=home))
    return [(one.resource_type, one.gpu) for one in found if one.gpu]
