# SPDX-License-Identifier: Apache-2.0
"""The same two files on real agents over TLS, and simulated: the last model is the same file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save

from fedml.simulation import simulate
from tests.fedml.simulation import apps
from tests.place import Place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with Place(tmp_path_factory.mktemp("wire")) as place:
        for name in ("one", "two", "three"):
            place.agent(name)
        yield place


@pytest.mark.parametrize(
    ("app", "said"),
    [
        pytest.param(apps.OWN_TRAIN, {"algorithm": "scaffold"}, id="scaffold"),
        pytest.param(apps.OWN_TRAIN, {"algorithm": "fedadam"}, id="fedadam"),
        pytest.param(
            apps.OWN_TRAIN,
            {"treatment": {"robust": {"rule": "median"}}, "clients": {"count": 3}},
            id="median",
        ),
        # Two stages a round, for which the built-in training is needed.
        pytest.param(apps.IMAGES, {"algorithm": "mime"}, id="mime"),
        # Rounds of their own within groups, of an algorithm that sends and keeps things of its own.
        pytest.param(
            apps.OWN_TRAIN,
            {"groups": {"count": 2, "rounds": 2, "algorithm": "scaffold"}},
            id="groups of scaffold",
        ),
        pytest.param(
            apps.OWN_TRAIN,
            {
                "algorithm": "fedadam",
                "groups": {"count": 2, "rounds": 3},
                "clients": {"count": 3},
            },
            id="groups of fedavg",
        ),
        # With one client at work there is one order in which updates can come.
        pytest.param(
            apps.OWN_TRAIN,
            {
                "algorithm": "fedbuff",
                "algorithm_config": {"buffer": 2},
                "clients": {"count": 3, "per_round": 1},
            },
            id="fedbuff",
        ),
    ],
)
def test_three_agents_and_the_simulator_end_with_the_same_file(
    place: Place, tmp_path: Path, app: str, said: dict[str, Any]
) -> None:
    settings = {"lr": 0.2}
    plan = {
        "rounds": 3,
        "seed": 7,
        "evaluate": {"devices": False},
        "clients": {"count": 3, "per_round": 2},
        **said,
    }
    texts = {
        name: json.dumps(plan[name])
        for name in ("algorithm_config", "treatment", "groups")
        if name in plan
    }
    run = place.federate(app, config=json.dumps(settings), **{**plan, **texts})
    place.finishes(run)
    deployed = place.model(run)
    (tmp_path / "app.py").write_text(app)
    files = {"app": "app.py", "workspace": str(tmp_path), "config": settings}
    result = simulate({**plan, **files}, engine="exact", workers=2)
    assert hashlib.sha256(save(result.model)).hexdigest() == deployed
