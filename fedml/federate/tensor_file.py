# SPDX-License-Identifier: Apache-2.0
"""Read a safetensors file piece by piece, trusting nothing in it.

The format is 8 bytes of header length (little endian), a JSON header, then the tensors' bytes::

    {"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "__metadata__": {...}}

Opening checks the whole header against the file's size: every byte of data belongs to exactly one
tensor, every length matches its shape. Reading gives one run of elements at a time, so memory
does not grow with the file. Nothing that came from elsewhere is memory-mapped: a file that shrinks
while it is read gives an error, not a SIGBUS (`mapped` is for files that nobody changes).
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

# BF16 and the 8-bit floats have no NumPy type and are refused by name.
_DTYPES: Mapping[str, str] = {
    "BOOL": "?",
    "U8": "<u1",
    "I8": "<i1",
    "U16": "<u2",
    "I16": "<i2",
    "U32": "<u4",
    "I32": "<i4",
    "U64": "<u8",
    "I64": "<i8",
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
}
_MAX_HEADER = 100_000_000  # the limit of the reference implementation


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
        entries: Every tensor by name, in the order of the header.
        metadata: The header's free-form strings.
    """

    __slots__ = ("_fd", "entries", "metadata", "path")

    def __init__(self, path: str | Path) -> None:
        """Open and check the header.

        Raises:
            OSError: The file cannot be opened.
            BadTensorFile: The header is wrong, or does not fit the file's size.
        """
        self.path = Path(path)
        self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.entries, self.metadata = _parse(self.path, self._fd)
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


def _parse(path: Path, fd: int) -> tuple[dict[str, Entry], dict[str, str]]:
    def wrong(why: str) -> BadTensorFile:
        return BadTensorFile(f"{path}: not a valid safetensors file: {why}")

    size = os.fstat(fd).st_size
    prefix = os.pread(fd, 8, 0)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(_MAX_HEADER, size - 8):
        raise wrong(f"{size} bytes cannot hold a header of {length}")
    try:
        header = json.loads(os.pread(fd, length, 8), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise wrong(f"the header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise wrong("the header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise wrong("__metadata__ must map strings to strings")
    base = 8 + length
    entries: dict[str, Entry] = {}
    spans: list[tuple[int, int, str]] = []
    for name, fields in header.items():
        entry, start, stop = _entry(wrong, name, fields, base)
        entries[name] = entry
        spans.append((start, stop, name))
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            raise wrong(f"tensor {name!r} starts at {start}, expected {end}: a hole or an overlap")
        end = stop
    if base + end != size:
        raise wrong(f"tensors end at byte {base + end}, the file at {size}")
    return entries, metadata


def _entry(wrong: Any, name: str, fields: Any, base: int) -> tuple[Entry, int, int]:
    if not isinstance(fields, dict) or not {"dtype", "shape", "data_offsets"} <= fields.keys():
        raise wrong(f"tensor {name!r} lacks dtype, shape or data_offsets")
    code, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(code, str) or code not in _DTYPES:
        raise wrong(f"tensor {name!r} has type {code!r}; NumPy reads {', '.join(_DTYPES)}")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise wrong(f"tensor {name!r} has shape {shape!r} and data_offsets {offsets!r}")
    dtype = np.dtype(_DTYPES[code])
    start, stop = offsets
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise wrong(f"tensor {name!r} of shape {shape} has {stop - start} bytes")
    return Entry(dtype, tuple(shape), base + start), start, stop


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name occurs twice")
    return out
