# SPDX-License-Identifier: Apache-2.0
"""Login keys survive copying or are refused with advice; orders are believed only when signed."""

import base64
import string
import zlib
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from fedml_protocol import wire_pb2
from fedml_protocol.codec import parse, serialise
from fedml_protocol.errors import (
    BadKey,
    BadSignature,
    MalformedMessage,
    ProtocolError,
    UnsupportedMessage,
)
from fedml_protocol.keys import (
    SECRET_BYTES,
    LoginKey,
    Scope,
    fingerprint,
    parse_login_key,
    sign,
    verify,
)
from fedml_protocol.tasks import Order, SignedOrder
from tests.fakes.messages import LAW, messages
from tests.protocol.golden.examples import DEVICE, ORDERS, SIGNING_KEY

URLS = st.text(string.ascii_lowercase + string.digits + ".:/-[]", max_size=40).map(
    "https://".__add__
)
KEYS = st.builds(
    LoginKey,
    scope=st.sampled_from(Scope),
    url=URLS,
    ca_sha256=st.binary(min_size=32, max_size=32),
    secret=st.binary(min_size=SECRET_BYTES, max_size=SECRET_BYTES),
)
PUBLIC = SIGNING_KEY.public_key()
TRUSTED = {fingerprint(PUBLIC): PUBLIC}


def key(url: str = "https://b.example.org:8443", scope: Scope = Scope.DEVICE) -> LoginKey:
    """A key whose bytes have both bits of every base64 character in use somewhere."""
    return LoginKey(scope=scope, url=url, ca_sha256=bytes(range(200, 232)), secret=b"\xfb\xff" * 12)


@LAW
@given(KEYS)
def test_a_key_is_read_as_it_was_printed(given_key: LoginKey) -> None:
    text = str(given_key)
    assert parse_login_key(text, given_key.scope) == given_key
    assert parse_login_key(f"  {text}\n", given_key.scope) == given_key
    assert set(text) <= set(string.ascii_letters + string.digits + "-_")


@pytest.mark.parametrize("url", ["https://b:1", "https://b:12", "https://b:123"])
def test_every_truncation_and_changed_character_of_a_key_is_refused(url: str) -> None:
    """Three lengths: base64 leaves 0, 2 or 4 bits of its last character unused."""
    text = str(key(url))
    alphabet = string.ascii_letters + string.digits + "-_+/= .\n~"
    for cut in range(len(text)):
        refused(text[:cut])
        refused(text[:cut] + text[cut + 1 :])
    for at, right in enumerate(text):
        for wrong in alphabet:
            changed = text[:at] + wrong + text[at + 1 :]
            if wrong != right and changed.strip() != text:
                refused(changed)
    for after in (*"".join(alphabet.split()), "==", text):
        refused(text + after)


def refused(text: str) -> None:
    """`text` is no key, and the person is told what to do."""
    advice = ""
    try:
        parse_login_key(text, Scope.DEVICE)
    except BadKey as error:
        advice = str(error)
    assert "copy it again" in advice or "fedml-broker" in advice, text


@LAW
@given(KEYS, st.data())
def test_two_swapped_or_lost_characters_are_refused(
    given_key: LoginKey, data: st.DataObject
) -> None:
    text = str(given_key)
    one, two = sorted(data.draw(st.tuples(*[st.integers(0, len(text) - 1)] * 2)))
    swapped = text[:one] + text[two] + text[one + 1 : two] + text[one] + text[two + 1 :]
    for damaged in (swapped if one != two else text[1:], text[:one] + text[two + 1 :]):
        if damaged != text:
            with pytest.raises(BadKey):
                parse_login_key(damaged, given_key.scope)


@LAW
@given(st.text(max_size=120) | st.text(max_size=120).map("fedml1d_".__add__))
def test_any_text_is_refused(text: str) -> None:
    with pytest.raises(BadKey) as error:
        parse_login_key(text, Scope.DEVICE)
    assert error.value.fault == "person"


@LAW
@given(st.binary(max_size=120))
def test_a_fitting_checksum_under_anything_is_read_or_refused(body: bytes) -> None:
    data = body + zlib.crc32(b"d" + body).to_bytes(4)
    text = "fedml1d_" + base64.urlsafe_b64encode(data).decode().rstrip("=")
    try:
        read = parse_login_key(text, Scope.DEVICE)
    except BadKey:
        return
    assert str(read) == text


def test_a_key_whose_url_is_no_text_is_refused() -> None:
    body = bytes(32 + SECRET_BYTES) + b"https://\xff\xfe"
    data = body + zlib.crc32(b"d" + body).to_bytes(4)
    with pytest.raises(BadKey):
        parse_login_key("fedml1d_" + base64.urlsafe_b64encode(data).decode(), Scope.DEVICE)


def test_a_key_of_the_other_scope_is_refused_with_the_way_to_the_right_one() -> None:
    with pytest.raises(
        BadKey, match=r"user's key.*a machine needs a device key, from `fedml-broker keys"
    ):
        parse_login_key(str(key(scope=Scope.USER)), Scope.DEVICE)
    with pytest.raises(BadKey, match=r"device's key, for `fedml-agent login`.*users token NAME"):
        parse_login_key(str(key(scope=Scope.DEVICE)), Scope.USER)
    with pytest.raises(BadKey, match=r"run's key, for the job itself.*users token NAME"):
        parse_login_key(str(key(scope=Scope.RUN)), Scope.USER)


