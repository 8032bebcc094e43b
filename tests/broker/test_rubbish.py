# SPDX-License-Identifier: Apache-2.0
"""What is discarded keeps its place until other bytes take it, and never longer than it may."""

from pathlib import Path

import pytest

from fedml_broker import rubbish
from fedml_broker.blobs import Blobs
from fedml_broker.rubbish import Rubbish

MB = 1 << 20


@pytest.fixture(autouse=True)
def room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk of which much is free, whatever this machine has."""
    monkeypatch.setattr(rubbish, "free_bytes", lambda directory: 1 << 40)


def file(folder: Path, name: str, size: int = MB) -> Path:
    path = folder / name
    path.write_bytes(bytes(size))
    return path


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_as_much_goes_as_comes_the_oldest_first(tmp_path: Path) -> None:
    heap = Rubbish(reserve_bytes=0)
    for name in ("a", "b", "c"):
        heap.add(file(tmp_path, name))
    assert left(tmp_path) == ["a", "b", "c"]
    heap.make_way(1)
    assert left(tmp_path) == ["b", "c"]
    heap.make_way(MB - 1)
    assert left(tmp_path) == ["b", "c"], "what is gone makes room for this, too"
    heap.make_way(MB)
    assert left(tmp_path) == ["c"]
    heap.make_way(5 * MB)
    heap.add(file(tmp_path, "later"))
    assert left(tmp_path) == ["later"], "what came before is no debt"
    heap.empty()
    assert left(tmp_path) == []


def test_only_so_much_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rubbish, "_MOST_BYTES", 2 * MB)
    heap = Rubbish(reserve_bytes=0)
    for name in ("a", "b", "c"):
        heap.add(file(tmp_path, name))
    heap.add(file(tmp_path, "small", 10))
    assert left(tmp_path) == ["b", "c"]


def test_on_a_disk_with_little_room_nothing_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rubbish, "free_bytes", lambda directory: 3 << 30)
    Rubbish(reserve_bytes=2 << 30).add(file(tmp_path, "a"))
    assert left(tmp_path) == []


async def test_a_discarded_blob_is_gone_for_everybody_and_its_place_at_the_end(
    tmp_path: Path,
) -> None:
    blobs = Blobs(tmp_path, reserve_bytes=0)
    blob = await blobs.add(bytes(MB))
    blobs.release(blob.sha256, "broker")
    assert await blobs.discard(blob.sha256)
    assert blobs.size(blob.sha256) is None
    assert len(left(tmp_path / "trash")) == 1
    again = await blobs.add(bytes(MB))
    assert blobs.size(again.sha256) == MB
    blobs.close()
    assert left(tmp_path / "trash") == []
