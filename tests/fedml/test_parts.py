# SPDX-License-Identifier: Apache-2.0
"""Workspaces on their way: what has not changed is neither read nor sent."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedml.client import Client
from fedml.errors import BrokerUnreachable, ConfigError
from fedml.parts import index, send
from tests.place import Place


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with Place(tmp_path_factory.mktemp("broker")) as place:
        yield place


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three hundred small files and a large one, all at rest."""
    monkeypatch.setattr("fedml.parts._RESTLESS_NS", 0)
    root = tmp_path / "w"
    for n in range(300):
        file = root / f"d{n % 7}" / f"{n}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{n}\n")
    (root / "large.bin").write_bytes(os.urandom(600_000))
    (root / "run.sh").write_text("true\n")
    (root / "run.sh").chmod(0o755)
    (root / "link").symlink_to("run.sh")
    return root


@pytest.fixture
def watched(broker: Place, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of what is put."""
    sizes: list[int] = []
    put = Client.put

    def counted(self: Client, sha256: str, size: int, *rest: Any, **more: Any) -> None:
        sizes.append(size)
        put(self, sha256, size, *rest, **more)

    monkeypatch.setattr(Client, "put", counted)
    return sizes


def test_an_unchanged_workspace_is_neither_read_nor_sent_again(
    broker: Place, workspace: Path, watched: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = send(broker.client, workspace)
    assert sum(watched) > 600_000
    assert len(watched) < 30
    watched.clear()
    monkeypatch.setattr("fedml.parts._read", None)
    assert send(broker.client, workspace) == first
    assert watched == []


def test_one_changed_file_costs_itself_and_its_neighbours(
    broker: Place, workspace: Path, watched: list[int]
) -> None:
    send(broker.client, workspace)
    watched.clear()
    (workspace / "d3" / "3.txt").write_text("changed\n")
    (workspace / "d4" / "new.txt").write_text("a new one\n")
    send(broker.client, workspace)
    manifest = watched.pop()
    assert len(watched) <= 2
    assert sum(watched) < 2000
    assert manifest < 20_000


def test_a_copy_elsewhere_is_the_same_package(workspace: Path, tmp_path: Path) -> None:
    shutil.copytree(workspace, tmp_path / "copy", symlinks=True)
    for file in (tmp_path / "copy").rglob("*.txt"):
        os.utime(file, (1, 1))
    one, two = index(workspace), index(tmp_path / "copy")
    assert one.package.manifest() == two.package.manifest()
    assert [f.path for f in one.package.files if f.executable] == ["run.sh"]
    assert [(link.path, link.target) for link in one.package.links] == [("link", "run.sh")]


def test_a_change_that_keeps_size_and_time_is_seen_all_the_same(workspace: Path) -> None:
    before = index(workspace).package
    file = workspace / "d3" / "3.txt"
    then = file.stat().st_mtime_ns
    file.write_text("4\n")
    os.utime(file, ns=(then, then))
    assert index(workspace).package != before


def test_a_file_that_was_just_written_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "a").write_text("1")
    index(tmp_path / "w")
    monkeypatch.setattr("fedml.parts._hash", lambda group: "ab" * 32)
    (part,) = index(tmp_path / "w").package.parts
    assert part.sha256 == "ab" * 32


def test_a_damaged_note_costs_only_the_reading(workspace: Path, tmp_path: Path) -> None:
    before = index(workspace, tmp_path / "cache").package
    (note,) = (tmp_path / "cache").iterdir()
    for damage in (b"", b"\xff{", b"[1]"):
        note.write_bytes(damage)
        assert index(workspace, tmp_path / "cache").package == before


def test_a_file_that_is_written_while_it_is_sent_is_named(broker: Place, tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    file = tmp_path / "w" / "growing.log"
    file.write_bytes(os.urandom(3_000_000))

    def told(done: int, total: int) -> None:
        file.write_bytes(b"x" * 3_000_000)

    with pytest.raises(ConfigError, match=r"growing\.log was changed"):
        send(broker.client, tmp_path / "w", told)


def test_an_upload_that_is_cut_off_goes_on_where_it_stopped(broker: Place, tmp_path: Path) -> None:
    file = tmp_path / "large.bin"
    file.write_bytes(os.urandom(32_000_000))

    def cut(done: int, total: int) -> None:
        if done > 24_000_000:  # of which the kernel's buffers, on both sides, may hold some ten
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broker.client.upload(file, cut)
    begun: list[int] = []
    blob = broker.client.upload(file, lambda done, total: begun.append(done))
    assert begun[0] > 8_000_000
    assert broker.client.lacks([blob["sha256"]]) == {}


def test_an_upload_goes_on_where_it_stands_when_more_has_come_than_was_known(
    broker: Place, tmp_path: Path
) -> None:
    """The broker may still read what a client had sent before it was cut off."""
    data = os.urandom(300_000)
    (tmp_path / "small.bin").write_bytes(data)
    sha256 = hashlib.sha256(data).hexdigest()

    def read(start: int) -> Iterator[bytes]:
        yield data[start:]

    def cut(start: int) -> Iterator[bytes]:
        yield data[:200_000]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broker.client.put(sha256, len(data), cut)
    broker.client.put(sha256, len(data), read, start=1000)  # what was known before the rest came
    assert broker.client.has(sha256)


def test_a_broker_that_does_not_come_back_is_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedml.client._RESUMPTIONS", 2)
    with Place(tmp_path) as place:
        client = place.client
    with pytest.raises(BrokerUnreachable, match="the upload was cut off") as caught:
        client.put("ab" * 32, 1, lambda start: iter([b"x"]))
    assert "goes on from there" in caught.value.hint


def _sha(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
