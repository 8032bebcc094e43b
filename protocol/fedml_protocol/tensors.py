# SPDX-License-Identifier: Apache-2.0
"""How tensors lie in a file: the safetensors layout, read without opening a single number.

Eight bytes, little-endian: the length of a JSON header; the header, name -> dtype, shape and
offsets; then the data, without gaps. Nothing in such a file can run code, which is why no other
format (pickle above all) is ever read from the wire.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedml_protocol.errors import MalformedMessage

MAX_HEADER_BYTES = 16 * 1024 * 1024

# What NumPy and torch can hold. Without it, the product of a million sizes would take for ever.
MAX_DIMENSIONS = 64
_TOO_LARGE = 1 << 63
_ENTRY = {"dtype", "shape", "data_offsets"}

# Bytes of one element.
DTYPES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where one tensor lies; `start` counts from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


def header_length(head: bytes, file_size: int) -> int:
    """The length of the JSON header that follows the first eight bytes.

    Raises:
        MalformedMessage: No such header can be in a file of this size.
    """
    length = int.from_bytes(head[:8], "little")
    if len(head) < 8 or length > MAX_HEADER_BYTES or 8 + length > file_size:
        raise MalformedMessage("not a safetensors file: its header does not fit into it")
    return length


def read_header(header: bytes, file_size: int) -> dict[str, Tensor]:
    """The tensors that a header declares, in the order of their data.

    Whatever is accepted here, the safetensors library accepts too: what this side has checked
    cannot mean something else to the side that loads it.

    Args:
        header: The JSON, without the eight bytes before it.
        file_size: Of the whole file, bytes.

    Raises:
        MalformedMessage: Not JSON, an unknown dtype, sizes that do not add up, gaps or overlaps.
    """
    try:
        declared = json.loads(header.decode(), object_pairs_hook=_object, parse_int=_size)
        if not isinstance(declared, dict):
            raise TypeError("its header is no object")
        metadata = declared.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            raise TypeError("its metadata is no object")
        # Joining and encoding refuse what is no text at all, half a surrogate pair among it.
        "".join([*declared, *metadata, *metadata.values()]).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise MalformedMessage(f"not a safetensors file: {error}") from error
    first = 8 + len(header)
    tensors = {name: _tensor(name, entry, first) for name, entry in declared.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].size)))
    end = first
    for name, tensor in ordered.items():
        if tensor.start != end:
            raise MalformedMessage(f"tensor {name[:80]!r} leaves a gap or overlaps another")
        end += tensor.size
    if end != file_size:
        raise MalformedMessage(f"the file has {file_size} bytes, its header describes {end}")
    return ordered


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):  # readers disagree about which of the two counts
        raise ValueError("a name occurs twice in its header")
    return found


def _size(digits: str) -> int:
    number = int(digits)
    if digits[0] == "-" or number >= _TOO_LARGE:
        raise ValueError(f"no size in bytes: {digits[:40]}")
    return number


def _tensor(name: str, entry: Any, first: int) -> Tensor:
    try:
        if entry.keys() != _ENTRY:
            raise KeyError("other fields than dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if type(shape) is not list or type(offsets) is not list or len(shape) > MAX_DIMENSIONS:
            raise TypeError("shape and data_offsets must be lists")
        start, stop = offsets
        if not all(type(n) is int for n in (*shape, start, stop)):
            raise TypeError("sizes must be whole numbers")
        # A size of 0 does not hide an overflow: some multiply before they see it.
        if math.prod(n or 1 for n in shape) * DTYPES[dtype] >= _TOO_LARGE:
            raise ValueError("larger than any file")
        expected = math.prod(shape) * DTYPES[dtype]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise MalformedMessage(f"tensor {name[:80]!r} is not described correctly") from error
    if stop - start != expected:
        raise MalformedMessage(
            f"tensor {name[:80]!r}: {dtype}{list(shape)} takes {expected} bytes, "
            f"{stop - start} are declared"
        )
    return Tensor(dtype, tuple(shape), first + start, expected)
