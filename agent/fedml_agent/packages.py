# SPDX-License-Identifier: Apache-2.0
"""Packages: fetched by hash, checked, unpacked. Nothing of a package is used before its hash is."""

import asyncio
import contextlib
import shutil
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

from fedml_agent.errors import AgentError
from fedml_agent.https import BlobChanged, Https, patiently
from fedml_protocol.blob import Blob

# So many packages stay, the least recently used go first.
_KEEP = 8


# A package is touched when it is used, and unpacked by then.
_IN_USE_S = 600.0


class BadPackage(AgentError):
    """The bytes are not what the offer names, or no archive that may be unpacked."""


class Packages:
    """The cache of one home."""

    def __init__(self, root: Path, https: Callable[[], Https]) -> None:
        self._root = root
        self._https = https
        self._fetching: dict[str, asyncio.Lock] = {}

    async def unpack(
        self, package: Blob, into: Path, *, unless: Callable[[], bool] = lambda: False
    ) -> None:
        """Fetch the package, if it is not here, and unpack it. A broker that is away is waited for.

        Args:
            unless: Says that nobody needs it any more.

        Raises:
            BadPackage: Other bytes than promised, or a harmful archive.
            BrokerUnreachable: It could not be fetched before nobody needed it.
        """
        file = self._root / f"{package.sha256}.tar.gz"
        async with self._fetching.setdefault(package.sha256, asyncio.Lock()):
            if not file.exists():
                try:
                    await patiently(
                        lambda: self._https().fetch(package, file, durable=True), unless=unless
                    )
                except BlobChanged as error:
                    raise BadPackage(
                        f"the package is not the one that was offered: {error}"
                    ) from error
            file.touch()
        try:
            await asyncio.to_thread(_extract, file, into)
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise BadPackage(f"the package cannot be unpacked: {error}") from error
        self._evict()

    def make_room(self) -> None:
        """The disk is low: drop what nobody uses at this moment. It can be fetched again."""
        for file in self._root.glob("*.tar.gz"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - file.stat().st_mtime > _IN_USE_S:
                    file.unlink()

    def _evict(self) -> None:
        files = sorted(self._root.glob("*.tar.gz"), key=lambda f: f.stat().st_mtime, reverse=True)
        for file in files[_KEEP:]:
            file.unlink(missing_ok=True)


def _extract(file: Path, into: Path) -> None:
    # Under another name until it is complete: a half of it must never look like a workspace.
    begun = into.with_name(into.name + ".new")
    shutil.rmtree(begun, ignore_errors=True)
    begun.mkdir(mode=0o700, parents=True)
    try:
        with tarfile.open(file) as archive:
            # "data" refuses absolute paths, links that lead outside, devices, and odd modes.
            archive.extractall(begun, filter="data")
        begun.rename(into)
    except BaseException:
        shutil.rmtree(begun, ignore_errors=True)
        raise
