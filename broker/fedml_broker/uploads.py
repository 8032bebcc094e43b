# SPDX-License-Identifier: Apache-2.0
"""Uploads under way: one file per (blob, owner), so that nobody can spoil another one's upload."""

import errno
import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from fedml_broker.problems import Problem

UPLOAD_OFFSET = "Upload-Offset"

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class Uploads:
    """The unfinished uploads of one directory. Belongs to the event loop; `clear` to a thread.

    Args:
        directory: Where the files lie; exists.
        known: For so many idle uploads the hash so far is remembered. Whoever comes back to a
            forgotten one waits while its file is read again.
    """

    def __init__(self, directory: Path, *, known: int = 1024) -> None:
        self._directory = directory
        self._known = known
        self._uploads: OrderedDict[tuple[str, str], Upload] = OrderedDict()

    @contextmanager
    def of(self, sha256: str, owner: str) -> "Iterator[Upload]":
        """This owner's upload of the blob, to work on."""
        key = (sha256, owner)
        if key not in self._uploads:
            self._uploads[key] = Upload(self._file(sha256, owner))
        upload = self._uploads[key]
        self._uploads.move_to_end(key)
        upload.users += 1
        try:
            yield upload
        finally:
            upload.users -= 1
            if upload.offset == 0 and upload.retire():
                del self._uploads[key]
            surplus = max(0, len(self._uploads) - self._known)
            for old in list(self._uploads)[:surplus]:
                if self._uploads[old].retire():
                    del self._uploads[old]

    def offset(self, sha256: str, owner: str) -> int:
        """How many bytes of the blob this owner has uploaded."""
        upload = self._uploads.get((sha256, owner))
        return upload.offset if upload else size_or_zero(self._file(sha256, owner))

    def busy(self) -> Set[Path]:
        """The files that a request is working on."""
        return {upload.path for upload in self._uploads.values() if upload.users}

    def clear(self, busy: Set[Path], before: float) -> tuple[int, int]:
        """Delete what was last written before the time `before` and is not busy.

        Returns:
            How many files, how many bytes.
        """
        files = freed = 0
        for file in self._directory.iterdir():
            try:
                status = file.stat()
                if file not in busy and status.st_mtime < before:
                    file.unlink()
                    files, freed = files + 1, freed + status.st_size
            except FileNotFoundError:
                continue  # finished meanwhile
        return files, freed

    def _file(self, sha256: str, owner: str) -> Path:
        return self._directory / f"{sha256}.{hashlib.sha256(owner.encode()).hexdigest()[:16]}"


class Upload:
    """One unfinished upload: a file, and the hash of what it holds so far.

    The methods run in threads, one at a time. Each request that writes has a turn; a newer request
    takes the turn away, so that a connection that died without a word cannot write any more.

    Attributes:
        offset: Bytes that have come.
        users: Requests that hold it; the event loop counts them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = size_or_zero(path)
        self.users = 0
        self._turn = 0
        self._retired = False
        self._digest: hashlib._Hash | None = None  # None: the file was not read yet
        self._mutex = threading.Lock()

    def here(self) -> dict[str, str]:
        """The header that says where to go on."""
        return {UPLOAD_OFFSET: str(self.offset)}

    def begin(self, start: int | None) -> int:
        """Take the turn, to append at `start`; None: begin anew.

        Raises:
            Problem: 409, `start` is not where the upload stands.
        """
        with self._mutex:
            if self._retired:
                raise self._superseded()
            if start is None:
                with full_disk_is_a_problem(), self.path.open("wb"):
                    self.offset, self._digest = 0, hashlib.sha256()
            else:
                self._recover()
                if start != self.offset:
                    raise Problem(
                        409,
                        "The part does not fit",
                        f"it begins at byte {start}, the upload stands at {self.offset}",
                        f"go on at {UPLOAD_OFFSET}",
                        headers=self.here(),
                    )
            self._turn += 1
            return self._turn

    def append(self, turn: int, blocks: Sequence[bytes]) -> None:
        """Write the bytes at the end.

        Raises:
            Problem: 409, the turn is over; 507, the disk is full: what fitted is kept.
        """
        with self._mutex, full_disk_is_a_problem(self.here):
            digest = self._check(turn)
            with self._open() as part:
                part.seek(self.offset)
                for block in blocks:
                    rest = memoryview(block)
                    while rest:
                        written = part.write(rest)
                        digest.update(rest[:written])
                        self.offset += written
                        rest = rest[written:]

    def finish(self, turn: int, sha256: str, target: Path) -> None:
        """Verify the whole and move it to `target`.

        Raises:
            Problem: 422, other bytes than the name says: they are thrown away.
        """
        with self._mutex, full_disk_is_a_problem(self.here):
            found = self._check(turn).hexdigest()
            if found == sha256:
                with self._open() as part:
                    part.truncate(self.offset)
                    os.fsync(part.fileno())
                install(self.path, target)
            else:
                self.path.unlink(missing_ok=True)
            size, self.offset, self._digest = self.offset, 0, None
            self._turn += 1
            if found != sha256:
                raise Problem(
                    422,
                    "The bytes are not the ones that were named",
                    f"the SHA-256 of the {size} bytes that came is {found}",
                    "they were damaged or changed on the way: upload again from byte 0",
                    headers=self.here(),
                )

    def retire(self) -> bool:
        """Forget it if nobody is at it; later calls by those who come too late are refused."""
        if self.users or not self._mutex.acquire(blocking=False):
            return False
        self._retired = True
        self._mutex.release()
        return True

    def _open(self) -> FileIO:
        try:
            return FileIO(self.path, "r+b")
        except FileNotFoundError:
            self.offset, self._digest = 0, None
            raise self._superseded("nobody went on with it for long, it was cleared") from None

    def _recover(self) -> None:
        """Know the hash of what the file holds; needed after a restart, or if it was swept away."""
        size = size_or_zero(self.path)
        if self._digest is not None and size >= self.offset:
            return
        with self.path.open("a+b") as part:
            part.seek(0)
            self._digest = hashlib.file_digest(part, "sha256")
            self.offset = part.tell()

    def _check(self, turn: int) -> "hashlib._Hash":
        if self._retired or turn != self._turn or self._digest is None:
            raise self._superseded()
        return self._digest

    def _superseded(self, why: str = "a newer request goes on with it") -> Problem:
        return Problem(
            409,
            "This upload was taken over",
            why,
            hint=f"ask with HEAD for {UPLOAD_OFFSET} before going on",
            headers=self.here(),
        )


def disk_full(detail: str, headers: dict[str, str] | None = None) -> Problem:
    """The answer to an upload that finds no room."""
    return Problem(
        507,
        "The broker's disk is full",
        detail,
        "delete old runs and models on the broker or give it more disk, then go on: "
        "what has come is kept",
        headers=headers,
    )


@contextmanager
def full_disk_is_a_problem(here: Callable[[], dict[str, str]] = dict) -> Iterator[None]:
    """Turn the system's word for a full disk into 507, with the headers that `here` gives then."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise disk_full(os.strerror(error.errno), here()) from error
        raise


def size_or_zero(path: Path) -> int:
    """Bytes of the file; 0 where there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def install(file: Path, target: Path) -> None:
    """Rename, and remember it on the disk."""
    file.chmod(0o600)
    file.rename(target)
    directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
