# SPDX-License-Identifier: Apache-2.0
"""Job and run files: what they ask for, and what is said of a wrong one."""

import json
from pathlib import Path

import pytest

from fedml.errors import ConfigError
from fedml.jobfile import read_federated, read_job, read_simulated


def _job(folder: Path, text: str) -> Path:
    file = folder / "job.yaml"
    file.write_text(text)
    return file


def _run(folder: Path, text: str) -> Path:
    (folder / "task.py").touch()
    file = folder / "run.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("job: echo\nbootstrp: x\n", r"line 2: unknown key `bootstrp`; did you mean `bootstrap`\?"),
        ("job: echo\ncomputing:\n  minimum_num_gpu: 1\n", r"line 3: .*`minimum_num_gpus`\?"),
        ("job: echo\nxyzzy: 1\n", r"line 2: unknown key `xyzzy`; known are job, "),
        ("job: echo\njob: echo\n", "line 2: `job` is there twice"),
        ("job: echo\nretries: lots\n", "line 2: `retries` must be a whole number.* 'lots'"),
        ("job: echo\nretries: -1\n", "line 2: `retries` must be a whole number"),
        ("job: echo\nretries: true\n", "line 2: `retries` must be a whole number"),
        ("job: echo\ndeadline: .inf\n", "line 2: `deadline` must be a number"),
        ("job: echo\ncomputing: 2\n", "line 2: `computing` must be a mapping"),
        ("job: echo\nenvironment_variables: [A]\n", "line 2: .* must be a mapping"),
        ("job: echo\nenvironment_variables:\n  A: [1]\n", "line 2: .* must be text"),
        ("job: {run_on_windows: dir}\n", "line 1: `job` has no `run_on_posix`"),
        ("bootstrap: echo\n", "there is no `job`"),
        ("job: ''\n", "there is no `job`"),
        ("- job\n", "a mapping of keys is expected"),
        ("job: [\n", r"is not YAML: (.|\n)*line 2"),
        ("job: echo\nworkspace: nowhere\n", "workspace .*nowhere is not a directory"),
        ("job: echo\njob_type: federate\n", "`job_type: federate` cannot be launched"),
    ],
)
def test_a_wrong_job_file_is_told_where_and_what(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=r"job\.yaml") as caught:
        read_job(_job(tmp_path, text))
    assert caught.match(said)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        read_job(tmp_path / "none.yaml")


def test_values_of_variables_and_labels_stay_as_they_are_written(tmp_path: Path) -> None:
    text = "job: echo\nenvironment_variables: {A: 1, B: yes, C: 007, D: }\nlabels: {on: off}\n"
    request, workspace = read_job(_job(tmp_path, text))
    assert request["env"] == {"A": "1", "B": "yes", "C": "007", "D": ""}
    assert request["labels"] == {"on": "off"}
    assert workspace is None


def test_what_is_not_given_has_its_default(tmp_path: Path) -> None:
    request, _ = read_job(_job(tmp_path, "job: echo\ncomputing:\n"))
    assert request == {
        "command": "echo",
        "bootstrap": "",
        "name": "job",
        "env": {},
        "needs": {"gpus": 0},
        "labels": {},
        "retries": 3,
        "deadline_s": 0.0,
        "grace_s": 10.0,
    }


def test_a_job_file_of_fedml_is_read_and_what_has_no_effect_is_named(tmp_path: Path) -> None:
    (tmp_path / "hello_world").mkdir()
    file = _job(
        tmp_path,
        """
workspace: hello_world
job_type: train
job_subtype: generate_training
bootstrap:
  run_on_posix: pip install -r requirements.txt
  run_on_windows: exit 1
job: |
  python3 hello_world.py
computing:
  minimum_num_gpus: 1
  maximum_cost_per_hour: $3000
  resource_type: A100-80G
""",
    )
    with pytest.warns(UserWarning, match="has no effect") as caught:
        request, workspace = read_job(file)
    assert request["command"] == "python3 hello_world.py\n"
    assert request["bootstrap"] == "pip install -r requirements.txt"
    assert request["needs"] == {"gpus": 1}
    assert workspace == tmp_path / "hello_world"
    said = [str(warning.message) for warning in caught]
    assert [text.split("`")[1] for text in said] == [
        "job_subtype",
        "computing.maximum_cost_per_hour",
        "computing.resource_type",
    ]
    assert "line 4" in said[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("app: task.py\nrounds: 2\n", "there is no `clients`"),
        ("app: task.py\nrounds: 2\nclients: {labels: {}}\n", "there is no `clients.count`"),
        ("app: task.py\nclients: {count: 2}\n", "there is no `rounds`"),
        ("rounds: 2\nclients: {count: 2}\n", "there is no `app`"),
        ("app: tusk.py\nrounds: 2\nclients: {count: 2}\n", "no tusk.py in the workspace"),
        (
            "app: task.py\nrounds: 2\nclients:\n  count: 2\n  per_rond: 1\n",
            r"line 5: unknown key `clients.per_rond`; did you mean `per_round`\?",
        ),
        (
            "app: task.py\nrounds: 2\nclients: {count: 2}\nevaluate: {central: 1}\n",
            "line 4: `evaluate.central` must be true or false",
        ),
        (
            "app: task.py\nrounds: 2\nclients: {count: 2}\nconfig: {day: 2026-01-31}\n",
            "line 4: `config` holds what JSON cannot say",
        ),
        (
            "app: task.py\nrounds: 2\nclients: {count: 2}\nconfig: {lr: .nan}\n",
            "line 4: `config` holds what JSON cannot say",
        ),
    ],
)
def test_a_wrong_run_file_is_told_where_and_what(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml") as caught:
        read_federated(_run(tmp_path, text))
    assert caught.match(said)


def test_a_run_file_asks_for_what_it_says(tmp_path: Path) -> None:
    text = (
        "app: task.py\nrounds: 3\nclients: &who {count: 2, over_select: 0.5}\n"
        "config: {lr: 0.1, layers: [3, 4]}\n"
    )
    request, workspace = read_federated(_run(tmp_path, text))
    assert workspace == tmp_path
    assert json.loads(request.pop("config")) == {"lr": 0.1, "layers": [3, 4]}
    assert request == {
        "app": "task.py",
        "name": "run",
        "rounds": 3,
        "clients": {"count": 2, "over_select": 0.5},
        "algorithm_config": "{}",
    }


def test_a_number_in_powers_of_ten_is_a_number(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "app: app.py\nrounds: 1\nconfig: {lr: 1e-3, name: e5}\n"
        "treatment: {privacy: {noise_multiplier: 1, delta: 1e-6}}\nclients: {count: 1}\n"
    )
    found, _ = read_simulated(file)
    assert json.loads(found["config"]) == {"lr": 0.001, "name": "e5"}
    assert json.loads(found["treatment"])["privacy"]["delta"] == 1e-6
