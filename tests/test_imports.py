# SPDX-License-Identifier: Apache-2.0
"""Who may import whom. This table is the architecture; changing it is a decision."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

MAY_IMPORT: dict[str, set[str]] = {
    "protocol/fedml_protocol": set(),
    "fedml": {"fedml_protocol"},
    "agent/fedml_agent": {"fedml_protocol"},
    "broker/fedml_broker": {"fedml_protocol"},
}
OURS = {Path(folder).name for folder in MAY_IMPORT}
# The agent idles in tens of megabytes: none of these may find its way into it.
HEAVY = {"numpy", "torch", "aiohttp", "sqlalchemy", "sqlite_utils", "msgspec"}


def _imports(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_package_imports_only_what_the_table_allows(folder: str) -> None:
    allowed = MAY_IMPORT[folder] | {Path(folder).name}
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    for file in files:
        assert _imports(file) & OURS <= allowed, file


def test_the_agent_stays_small() -> None:
    for file in (ROOT / "agent/fedml_agent").rglob("*.py"):
        assert not _imports(file) & HEAVY, file


@pytest.mark.parametrize(
    ("start", "never"),
    [
        (
            "fedml_agent.daemon, fedml_agent.cli.run",
            HEAVY | {"safetensors", "fedml_broker", "fedml"},
        ),
        ("fedml, fedml.cli", HEAVY | {"safetensors", "fedml_broker", "fedml_agent"}),
    ],
)
def test_what_a_slim_installation_starts_needs_nothing_of_the_extras(
    start: str, never: set[str]
) -> None:
    code = f"import {start}, sys; print(*{{m.partition('.')[0] for m in sys.modules}})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(found.stdout.split()) & never


def test_a_broker_without_its_extra_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['sqlalchemy'] = None; sys.argv = ['fedml-broker', 'up'];"
        "from fedml_broker.cli import main; main()"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 1
    assert "pip install 'fedml-agent[broker]'" in found.stderr
    assert "Traceback" not in found.stderr
