# SPDX-License-Identifier: Apache-2.0
"""Reads the Parquet files that the graph providers need, without pyarrow (a hundred megabytes).

Enough of the format (Apache Parquet 2.x) for tables written by pandas: one or more row groups,
pages of version 1, codecs none and gzip, encodings PLAIN, RLE and dictionary, columns of int64
and text that are required, optional without missing values, or lists of one level. Anything else
is refused with its name.
"""

import struct
import zlib
from typing import Any

import numpy as np

from fedml.data.dataset import Array
from fedml.data.errors import DamagedData

_MAGIC = b"PAR1"
# Numbers of the format's own enumerations (parquet.thrift).
_INT64, _BYTE_ARRAY = 2, 6
_PLAIN, _PLAIN_DICTIONARY, _RLE_DICTIONARY = 0, 2, 8
_UNCOMPRESSED, _GZIP = 0, 2
_DATA_PAGE, _DICTIONARY_PAGE = 0, 2
_REQUIRED, _OPTIONAL, _REPEATED = 0, 1, 2


def read(content: bytes) -> dict[str, Array]:
    """Every column of the file, by its dotted path.

    A list column comes flat; with a fixed length of list, ``reshape(rows, -1)`` restores it.

    Raises:
        DamagedData: Not a Parquet file, or a part of the format that is not read here.
    """
    if not (content.startswith(_MAGIC) and content.endswith(_MAGIC)):
        raise DamagedData("not a Parquet file")
    (footer_size,) = struct.unpack_from("<I", content, len(content) - 8)
    footer = _Thrift(content, len(content) - 8 - footer_size).struct()
    levels = _levels(footer[2])
    columns: dict[str, list[Array]] = {}
    for group in footer[4]:
        for chunk in group[1]:
            meta = chunk[3]
            path = ".".join(part.decode() for part in meta[3])
            columns.setdefault(path, []).append(_chunk(content, meta, *levels[path]))
    return {path: np.concatenate(parts) for path, parts in columns.items()}


def _levels(schema: list[dict[int, Any]]) -> dict[str, tuple[int, int]]:
    """Leaf path -> highest definition and repetition level. The schema is a tree, parents first."""
    found: dict[str, tuple[int, int]] = {}
    at = 1  # 0 is the root, whose own name is in no path

    def walk(children: int, path: str, defined: int, repeated: int) -> None:
        nonlocal at
        for _ in range(children):
            node = schema[at]
            at += 1
            kind = node.get(3, _REQUIRED)
            name = path + node[4].decode()
            here = (defined + (kind != _REQUIRED), repeated + (kind == _REPEATED))
            if 5 in node:
                walk(node[5], f"{name}.", *here)
            else:
                found[name] = here

    walk(schema[0][5], "", 0, 0)
    return found


def _chunk(content: bytes, meta: dict[int, Any], defined: int, repeated: int) -> Array:
    """One column of one row group: its pages in a row."""
    kind, codec, wanted = meta[1], meta[4], meta[5]
    at = min(meta[9], meta.get(11, meta[9]))
    dictionary: Array | None = None
    pages: list[Array] = []
    have = 0
    while have < wanted:
        thrift = _Thrift(content, at)
        header = thrift.struct()
        at = thrift.at + header[3]
        body = _inflated(content[thrift.at : at], codec)
        if header[1] == _DICTIONARY_PAGE:
            dictionary = _plain(body, kind, header[7][1])
        elif header[1] == _DATA_PAGE:
            count, encoding = header[5][1], header[5][2]
            pages.append(_page(body, count, encoding, kind, dictionary, defined, repeated))
            have += count
        else:
            raise DamagedData(f"Parquet page type {header[1]} is not read here")
    return np.concatenate(pages)


def _inflated(body: bytes, codec: int) -> bytes:
    if codec == _GZIP:
        return zlib.decompress(body, wbits=31)
    if codec == _UNCOMPRESSED:
        return body
    raise DamagedData(f"Parquet codec {codec} is not read here")


def _page(
    body: bytes,
    count: int,
    encoding: int,
    kind: int,
    dictionary: Array | None,
    defined: int,
    repeated: int,
) -> Array:
    at = 0
    # Repetition levels first, then definition levels, each with its length before it.
    for highest in (repeated, defined):
        if highest == 0:
            continue
        (size,) = struct.unpack_from("<I", body, at)
        levels = _hybrid(body[at + 4 : at + 4 + size], highest.bit_length(), count)
        at += 4 + size
        last = levels
    if defined and (last != defined).any():
        raise DamagedData("a Parquet column with missing values is not read here")
    if encoding == _PLAIN:
        return _plain(body[at:], kind, count)
    if encoding in (_RLE_DICTIONARY, _PLAIN_DICTIONARY) and dictionary is not None:
        return dictionary[_hybrid(body[at + 1 :], body[at], count)]
    raise DamagedData(f"Parquet encoding {encoding} is not read here")


def _plain(body: bytes, kind: int, count: int) -> Array:
    if kind == _INT64:
        return np.frombuffer(body, "<i8", count).astype(np.int64)
    if kind == _BYTE_ARRAY:
        values: list[str] = []
        at = 0
        for _ in range(count):
            (size,) = struct.unpack_from("<I", body, at)
            values.append(body[at + 4 : at + 4 + size].decode())
            at += 4 + size
        return np.asarray(values, np.str_)
    raise DamagedData(f"Parquet type {kind} is not read here")


def _hybrid(body: bytes, width: int, count: int) -> Array:
    """Run-length and bit-packed integers mixed, ``count`` of them, ``width`` bits each."""
    out = np.zeros(count, np.int64)
    have = at = 0
    size = (width + 7) // 8
    while have < count:
        header, at = _varint(body, at)
        if header & 1:
            # Groups of eight values, low bits first.
            values = (header >> 1) * 8
            packed = np.frombuffer(body, np.uint8, (header >> 1) * width, at)
            bits = np.unpackbits(packed, bitorder="little").reshape(values, width)
            at += len(packed)
            run = bits.astype(np.int64) @ (1 << np.arange(width))
            take = min(values, count - have)
            out[have : have + take] = run[:take]
        else:
            take = min(header >> 1, count - have)
            out[have : have + take] = int.from_bytes(body[at : at + size], "little")
            at += size
        have += take
    return out


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at


class _Thrift:
    """Reads structures in Thrift's compact protocol: field number -> value."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data = data
        self.at = at

    def struct(self) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        number = 0
        while True:
            tag = self._byte()
            if tag == 0:
                return fields
            step, kind = tag >> 4, tag & 0x0F
            number = number + step if step else self._zigzag()
            fields[number] = self._value(kind)

    def _value(self, kind: int) -> Any:
        match kind:
            case 1 | 2:  # true and false; the value is the type
                return kind == 1
            case 3:
                return self._byte()
            case 4 | 5 | 6:
                return self._zigzag()
            case 7:
                self.at += 8
                return struct.unpack_from("<d", self._data, self.at - 8)[0]
            case 8:
                size = self._unsigned()
                self.at += size
                return self._data[self.at - size : self.at]
            case 9 | 10:
                head = self._byte()
                size = head >> 4 if head >> 4 < 15 else self._unsigned()
                return [self._value(head & 0x0F) for _ in range(size)]
            case 12:
                return self.struct()
        raise DamagedData(f"Thrift type {kind} is not read here")

    def _byte(self) -> int:
        self.at += 1
        return self._data[self.at - 1]

    def _unsigned(self) -> int:
        value, self.at = _varint(self._data, self.at)
        return value

    def _zigzag(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)
