# SPDX-License-Identifier: Apache-2.0
"""What a step gets of others: values in texts, files in packages."""

import json

import pytest

from fedml_broker.inputs import Missing, fill, fill_json, texts_in, used, with_files
from fedml_broker.outputs import Outputs, parse_values
from fedml_protocol.blob import Blob
from fedml_protocol.errors import MalformedMessage
from fedml_protocol.package import File, Link, Package, Part

A, B, C = ("a" * 64, "b" * 64, "c" * 64)
LEFT = {
    "one": Outputs(
        files={"x.txt": Blob(sha256=A, size=3), "deep/y": Blob(sha256=B, size=0)},
        values={"rate": "0.1", "name": "a b", "list": "[1]"},
    ),
    "none": Outputs(),
}


def test_values_stand_in_texts_wherever_they_are_referred_to() -> None:
    text = "--rate ${{ steps.one.outputs.rate }} '${{steps.one.outputs.name}}' $HOME ${HOME}"
    assert fill(text, LEFT) == "--rate 0.1 'a b' $HOME ${HOME}"
    assert used(iter([text])) == {"one": "${{steps.one.outputs.name}}"}
    with pytest.raises(MalformedMessage, match="means nothing"):
        used(iter(["${{ secrets.x }}"]))


def test_a_value_is_not_looked_into_again() -> None:
    sly = {"one": Outputs(values={"x": "${{ steps.one.outputs.y }}", "y": "never"})}
    assert fill("${{ steps.one.outputs.x }}", sly) == "${{ steps.one.outputs.y }}"


def test_what_was_not_left_is_told_with_what_was() -> None:
    with pytest.raises(Missing, match="one has left no value raet; its values: rate, name, list"):
        fill("${{ steps.one.outputs.raet }}", LEFT)
    with pytest.raises(Missing, match="none has left no files; it has left no files at all"):
        with_files(Package(), {"in": "none"}, LEFT)
    with pytest.raises(Missing, match=r"one has left no file z; its files: x\.txt, deep/y"):
        with_files(Package(), {"in": "one/z"}, LEFT)


def test_in_a_configuration_a_number_alone_is_a_number_and_else_a_text() -> None:
    config = {
        "rate": "${{ steps.one.outputs.rate }}",
        "deep": [{"said": "is ${{ steps.one.outputs.rate }}"}],
        "list": "${{ steps.one.outputs.list }}",
        "own": "7",
        "n": 3,
    }
    assert json.loads(fill_json(json.dumps(config), LEFT)) == {
        "rate": 0.1,
        "deep": [{"said": "is 0.1"}],
        "list": "[1]",
        "own": "7",
        "n": 3,
    }
    assert sorted(texts_in('{"a": ["x", {"b": "y"}], "c": 1, "d": "z"}')) == ["x", "y", "z"]


def test_files_of_others_lie_beside_those_of_the_workspace() -> None:
    base = Package((Part(C, (File("run.sh", 9, True),)),), (Link("latest", "run.sh"),))
    made = with_files(base, {"in": "one", "z.txt": "one/x.txt"}, LEFT)
    assert [file.path for file in made.files] == ["run.sh", "in/x.txt", "in/deep/y", "z.txt"]
    assert made.links == base.links
    for path in ("run.sh", "../out", "latest/x"):
        with pytest.raises(Missing, match="do not go together"):
            with_files(base, {path: "one/x.txt"}, LEFT)


def test_of_the_lines_of_a_job_those_with_a_name_and_a_value_count() -> None:
    assert parse_values("a=1\n\nsay nothing\nb = 2\na=x=y\n=3\nc=\n") == {"a": "x=y", "c": ""}
