# SPDX-License-Identifier: Apache-2.0
"""The same two files on real agents over TLS, and simulated: the last model is the same file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from safetensors.numpy import save

from fedml.simulation import simulate
from tests.fedml.simulation import apps
from tests.place import Place


def test_three_agents_and_the_simulator_end_with_the_same_file(tmp_path: Path) -> None:
    said = {"rounds": 3, "seed": 7, "algorithm": "scaffold", "evaluate": {"devices": False}}
    settings, clients = {"lr": 0.2}, {"count": 3, "per_round": 2}
    with Place(tmp_path) as place:
        for name in ("one", "two", "three"):
            place.agent(name)
        run = place.federate(apps.OWN_TRAIN, config=json.dumps(settings), clients=clients, **said)
        place.finishes(run)
        deployed = place.model(run)
    plan = {"app": "app.py", "workspace": str(tmp_path / "app"), "config": settings}
    result = simulate({**plan, "clients": clients, **said}, engine="exact", workers=2)
    assert hashlib.sha256(save(result.model)).hexdigest() == deployed
