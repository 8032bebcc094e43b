# SPDX-License-Identifier: Apache-2.0
"""A package: which files a workspace has, and in which blobs their bytes are.

A package is known by the SHA-256 of its manifest, which names every blob by its own: whoever
holds the one hash has all bytes verified. A blob holds whole files, one after another: a large one
alone, small ones together, so that ten thousand of them are not ten thousand requests, and a change
of one costs no more than its neighbours.

    {"package": 1,
     "parts": [{"sha256": "ab…", "files": [["src/train.py", 812], ["run.sh", 90, "x"]]}],
     "links": [["latest", "runs/7"]]}

`parse` refuses whatever could reach beyond the directory that it is unpacked into, so that who
unpacks need only write what it says: files first, links last.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from fedml_protocol.blob import Blob
from fedml_protocol.errors import MalformedMessage

VERSION = 1
# About half a million files. Whoever reads a manifest holds it in memory.
MAX_BYTES = 64 << 20
_LONGEST_NAME = 255


@dataclass(frozen=True, slots=True)
class File:
    """One file, by its path in the workspace."""

    path: str
    size: int
    executable: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """One blob: the bytes of its files, in this order."""

    sha256: str
    files: tuple[File, ...]

    @property
    def blob(self) -> Blob:
        """The same, to be fetched."""
        return Blob(sha256=self.sha256, size=sum(file.size for file in self.files))


@dataclass(frozen=True, slots=True)
class Link:
    """One symbolic link. Its target is relative and stays inside."""

    path: str
    target: str


@dataclass(frozen=True, slots=True)
class Package:
    """All of a workspace but its bytes."""

    parts: tuple[Part, ...] = ()
    links: tuple[Link, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(part.blob.size for part in self.parts)

    @property
    def files(self) -> Iterator[File]:
        """Every file."""
        return (file for part in self.parts for file in part.files)

    def manifest(self) -> bytes:
        """As it travels; the same files give the same bytes."""
        parts = [{"sha256": p.sha256, "files": [_row(f) for f in p.files]} for p in self.parts]
        links = [[link.path, link.target] for link in self.links]
        said = {"package": VERSION, "parts": parts, "links": links}
        return json.dumps(said, separators=(",", ":"), sort_keys=True).encode()


def _row(file: File) -> list[Any]:
    return [file.path, file.size, *(["x"] if file.executable else [])]


def parse(manifest: bytes) -> Package:
    """Read a manifest that anybody may have written.

    Raises:
        MalformedMessage: It is none, or something in it reaches out of the workspace.
    """
    if len(manifest) > MAX_BYTES:
        raise MalformedMessage(f"the manifest of a package has at most {MAX_BYTES} bytes")
    try:
        said = json.loads(manifest)
        if said["package"] != VERSION:
            raise MalformedMessage(f"a package of a form that is not known: {said['package']!r}")
        package = Package(
            tuple(
                Part(part["sha256"], tuple(_file(*row) for row in part["files"]))
                for part in said["parts"]
            ),
            tuple(Link(path, target) for path, target in said["links"]),
        )
        _check(package)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise MalformedMessage(f"not the manifest of a package: {error}") from error
    return package


def _file(path: str, size: int, mode: str = "") -> File:
    if type(size) is not int or size < 0 or mode not in ("", "x"):
        raise MalformedMessage(f"{path!r}: {size!r} is no size, or {mode!r} no mode")
    return File(path, size, mode == "x")


def _check(package: Package) -> None:
    """Each path once, inside, and none below a file or a link."""
    for part in package.parts:
        if not part.files:
            raise MalformedMessage(f"the part {part.sha256} has no files")
        _ = part.blob  # refuses what is no hash
    leaves: set[str] = set()
    folders: set[str] = set()
    for path in [file.path for file in package.files] + [link.path for link in package.links]:
        _check_path(path)
        if path in leaves:
            raise MalformedMessage(f"{path!r} is there twice")
        leaves.add(path)
        above = path.rpartition("/")[0]
        while above and above not in folders:
            folders.add(above)
            above = above.rpartition("/")[0]
    if both := leaves & folders:
        raise MalformedMessage(f"{min(both)!r} is a directory and something else")
    for link in package.links:
        if leads_out(link.path, link.target):
            raise MalformedMessage(f"the link {link.path!r} leads out, to {link.target!r}")


def _check_path(path: str) -> None:
    if not isinstance(path, str):
        raise MalformedMessage(f"{path!r} is no path")
    for name in path.split("/"):
        if name in ("", ".", "..") or "\0" in name or len(os.fsencode(name)) > _LONGEST_NAME:
            raise MalformedMessage(f"{path[:300]!r} is no path inside a package")


def leads_out(path: str, target: str) -> bool:
    """Whether a link at `path` may lead out of the workspace that it lies in.

    `..` counts at the beginning only: after a name it would be taken of wherever that name leads.
    """
    if not isinstance(target, str) or not target or "\0" in target or target.startswith("/"):
        return True
    names = [name for name in target.split("/") if name not in ("", ".")]
    up = next((n for n, name in enumerate(names) if name != ".."), len(names))
    return ".." in names[up:] or up > len(PurePosixPath(path).parts) - 1
