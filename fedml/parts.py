# SPDX-License-Identifier: Apache-2.0
"""A workspace on its way to the broker: what is there already is neither sent nor read again.

Its parts (see `fedml_protocol.package`) are known by their hash. A note in the user's cache says
which hash belonged to files of which inode, size and times: as with git's index, a file whose facts
have not changed has not changed. Small files travel together. Where such a part ends is decided by
the path of its last file, so that a new file does not move the ends of all others.
"""

import hashlib
import json
import os
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedml.client import Client, Told, silent
from fedml.errors import BrokerRefused, ConfigError
from fedml.package import files
from fedml_protocol.package import File, Link, Package, Part

_ALONE_BYTES = 256 * 1024
_TOGETHER_BYTES = 4 * 1024 * 1024
_FILES_TOGETHER = 64
_CHUNK = 1024 * 1024
# A file that was written this recently may be written again without a change of its times.
_RESTLESS_NS = 2 * 10**9


@dataclass(frozen=True, slots=True)
class Source:
    """One file on the disk, as it was when the workspace was looked at."""

    path: Path
    name: str
    facts: tuple[int, ...]

    @classmethod
    def of(cls, path: Path, name: str) -> "Source":
        """Look at it."""
        s = path.stat()
        facts = (s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev, s.st_mode)
        return cls(path, name, facts)

    @property
    def file(self) -> File:
        """As the manifest has it."""
        return File(self.name, self.facts[0], bool(self.facts[5] & 0o100))


class Indexed:
    """A workspace whose every part is known by its hash."""

    def __init__(self, links: Sequence[Link], parts: Sequence[tuple[str, list[Source]]]) -> None:
        self.package = Package(
            tuple(Part(sha256, tuple(s.file for s in sources)) for sha256, sources in parts),
            tuple(links),
        )
        self._sources = dict(parts)

    def read(self, sha256: str, start: int = 0) -> Iterator[bytes]:
        """The bytes of one part from `start` on.

        Raises:
            ConfigError: A file is not any more what it was.
        """
        for source in self._sources[sha256]:
            size = source.facts[0]
            if start < size:
                yield from _read(source, start)
            start = max(start - size, 0)

    def check_unchanged(self, sha256: str) -> None:
        """Raise ConfigError if a file of the part was changed meanwhile."""
        for source in self._sources[sha256]:
            try:
                same = Source.of(source.path, source.name) == source
            except OSError:
                same = False
            if not same:
                raise _changed(source)


def index(workspace: Path, cache: Path | None = None) -> Indexed:
    """Know every part of a workspace by its hash; only what has changed is read.

    Args:
        workspace: The directory.
        cache: Where the notes are kept; None: in the user's cache (XDG_CACHE_HOME).

    Raises:
        ConfigError: There is no such directory, or something in it cannot be packed.
    """
    if not workspace.is_dir():
        raise ConfigError(f"the workspace {workspace} is not a directory")
    workspace = workspace.resolve()
    note = (cache or _cache()) / f"{hashlib.sha256(os.fsencode(workspace)).hexdigest()[:32]}.json"
    known, noted = _noted(note), dict[str, str]()
    links, parts = [], []
    try:
        sources = []
        for path in files(workspace):
            name = str(path.relative_to(workspace))
            if path.is_symlink():
                links.append(Link(name, str(path.readlink())))
            else:
                sources.append(Source.of(path, name))
        for group in _groups(sources):
            key = hashlib.sha256(repr([(s.name, s.facts) for s in group]).encode()).hexdigest()
            restless = time.time_ns() - _RESTLESS_NS
            sha256 = known.get(key) or _hash(group)
            parts.append((sha256, group))
            if all(max(s.facts[1], s.facts[2]) < restless for s in group):
                noted[key] = sha256
    except OSError as error:
        raise ConfigError(f"the workspace {workspace} cannot be packed: {error}") from error
    if noted != known:
        _note(note, noted)
    return Indexed(links, parts)


def send(
    client: Client,
    workspace: Path,
    told: Told = silent,
    *,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Bring a workspace to the broker; its package as ``{"sha256", "size"}``.

    Raises:
        ConfigError: It cannot be packed, or it was changed meanwhile.
        BrokerRefused: The broker says no.
        BrokerUnreachable: It went away and did not come back.
    """
    indexed = index(workspace, cache)
    manifest = indexed.package.manifest()
    known_by = hashlib.sha256(manifest).hexdigest()
    sizes = {part.sha256: part.blob.size for part in indexed.package.parts}
    lacks = client.lacks([*sizes, known_by])
    sent, total = 0, sum(size for sha256, size in sizes.items() if sha256 in lacks)
    for sha256, size in sizes.items():
        if sha256 in lacks:
            before = sent
            try:
                client.put(
                    sha256,
                    size,
                    lambda start, sha256=sha256: indexed.read(sha256, start),  # type: ignore[misc]
                    lambda done, _, before=before: told(before + done, total),  # type: ignore[misc]
                    start=lacks[sha256],
                )
            except BrokerRefused:
                indexed.check_unchanged(sha256)
                raise
            sent += size
    if known_by in lacks:
        client.put(known_by, len(manifest), lambda start: iter([manifest[start:]]))
    return {"sha256": known_by, "size": len(manifest)}


def _groups(sources: Sequence[Source]) -> Iterator[list[Source]]:
    """Large files alone, small ones together."""
    together: list[Source] = []
    size = 0
    for source in sources:
        if source.facts[0] >= _ALONE_BYTES:
            yield [source]
            continue
        together.append(source)
        size += source.facts[0]
        last = zlib.crc32(os.fsencode(source.name)) % _FILES_TOGETHER == 0
        if last or size >= _TOGETHER_BYTES:
            yield together
            together, size = [], 0
    if together:
        yield together


def _hash(group: Sequence[Source]) -> str:
    digest = hashlib.sha256()
    for source in group:
        for piece in _read(source, 0):
            digest.update(piece)
    return digest.hexdigest()


def _read(source: Source, start: int) -> Iterator[bytes]:
    left = source.facts[0] - start
    with source.path.open("rb") as data:
        data.seek(start)
        while left:
            piece = data.read(min(left, _CHUNK))
            if not piece:
                raise _changed(source)
            left -= len(piece)
            yield piece


def _changed(source: Source) -> ConfigError:
    return ConfigError(
        f"{source.path} was changed while the workspace was sent",
        "let its writer finish, or name it in .fedmlignore; then try again",
    )


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "fedml" / "packages"


def _noted(note: Path) -> dict[str, str]:
    with suppress(OSError, ValueError):  # never written, or half: then everything is read
        found = json.loads(note.read_text())
        if isinstance(found, dict):
            return found
    return {}


def _note(note: Path, noted: dict[str, str]) -> None:
    with suppress(OSError):  # a home that cannot be written only costs the reading next time
        note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        beside = note.with_suffix(f".{os.getpid()}")
        beside.write_text(json.dumps(noted))
        beside.replace(note)
