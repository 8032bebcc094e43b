# SPDX-License-Identifier: Apache-2.0
"""What a task leaves behind is read as its own file or not at all."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fedml_agent.belongings import NotAFile, opened


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "device.key").write_text("the key")
    (tmp_path / "session" / "out").mkdir(parents=True)
    return tmp_path / "session"


def test_a_file_can_be_read_more_than_once(folder: Path) -> None:
    (folder / "out" / "update").write_text("mine")
    with opened(folder, "out", "update") as path:
        assert [path.read_text(), path.read_text()] == ["mine", "mine"]
        assert path.stat().st_size == 4


def test_it_stays_the_same_file_when_another_is_put_in_its_place(folder: Path) -> None:
    update = folder / "out" / "update"
    update.write_text("mine")
    with opened(folder, "out", "update") as path:
        update.unlink()
        update.symlink_to(folder.parent / "private" / "device.key")
        assert path.read_text() == "mine"


def _link(folder: Path) -> None:
    (folder / "out" / "update").symlink_to(folder.parent / "private" / "device.key")


def _linked_folder(folder: Path) -> None:
    (folder / "out").rmdir()
    (folder / "out").symlink_to(folder.parent / "private")
    (folder.parent / "private" / "update").write_text("the key")


def _pipe(folder: Path) -> None:
    os.mkfifo(folder / "out" / "update")


def _folder(folder: Path) -> None:
    (folder / "out" / "update").mkdir()


def _file_for_folder(folder: Path) -> None:
    (folder / "out").rmdir()
    (folder / "out").write_text("")


@pytest.mark.parametrize("leave", [_link, _linked_folder, _pipe, _folder, _file_for_folder])
def test_anything_else_is_refused(folder: Path, leave: Callable[[Path], None]) -> None:
    leave(folder)
    with pytest.raises(NotAFile), opened(folder, "out", "update"):
        pass


@pytest.mark.parametrize("name", ["..", ".", "", "../private/device.key", "/etc/passwd", "a\0b"])
def test_a_name_leads_nowhere_else(folder: Path, name: str) -> None:
    with pytest.raises(NotAFile), opened(folder, "out", name):
        pass


def test_what_is_not_there_is_missing(folder: Path) -> None:
    with pytest.raises(FileNotFoundError), opened(folder, "out", "update"):
        pass


def test_no_descriptor_is_left_open(folder: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    _link(folder)
    for name in ("update", "none", ".."):
        with pytest.raises((NotAFile, FileNotFoundError)), opened(folder, "out", name):
            pass
    assert len(list(Path("/proc/self/fd").iterdir())) == before
