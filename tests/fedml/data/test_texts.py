# SPDX-License-Identifier: Apache-2.0
"""Topics, verses and words."""

import gzip
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedml import data
from fedml.data.bible import ALPHABET, characters, expand, lzw
from fedml.data.dataset import Texts
from fedml.data.errors import DamagedData
from fedml.data.text import bag_of_words
from fedml.data.words import cbpack

Load = Callable[[str], data.Dataset[Any]]


@pytest.mark.parametrize(
    ("name", "topics"), [("20news", 20), ("reuters-r8", 8), ("reuters-r52", 52)]
)
def test_every_topic_occurs_in_both_parts(name: str, topics: int, real: Load) -> None:
    texts = real(name)

    assert len(texts.classes) == topics
    assert set(np.unique(texts.train.y)) == set(np.unique(texts.test.y)) == set(range(topics))
    assert sum(not text for text in (*texts.train.x, *texts.test.x)) == 0


def test_hashed_words_are_enough_to_tell_reuters_topics(real: Load) -> None:
    reuters = real("reuters-r8")
    train = bag_of_words(reuters.train.x, 2048)
    test = bag_of_words(reuters.test.x, 2048)
    means = np.stack([train[reuters.train.y == topic].mean(axis=0) for topic in range(8)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)

    assert ((test @ means.T).argmax(axis=1) == reuters.test.y).mean() > 0.8


def test_a_bag_of_words_forgets_order_but_not_counts() -> None:
    one, other, twice, none = bag_of_words(["a b c", "c b a", "a a b", ""], 64)

    assert np.array_equal(one, other)
    assert not np.array_equal(one, twice)
    assert np.linalg.norm(one) == pytest.approx(1)
    assert not none.any()
    with pytest.raises(ValueError, match=">= 1"):
        bag_of_words(["a"], 0)


def test_the_bible_is_complete(real: Load) -> None:
    bible = real("king-james")

    assert len(bible.train) + len(bible.test) == 31_102
    assert len(bible.clients) == 66
    assert bible.train.x[0] == "In the beginning God created the heaven and the earth."
    assert bible.test.x[-1] == "The grace of our Lord Jesus Christ be with you all. Amen."
    psalms = bible.of_client("Psalms")
    assert len(psalms.train) + len(psalms.test) == 2461
    assert psalms.train.x[0].startswith("Blessed is the man that walketh not")


@given(content=st.binary(max_size=2000) | st.text("ab", max_size=4000).map(str.encode))
def test_lzw_expands_what_compress_writes(content: bytes) -> None:
    tool = shutil.which("compress")
    if tool is None:
        assert lzw(literal_lzw(content)) == content
        return
    packed = subprocess.run([tool, "-c", "-f"], input=content, capture_output=True, check=False)
    assert lzw(packed.stdout[3:]) == content


def literal_lzw(content: bytes) -> bytes:
    """The simplest encoder that the format allows: one code a byte, table cleared before it grows.

    Every 200 bytes a clear code, padded to a group of eight codes of nine bits.
    """
    out = bytearray()
    for start in range(0, len(content), 200):
        codes = [*content[start : start + 200], 256]
        codes += [0] * (-len(codes) % 8)
        packed = sum(code << (9 * place) for place, code in enumerate(codes))
        out += packed.to_bytes(len(codes) * 9 // 8, "little")
    return bytes(out)


def test_lzw_refuses_codes_out_of_nowhere() -> None:
    with pytest.raises(DamagedData, match="LZW code 511"):
        lzw(b"\xff\xff\xff")


def test_another_file_is_no_bible() -> None:
    with pytest.raises(DamagedData):
        expand(b"PK\x03\x04")


def test_characters_follow_each_other_and_stay_with_their_client() -> None:
    texts = Texts(x=("abcdef", "uvw", "gh"), client=np.asarray([3, 5, 3]))
    windows = characters(texts, 4)

    spelled = ["".join(ALPHABET[symbol] for symbol in row) for row in windows.x]
    following = ["".join(ALPHABET[symbol] for symbol in row) for row in windows.y]
    assert spelled == ["abcd", "ef\ng"]
    assert following == ["bcde", "f\ngh"]
    assert windows.client is not None
    assert windows.client.tolist() == [3, 3]
    assert characters(Texts(x=("é~",)), 1).x.tolist() == [[0]]
    with pytest.raises(ValueError, match=">= 1"):
        characters(texts, 0)


def test_the_alphabet_covers_the_bible(real: Load) -> None:
    bible = real("king-james")
    assert set("".join(bible.train.x)) <= set(ALPHABET)
    windows = characters(bible.test, 80)
    assert windows.x.min() > 0
    assert np.array_equal(windows.x[0, 1:], windows.y[0, :-1])


def test_surnames_are_those_of_the_census(real: Load) -> None:
    names = real("surnames").train

    assert names.x[:3] == ("SMITH", "JOHNSON", "WILLIAMS")
    assert names.y.sum() == pytest.approx(1)
    assert (np.diff(names.y) <= 0).all()
    assert names.y[0] == pytest.approx(1.006 / 90.5, rel=0.05)


def test_a_name_for_both_sexes_is_counted_once(real: Load) -> None:
    names = real("first-names").train
    assert len(set(names.x)) == len(names.x)
    assert "LESLIE" in names.x


def test_the_is_the_most_frequent_english_word(real: Load) -> None:
    words = real("english-words").train

    assert words.x[0] == "the"
    ratio = words.y[0] / words.y[words.x.index("house")]
    assert 50 < ratio < 500


def test_word_lists_of_every_length_of_messagepack() -> None:
    many = [f"w{number:03}" for number in range(20)]  # an array and strings with 16-bit lengths
    long = "x" * 40
    body = b"\x94\x82\xa6format\xa2cB\xa7version\x01\x90"
    body += b"\xdc\x00\x14" + b"".join(b"\xa4" + word.encode() for word in many)
    body += b"\x91\xd9\x28" + long.encode()

    assert cbpack(gzip.compress(body)) == [[], many, [long]]
    with pytest.raises(DamagedData, match="0xc0"):
        cbpack(gzip.compress(b"\x91\xc0"))
    with pytest.raises(DamagedData, match="not a word list"):
        cbpack(gzip.compress(b"\x91\x80"))
