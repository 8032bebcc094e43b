# SPDX-License-Identifier: Apache-2.0
"""Discarded files, deleted when other bytes take their place.

A virtual machine may give memory that lies free for two seconds back to its host, and pays for
having it again: 100 MB that are written into such memory take 60 to 190 ms of CPU, 17 ms into
what was freed a moment ago. The updates of a round are discarded at its end, and as many come a few
seconds later: so the old ones keep their pages until then.
"""

import os
import threading
from collections import deque
from pathlib import Path

from fedml_broker.uploads import size_or_zero

# Below, nothing is gained.
_LEAST_BYTES = 1 << 20
# So many bytes wait at most, and on a disk that has little room none does.
_MOST_BYTES = 1 << 30


class Rubbish:
    """Files that nobody will open again. The methods run in any thread.

    Args:
        reserve_bytes: So much of the disk is to stay free in any case.
    """

    def __init__(self, *, reserve_bytes: int) -> None:
        self._reserve_bytes = reserve_bytes
        self._files: deque[tuple[Path, int]] = deque()
        self._bytes = 0
        self._owed = 0
        self._mutex = threading.Lock()

    def add(self, file: Path) -> None:
        """Delete the file, now or later."""
        size = size_or_zero(file)
        if size < _LEAST_BYTES or free_bytes(file.parent) < self._reserve_bytes + 2 * _MOST_BYTES:
            file.unlink(missing_ok=True)
            return
        with self._mutex:
            self._files.append((file, size))
            self._bytes += size
            while self._bytes > _MOST_BYTES:
                self._delete()

    def make_way(self, size: int) -> None:
        """So many bytes are about to be written: delete about as many."""
        with self._mutex:
            self._owed += size
            while self._files and self._owed > 0:
                self._owed -= self._delete()
            if not self._files:
                self._owed = 0

    def empty(self) -> None:
        """Delete all of it."""
        with self._mutex:
            while self._files:
                self._delete()

    def _delete(self) -> int:
        file, size = self._files.popleft()
        self._bytes -= size
        file.unlink(missing_ok=True)
        return size


def free_bytes(directory: Path) -> int:
    """What is left on the disk for us."""
    disk = os.statvfs(directory)
    return disk.f_bavail * disk.f_frsize
