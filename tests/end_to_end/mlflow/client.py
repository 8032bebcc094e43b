# SPDX-License-Identifier: Apache-2.0
"""What a program that knows MLflow and nothing of ours does; prints the id of its run."""

import math
import sys
from pathlib import Path

import mlflow
from mlflow.tracking import MlflowClient

mlflow.set_experiment("trees")
with mlflow.start_run(run_name="first", tags={"team": "blue"}) as run:
    mlflow.log_params({"lr": 0.1, "depth": 3})
    for step in range(10):
        mlflow.log_metric("loss", 1 / (step + 1), step=step)
    mlflow.log_metrics({"auc": 0.5, "odd": math.nan}, step=9)
    mlflow.set_tag("stage", "trial")
    Path("notes.txt").write_text("hello")
    mlflow.log_artifact("notes.txt")
    mlflow.log_artifact("notes.txt", "deep/er")
    mlflow.log_dict({"a": 1}, "facts.json")
name = run.info.run_id

client = MlflowClient()
found = client.get_run(name)
assert found.info.status == "FINISHED", found.info
assert found.info.run_name == "first"
assert found.data.params == {"lr": "0.1", "depth": "3"}
assert found.data.metrics["loss"] == 0.1
assert math.isnan(found.data.metrics["odd"])
assert found.data.tags["team"] == "blue"
assert found.data.tags["stage"] == "trial"
assert [m.step for m in client.get_metric_history(name, "loss")] == [*range(10)]
assert sorted(f.path for f in client.list_artifacts(name)) == ["deep", "facts.json", "notes.txt"]
assert [f.path for f in client.list_artifacts(name, "deep/er")] == ["deep/er/notes.txt"]
assert Path(client.download_artifacts(name, "deep/er/notes.txt", ".")).read_text() == "hello"

number = client.get_experiment_by_name("trees").experiment_id
assert client.get_experiment(number).name == "trees"
assert client.get_experiment_by_name("nothing") is None
assert {e.name for e in client.search_experiments()} == {"Default", "trees"}
assert [e.name for e in client.search_experiments(filter_string="name LIKE 'tr%'")] == ["trees"]
try:
    client.create_experiment("trees")
except mlflow.MlflowException as refused:
    code = refused.error_code
else:
    raise AssertionError("made twice")
assert code == "RESOURCE_ALREADY_EXISTS"

with mlflow.start_run(run_name="second"):
    mlflow.log_param("lr", 0.2)
    mlflow.log_metric("loss", 5.0)


def search(text: str, **more: object) -> list[str]:
    return [r.info.run_name for r in client.search_runs([number], text, **more)]


assert search("") == ["second", "first"]
assert search("metrics.loss < 1 and params.lr = '0.1' AND tags.team = 'blue'") == ["first"]
assert search("attributes.status = 'FINISHED'", order_by=["metrics.loss ASC"]) == [
    "first",
    "second",
]
assert search("tags.`team` != 'blue'") == []
client.delete_run(name)
assert search("") == ["second"]
client.restore_run(name)
try:
    with mlflow.start_run(run_name="third"):
        raise RuntimeError("on purpose")
except RuntimeError:
    assert search("attributes.status = 'FAILED'") == ["third"]
with mlflow.start_run(run_id=name):
    mlflow.log_metric("late", 1.0)
assert client.get_run(name).info.status == "FINISHED"
with mlflow.start_run(experiment_id="0"):
    mlflow.log_metric("x", 1)
sys.stdout.write(name + "\n")
