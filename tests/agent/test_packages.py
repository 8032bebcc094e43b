# SPDX-License-Identifier: Apache-2.0
"""Packages on a machine: what is laid out, what is refused, what stays, and what gives way."""

import asyncio
import hashlib
import os
import time
from pathlib import Path
from typing import Any

import pytest

from fedml_agent.https import BlobChanged
from fedml_agent.packages import BadPackage, NoRoom, Packages
from fedml_agent.policy import Policy
from fedml_protocol.blob import Blob
from fedml_protocol.package import File, Link, Package, Part


class Shelf:
    """A broker's blobs, and how often each was asked for."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.asked: list[str] = []

    def put(self, data: bytes) -> str:
        sha256 = hashlib.sha256(data).hexdigest()
        self.blobs[sha256] = data
        return sha256

    def package(self, files: dict[str, bytes], links: dict[str, str] | None = None) -> Blob:
        """All files in one part."""
        sha256 = self.put(b"".join(files.values()))
        part = Part(sha256, tuple(File(n, len(d), n.endswith(".sh")) for n, d in files.items()))
        links_ = tuple(Link(*link) for link in (links or {}).items())
        return self.manifest(Package((part,), links_))

    def manifest(self, package: Package) -> Blob:
        manifest = package.manifest()
        return Blob(sha256=self.put(manifest), size=len(manifest))

    def fetch(self, blob: Blob, into: Path, *, durable: bool) -> None:
        self.asked.append(blob.sha256)
        data = self.blobs[blob.sha256]
        if hashlib.sha256(data).hexdigest() != blob.sha256:
            raise BlobChanged("other bytes")
        into.write_bytes(data)


class Machine:
    """A cache with its policy."""

    def __init__(self, root: Path) -> None:
        self.shelf = Shelf()
        self.policy = Policy(disk_reserve=0)
        https: Any = self.shelf
        self.packages = Packages(root, lambda: https, lambda: self.policy)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    (tmp_path / "cache").mkdir()
    return Machine(tmp_path / "cache")


FILES = {"run.sh": b"echo hi\n", "src/a.py": b"", "src/b.py": os.urandom(100_000)}


async def test_a_workspace_is_laid_out_as_it_was(machine: Machine, tmp_path: Path) -> None:
    package = machine.shelf.package(FILES, {"src/last": "b.py"})
    await machine.packages.unpack(package, tmp_path / "work")
    found = {
        str(path.relative_to(tmp_path / "work")): path.read_bytes()
        for path in (tmp_path / "work").rglob("*")
        if path.is_file()
    }
    assert found == {**FILES, "src/last": FILES["src/b.py"]}
    assert (tmp_path / "work" / "src" / "last").readlink() == Path("b.py")
    assert os.access(tmp_path / "work" / "run.sh", os.X_OK)
    assert not os.access(tmp_path / "work" / "src" / "a.py", os.X_OK)


async def test_the_next_package_brings_only_what_it_changes(
    machine: Machine, tmp_path: Path
) -> None:
    shelf = machine.shelf
    big = Part(shelf.put(b"x" * 1000), (File("big", 1000),))
    for n in (1, 2):
        part = Part(shelf.put(b"%d" % n), (File("n", 1),))
        await machine.packages.unpack(shelf.manifest(Package((big, part))), tmp_path / f"w{n}")
    assert shelf.asked.count(big.sha256) == 1
    assert len(shelf.asked) == 5


async def test_what_a_task_writes_does_not_reach_the_next_one(
    machine: Machine, tmp_path: Path
) -> None:
    package = machine.shelf.package(FILES)
    for n in (1, 2):
        await machine.packages.unpack(package, tmp_path / f"w{n}")
        with (tmp_path / f"w{n}" / "src" / "b.py").open("r+b") as file:
            assert file.read() == FILES["src/b.py"]
            file.seek(0)
            file.write(b"changed")


async def test_two_tasks_at_once_fetch_a_package_once(machine: Machine, tmp_path: Path) -> None:
    package = machine.shelf.package(FILES)
    await asyncio.gather(*(machine.packages.unpack(package, tmp_path / str(n)) for n in range(3)))
    assert len(machine.shelf.asked) == 2


async def test_nothing_is_left_of_a_package_that_is_not_what_it_says(
    machine: Machine, tmp_path: Path
) -> None:
    shelf = machine.shelf
    short = Part(shelf.put(b"abc"), (File("a", 2), File("b", 5)))
    other = Part(hashlib.sha256(b"x").hexdigest(), (File("a", 1),))
    shelf.blobs[other.sha256] = b"y"
    (tmp_path / "outside").mkdir()
    escape = b'{"package":1,"parts":[],"links":[["a","../outside"]]}'
    for package, why in (
        (shelf.manifest(Package((short,))), "names 7 bytes"),
        (shelf.manifest(Package((other,))), "not the one that was offered"),
        (Blob(sha256=shelf.put(escape), size=len(escape)), "leads out"),
        (Blob(sha256=shelf.put(b"\x1f\x8b"), size=2), "not the manifest"),
        (Blob(sha256="ab" * 32, size=1 << 40), "too many"),
    ):
        with pytest.raises(BadPackage, match=why):
            await machine.packages.unpack(package, tmp_path / "work")
        assert not (tmp_path / "work").exists()
        assert not (tmp_path / "work.new").exists()


async def test_a_package_that_does_not_fit_is_not_fetched(machine: Machine, tmp_path: Path) -> None:
    huge = Part("ab" * 32, (File("huge", 1 << 60),))
    with pytest.raises(NoRoom, match="disk_reserve"):
        await machine.packages.unpack(machine.shelf.manifest(Package((huge,))), tmp_path / "work")
    assert len(machine.shelf.asked) == 1


def _aged(root: Path, **ages_s: float) -> None:
    for name, age_s in ages_s.items():
        (root / name).write_bytes(b"x" * 100)
        os.utime(root / name, (time.time() - age_s, time.time() - age_s))


def test_the_least_recently_used_go_when_they_are_too_many(tmp_path: Path) -> None:
    nobody: Any = None
    packages = Packages(tmp_path, nobody, lambda: Policy(package_disk=250))
    _aged(tmp_path, old=30, new=10, older=40, newer=5)
    packages.evict()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["new", "newer"]


def test_a_low_disk_costs_the_packages_that_nobody_uses_at_this_moment(tmp_path: Path) -> None:
    nobody: Any = None
    packages = Packages(tmp_path, nobody, Policy)
    _aged(tmp_path, used=3600, idle=5, **{"coming.part": 5, "rubbish.part": 3600})
    with packages._using(["used"]):
        packages.make_room()
        assert sorted(file.name for file in tmp_path.iterdir()) == ["coming.part", "used"]
    packages.make_room()
    assert [file.name for file in tmp_path.iterdir()] == ["coming.part"]
