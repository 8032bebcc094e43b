# SPDX-License-Identifier: Apache-2.0
"""Secrets are taken out of a stream, however it is cut."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedml_agent.redact import Redactor, Secrets
from fedml_agent.secret_names import secrets_of
from tests.fakes.messages import LAW

PASSWORD = "hunter2-and-more"
SECRETS = Secrets({"DB_PASSWORD": PASSWORD, "LONG_TOKEN": "abcabcd", "LONGER_TOKEN": "abcabcdef"})


def test_a_value_is_replaced_by_its_name() -> None:
    assert SECRETS.replace(f"login {PASSWORD}!\n".encode()) == b"login ***DB_PASSWORD***!\n"
    assert SECRETS.hide(f"ü {PASSWORD}") == "ü ***DB_PASSWORD***"


@pytest.mark.parametrize("before", ["", "u", "me:", "user:", "\0"])
@pytest.mark.parametrize("after", ["", "\n", "@host"])
@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode])
def test_its_base64_is_found_wherever_it_stands(before: str, after: str, encode: object) -> None:
    value = "p>?~ssword/+üü~~??>>"
    text = encode((before + value + after).encode())  # type: ignore[operator]
    hidden = Secrets({"A_TOKEN": value}).replace(b"Authorization: Basic " + text)
    assert b"***A_TOKEN***" in hidden
    # What is left is of the neighbours: at most what three bytes at each end decide.
    assert len(hidden) - len(b"Authorization: Basic ***A_TOKEN***") <= 4 * (len(before) + 8)


def test_lines_of_a_key_are_found_one_by_one() -> None:
    key = "-----BEGIN KEY-----\nMC4CAQAwBQYDK2VwBCIEIA\nshort\n-----END KEY-----\n"
    secrets = Secrets({"SSH_KEY": key})
    assert secrets.replace(b"> MC4CAQAwBQYDK2VwBCIEIA\n") == b"> ***SSH_KEY***\n"
    assert secrets.replace(b"short\n") == b"short\n"


def test_of_two_secrets_that_begin_alike_the_longer_one_counts() -> None:
    redactor = Redactor(SECRETS)
    assert redactor.feed(b"abcabcd") == b""  # it may be either
    assert redactor.feed(b"ef") == b"***LONGER_TOKEN***"
    assert redactor.feed(b"abcabcd") == b""
    assert redactor.rest() == b"***LONG_TOKEN***"


def test_a_line_that_ends_is_not_held_back() -> None:
    assert Redactor(SECRETS).feed(b"epoch 1\n") == b"epoch 1\n"


TEXTS = st.lists(
    st.sampled_from(["abc", "abcabcd", "abcabcdef", PASSWORD, PASSWORD[:7], "a", "x\n", "d", "h"]),
    max_size=12,
).map("".join)


@LAW
@given(text=TEXTS, cuts=st.lists(st.integers(0, 120), max_size=8))
def test_however_a_stream_is_cut_the_result_is_that_of_the_whole(
    text: str, cuts: list[int]
) -> None:
    data = text.encode()
    redactor, out, at = Redactor(SECRETS), b"", 0
    for cut in [*sorted(c for c in cuts if c < len(data)), len(data)]:
        out += redactor.feed(data[at:cut])
        at = cut
    assert out + redactor.rest() == SECRETS.replace(data)
    assert PASSWORD.encode() not in out


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "wandb_api_key", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "CLIENT_SECRET",
     "CREDENTIALS", "PASSWD"],
)  # fmt: skip
def test_names_that_look_secret_are(name: str) -> None:
    assert secrets_of({name: "0123456789"}) == {name: "0123456789"}


@pytest.mark.parametrize(
    "name", ["TOKENIZER", "KEYBOARD", "MONKEY", "SEED", "PATH", "PASSWORDLESS"]
)
def test_names_that_do_not_are_not(name: str) -> None:
    assert secrets_of({name: "0123456789"}) == {}


def test_who_declares_a_secret_is_believed() -> None:
    env = {"LOGIN": "ana:1234", "SITE": "north", "N_KEY": "1"}
    assert secrets_of(env, ["LOGIN"]) == {"LOGIN": "ana:1234"}
    assert secrets_of(env, [], ["SI*"]) == {"SITE": "north"}
    assert secrets_of(env) == {}  # too short to be one, and in every other line
