# SPDX-License-Identifier: Apache-2.0
"""Job files: what they ask for, and what is said of a wrong one."""

from pathlib import Path

import pytest

from fedml.errors import ConfigError
from fedml.jobfile import read_job


def test_an_unknown_key_is_named_with_its_line_and_the_nearest_known_one(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("job: echo\nbootstrp: pip install x\n")
    with pytest.raises(ConfigError, match=r"line 2: unknown key `bootstrp`; did you mean `boots"):
        read_job(file)


def test_a_missing_workspace_is_named(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("job: echo\nworkspace: nowhere\n")
    with pytest.raises(ConfigError, match="nowhere is not a directory"):
        read_job(file)


def test_gpus_and_environment_are_read(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("job: echo\ncomputing: {minimum_num_gpus: 2}\nenvironment_variables: {A: 1}\n")
    request, workspace = read_job(file)
    assert (request["needs"]["gpus"], request["env"], workspace) == (2, {"A": "1"}, None)
