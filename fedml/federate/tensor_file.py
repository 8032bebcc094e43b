# SPDX-License-Identifier: Apache-2.0
"""Read a safetensors file piece by piece, trusting nothing in it; write one without copies.

Opening checks the whole header against the file's size (see `fedml_protocol.tensors`). Reading
gives one run of elements at a time, so memory does not grow with the file. Nothing that came from
elsewhere is memory-mapped: a file that shrinks while it is read gives an error, not a SIGBUS
(`mapped` is for files that nobody changes).
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from fedml.federate.arrays import Array, Arrays
from fedml_protocol.errors import MalformedMessage
from fedml_protocol.tensors import header_length, read_header

# BF16 and the 8-bit floats have no NumPy type and are refused by name. In this order the library
# lays tensors out, the largest elements first, so that each begins where its type may.
_DTYPES: Mapping[str, str] = {
    "U64": "<u8",
    "I64": "<i8",
    "F64": "<f8",
    "F32": "<f4",
    "U32": "<u4",
    "I32": "<i4",
    "F16": "<f2",
    "U16": "<u2",
    "I16": "<i2",
    "I8": "<i1",
    "U8": "<u1",
    "BOOL": "?",
}
# What is written at once. For more, the page cache takes two megabytes in one piece, which is just
# what a virtual machine that has them free gives back to its host: seven times the time of writing.
_PIECE = 1 << 20
_NAMES = {np.dtype(code): name for name, code in _DTYPES.items()}
_PLACES = {name: place for place, name in enumerate(_DTYPES)}


class BadTensorFile(ValueError):
    """The file is not a well-formed safetensors file, or holds a type that we cannot read."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies: element type, shape, and byte offset from the start of the file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """How many elements."""
        return math.prod(self.shape)


class TensorFile:
    """One safetensors file, open for reading; close it, or use it as a context manager.

    Attributes:
        path: The file.
        entries: Every tensor by name, in the order of their data.
    """

    __slots__ = ("_fd", "entries", "path")

    def __init__(self, path: str | Path) -> None:
        """Open and check the header.

        Raises:
            OSError: The file cannot be opened.
            BadTensorFile: The header is wrong, or does not fit the file's size.
        """
        self.path = Path(path)
        self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.entries = _entries(self.path, self._fd)
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        """The descriptor."""
        return self._fd

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Elements ``start:stop`` of the flattened tensor, a new array of shape ``(stop-start,)``.

        Raises:
            KeyError: No such tensor.
            BadTensorFile: The file ended early: it was cut after it was opened.
        """
        entry = self.entries[name]
        stop = entry.size if stop is None else stop
        out = np.empty(stop - start, entry.dtype)
        view = out.view(np.uint8).data
        position, done = entry.offset + start * entry.dtype.itemsize, 0
        while done < len(view):
            got = os.preadv(self._fd, [view[done:]], position + done)
            if got == 0:
                raise BadTensorFile(f"{self.path}: ends inside tensor {name!r}")
            done += got
        return out

    def load(self) -> Arrays:
        """Every tensor, whole, in its shape."""
        return {name: self.read(name).reshape(e.shape) for name, e in self.entries.items()}


def mapped(path: str | Path) -> Arrays:
    """Every tensor of a file as a read-only view of it, nothing read before it is used.

    For a file that nobody changes any more: one that is cut later kills the process (SIGBUS).

    Raises:
        OSError: The file cannot be opened.
        BadTensorFile: The header is wrong, or does not fit the file's size.
    """
    with TensorFile(path) as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return {
            name: np.frombuffer(data, e.dtype, e.size, e.offset).reshape(e.shape)
            for name, e in file.entries.items()
        }


def write(
    path: str | Path,
    arrays: Mapping[str, Array],
    *,
    metadata: Mapping[str, str] | None = None,
    over: bool = False,
) -> None:
    """Write arrays into a file: the bytes that safetensors writes, straight from the arrays.

    Arrays that are strided (a transposed weight) or big-endian are copied one at a time.
    safetensors 0.8 writes the wrong numbers for strided ones, older ones copy everything.

    Args:
        path: Of the file.
        arrays: By name.
        metadata: Goes into its header.
        over: Write over what a file that is there holds, in its blocks and pages: half the time of
            a new one. If that breaks off, a mixture remains that looks whole.

    Raises:
        OSError: The file cannot be written.
        ValueError: An array is of a type that such a file cannot hold.
    """
    about: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    ordered = sorted((_PLACES[_type(name, a)], name, a) for name, a in arrays.items())
    offset = 0
    for _, name, array in ordered:
        stop = offset + array.nbytes
        about[name] = {
            "dtype": _type(name, array),
            "shape": array.shape,
            "data_offsets": (offset, stop),
        }
        offset = stop
    header = json.dumps(about, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    anew = 0 if over else os.O_TRUNC
    with os.fdopen(
        os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | anew, 0o666), "wb"
    ) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for _, _, array in ordered:
            plain = np.asarray(array, array.dtype.newbyteorder("<"), order="C")
            data = plain.reshape(-1).view(np.uint8).data
            for start in range(0, len(data), _PIECE):
                file.write(data[start : start + _PIECE])
        file.truncate()


def _type(name: str, array: Array) -> str:
    found = _NAMES.get(array.dtype.newbyteorder("<"))
    if found is None:
        raise ValueError(f"tensor {name!r} has type {array.dtype}, which no tensor file holds")
    return found


def _entries(path: Path, fd: int) -> dict[str, Entry]:
    size = os.fstat(fd).st_size
    try:
        length = header_length(os.pread(fd, 8, 0), size)
        tensors = read_header(os.pread(fd, length, 8), size)
    except MalformedMessage as error:
        raise BadTensorFile(f"{path}: {error}") from error
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise BadTensorFile(
                f"{path}: tensor {name!r} has type {tensor.dtype!r}, NumPy has none"
            )
    return {
        name: Entry(np.dtype(_DTYPES[tensor.dtype]), tensor.shape, tensor.start)
        for name, tensor in tensors.items()
    }
