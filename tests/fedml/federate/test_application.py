# SPDX-License-Identifier: Apache-2.0
"""What users' functions are given."""

import subprocess
import sys
from pathlib import Path

import pytest

from fedml.federate.application import ApplicationError, Client


def test_data_that_the_machine_does_not_list_is_an_error_that_says_where_to_list_it() -> None:
    client = Client(index=0, count=1, paths={"heart": "/data/heart"})
    assert client.paths["heart"] == "/data/heart"
    with pytest.raises(ApplicationError, match=r"no data called 'lungs' \(listed: heart\)"):
        client.paths["lungs"]
    with pytest.raises(ApplicationError, match="listed: none"):
        Client(index=0, count=1).paths["lungs"]


_IMPORTS_WITHIN = """
def model(config):
    import torch

    return torch.nn.Linear(3, 2)

def data(client, config): ...
def train(model, data, config, rng): ...
"""


def test_a_model_that_imports_torch_within_is_seeded_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(_IMPORTS_WITHIN)
    # In a process of its own: here torch may have been imported already.
    program = (
        "from pathlib import Path; from fedml.federate.application import Application\n"
        "import sys; assert 'torch' not in sys.modules\n"
        "print(Application(Path('app.py'), {}).first_model(7)['weight'].tolist())"
    )
    words = [sys.executable, "-c", program]
    found = {
        subprocess.run(words, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
        for _ in range(2)
    }
    assert len(found) == 1