def test_a_key_whose_scope_was_edited_is_damaged() -> None:
    edited = str(key(scope=Scope.USER)).replace("fedml1u_", "fedml1d_")
    with pytest.raises(BadKey, match="damaged"):
        parse_login_key(edited, Scope.DEVICE)


@pytest.mark.parametrize("scope", Scope)
def test_what_is_no_key_is_answered_with_where_to_get_one(scope: Scope) -> None:
    for text in ("", "hello", "_", "fedml1_", "fedml2d_abc", "FEDML1D_abc", "https://b:8443"):
        with pytest.raises(BadKey, match=f"fedml1{scope}_ and is (printed by|what a job finds)"):
            parse_login_key(text, scope)


def test_the_secret_is_not_shown() -> None:
    shown = repr(key()) + f"{[key()]}"
    assert str(key()) not in shown
    assert repr(key().secret) not in shown
    assert "b.example.org" in shown


def test_a_key_with_parts_of_another_length_is_not_made() -> None:
    for secret in (b"", bytes(23), bytes(25)):
        with pytest.raises(BadKey):
            replace(key(), secret=secret)
    for ca_sha256 in (b"", bytes(31), bytes(64)):
        with pytest.raises(BadKey):
            replace(key(), ca_sha256=ca_sha256)


@LAW
@given(messages(Order))
def test_a_signed_order_is_believed(order: Order) -> None:
    assert verify(sign(order, SIGNING_KEY), TRUSTED, order.device) == order


@pytest.mark.parametrize("name", ORDERS)
def test_every_flipped_bit_of_a_signed_order_is_refused(name: str) -> None:
    whole = serialise(sign(ORDERS[name], SIGNING_KEY))
    number = int.from_bytes(whole)
    for bit in range(8 * len(whole)):
        fault = None
        try:
            verify(parse(SignedOrder, (number ^ 1 << bit).to_bytes(len(whole))), TRUSTED, DEVICE)
        except (BadSignature, MalformedMessage) as error:
            fault = error.fault
        assert fault == "sender", f"bit {bit}"


def test_every_truncation_of_a_signed_order_is_refused() -> None:
    whole = serialise(sign(ORDERS["offer-launch"], SIGNING_KEY))
    for cut in range(len(whole)):
        with pytest.raises((BadSignature, MalformedMessage)):
            verify(parse(SignedOrder, whole[:cut]), TRUSTED, DEVICE)


@LAW
@given(messages(SignedOrder))
def test_an_order_that_nobody_signed_is_refused(signed: SignedOrder) -> None:
    for key_id in (signed.key_id, fingerprint(PUBLIC)):
        with pytest.raises(BadSignature):
            verify(replace(signed, key_id=key_id), TRUSTED, DEVICE)


def test_a_signature_of_another_length_is_refused() -> None:
    signed = sign(ORDERS["drain"], SIGNING_KEY)
    for signature in (b"", signed.signature[:63], signed.signature + b"\0", bytes(64)):
        with pytest.raises(BadSignature, match="does not fit"):
            verify(replace(signed, signature=signature), TRUSTED, DEVICE)


def test_an_order_signed_with_an_unknown_key_is_refused() -> None:
    stranger = Ed25519PrivateKey.from_private_bytes(bytes(32))
    signed = sign(ORDERS["drain"], stranger)
    with pytest.raises(BadSignature, match="unknown key"):
        verify(signed, TRUSTED, DEVICE)
    with pytest.raises(BadSignature, match="unknown key"):
        verify(signed, {}, DEVICE)
    with pytest.raises(BadSignature, match="does not fit"):
        verify(replace(signed, key_id=fingerprint(PUBLIC)), TRUSTED, DEVICE)


def test_an_order_for_another_device_is_refused() -> None:
    with pytest.raises(BadSignature, match=f"for device {DEVICE}, this is d-other"):
        verify(sign(ORDERS["drain"], SIGNING_KEY), TRUSTED, "d-other")


def test_an_order_is_not_read_before_its_signature_fits() -> None:
    junk = SignedOrder(key_id=fingerprint(PUBLIC), order=b"\xff", signature=bytes(64))
    with pytest.raises(BadSignature):
        verify(junk, TRUSTED, DEVICE)


def test_a_signature_under_other_bytes_is_no_signature_under_an_order() -> None:
    order = serialise(ORDERS["drain"])
    bare = SignedOrder(key_id=fingerprint(PUBLIC), order=order, signature=SIGNING_KEY.sign(order))
    with pytest.raises(BadSignature):
        verify(bare, TRUSTED, DEVICE)


@pytest.mark.parametrize(
    ("order", "refusal", "fault"),
    [
        (b"\xff", MalformedMessage, "sender"),
        (wire_pb2.Order(device=DEVICE).SerializeToString(), UnsupportedMessage, "version"),
        (
            wire_pb2.Order(device=DEVICE, drain=wire_pb2.Drain()).SerializeToString(),
            MalformedMessage,
            "sender",
        ),
    ],
)
def test_what_is_signed_and_no_order_is_refused_too(
    order: bytes, refusal: type[ProtocolError], fault: str
) -> None:
    signed = SignedOrder(
        key_id=fingerprint(PUBLIC),
        order=order,
        signature=SIGNING_KEY.sign(b"fedml order 1\0" + order),
    )
    with pytest.raises(refusal) as error:
        verify(signed, TRUSTED, DEVICE)
    assert error.value.fault == fault


def test_a_fingerprint_is_the_beginning_of_the_keys_hash() -> None:
    """The public key is RFC 8032's for the seed 00 01 ... 1f, hashed with sha256sum."""
    assert fingerprint(PUBLIC) == "56475aa75463474c"
