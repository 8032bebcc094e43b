# SPDX-License-Identifier: Apache-2.0
"""Packages: fetched by hash, checked, laid out. Nothing of a package is used before its hash is.

packages/SHA256    a manifest or a part of one (fedml_protocol/package.py), as it came

What a former package brought is not fetched again. A workspace gets copies, never links: what a
task does to its files must not reach the next one's. The least recently used blobs go first when
they are more than `cache.packages`; those of a package that is being laid out stay.
"""

import asyncio
import contextlib
import errno
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from weakref import WeakValueDictionary

from fedml_agent.errors import AgentError
from fedml_agent.https import BlobChanged, Https, patiently
from fedml_agent.policy import Policy
from fedml_agent.room import disk_free
from fedml_protocol.blob import Blob
from fedml_protocol.errors import MalformedMessage
from fedml_protocol.package import MAX_BYTES, Package, Part, parse

# A file that is copied within one file system may share its blocks; not every one can do that.
_CANNOT_SHARE = frozenset({errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM})
_CHUNK = 1024 * 1024
# What a killed agent was fetching is rubbish by then.
_RUBBISH_S = 600.0


class BadPackage(AgentError):
    """The bytes are not what the offer names, or no package that may be unpacked."""


class NoRoom(AgentError):
    """The disk has no room for the files of a package."""


class Packages:
    """The cache of one home."""

    def __init__(
        self, root: Path, https: Callable[[], Https], policy: Callable[[], Policy]
    ) -> None:
        self._root = root
        self._https = https
        self._policy = policy
        self._fetching: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._in_use: Counter[str] = Counter()

    async def unpack(
        self, package: Blob, into: Path, *, unless: Callable[[], bool] = lambda: False
    ) -> None:
        """Fetch what of the package is not here, and lay it out. A broker that is away is waited
        for.

        Args:
            into: Replaced by the workspace as a whole, once it is complete.
            unless: Says that nobody needs it any more.

        Raises:
            BadPackage: Other bytes than promised, or a harmful package.
            NoRoom: It does not fit.
            BrokerUnreachable: It could not be fetched before nobody needed it.
        """
        if package.size > MAX_BYTES:
            raise BadPackage(f"the package's list of files has {package.size} bytes: too many")
        with self._using([package.sha256]):
            await self._fetch(package, unless)
            try:
                content = await asyncio.to_thread(self._parse, package)
            except MalformedMessage as error:
                raise BadPackage(f"the package cannot be unpacked: {error}") from error
            with self._using([part.sha256 for part in content.parts]):
                self._check_room(content)
                for part in content.parts:
                    await self._fetch(part.blob, unless)
                await asyncio.to_thread(self._lay_out, content, into)
        await asyncio.to_thread(self.evict)

    def make_room(self) -> None:
        """The disk is low: drop what nobody uses at this moment. It can be fetched again."""
        self.evict(limit=0)

    def evict(self, limit: int | None = None) -> None:
        """Remove the least recently used blobs beyond the limit, bytes; None: the policy's."""
        limit = self._policy().package_disk if limit is None else limit
        total, now = 0, time.time()
        for size, used_at, file in sorted(self._kept(), key=lambda one: one[1], reverse=True):
            total += size
            # Fetched as NAME.part; a name without it is that of a blob.
            busy = self._in_use[file.stem] > 0 or (file.suffix and now - used_at < _RUBBISH_S)
            if total > limit and not busy:
                file.unlink(missing_ok=True)
                total -= size

    def _kept(self) -> Iterator[tuple[int, float, Path]]:
        for file in self._root.iterdir():
            with contextlib.suppress(FileNotFoundError):
                facts = file.stat()
                yield facts.st_size, facts.st_mtime, file

    @contextlib.contextmanager
    def _using(self, blobs: Sequence[str]) -> Iterator[None]:
        self._in_use.update(blobs)
        try:
            yield
        finally:
            self._in_use.subtract(blobs)
            self._in_use = +self._in_use

    async def _fetch(self, blob: Blob, unless: Callable[[], bool]) -> None:
        file = self._root / blob.sha256
        lock = self._fetching.get(blob.sha256) or asyncio.Lock()
        self._fetching[blob.sha256] = lock
        try:
            async with lock:
                if not file.exists():
                    await patiently(
                        lambda: self._https().fetch(blob, file, durable=True), unless=unless
                    )
                file.touch()
        except BlobChanged as error:
            raise BadPackage(f"the package is not the one that was offered: {error}") from error

    def _parse(self, package: Blob) -> Package:
        return parse((self._root / package.sha256).read_bytes())

    def _check_room(self, content: Package) -> None:
        here = (self._root / part.sha256 for part in content.parts)
        lacking = sum(
            part.blob.size
            for part, file in zip(content.parts, here, strict=True)
            if not file.exists()
        )
        free = disk_free(self._root) - self._policy().disk_reserve
        if content.size and content.size + lacking > free:
            raise NoRoom(
                f"the workspace has {content.size / 1e9:.1f} GB, and {max(free, 0) / 1e9:.1f} GB "
                "of this machine's disk may be used (resources.disk_reserve)"
            )

    def _lay_out(self, content: Package, into: Path) -> None:
        # Under another name until it is complete: a half of it must never look like a workspace.
        begun = into.with_name(into.name + ".new")
        shutil.rmtree(begun, ignore_errors=True)
        begun.mkdir(mode=0o700, parents=True)
        try:
            for part in content.parts:
                self._write(part, begun)
            for link in content.links:
                target = begun / link.path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(link.target)
            begun.rename(into)
        except BaseException:
            shutil.rmtree(begun, ignore_errors=True)
            raise

    def _write(self, part: Part, root: Path) -> None:
        with (self._root / part.sha256).open("rb") as data:
            if os.fstat(data.fileno()).st_size != part.blob.size:
                raise BadPackage(f"the package names {part.blob.size} bytes of {part.sha256}")
            at = 0
            for file in part.files:
                target = root / file.path
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("xb") as out:
                    _copy(data.fileno(), out.fileno(), at, file.size)
                target.chmod(0o755 if file.executable else 0o644)
                at += file.size


def _copy(source: int, target: int, at: int, size: int) -> None:
    """Copy a range of one file to the beginning of an empty one."""
    done = 0
    try:
        while done < size and (n := os.copy_file_range(source, target, size - done, at + done)):
            done += n
    except OSError as error:
        if error.errno not in _CANNOT_SHARE:
            raise
    while done < size:
        piece = os.pread(source, min(size - done, _CHUNK), at + done)
        if not piece:
            raise BadPackage("a file of the package cache was cut short")
        done += os.write(target, piece)
