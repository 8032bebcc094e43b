# SPDX-License-Identifier: Apache-2.0
"""The King James Bible for language models: 31,102 verses in 66 books, its natural clients.

The books differ in size as devices do (13 verses to 2,461) and in style. The last fifth of every
book's verses is the test part. `characters` cuts verses into windows for a model that predicts
the next character.
"""

import itertools
import re
import struct

import numpy as np

from fedml.data.dataset import Array, Dataset, Examples, Texts
from fedml.data.errors import DamagedData
from fedml.data.packages import DebianFile
from fedml.data.provider import Files, Provider

TEST_SHARE = 0.2
# The symbols of `characters`; their places are the symbol numbers. 0 stands for any other
# character.
ALPHABET = "\0\n " + "".join(chr(code) for code in range(0x21, 0x7F))

# Abbreviation and name, in the order of the file.
_BOOKS = (
    "Ge Genesis, Exo Exodus, Lev Leviticus, Num Numbers, Deu Deuteronomy, Josh Joshua, Jdgs "
    "Judges, Ruth Ruth, 1Sm 1 Samuel, 2Sm 2 Samuel, 1Ki 1 Kings, 2Ki 2 Kings, 1Chr 1 "
    "Chronicles, 2Chr 2 Chronicles, Ezra Ezra, Neh Nehemiah, Est Esther, Job Job, Psa Psalms, "
    "Prv Proverbs, Eccl Ecclesiastes, SSol Song of Solomon, Isa Isaiah, Jer Jeremiah, Lam "
    "Lamentations, Eze Ezekiel, Dan Daniel, Hos Hosea, Joel Joel, Amos Amos, Obad Obadiah, "
    "Jonah Jonah, Mic Micah, Nahum Nahum, Hab Habakkuk, Zep Zephaniah, Hag Haggai, Zec "
    "Zechariah, Mal Malachi, Mat Matthew, Mark Mark, Luke Luke, John John, Acts Acts, Rom "
    "Romans, 1Cor 1 Corinthians, 2Cor 2 Corinthians, Gal Galatians, Eph Ephesians, Phi "
    "Philippians, Col Colossians, 1Th 1 Thessalonians, 2Th 2 Thessalonians, 1Tim 1 Timothy, "
    "2Tim 2 Timothy, Titus Titus, Phmn Philemon, Heb Hebrews, Jas James, 1Pet 1 Peter, 2Pet 2 "
    "Peter, 1Jn 1 John, 2Jn 2 John, 3Jn 3 John, Jude Jude, Rev Revelation"
)
BOOKS = dict(book.split(" ", 1) for book in _BOOKS.split(", "))

_MAGIC = b"EC02"
_HEADER = 0x54
_CLEAR = 256
_MAX_BITS = 16


