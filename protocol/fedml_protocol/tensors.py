# SPDX-License-Identifier: Apache-2.0
"""How tensors lie in a file: the safetensors layout, read without opening a single number.

Eight bytes, little-endian: the length of a JSON header; the header, name -> dtype, shape and
offsets; then the data, without gaps. Nothing in such a file can run code, which is why no other
format (pickle above all) is ever read from the wire.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedml_protocol.errors import MalformedMessage

MAX_HEADER_BYTES = 16 * 1024 * 1024

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

    Args:
        header: The JSON, without the eight bytes before it.
        file_size: Of the whole file, bytes.

    Raises:
        MalformedMessage: Not JSON, an unknown dtype, sizes that do not add up, gaps or overlaps.
    """
    try:
        declared = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise MalformedMessage(f"not a safetensors file: {error}") from error
    if not isinstance(declared, dict):
        raise MalformedMessage("not a safetensors file: its header is no object")
    first = 8 + len(header)
    tensors = {
        name: _tensor(name, entry, first)
        for name, entry in declared.items()
        if name != "__metadata__"
    }
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].size)))
    end = first
    for name, tensor in ordered.items():
        if tensor.start != end:
            raise MalformedMessage(f"tensor {name[:80]!r} leaves a gap or overlaps another")
        end += tensor.size
    if end != file_size:
        raise MalformedMessage(f"the file has {file_size} bytes, its header describes {end}")
    return ordered


def _tensor(name: str, entry: Any, first: int) -> Tensor:
    try:
        dtype, shape = entry["dtype"], entry["shape"]
        start, stop = entry["data_offsets"]
        numbers = [*shape, start, stop]
        if not all(type(n) is int and n >= 0 for n in numbers):
            raise TypeError("sizes must be whole numbers >= 0")
        expected = math.prod(shape) * DTYPES[dtype]
    except (KeyError, TypeError, ValueError) as error:
        raise MalformedMessage(f"tensor {name[:80]!r} is not described correctly") from error
    if stop - start != expected:
        raise MalformedMessage(
            f"tensor {name[:80]!r}: {dtype}{list(shape)} takes {expected} bytes, "
            f"{stop - start} are declared"
        )
    return Tensor(dtype, tuple(shape), first + start, expected)
