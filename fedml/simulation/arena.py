# SPDX-License-Identifier: Apache-2.0
"""Memory that the processes of one simulation share: a folder of files that they all map.

    model-N       the arrays that clients start from          `Board`
    sum-M         what member M has summed up in a round      `Board`
    data-M        clients' data, as member M loaded it        `Shelf`

The folder lies in /dev/shm where there is one. Whoever made it holds a lock in it while he lives
and removes it at the end; a folder whose lock is free was left by a process that was killed, and
the next simulation removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import mmap
import os
import pickle
import shutil
import sys
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from fedml.errors import RunFailed
from fedml.federate.arrays import Array
from fedml.federate.layout import Layout, Spec

_PREFIX = "fedml-simulation-"
_ALIGNED = 64  # bytes: a cache line
_LARGE = 1 << 16  # bytes: from here on it matters whether clients share an array


class Arena:
    """The folder; use it as a context manager."""

    def __init__(self) -> None:
        root = Path("/dev/shm")  # noqa: S108 - checked and made private below
        if not os.access(root, os.W_OK):
            root = Path(tempfile.gettempdir())
        _sweep(root)
        # Made under another name, so that nobody sweeps it before its lock is held.
        made = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=root))
        self._lock = os.open(made / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.folder = made.rename(made.with_name(made.name.removeprefix(".")))
        room = os.statvfs(self.folder)
        self.room = room.f_bavail * room.f_frsize

    def close(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _sweep(root: Path) -> None:
    for folder in root.glob(f"{_PREFIX}*"):
        # Somebody else's, or just gone: not ours to remove.
        with contextlib.suppress(OSError):
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


class Board:
    """Named arrays at fixed places of one file; every process that opens it sees the same."""

    def __init__(self, path: Path, specs: Mapping[str, Spec], *, create: bool = False) -> None:
        """Map the file.

        Args:
            path: In the arena.
            specs: The arrays; the same for everybody.
            create: Make the file, zeroed.

        Raises:
            RunFailed: There is no room in shared memory.
        """
        places: dict[str, int] = {}
        size = 0
        for name, spec in specs.items():
            places[name] = size
            size += -(-spec.size * spec.dtype.itemsize // _ALIGNED) * _ALIGNED
        size = max(size, _ALIGNED)
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if create else 0)
        fd = os.open(path, flags, 0o600)
        try:
            if create:
                # All of it now: a full disk is an error here, and a fatal signal later.
                os.posix_fallocate(fd, 0, size)
            memory = mmap.mmap(fd, size)
        except OSError as error:
            raise RunFailed(
                f"no room for {size / 1e6:.0f} MB in {path.parent}: {error.strerror}",
                "free some of it, or in a container: `--shm-size`",
            ) from error
        finally:
            os.close(fd)
        self.arrays: dict[str, Array] = {
            name: np.ndarray(spec.shape, spec.dtype, memory, places[name])
            for name, spec in specs.items()
        }

    def write(self, arrays: Mapping[str, Array]) -> None:
        """Copy arrays in; names, shapes and dtypes are the board's."""
        for name, array in self.arrays.items():
            np.copyto(array, arrays[name], casting="no")


@dataclass(frozen=True, slots=True)
class Place:
    """Where on a shelf one client's data lies.

    Attributes:
        file: Name of the shelf's file.
        head: Offset and length of the object without its arrays.
        buffers: The same of each array.
    """

    file: str
    head: tuple[int, int]
    buffers: tuple[tuple[int, int], ...]


