# SPDX-License-Identifier: Apache-2.0
"""A workspace as one file: the same files always give the same bytes, and so the same hash.

Ignore files are honoured (`.gitignore`, `.fedmlignore`), and what nobody wants to ship never is.
"""

import fnmatch
import gzip
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

from fedml.errors import ConfigError

_NEVER = (".git", "__pycache__", ".venv", ".DS_Store", ".pytest_cache", ".mypy_cache")


def build(workspace: Path, into: Path) -> int:
    """Pack a directory as .tar.gz; how many files it has.

    Raises:
        ConfigError: There is no such directory.
    """
    if not workspace.is_dir():
        raise ConfigError(f"the workspace {workspace} is not a directory")
    files = sorted(_files(workspace, workspace, []))
    # Times and owners are left out: they would change the hash of unchanged files.
    with (
        into.open("wb") as raw,
        gzip.GzipFile(fileobj=raw, mode="wb", filename="", mtime=0, compresslevel=1) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for file in files:
            info = archive.gettarinfo(file, str(file.relative_to(workspace)))
            info.mtime, info.uid, info.gid, info.uname, info.gname = 0, 0, 0, "", ""
            info.mode = 0o755 if info.mode & 0o100 else 0o644
            if info.isreg():
                with file.open("rb") as data:
                    archive.addfile(info, data)
            else:
                archive.addfile(info)
    return len(files)


def _files(folder: Path, root: Path, ignored: list[str]) -> Iterator[Path]:
    ignored = ignored + _ignore_file(folder)
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        path = Path(entry.path)
        relative = str(path.relative_to(root))
        if entry.name in _NEVER or _matches(relative, entry.name, entry.is_dir(), ignored):
            continue
        if entry.is_symlink() or entry.is_file():
            yield path
        elif entry.is_dir():
            yield from _files(path, root, ignored)


def _ignore_file(folder: Path) -> list[str]:
    lines: list[str] = []
    for name in (".gitignore", ".fedmlignore"):
        file = folder / name
        if file.is_file():
            lines += [line.strip() for line in file.read_text(errors="replace").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def _matches(relative: str, name: str, is_dir: bool, patterns: list[str]) -> bool:
    ignored = False
    for pattern in patterns:
        keep = pattern.startswith("!")
        plain = pattern.lstrip("!")
        only_dirs = plain.endswith("/")
        plain = plain.strip("/")
        if only_dirs and not is_dir:
            continue
        if fnmatch.fnmatch(name, plain) or fnmatch.fnmatch(relative, plain):
            ignored = not keep
    return ignored
