# SPDX-License-Identifier: Apache-2.0
"""Packages: fetched by hash, checked, unpacked. Nothing of a package is used before its hash is."""

import asyncio
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

from fedml_agent.errors import AgentError
from fedml_agent.https import BlobChanged, Https
from fedml_protocol.blob import Blob

# So many packages stay, the least recently used go first.
_KEEP = 8


class BadPackage(AgentError):
    """The bytes are not what the offer names, or no archive that may be unpacked."""


class Packages:
    """The cache of one home."""

    def __init__(self, root: Path, https: Callable[[], Https]) -> None:
        self._root = root
        self._https = https
        self._fetching: dict[str, asyncio.Lock] = {}

    async def unpack(self, package: Blob, into: Path) -> None:
        """Fetch the package, if it is not here, and unpack it.

        Raises:
            BadPackage: Other bytes than promised, or a harmful archive.
            BrokerUnreachable: It could not be fetched.
        """
        file = self._root / f"{package.sha256}.tar.gz"
        async with self._fetching.setdefault(package.sha256, asyncio.Lock()):
            if not file.exists():
                try:
                    await asyncio.to_thread(self._https().fetch, package, file)
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

    def _evict(self) -> None:
        files = sorted(self._root.glob("*.tar.gz"), key=lambda f: f.stat().st_mtime, reverse=True)
        for file in files[_KEEP:]:
            file.unlink(missing_ok=True)


def _extract(file: Path, into: Path) -> None:
    into.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        with tarfile.open(file) as archive:
            # "data" refuses absolute paths, links that lead outside, devices, and odd modes.
            archive.extractall(into, filter="data")
    except BaseException:
        shutil.rmtree(into, ignore_errors=True)
        raise
