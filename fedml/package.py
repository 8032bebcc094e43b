# SPDX-License-Identifier: Apache-2.0
"""A workspace as one file: the same files always give the same bytes, and so the same hash.

Ignore files (`.gitignore`, `.fedmlignore`, in any directory) mean what they mean to git, and what
nobody wants to ship never is.
"""

import gzip
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

from pathspec import GitIgnoreSpec

from fedml.errors import ConfigError
from fedml_protocol.package import leads_out

_NEVER = (
    ".git", "__pycache__", ".venv", ".DS_Store", ".pytest_cache", ".mypy_cache", ".ruff_cache",
)  # fmt: skip
_IGNORE_FILES = (".gitignore", ".fedmlignore")

# Directories from the root down, each with what its ignore files say.
_Ignored = list[tuple[Path, GitIgnoreSpec]]


def build(workspace: Path, into: Path) -> int:
    """Pack a directory as .tar.gz; how many files it has.

    Raises:
        ConfigError: There is no such directory, or something in it cannot be packed.
    """
    if not workspace.is_dir():
        raise ConfigError(f"the workspace {workspace} is not a directory")
    try:
        return _pack(workspace, into)
    except OSError as error:
        raise ConfigError(f"the workspace {workspace} cannot be packed: {error}") from error


def _pack(workspace: Path, into: Path) -> int:
    members = files(workspace)
    # Times and owners are left out: they would change the hash of unchanged files.
    with (
        into.open("wb") as raw,
        gzip.GzipFile(fileobj=raw, mode="wb", filename="", mtime=0, compresslevel=1) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for file in members:
            info = archive.gettarinfo(file, str(file.relative_to(workspace)))
            info.mtime, info.uid, info.gid, info.uname, info.gname = 0, 0, 0, "", ""
            info.mode = 0o755 if info.mode & 0o100 else 0o644
            if info.isreg():
                with file.open("rb") as data:
                    archive.addfile(info, data)
            else:
                archive.addfile(info)
    return len(members)


def files(workspace: Path) -> list[Path]:
    """What would be packed, sorted.

    Raises:
        ConfigError: A link leads out of the workspace.
    """
    return sorted(_files(workspace, workspace, []))


def _files(folder: Path, root: Path, above: _Ignored) -> Iterator[Path]:
    ignored = above + _ignore_files(folder)
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        path = Path(entry.path)
        link = entry.is_symlink()
        directory = entry.is_dir() and not link
        if entry.name in _NEVER or _is_ignored(path, directory, ignored):
            continue
        if directory:
            yield from _files(path, root, ignored)
        elif link:
            _check_link(path, root)
            yield path
        elif entry.is_file():
            yield path


def _ignore_files(folder: Path) -> _Ignored:
    lines: list[str] = []
    for name in _IGNORE_FILES:
        file = folder / name
        if file.is_file():
            lines += file.read_text(errors="replace").splitlines()
    return [(folder, GitIgnoreSpec.from_lines(lines))] if lines else []


def _is_ignored(path: Path, directory: bool, ignored: _Ignored) -> bool:
    # The deepest file that says anything decides, as with git.
    for folder, spec in reversed(ignored):
        relative = str(path.relative_to(folder)) + ("/" if directory else "")
        verdict = spec.check_file(relative).include
        if verdict is not None:
            return bool(verdict)
    return False


def _check_link(path: Path, root: Path) -> None:
    """A link that leads out of the workspace would lead nowhere on the machine."""
    target = path.readlink()
    if leads_out(str(path.relative_to(root)), str(target)):
        raise ConfigError(
            f"the link {path} leads out of the workspace, to {target}",
            "copy the file into the workspace, or name the link in .fedmlignore",
        )
