# SPDX-License-Identifier: Apache-2.0
"""Workspaces as packages: what goes in, what stays out, and that the bytes are always the same."""

import os
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

from fedml.errors import ConfigError
from fedml.package import build


def _write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def _packed(workspace: Path) -> list[str]:
    into = workspace.parent / "package.tar.gz"
    build(workspace, into)
    with tarfile.open(into) as archive:
        return sorted(archive.getnames())


TREE = {
    ".gitignore": "*.log\n/data/\n!keep.log\nbuild\n# a comment\n\n**/tmp/*.bin\n",
    "main.py": "",
    "a.log": "",
    "keep.log": "",
    "data/big.bin": "",
    "src/data/small.txt": "",
    "src/build/out.o": "",
    "src/tmp/x.bin": "",
    "src/tmp/x.txt": "",
    "sub/.gitignore": "!a.log\nsecret.*\n",
    "sub/a.log": "",
    "sub/b.log": "",
    "sub/secret.txt": "",
    "sub/deep/secret.key": "",
    "with space/file.txt": "",
    "__pycache__/main.pyc": "",
}


def test_ignore_files_mean_what_they_mean_to_git(tmp_path: Path) -> None:
    workspace = _write(tmp_path / "w", TREE)
    git = ["git", "-c", "core.excludesFile=/dev/null", "-C", str(workspace)]
    subprocess.run([*git, "init", "-q"], check=True)
    listed = subprocess.run(
        [*git, "ls-files", "-z", "--others", "--exclude-standard"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\0")

    expected = sorted(name for name in listed if name and "__pycache__" not in name)
    assert _packed(workspace) == expected
    assert "sub/a.log" in expected
    assert "sub/b.log" not in expected


def test_a_fedmlignore_keeps_out_what_git_keeps(tmp_path: Path) -> None:
    files = {".fedmlignore": "weights/\n", "weights/w.bin": "", "run.py": ""}
    assert _packed(_write(tmp_path / "w", files)) == [".fedmlignore", "run.py"]


def test_times_and_owners_do_not_change_the_bytes(tmp_path: Path) -> None:
    workspace = _write(tmp_path / "w", {"a.py": "1", "b/c.py": "2"})
    build(workspace, tmp_path / "one")
    os.utime(workspace / "a.py", (1, time.time() + 1000))
    build(workspace, tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("target", ["/etc/passwd", "../outside", "sub/../../outside"])
def test_a_link_out_of_the_workspace_is_refused_by_name(tmp_path: Path, target: str) -> None:
    workspace = _write(tmp_path / "w", {"a.py": ""})
    (workspace / "link").symlink_to(target)
    with pytest.raises(ConfigError, match=r"link .*/link leads out of the workspace") as caught:
        build(workspace, tmp_path / "p")
    assert ".fedmlignore" in caught.value.hint


def test_a_link_inside_the_workspace_stays_a_link(tmp_path: Path) -> None:
    workspace = _write(tmp_path / "w", {"sub/a.py": ""})
    (workspace / "sub" / "b.py").symlink_to("../sub/a.py")
    assert _packed(workspace) == ["sub/a.py", "sub/b.py"]


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    workspace = _write(tmp_path / "w", {"a.py": ""})
    os.mkfifo(workspace / "pipe")  # neither packed nor waited for
    assert _packed(workspace) == ["a.py"]
    (workspace / ".gitignore").mkdir()  # a directory of that name says nothing
    assert _packed(workspace) == ["a.py"]