class Shelf:
    """One process's file of clients' data; only it writes there, everybody reads.

    Objects are taken apart by pickle with their arrays out of band, so that reading one back makes
    arrays that live in the shared file. Nothing comes from outside: the user's own `data` function
    made it on this machine, in this run.
    """

    def __init__(self, folder: Path, name: str, room: int) -> None:
        self._folder = folder
        self._name = name
        self._room = room
        self._used = 0
        self._fd = -1
        self._maps: dict[str, mmap.mmap] = {}
        # Arrays of earlier clients that still live: what is met twice is shared by clients.
        self._met: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._sharing = True

    def put(self, thing: Any) -> Place | None:
        """Store it; None where it cannot be taken apart, does not fit, or had better stay whole.

        Something large that several clients refer to (a data set with indices into it) would be
        stored once for each of them, so such objects stay in this process.
        """
        if not self._sharing:
            return None
        stream, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
        packer = _Packer(stream, 5, buffer_callback=buffers.append)
        try:
            packer.dump(thing)
            views = [buffer.raw() for buffer in buffers]
        except Exception:  # pickle says that it cannot in many ways; the object stays in here
            return None
        for large in packer.large:
            # A file is mapped by all processes as it is.
            if isinstance(large, np.memmap) or self._met.get(id(large)) is large:
                self._sharing = False
                return None
        for large in packer.large:
            self._met[id(large)] = large
        start = self._used
        try:
            head = self._append(stream.getbuffer())
            places = tuple(self._append(view) for view in views)
        except OSError:
            self._used = start
            return None
        return Place(self._name, head, places)

    def get(self, place: Place) -> Any:
        """Read back what was put at ``place``, by whomever."""
        memory = self._maps.get(place.file)
        if memory is None:
            fd = os.open(self._folder / place.file, os.O_RDWR | os.O_CLOEXEC)
            try:
                memory = self._maps[place.file] = mmap.mmap(fd, os.fstat(fd).st_size)
            finally:
                os.close(fd)
        whole = memoryview(memory)
        start, size = place.head
        parts = [whole[at : at + length] for at, length in place.buffers]
        return pickle.loads(whole[start : start + size], buffers=parts)  # noqa: S301 - see above

    def _append(self, data: memoryview) -> tuple[int, int]:
        if self._used + data.nbytes > self._room:
            raise OSError("the shelf is full")
        if self._fd < 0:
            path = self._folder / self._name
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            # Sparse: takes up what is written, and can be mapped whole from the beginning.
            os.ftruncate(self._fd, max(self._room, mmap.PAGESIZE))
        at, done = self._used, 0
        while done < data.nbytes:
            # Not through a mapping, where a full disk would be a fatal signal.
            done += os.pwrite(self._fd, data[done:], at + done)
        self._used += -(-data.nbytes // _ALIGNED) * _ALIGNED
        return at, data.nbytes


class _Packer(pickle.Pickler):
    """Takes torch tensors apart as well, and notes the large arrays that it meets."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.large: list[Any] = []
        self._torch = sys.modules.get("torch")

    def reducer_override(self, thing: Any) -> Any:
        if isinstance(thing, np.ndarray):
            if thing.nbytes >= _LARGE:
                self.large.append(thing)
        elif self._torch is not None and type(thing) is self._torch.Tensor:
            if thing.device.type != "cpu" or thing.requires_grad or thing.is_sparse:
                return NotImplemented
            if thing.nbytes >= _LARGE:
                self.large.append(thing)
            return self._torch.from_numpy, (thing.numpy(),)
        return NotImplemented


class Boards:
    """What members read of the server: of each version a model, and what is sent with it."""

    def __init__(self, folder: Path) -> None:
        """Of an arena."""
        self._folder = folder
        self._made: dict[int, tuple[Board, Board]] = {}

    def write(self, version: int, model: Mapping[str, Array], sent: Mapping[str, Array]) -> None:
        """Put both in their places, which are made the first time."""
        if version not in self._made:
            self._made[version] = (
                self._make("model", version, model),
                self._make("sent", version, sent),
            )
        boards = self._made[version]
        boards[0].write(model)
        boards[1].write(sent)

    def _make(self, name: str, version: int, arrays: Mapping[str, Array]) -> Board:
        specs = Layout.of(dict(arrays)).tensors
        return Board(self._folder / f"{name}-{version}", specs, create=True)