def lzw(data: bytes) -> bytes:
    """Expand the LZW code of Unix ``compress`` (Welch 1984), 9 to 16 bits a code, without its
    header.

    Codes are packed from the low bit up, in groups of eight; when the width changes or the table is
    cleared, the rest of the group is padding.

    Raises:
        DamagedData: A code that no table can hold.
    """
    table: list[bytes] = [bytes((byte,)) for byte in range(256)] + [b""]
    out: list[bytes] = []
    width, group_start, at, last = 9, 0, 0, b""
    bits = len(data) * 8

    def next_group() -> int:
        # Where the next group starts, counted in bits; `group_start` and `width` are still the old.
        group = width * 8
        return group_start + -(-(at - group_start) // group) * group

    while at + width <= bits:
        word = int.from_bytes(data[at >> 3 : (at >> 3) + 4], "little")
        code = (word >> (at & 7)) & ((1 << width) - 1)
        at += width
        if code == _CLEAR:
            at = group_start = next_group()
            del table[257:]
            width, last = 9, b""
            continue
        if code < len(table):
            entry = table[code]
        elif code == len(table) and last:
            entry = last + last[:1]
        else:
            raise DamagedData(f"LZW code {code} before it was defined")
        out.append(entry)
        if last and len(table) < 1 << _MAX_BITS:
            table.append(last + entry[:1])
            if len(table) == 1 << width and width < _MAX_BITS:
                at = group_start = next_group()
                width += 1
        last = entry
    return b"".join(out)


def expand(content: bytes) -> str:
    """Text of a "Bible Retrieval System" file: a table of offsets, then 64 KiB windows in LZW.

    Raises:
        DamagedData: It is no such file.
    """
    if not content.startswith(_MAGIC):
        raise DamagedData("not a compressed text of the Bible Retrieval System")
    window, count = struct.unpack_from(">II", content, _HEADER)
    offsets = struct.unpack_from(f">{count + 1}I", content, _HEADER + 8)
    windows = [lzw(content[at:end]) for at, end in itertools.pairwise(offsets)]
    if any(len(text) != window for text in windows[:-1]):
        raise DamagedData(f"a window of the text is not {window} bytes long")
    return b"".join(windows).decode("ascii")


def characters(texts: Texts, length: int) -> Examples:
    """Cut running text into windows for predicting every next character.

    The verses of one client are joined by newlines in their order; windows do not overlap, and
    the rest that fills no window is left out.

    Returns:
        ``x`` and ``y`` ``(N, length)`` int64 places in `ALPHABET`, ``y`` one character later than
        ``x``; `client` as in ``texts``.

    Raises:
        ValueError: ``length`` is below 1.
    """
    if length < 1:
        raise ValueError(f"length must be >= 1, got {length}")
    owner = np.zeros(len(texts), np.int64) if texts.client is None else texts.client
    symbol = np.zeros(0x110000, np.int64)
    symbol[[ord(character) for character in ALPHABET]] = np.arange(len(ALPHABET))
    inputs: list[Array] = [np.empty((0, length), np.int64)]
    targets: list[Array] = [np.empty((0, length), np.int64)]
    owners: list[Array] = [np.empty(0, np.int64)]
    for client in np.unique(owner).tolist():
        running = "\n".join(texts.x[row] for row in np.flatnonzero(owner == client).tolist())
        codes = symbol[np.frombuffer(running.encode("utf-32-le"), np.uint32)]
        windows = (len(codes) - 1) // length
        if windows > 0:
            inputs.append(codes[: windows * length].reshape(windows, length))
            targets.append(codes[1 : windows * length + 1].reshape(windows, length))
            owners.append(np.full(windows, client, np.int64))
    return Examples(
        x=np.concatenate(inputs),
        y=np.concatenate(targets),
        client=None if texts.client is None else np.concatenate(owners),
    )


def read(files: Files) -> Dataset[Texts]:
    """One row a verse, in the order of the book."""
    _title, *lines = expand(files["text"]).splitlines()
    verses: list[str] = []
    owner: list[int] = []
    number = {abbreviation: place for place, abbreviation in enumerate(BOOKS)}
    for line in lines:
        found = re.fullmatch(r"(\d?[A-Za-z]+)\d+:\d+ (.+)", line)
        if found is None or found[1] not in number:
            raise DamagedData(f"not a verse: {line[:40]!r}")
        owner.append(number[found[1]])
        verses.append(found[2])
    client = np.asarray(owner, np.int64)
    everything = Texts(x=tuple(verses), client=client)
    held = np.concatenate([_last(np.flatnonzero(client == book)) for book in number.values()])
    return Dataset(
        name="king-james",
        train=everything.take(np.setdiff1d(np.arange(len(verses)), held)),
        test=everything.take(held),
        clients=tuple(BOOKS.values()),
    )


def _last(rows: Array) -> Array:
    return rows[len(rows) - round(len(rows) * TEST_SHARE) :]


PROVIDERS = (
    Provider(
        name="king-james",
        title="King James Bible, verse by verse: running text of 66 books",
        licence="public domain (translation of 1611); the file: free use with its legend kept",
        source="Chapin 1993, Bible Retrieval System; in Debian's bible-kjv-text",
        size="24,880 + 6,222 verses",
        download_mb=2.4,
        files={
            "text": DebianFile(
                package="bible-kjv-text",
                path="/usr/lib/bible.data",
                sha256="6c746c2acc8a34bfded980883ff1701a5d68934a1c853ebf88a07b978fe0ae0e",
            )
        },
        read=read,
    ),
)
