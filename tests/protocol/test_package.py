# SPDX-License-Identifier: Apache-2.0
"""Manifests of packages: what is said comes back, and nothing in one reaches out."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedml_protocol.errors import MalformedMessage
from fedml_protocol.package import File, Link, Package, Part, leads_out, parse

SHA = "ab" * 32
NAMES = st.text(min_size=1, max_size=20).filter(
    lambda n: "/" not in n and "\0" not in n and n not in (".", "..")
)


@given(st.dictionaries(NAMES, st.tuples(st.integers(0, 2**50), st.booleans()), min_size=1))
def test_a_manifest_says_what_it_was_made_of(files: dict[str, tuple[int, bool]]) -> None:
    parts = tuple(Part(SHA, (File(f"d/{name}", *facts),)) for name, facts in files.items())
    package = Package(parts, (Link("l", "d"),))
    assert parse(package.manifest()) == package
    assert package.size == sum(size for size, _ in files.values())


def _manifest(files: object = (), links: object = (), version: object = 1, sha: str = SHA) -> bytes:
    parts = [{"sha256": sha, "files": files}] if files else []
    return json.dumps({"package": version, "parts": parts, "links": links}).encode()


@pytest.mark.parametrize(
    ("manifest", "why"),
    [
        (b"\x1f\x8b\x08", "not the manifest"),
        (b"[]", "not the manifest"),
        (b"{}", "not the manifest"),
        (b"[" * 100_000, "not the manifest"),
        (_manifest(version=2), "not known"),
        (_manifest([["a", -1]]), "no size"),
        (_manifest([["a", True]]), "no size"),
        (_manifest([["a", 1, "w"]]), "no mode"),
        (_manifest([["a", 1]], sha="../x"), "SHA-256"),
        (_manifest([["\udead", 1]]), "not the manifest"),
        (_manifest([["a", 1], ["a", 2]]), "twice"),
        (_manifest([["a", 1]], [["a", "b"]]), "twice"),
        (_manifest([["a/b", 1]], [["a", "c"]]), "a directory and something else"),
        (_manifest([["a/b/c", 1], ["a", 1]]), "a directory and something else"),
        (_manifest([["/a", 1]]), "no path"),
        (_manifest([["../a", 1]]), "no path"),
        (_manifest([["a/../../b", 1]]), "no path"),
        (_manifest([["a//b", 1]]), "no path"),
        (_manifest([["a\0", 1]]), "no path"),
        (_manifest([["x" * 256, 1]]), "no path"),
        (_manifest([[7, 1]]), "no path"),
        (_manifest(links=[["a", "/etc/passwd"]]), "leads out"),
        (_manifest(links=[["d/a", "../../x"]]), "leads out"),
        (_manifest(links=[["a", 3]]), "leads out"),
    ],
)
def test_what_reaches_out_or_is_no_manifest_is_refused(manifest: bytes, why: str) -> None:
    with pytest.raises(MalformedMessage, match=why):
        parse(manifest)


def test_a_link_may_point_to_its_neighbours_and_not_through_another_link_upwards() -> None:
    assert not leads_out("a/b", "../c")
    assert not leads_out("a/b", ".")
    assert not leads_out("a", "b/./c")
    assert leads_out("a", "..")
    # `d -> .` is inside, and `d/..` is not.
    assert leads_out("e", "d/../x")
