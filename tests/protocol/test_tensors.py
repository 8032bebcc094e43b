# SPDX-License-Identifier: Apache-2.0
"""Headers of tensor files, against the safetensors library: what it writes is read here equally,
what is accepted here it accepts too, and nothing makes the reader crash."""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.numpy import save

from fedml_protocol.errors import MalformedMessage
from fedml_protocol.tensors import (
    DTYPES,
    MAX_DIMENSIONS,
    MAX_HEADER_BYTES,
    Tensor,
    header_length,
    read_header,
)
from tests.fakes.messages import LAW

# NumPy has no bfloat16: that one is written with torch, in a test of its own.
NUMPY = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip

NAMES = st.text(max_size=8).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 4), max_size=4)
DECLARED = st.dictionaries(NAMES, st.tuples(st.sampled_from(sorted(NUMPY)), SHAPES), max_size=5)
# Not empty: with no tensors and empty metadata, safetensors 0.8 writes what it cannot read itself.
TEXT = st.text(max_size=4)
METADATA = st.none() | st.dictionaries(TEXT, TEXT, min_size=1, max_size=2)


def written(declared: Mapping[str, tuple[str, list[int]]], metadata: Any = None) -> bytes:
    """A file as the library writes it; no two neighbours in it are equal."""
    arrays: dict[str, Any] = {
        name: np.arange(math.prod(shape)).astype(NUMPY[dtype]).reshape(shape)
        for name, (dtype, shape) in declared.items()
    }
    return bytes(save(arrays, metadata=metadata))


def ours(file: bytes) -> dict[str, Tensor]:
    """What this side reads in a file."""
    length = header_length(file[:8], len(file))
    return read_header(file[8 : 8 + length], len(file))


def theirs(file: bytes) -> dict[str, dict[str, Any]]:
    """What the library reads in a file."""
    return dict(safetensors.deserialize(file))  # type: ignore[no-untyped-call]


def agree(file: bytes) -> None:
    """Refused here with an error that says whose fault it is, or read by both alike."""
    try:
        tensors = ours(file)
    except MalformedMessage:
        return
    same = theirs(file)
    assert {name: (t.dtype, list(t.shape)) for name, t in tensors.items()} == {
        name: (t["dtype"], t["shape"]) for name, t in same.items()
    }
    for name, tensor in tensors.items():
        assert file[tensor.start : tensor.start + tensor.size] == same[name]["data"]


def file_of(header: object, data: bytes = b"") -> bytes:
    """A file with any header at all."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: Any = "U8", shape: Any = (1,), offsets: Any = (0, 1)) -> dict[str, Any]:
    """What a header says about one tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_the_types_of_both_sides_have_the_same_names_and_sizes() -> None:
    sizes = {name: np.dtype(dtype).itemsize for name, dtype in NUMPY.items()}
    assert {**sizes, "BF16": 2} == DTYPES


def test_what_torch_writes_as_bfloat16_is_read() -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save as torch_save

    file = torch_save({"w": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)})
    assert ours(file) == {"w": Tensor("BF16", (2, 3), len(file) - 12, 12)}
    agree(file)


@LAW
@given(DECLARED, METADATA)
def test_what_the_library_writes_is_read_as_it_was_meant(
    declared: dict[str, tuple[str, list[int]]], metadata: dict[str, str] | None
) -> None:
    file = written(declared, metadata)
    tensors = ours(file)
    assert {name: (t.dtype, list(t.shape)) for name, t in tensors.items()} == {
        name: (dtype, shape) for name, (dtype, shape) in declared.items()
    }
    agree(file)


@LAW
@given(DECLARED)
def test_tensors_come_in_the_order_of_their_data_without_gaps(
    declared: dict[str, tuple[str, list[int]]],
) -> None:
    file = written(declared)
    end = 8 + header_length(file[:8], len(file))
    for tensor in ours(file).values():
        assert tensor.start == end
        end += tensor.size
    assert end == len(file)


@LAW
@given(DECLARED, st.data())
def test_a_damaged_file_is_refused_or_read_by_both_alike(
    declared: dict[str, tuple[str, list[int]]], data: st.DataObject
) -> None:
    file = written(declared)
    length = header_length(file[:8], len(file))
    for _ in range(20):
        at = data.draw(st.integers(8, 7 + length))
        put = data.draw(st.binary(max_size=2) | st.sampled_from(list(b'-0123456789"{}[],:\\ e.')))
        piece = put if isinstance(put, bytes) else bytes([put])
        header = file[8:at] + piece + file[at + 1 : 8 + length]
        agree(file_of(header, file[8 + length :]))
    cut = data.draw(st.integers(0, len(file) - 1))
    with pytest.raises(MalformedMessage):
        ours(file[:cut])
    with pytest.raises(MalformedMessage):
        ours(file + b"\0")


