# SPDX-License-Identifier: Apache-2.0
"""A deployed run without machines: the real worker and aggregator classes, driven in order.

`run` does what agents and broker do between them: one `Worker` for each client in a folder of its
own, one `Aggregator`, models and updates as files. It returns the model of each round.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from fedml.federate.aggregator import Aggregator
from fedml.federate.worker import Worker
from fedml_protocol.blob import Blob
from fedml_protocol.federate import (
    AddUpdate,
    BeginRound,
    FinishRound,
    MakeModel,
    OpenRun,
    PlanRound,
    StageKind,
    StageOrder,
    StageSpec,
)

Models = list[dict[str, Any]]


def run(
    app: Path,
    folder: Path,
    plan: Mapping[str, Any],
    told: list[dict[str, float]] | None = None,
) -> Models:
    """Run a plan (the keys of a run file) and return every model, the first one included.

    What the aggregator tells of each round is appended to `told`.
    """
    clients, seed = plan["clients"]["count"], plan.get("seed", 0)
    said = {
        "algorithm": plan.get("algorithm", "fedavg"),
        "algorithm_config": json.dumps(plan.get("algorithm_config", {})),
        "treatment": json.dumps(plan.get("treatment", {})),
        "config": json.dumps(plan.get("config", {})),
        "seed": seed,
    }
    aggregator = Aggregator()
    opened = aggregator.answer(
        OpenRun(
            app_dir=str(app.parent),
            app=app.name,
            clients=clients,
            central=True,
            groups=json.dumps(plan.get("groups", {})),
            **said,
        )
    )
    workers = [_worker(folder / f"client-{k}", app) for k in range(clients)]
    made = aggregator.answer(MakeModel(out_dir=str(_new(folder / "out-0"))))
    whole = made
    models: Models = [load_file(made.model_path)]
    blob = Blob(sha256="0" * 64, size=1)
    group_of = {c: g for g, each in enumerate(opened.groups) for c in each.clients}
    if opened.groups:
        said |= {"algorithm": opened.algorithm, "algorithm_config": opened.algorithm_config}
    for number in range(1, plan["rounds"] * opened.stages + 1):
        whole = made if made.model_path else whole
        if (number - 1) % opened.stages == 0:
            count = plan["clients"].get("per_round", clients)
            index = (number - 1) // opened.stages + 1
            chosen = aggregator.answer(
                PlanRound(round=index, clients=tuple(range(clients)), count=count)
            )
        groups = {group.group: group for group in made.groups}
        aggregator.answer(
            BeginRound(
                round=number,
                model_path=whole.model_path,
                state_path=made.state_path,
                clients=chosen.clients,
                groups=tuple(group for group in made.groups if group.model_path),
            )
        )
        # Backwards: the order in which clients answer must not matter.
        for client in reversed(chosen.clients):
            start = groups.get(group_of.get(client, -1), made)
            spec = StageSpec(
                session="run-000000000000",
                kind=StageKind.TRAIN_IN_GROUP if opened.groups else StageKind.TRAIN,
                group=group_of.get(client, 0),
                turns=opened.stages if opened.groups else 0,
                round=number,
                client=client,
                clients=clients,
                app=app.name,
                model=blob,
                evaluate=(number - 1) % opened.stages == 0,
                **said,
            )
            out = _new(folder / f"update-{number}-{client}")
            order = StageOrder(
                task=f"t-{number}-{client}",
                epoch=1,
                spec=spec,
                model_path=start.model_path or whole.model_path,
                sent_path=start.sent_path,
                out_dir=str(out),
            )
            done = workers[client]._answer(order)
            assert done.cause is None, done.cause
            added = aggregator.answer(
                AddUpdate(
                    client=client,
                    path=str(out / "update.safetensors"),
                    weight=done.weight,
                    metrics=done.metrics,
                )
            )
            assert added.refusal is None, added.refusal
        made = aggregator.answer(FinishRound(out_dir=str(_new(folder / f"out-{number}"))))
        if made.model_path:
            models.append(load_file(made.model_path))
            if told is not None:
                told.append(dict(made.metrics))
    return models


def _worker(root: Path, app: Path) -> Worker:
    package = root / "package"
    package.mkdir(parents=True)
    shutil.copy(app, package / app.name)
    return Worker("run-000000000000", root)


def _new(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder
