# SPDX-License-Identifier: Apache-2.0
"""Run files: what they ask for, and what is said of a wrong one."""

import json
from pathlib import Path

import pytest

from fedml.errors import ConfigError
from fedml.runfile import read_federated, read_simulated


def _run(folder: Path, text: str) -> Path:
    (folder / "task.py").touch()
    file = folder / "run.yaml"
    file.write_text(text)
    return file


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