def test_every_flipped_bit_of_a_header_is_refused_or_read_by_both_alike() -> None:
    file = written({"a": ("F32", [2, 3]), "b.weight": ("I8", [4]), "c": ("F64", [])}, {"k": "v"})
    length = header_length(file[:8], len(file))
    number = int.from_bytes(file)
    for bit in range(8 * (len(file) - 8 - length), 8 * len(file)):
        agree((number ^ 1 << bit).to_bytes(len(file)))


NUMBERS = st.integers(-2, 9) | st.sampled_from([2**31, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 1.0])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)
ENTRIES = st.builds(
    entry,
    st.sampled_from([*DTYPES, "F8_E4M3", "f32", ""]) | JSON,
    st.lists(NUMBERS, max_size=4) | JSON,
    st.lists(NUMBERS, max_size=3) | JSON,
)


@LAW
@given(
    JSON | st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), ENTRIES | JSON),
    st.binary(max_size=9),
)
@example({}, b"")
@example({"a": entry(shape=[0, 2**64 - 1], offsets=[0, 0])}, b"")
@example({"a": entry(shape=[2**63, 2, 0], offsets=[0, 0])}, b"")
@example({"a": entry(shape=[2**62, 4, 0], offsets=[0, 0])}, b"")
@example({"a": entry(shape={}, offsets=[0, 1])}, b"x")
@example({"a": entry(shape="", offsets=[0, 1])}, b"x")
@example({"a": ["U8", [1], [0, 1]]}, b"x")
@example({"a": entry(), "__metadata__": {"k": 1}}, b"x")
@example({"a": entry(), "__metadata__": ["k"]}, b"x")
@example({"\ud800": entry()}, b"x")
@example({"a": entry(), "__metadata__": {"k": "\udfff"}}, b"x")
@example({"a": {**entry(), "b": float("nan")}}, b"x")
@example({"a": {**entry(), "shape": [True]}}, b"x")
def test_any_header_is_refused_or_read_by_both_alike(header: Any, data: bytes) -> None:
    agree(file_of(header, data))


@LAW
@given(st.binary(max_size=60))
def test_any_bytes_are_refused_or_read_by_both_alike(data: bytes) -> None:
    agree(data)
    agree(file_of(data))


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[-0,1]}}',
        b'{"a":{"dtype":"U8","shape":[01],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U8","shape":[1e0],"data_offsets":[0,1]}}',
        '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'.encode("utf-16"),
        b'\xef\xbb\xbf{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b'{"\xff":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1,1]}}',
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0]}}',
        b'{"a":{"dtype":"U8","shape":[1]}}',
        b'{"a":{"dtype":["U8"],"shape":[1],"data_offsets":[0,1]}}',
        b"[]",
        b"null",
        b"",
    ],
    ids=range(15),
)
def test_what_readers_may_disagree_about_is_the_senders_fault(header: bytes) -> None:
    with pytest.raises(MalformedMessage) as error:
        ours(file_of(header, b"x"))
    assert error.value.fault == "sender"


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ({"a": entry(shape=[2])}, "U8.2. takes 2 bytes, 1 are declared"),
        ({"a": entry(dtype="F32")}, "takes 4 bytes"),
        ({"a": entry(dtype="COMPLEX")}, "'a' is not described correctly"),
        ({"a": entry(offsets=[1, 2])}, "'a' leaves a gap"),
        ({"a": entry(), "b": entry()}, "'b' leaves a gap or overlaps"),
        ({}, "the file has 11 bytes, its header describes 10"),
        ({"a": entry(shape=[1] * (MAX_DIMENSIONS + 1))}, "not described correctly"),
    ],
)
def test_a_refusal_names_the_tensor_and_what_is_wrong(header: object, why: str) -> None:
    with pytest.raises(MalformedMessage, match=why):
        ours(file_of(header, b"x"))


def test_a_header_longer_than_the_file_or_the_limit_is_refused_before_it_is_read() -> None:
    for head, size in (
        (b"", 0),
        (b"\0" * 7, 100),
        ((93).to_bytes(8, "little"), 100),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little"), 2**40),
        (b"\xff" * 8, 2**64),
    ):
        with pytest.raises(MalformedMessage, match="does not fit"):
            header_length(head, size)
    assert header_length((92).to_bytes(8, "little") + b"{", 100) == 92
    assert header_length(MAX_HEADER_BYTES.to_bytes(8, "little"), 2**40) == MAX_HEADER_BYTES


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a":{"dtype":"U8","shape":[' + b"9," * 2_000_000 + b'9],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U8","shape":[' + b"9" * 100_000 + b'],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,' + b"9" * 4_000 + b"]}}",
        b'{"' + b"a" * 1_000_000 + b'":{"dtype":"U8","shape":[2],"data_offsets":[0,1]}}',
    ],
    ids=["lists", "objects", "dimensions", "digits", "offset", "name"],
)
def test_a_hostile_header_is_refused_at_once_and_in_few_words(header: bytes) -> None:
    """At once: the product of two million sizes would outlast the time limit of a test."""
    with pytest.raises(MalformedMessage) as error:
        ours(file_of(header, b"x"))
    assert len(str(error.value)) < 300
