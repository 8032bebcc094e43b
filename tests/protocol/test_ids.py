# SPDX-License-Identifier: Apache-2.0
"""Ids are safe wherever they are put; UUIDv7 is what RFC 9562 says."""

import re
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedml_protocol.errors import MalformedMessage
from fedml_protocol.ids import check_id, check_sha256, uuid7
from tests.fakes.messages import IDS, LAW, SHA256

DANGEROUS = ["", "a" * 41, "A", "a.b", "a/b", "..", "+", "#", "$sys", "a b", "ä", "a\n", "\0", "٣"]


@LAW
@given(IDS)
def test_an_id_passes_as_it_is(value: str) -> None:
    assert check_id(value, "task") == value


@LAW
@given(st.text(max_size=45) | st.sampled_from(DANGEROUS))
def test_whatever_else_is_no_id(value: str) -> None:
    fits = 1 <= len(value) <= 40 and set(value) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    if fits:
        assert check_id(value, "task") == value
    else:
        with pytest.raises(MalformedMessage, match="task must be 1 to 40"):
            check_id(value, "task")


@pytest.mark.parametrize("value", DANGEROUS)
def test_what_could_leave_a_folder_a_topic_or_a_url_is_no_id(value: str) -> None:
    with pytest.raises(MalformedMessage) as error:
        check_id(value, "device")
    assert error.value.fault == "sender"


def test_a_refused_id_is_not_repeated_at_length() -> None:
    with pytest.raises(MalformedMessage) as error:
        check_id("x" * 100_000, "task")
    assert len(str(error.value)) < 200


@LAW
@given(SHA256)
def test_a_hash_is_64_lower_case_digits(value: str) -> None:
    assert check_sha256(value) == value
    for other in (value[1:], value + "0", f" {value[1:]}", value[1:] + "\n", value[1:] + "G"):
        with pytest.raises(MalformedMessage, match="not a SHA-256"):
            check_sha256(other)


def test_uuid7_is_the_example_of_the_rfc() -> None:
    """RFC 9562, appendix A.6."""
    entropy = (0xCC3 << 62 | 0x18C4DC0C0C07398F).to_bytes(10)
    value = uuid.UUID(bytes=uuid7(0x017F22E279B0, entropy))
    assert str(value) == "017f22e2-79b0-7cc3-98c4-dc0c0c07398f"


@LAW
@given(st.integers(0, 2**48 - 1), st.integers(0, 2**48 - 1), st.binary(min_size=10, max_size=16))
def test_uuid7_carries_version_variant_and_a_time_that_sorts(
    one: int, two: int, entropy: bytes
) -> None:
    value = uuid.UUID(bytes=uuid7(one, entropy))
    assert value.version == 7
    assert value.variant == uuid.RFC_4122
    assert value.int >> 80 == one
    if one < two:
        assert uuid7(one, entropy) < uuid7(two, b"\0" * 10)


@LAW
@given(st.binary(min_size=10, max_size=10), st.binary(min_size=10, max_size=10))
def test_uuid7_keeps_74_random_bits(one: bytes, two: bytes) -> None:
    low = (1 << 74) - 1
    same = int.from_bytes(one) & low == int.from_bytes(two) & low
    assert (uuid7(1, one) == uuid7(1, two)) == same


def test_a_hash_is_written_as_hashlib_writes_it() -> None:
    assert re.fullmatch("[0-9a-f]{64}", check_sha256("0123456789abcdef" * 4))
