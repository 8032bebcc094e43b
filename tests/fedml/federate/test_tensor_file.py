# SPDX-License-Identifier: Apache-2.0
"""What the reference library writes is read, and written with the same bytes; whatever is
malformed is refused when it is opened."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from safetensors.numpy import load_file, save, save_file

from fedml.federate.tensor_file import BadTensorFile, TensorFile, mapped, write

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array(7, np.int64),
    "c": np.empty((0, 4), np.float16),
    "d": np.array([True, False]),
    "e": np.linspace(0, 1, 5),
}


def open_files() -> int:
    return len([*Path("/proc/self/fd").iterdir()])


def raw(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_every_type_that_numpy_has_is_read_back(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "t", metadata={"round": "3"})
    with TensorFile(tmp_path / "t") as file:
        loaded = file.load()
    assert loaded.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[name], array)


@pytest.mark.parametrize("before", [0, 10, 5_000_000])
def test_written_over_another_file_nothing_of_that_remains(tmp_path: Path, before: int) -> None:
    arrays = {"w": np.arange(700_001, dtype=np.float32), "b": np.ones(3)}
    (tmp_path / "over").write_bytes(b"x" * before)
    there = (tmp_path / "over").stat().st_ino

    write(tmp_path / "over", arrays, over=True)

    assert (tmp_path / "over").read_bytes() == save(arrays)
    assert (tmp_path / "over").stat().st_ino == there


def test_a_mapped_file_holds_the_same_and_cannot_be_written(tmp_path: Path) -> None:
    arrays = {"w": np.arange(6.0).reshape(2, 3), "none": np.empty((0, 2)), "one": np.array(7.0)}
    save_file(arrays, tmp_path / "f")

    found = mapped(tmp_path / "f")
    (tmp_path / "f").unlink()

    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert np.array_equal(found[name], array)
        assert found[name].shape == array.shape
        assert not found[name].flags.writeable


def test_a_run_of_elements_is_read_without_the_rest(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "t")
    with TensorFile(tmp_path / "t") as file:
        np.testing.assert_array_equal(file.read("a", 2, 5), [2, 3, 4])
        assert file.read("a", 3, 3).size == 0


def test_a_file_cut_after_opening_is_an_error_not_a_signal(tmp_path: Path) -> None:
    save_file({"a": np.zeros(10_000, np.float32)}, tmp_path / "t")
    with TensorFile(tmp_path / "t") as file:
        os.truncate(tmp_path / "t", 5000)
        with pytest.raises(BadTensorFile, match="ends inside tensor 'a'"):
            file.read("a")


TYPES = ["?", "<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<u8", "<i8", "<f2", "<f4", "<f8"]
NAMES = st.text(st.characters(codec="utf-8"), max_size=12).filter(lambda name: name[:2] != "__")


@settings(deadline=None)
@given(
    st.dictionaries(
        NAMES,
        arrays_of.arrays(
            st.sampled_from(TYPES), arrays_of.array_shapes(min_dims=0, min_side=0, max_side=5)
        ),
        max_size=6,
    ),
    st.none() | st.dictionaries(NAMES, NAMES, min_size=1, max_size=1),
)
def test_a_file_has_the_bytes_of_the_library(tmp_path_factory, tensors, metadata) -> None:
    path = tmp_path_factory.getbasetemp() / "written"
    write(path, tensors, metadata=metadata)
    assert path.read_bytes() == save(tensors, metadata=metadata)


def test_strided_and_big_endian_arrays_keep_their_numbers(tmp_path: Path) -> None:
    square = np.arange(12, dtype=np.float32).reshape(3, 4)
    tensors = {"turned": square.T, "every_other": square[:, ::2], "foreign": square.astype(">f4")}
    write(tmp_path / "t", tensors)
    found = load_file(tmp_path / "t")
    for name, array in tensors.items():
        np.testing.assert_array_equal(found[name], array)


def test_what_no_file_holds_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'w' has type complex64"):
        write(tmp_path / "t", {"w": np.zeros(2, np.complex64)})
    assert not (tmp_path / "t").exists()


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "does not fit into it"),
        (b"\xff" * 8, "does not fit into it"),
        (raw(b"not json"), "Expecting value"),
        (raw(b"[" * 100_000), "recursion"),
        (raw([1]), "its header is no object"),
        (raw({"__metadata__": {"a": 1}}), "expected str instance, int found"),
        (raw({"__metadata__": 1}), "its metadata is no object"),
        (raw({"a": 3}), "'a' is not described correctly"),
        (raw({"a": {**F32, "dtype": "BF16", "shape": [4]}}, b"\0" * 8), "type 'BF16'"),
        (raw({"a": {**F32, "dtype": ["F32"]}}, b"\0" * 8), "'a' is not described correctly"),
        (raw({"a": {**F32, "shape": [3]}}, b"\0" * 8), "F32\\[3\\] takes 12 bytes, 8 are declared"),
        (raw({"a": {**F32, "shape": [-2]}}, b"\0" * 8), "no size in bytes: -2"),
        (raw({"a": {**F32, "shape": [True, 2]}}, b"\0" * 8), "'a' is not described correctly"),
        (raw({"a": {**F32, "data_offsets": [8, 0]}}, b"\0" * 8), "-8 are declared"),
        (raw({"a": F32}, b"\0" * 9), "has 78 bytes, its header describes 77"),
        (raw({"a": F32}, b"\0" * 7), "has 76 bytes, its header describes 77"),
        (raw({"a": F32, "b": F32}, b"\0" * 8), "'b' leaves a gap or overlaps another"),
        (raw({"a": {**F32, "data_offsets": [8, 16]}}, b"\0" * 16), "'a' leaves a gap"),
        (raw(b'{"a": %s, "a": %s}' % ((json.dumps(F32).encode(),) * 2), b"\0" * 8), "twice"),
    ],
)
def test_a_malformed_file_is_refused_with_the_reason(tmp_path: Path, content, why) -> None:
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(BadTensorFile, match=why):
        TensorFile(tmp_path / "t")


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_a_damaged_file_is_refused_or_read_never_anything_else(tmp_path_factory, data) -> None:
    good = bytearray(save(TENSORS))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(good[: data.draw(st.integers(0, len(good)))])
    before = open_files()
    try:
        with TensorFile(path) as file:
            file.load()
    except BadTensorFile:
        pass
    assert open_files() == before
