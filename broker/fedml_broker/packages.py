# SPDX-License-Identifier: Apache-2.0
"""Packages as runs name them: all their blobs are here, and stay as long as the run is listed."""

import asyncio
import shutil
from dataclasses import dataclass
from pathlib import Path

import msgspec

from fedml_broker.blobs import Blobs
from fedml_broker.problems import Problem
from fedml_protocol.blob import Blob
from fedml_protocol.errors import MalformedMessage
from fedml_protocol.package import MAX_BYTES, Package, parse

_CHUNK = 1024 * 1024


class PackageRef(msgspec.Struct, frozen=True):
    """An uploaded package, by the hash of its manifest."""

    sha256: str
    size: int = 0


@dataclass(frozen=True, slots=True)
class Uploaded:
    """A package whose blobs are all here.

    Attributes:
        blobs: The manifest and the parts.
        content_bytes: Of all files together.
    """

    manifest: Blob
    blobs: tuple[str, ...]
    content_bytes: int

    def release(self, blobs: Blobs, owner: str) -> None:
        """Something refers to it now: the upload need not keep it any longer."""
        for sha256 in self.blobs:
            blobs.release(sha256, owner)


async def check(blobs: Blobs, ref: PackageRef, owner: str) -> Uploaded:
    """The package, claimed for `owner` until he refers to it.

    Raises:
        Problem: 422, it is none, or not all of it was uploaded.
    """
    size = blobs.size(ref.sha256)
    if size is None:
        raise Problem(
            422, "the package was not uploaded", ref.sha256, hint="upload it first, then submit"
        )
    if size > MAX_BYTES:
        raise Problem(422, "not a package", f"its manifest has {size} bytes, at most {MAX_BYTES}")
    blobs.claim(ref.sha256, owner)
    package = await asyncio.to_thread(read, blobs, ref.sha256)
    for part in package.parts:
        found = blobs.size(part.sha256)
        if found is None:
            raise Problem(
                422,
                "a part of the package was not uploaded",
                part.sha256,
                hint="upload it first, then submit",
            )
        if found != part.blob.size:
            raise Problem(
                422,
                "the package is not what it says",
                f"the files in {part.sha256} have {part.blob.size} bytes, and it has {found}",
            )
        blobs.claim(part.sha256, owner)
    manifest = Blob(sha256=ref.sha256, size=size)
    blobs_ = (ref.sha256, *(part.sha256 for part in package.parts))
    return Uploaded(manifest, blobs_, package.size)


def read(blobs: Blobs, sha256: str) -> Package:
    """What a manifest says.

    Raises:
        Problem: 404, it is not here; 422, it is none.
    """
    try:
        return parse(blobs.path(sha256).read_bytes())
    except MalformedMessage as error:
        raise Problem(422, "not a package", str(error)) from error


def unpack(blobs: Blobs, sha256: str, into: Path) -> None:
    """Lay the files of a package into a new directory.

    Raises:
        Problem: 404, some of it is not here; 422, it is none.
    """
    package = read(blobs, sha256)
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir(mode=0o700, parents=True)
    for part in package.parts:
        with blobs.path(part.sha256).open("rb") as data:
            for file in part.files:
                target = into / file.path
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("xb") as out:
                    left = file.size
                    while left and (piece := data.read(min(left, _CHUNK))):
                        left -= out.write(piece)
                target.chmod(0o755 if file.executable else 0o644)
    for link in package.links:
        target = into / link.path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(link.target)
