# SPDX-License-Identifier: Apache-2.0
"""`fedml-agent hardware`."""

import click

from fedml_agent import hardware as reading
from fedml_agent.cli.options import home_option, json_option
from fedml_agent.home import Home

GB = 1e9


@click.command()
@home_option
@json_option
def hardware(home: Home, as_json: bool) -> None:
    """Show what this machine has: processors, memory, disk, network, accelerators.

    \b
    Examples:
      fedml-agent hardware
      fedml-agent hardware --json | jq .inventory.accelerators
    """
    found = reading.read(disk=home.root, nvml=reading.nvml_of_this_process())
    if as_json:
        click.echo(found.to_json())
        return
    machine, cpu = found.inventory.machine, found.inventory.cpu
    disk = found.readings.disk
    rows = [
        ("machine", f"{machine.hostname}, {machine.os}, {machine.kernel} {machine.arch}"),
        ("processors", f"{cpu.model}, {cpu.logical} threads, {cpu.usable:g} usable"),
        (
            "memory",
            f"{found.inventory.memory / GB:.1f} GB, "
            f"{found.readings.memory_available / GB:.1f} GB available",
        ),
        ("disk", f"{disk.path}: {disk.free / GB:.1f} of {disk.total / GB:.1f} GB free"),
        *(
            ("network", f"{i.name}, {'up' if i.up else 'down'}" + _speed(i.speed))
            for i in found.readings.interfaces
        ),
    ]
    accelerators = found.inventory.accelerators
    if accelerators.absent:
        rows.append(("accelerators", f"absent: {accelerators.absent}"))
    busy = {reading.index: reading for reading in found.readings.gpus}
    for gpu in accelerators.gpus:
        now = busy.get(gpu.index)
        text = f"{gpu.name}, {(gpu.memory or 0) / GB:.0f} GB, {gpu.uuid}"
        if gpu.mig is not None:
            text += f", MIG {'on' if gpu.mig else 'off'}"
        if gpu.fault:
            text += f", out of order: {gpu.fault}"
        elif now is not None:
            text += _busy(now)
        rows.append((f"GPU {gpu.index}", text))
        rows.extend(
            ("", f"MIG {i.profile}, {(i.memory or 0) / GB:.0f} GB, {i.uuid}") for i in gpu.instances
        )
        for process in (now.processes or ()) if now is not None else ():
            took = f", {process.memory / GB:.1f} GB" if process.memory is not None else ""
            rows.append(("", f"process {process.pid}{took}"))
    for name, text in rows:
        click.echo(f"{name:<14}{text}")


def _busy(now: reading.GpuReading) -> str:
    """What a GPU says of its present; in MIG mode it does not know how busy it is."""
    used = None if now.memory_used is None else now.memory_used / GB
    told = (
        (used, "{:.1f} GB used"),
        (now.utilisation, "{:.0f} % busy"),
        (now.temperature, "{:.0f} °C"),
        (now.power, "{:.0f} W"),
    )
    return "".join(f", {text.format(value)}" for value, text in told if value is not None)


def _speed(speed: int | None) -> str:
    return f", {speed} Mbit/s" if speed else ""
