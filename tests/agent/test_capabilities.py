# SPDX-License-Identifier: Apache-2.0
"""What happens on machines that cannot give a protection, and whether they admit it.

Such machines are made with the kernel's own limits on namespaces, which hold inside a user
namespace, and with filters of system calls that answer as a machine without them would.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedml_agent import view
from fedml_agent.sandbox import PROTECTIONS, Capability, capabilities

WITHOUT = """
import asyncio, ctypes, json, struct, sys
from pathlib import Path
x86 = {machine!r} == "x86_64"
CALLS = {{
    # number of the call, value of its first argument if that matters, error
    "mount": (165 if x86 else 40, None, 1),  # user namespaces, but no right to do anything in them
    "landlock": (444, None, 95),
    "filters": (157 if x86 else 167, 22, 22),
}}
def forbid(number, first, error):
    argument = [(0x20, 0, 0, 16), (0x15, 0, 1, first)] if first is not None else []
    code = [(0x20, 0, 0, 0), (0x15, 0, len(argument) + 1, number), *argument]
    code += [(6, 0, 0, 0x50000 | error), (6, 0, 0, 0x7FFF0000)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in code))
    program = struct.pack("HxxxxxxQ", len(code), ctypes.addressof(program)), program
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program[0], 0, 0) == 0
for name in {limits!r}:
    if name in CALLS:
        forbid(*CALLS[name])
    else:
        Path(f"/proc/sys/user/max_{{name}}_namespaces").write_text("0")
sys.path.insert(0, {tests!r})
from test_sandbox import Tasks
from fedml_agent.sandbox import capabilities
from fedml_agent.tending import TaskRefused
async def main():
    tasks = Tasks(Path({folder!r}))
    found = {{name: can.works for name, can in capabilities().items()}}
    try:
        task = await tasks.start("sh", "-c", "setsid sleep infinity & exit 3", {spec})
        print(json.dumps([found, (await task.ended()).code, task.facts["missing"]]))
    except TaskRefused as refusal:
        print(json.dumps([found, str(refusal), {{}}]))
asyncio.run(main())
"""


def on_a_machine_without(limits: list[str], folder: Path, spec: str) -> Any:
    script = WITHOUT.format(
        limits=limits,
        folder=str(folder),
        spec=spec,
        tests=str(Path(__file__).parent),
        machine=os.uname().machine,
    )
    inside = ["unshare", "--user", "--map-root-user"]
    done = subprocess.run([*inside, sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("limits", "spec", "protection"),
    [
        (["net", "filters"], "network=False", "network"),
        (["user", "landlock"], "network=False", "read_only"),
        (["mnt", "landlock"], "hide=[Path('/etc/ssl')]", "hide"),
        (["mount", "landlock"], "hide=[Path('/etc/ssl')]", "hide"),
    ],
)
def test_a_required_protection_that_is_missing_refuses_the_task(
    tmp_path: Path, limits: list[str], spec: str, protection: str
) -> None:
    found, said, _ = on_a_machine_without(limits, tmp_path, spec)
    assert f"this machine cannot give the protection '{protection}'" in said
    assert found[protection] is False


@pytest.mark.parametrize(
    ("limits", "spec", "missing"),
    [
        (["net", "filters"], "network=False, optional=['network']", {"network"}),
        (["pid"], "", {"pids"}),
        (["user"], "network=False, hide=[Path('/etc/ssl')]", {"pids"}),
        (
            ["mount", "landlock"],
            "optional=['read_only', 'hide']",
            {"read_only", "hide", "pids"},
        ),
        (
            ["user", "landlock", "filters"],
            "network=False, optional=['network', 'read_only', 'hide']",
            {"network", "read_only", "hide", "pids"},
        ),
    ],
)
def test_an_optional_protection_that_is_missing_is_reported_and_the_task_runs(
    tmp_path: Path, limits: list[str], spec: str, missing: set[str]
) -> None:
    found, code, told = on_a_machine_without(limits, tmp_path, spec)
    assert code == 3
    assert set(told) == missing
    assert all(told.values()), "each with its reason"
    assert not any(found[name] for name in missing)


def test_a_task_says_in_its_log_what_it_runs_without(tmp_path: Path) -> None:
    on_a_machine_without(["user"], tmp_path, "network=False, say_missing=True")
    said = (tmp_path / "t0" / "err.0").read_text()
    assert said.startswith("fedml: this machine gives tasks no protection 'pids': no user names")
    assert said.count("\n") == 1


def test_capabilities_give_a_reason_for_each_thing_that_does_not_work() -> None:
    found = capabilities()
    assert set(found) == {"user_namespaces", "cgroups", *PROTECTIONS}
    for can in found.values():
        assert can.works == (can.why_not == "")


@pytest.mark.parametrize(
    ("limits", "by"),
    [
        ([], {"namespaces"}),
        (["user"], {"Landlock", "a filter"}),
    ],
)
def test_capabilities_say_by_what_means(tmp_path: Path, limits: list[str], by: set[str]) -> None:
    ask = "print([c.by for n, c in capabilities().items() if n in ('hide', 'network')])"
    script = WITHOUT.partition("async def main")[0].format(
        limits=limits, tests=str(Path(__file__).parent), machine=os.uname().machine
    )
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", sys.executable, "-c", script + ask],
        capture_output=True,
        text=True,
    )
    assert set(ast.literal_eval(done.stdout)) == by, done.stderr


def test_capabilities_that_cannot_be_tried_are_not_claimed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "view.py"
    broken.write_text("raise SystemExit('no such luck')")
    monkeypatch.setattr(view, "__file__", str(broken))
    found = capabilities.__wrapped__()
    assert found["hide"] == Capability(False, "it could not be tried: no such luck")
