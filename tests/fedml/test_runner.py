# SPDX-License-Identifier: Apache-2.0
"""Scripts as FedML's users write them, run as they are: real data, real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import fedml
from fedml.errors import ConfigError
from fedml.runner import FedMLRunner
from fedml.script import numbers, to_arrays
from fedml.translation import Differs
from tests.place import Place

CONFIG: dict[str, dict[str, Any]] = {
    "common_args": {"training_type": "simulation", "random_seed": 3},
    "data_args": {"dataset": "fashionmnist", "partition_method": "homo"},
    "model_args": {"model": "lr"},
    "train_args": {
        "federated_optimizer": "FedAvg",
        "client_num_in_total": 6,
        "client_num_per_round": 3,
        "comm_round": 3,
        "epochs": 1,
        "batch_size": 256,
        "client_optimizer": "sgd",
        "learning_rate": 0.1,
        "my_own_key": 17,
    },
    "validation_args": {"frequency_of_the_test": 1},
    "comm_args": {"backend": "sp"},
}

# A trainer and an aggregator of the script's own; each says what was called.
SCRIPT = """
import json
import torch
import fedml
from fedml import FedMLRunner
from fedml.core import ClientTrainer, ServerAggregator

calls = []

class Params:
    def get_model_params(self):
        return self.model.cpu().state_dict()

    def set_model_params(self, model_parameters):
        self.model.load_state_dict(model_parameters)

class Trainer(Params, ClientTrainer):
    def on_before_local_training(self, train_data, device, args):
        calls.append("before")

    def train(self, train_data, device, args):
        assert self.local_sample_number == len(train_data.dataset)
        calls.append(f"train {self.id} of round {args.round_idx}")
        optimizer = torch.optim.SGD(self.model.parameters(), lr=args.learning_rate)
        for epoch in range(args.epochs):
            for x, labels in train_data:
                self.model.zero_grad()
                loss = torch.nn.functional.cross_entropy(self.model(x.to(device)), labels)
                loss.backward()
                optimizer.step()

    def on_after_local_training(self, train_data, device, args):
        calls.append("after")

    def test(self, test_data, device, args):
        return tested(self.model, test_data)

class Aggregator(Params, ServerAggregator):
    def on_before_aggregation(self, raw_client_model_or_grad_list):
        calls.append(f"list of {len(raw_client_model_or_grad_list)}")
        return raw_client_model_or_grad_list

    def on_after_aggregation(self, aggregated_model_or_grad):
        calls.append("aggregated")
        return aggregated_model_or_grad

    def test(self, test_data, device, args):
        return tested(self.model, test_data)

def tested(model, test_data):
    correct = total = loss = 0
    with torch.no_grad():
        for x, labels in test_data:
            z = model(x)
            correct += int((z.argmax(1) == labels).sum())
            loss += float(torch.nn.functional.cross_entropy(z, labels)) * len(labels)
            total += len(labels)
    return {"test_correct": correct, "test_loss": loss, "test_total": total}

if __name__ == "__main__":
    args = fedml.init()
    assert args.my_own_key == 17
    device = fedml.device.get_device(args)
    dataset, output_dim = fedml.data.load(args)
    model = fedml.model.create(args, output_dim)
    runner = FedMLRunner(args, device, dataset, model, TRAINER, AGGREGATOR)
    result = runner.run()
    if result is not None and hasattr(result, "metrics") and not isinstance(result.metrics, list):
        print(json.dumps({"metrics": dict(result.metrics), "calls": calls,
                          "tested": tested(model, dataset[3])["test_correct"]}))
"""


def _script(folder: Path, trainer: str, aggregator: str, config: dict[str, Any] = CONFIG) -> Path:
    (folder / "fedml_config.yaml").write_text(yaml.safe_dump(config))
    file = folder / "main.py"
    file.write_text(SCRIPT.replace("TRAINER", trainer).replace("AGGREGATOR", aggregator))
    return file


def _run(file: Path, *words: str, code: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, file.name, "--cf", "fedml_config.yaml", *words],
        cwd=file.parent, env={**os.environ, **env}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done


def _with(**changes: dict[str, Any]) -> dict[str, Any]:
    return {name: {**section, **changes.get(name, {})} for name, section in CONFIG.items()}


def test_a_script_with_trainer_and_aggregator_runs_and_every_hook_is_called(
    tmp_path: Path,
) -> None:
    file = _script(tmp_path, "Trainer(model, args)", "Aggregator(model, args)")
    said = json.loads(_run(file).stdout)
    calls = said["calls"]
    assert said["metrics"]["central.accuracy"] > 0.6
    # The script's own model is the last global one.
    assert said["tested"] == round(said["metrics"]["central.accuracy"] * 10_000)
    assert calls.count("before") == calls.count("after") == 9
    assert calls.count("list of 3") == calls.count("aggregated") == 3
    assert calls[0] == "before"
    assert calls[1].startswith("train ")
    assert calls[1].endswith("of round 0")
    assert sum("of round 2" in call for call in calls) == 3


def test_the_built_in_training_learns_what_the_same_loop_in_a_trainer_learns(
    tmp_path: Path,
) -> None:
    ours = json.loads(_run(_script(tmp_path, "None", "None")).stdout)
    theirs = json.loads(_run(_script(tmp_path, "Trainer(model, args)", "None")).stdout)
    difference = ours["metrics"]["central.accuracy"] - theirs["metrics"]["central.accuracy"]
    assert abs(difference) < 0.05
    assert ours["tested"] > 6000


def test_an_aggregator_sees_what_the_built_in_training_made(tmp_path: Path) -> None:
    said = json.loads(_run(_script(tmp_path, "None", "Aggregator(model, args)")).stdout)
    assert said["calls"].count("list of 3") == 3
    assert said["metrics"]["central.accuracy"] > 0.6


def test_of_the_processes_of_mpirun_the_first_runs_all_clients(tmp_path: Path) -> None:
    file = _script(tmp_path, "Trainer(model, args)", "None")
    second = _run(file, OMPI_COMM_WORLD_RANK="1")
    assert second.stdout == ""
    assert "process 1 has nothing to do" in second.stderr


def test_a_one_line_script_simulates(tmp_path: Path) -> None:
    file = _script(tmp_path, "None", "None")
    file.write_text("import fedml\nprint(fedml.run_simulation(backend='sp').rounds)\n")
    assert _run(file).stdout == "3\n"


def test_the_script_of_the_page_runs(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "fedml.md").read_text()
    text = page.partition("```python\n")[2].partition("```")[0]
    file = _script(tmp_path, "None", "None")
    file.write_text(text)
    said = _run(file).stderr
    assert "round 3/3  central.accuracy" in said
    line = text.splitlines().index("    dataset, output_dim = fedml.data.load(args)") + 1
    assert f"{file}:{line}: Differs: fedml.data.load" in said  # its own line, none of ours
    assert "fedml/data" not in said


def test_a_client_process_is_told_that_agents_are_the_clients(tmp_path: Path) -> None:
    config = _with(common_args={"training_type": "cross_silo"})
    file = _script(tmp_path, "None", "None", config)
    done = _run(file, "--rank", "1", "--role", "client", code=1)
    assert "agents are the clients here" in done.stderr
    assert "try: `fedml-agent login KEY`" in done.stderr


@pytest.mark.timeout(180)  # three runs, each of which imports torch on every machine
def test_a_script_of_a_server_trains_on_machines(tmp_path: Path) -> None:
    config = _with(
        common_args={"training_type": "cross_silo"},
        train_args={"client_num_in_total": 2, "client_num_per_round": 2, "comm_round": 2},
        comm_args={"backend": "MQTT_S3"},
    )
    folder = tmp_path / "script"
    folder.mkdir()
    file = _script(folder, "Trainer(model, args)", "None", config)
    with Place(tmp_path) as place:
        place.agent("one")
        place.agent("two")
        home = str(tmp_path / "me")
        _run(file, "--rank", "0", "--role", "server", FEDML_HOME=home)
        run = place.client.call("GET", "/v1/runs?limit=1")["runs"][0]["id"]
        found = place.client.call("GET", f"/v1/runs/{run}")["rounds"]
        # Without a trainer the built-in one serves every algorithm, there as here.
        config["train_args"] |= {"federated_optimizer": "FedProx", "fedprox_mu": 0.1}
        _run(_script(folder, "None", "None", config), FEDML_HOME=home)
        assert place.client.call("GET", "/v1/runs?limit=1")["runs"][0]["state"] == "FINISHED"
        file.write_text("import fedml\nprint(fedml.run_cross_silo_server().state)\n")
        assert _run(file, FEDML_HOME=home).stdout == "FINISHED\n"
    rounds = [r for r in found if r["model"]]
    assert [r["round"] for r in rounds] == [0, 1, 2]
    accuracies = [r["metrics"]["devices.accuracy"] for r in rounds]
    assert accuracies[-1] > 0.5 > accuracies[0]


# ---------------------------------------------------------------------- in this process


class _Mean(fedml.core.ServerAggregator):
    """Throws away all but the first client's model."""

    def get_model_params(self) -> Any:
        return self.model

    def set_model_params(self, model_parameters: Any) -> None:
        self.model = model_parameters

    def aggregate(self, raw_client_model_or_grad_list: Any) -> Any:
        return raw_client_model_or_grad_list[0][1]

    def test(self, test_data: Any, device: Any, args: Any) -> Any:
        return {"w": float(self.model["w"][0])}


class _Adds(fedml.core.ClientTrainer):
    """No torch: a client moves the weight by its number plus one."""

    def get_model_params(self) -> Any:
        return self.model

    def set_model_params(self, model_parameters: Any) -> None:
        self.model = model_parameters

    def train(self, train_data: Any, device: Any, args: Any) -> None:
        self.model = {"w": self.model["w"] + self.id + 1}


def _args(**changes: Any) -> Any:
    known = {"training_type": "simulation", "client_num_in_total": 3, "client_num_per_round": 3,
             "comm_round": 2, "frequency_of_the_test": 1}  # fmt: skip
    return fedml.arguments.Arguments({"train_args": {**known, **changes}})


def _eight() -> list[Any]:
    loaders = {client: [client] for client in range(3)}
    return [3, 3, [], [1], {0: 1, 1: 1, 2: 4}, loaders, loaders, 2]


def test_parameters_need_no_torch_and_count_by_examples() -> None:
    model = {"w": np.zeros(2)}
    trainer = _Adds(model, None)
    eight = _eight()
    eight[3] = None  # nothing to test on
    result = FedMLRunner(_args(), None, eight, model, trainer).run()
    assert result is not None
    np.testing.assert_array_equal(trainer.model["w"], result.model["w"])
    # Each round adds the mean of 1, 2 and 3, counted 1, 1 and 4.
    np.testing.assert_allclose(result.model["w"], 2 * (1 + 2 + 4 * 3) / 6)


def test_an_aggregate_of_the_scripts_own_decides() -> None:
    model = {"w": np.zeros(2)}
    aggregator = _Mean(model, None)
    runner = FedMLRunner(_args(), None, _eight(), model, _Adds(model, None), aggregator)
    result = runner.run()
    assert result is not None
    np.testing.assert_allclose(result.model["w"], [2.0, 2.0])  # client 0 adds 1 a round
    assert result.metrics["central.w"] == 2.0
    np.testing.assert_allclose(aggregator.model["w"], [2.0, 2.0])


def test_fedprox_with_a_trainer_of_ones_own_is_said_to_be_fedavg() -> None:
    model = {"w": np.zeros(2)}
    args = _args(federated_optimizer="FedProx", fedprox_mu=0.1)
    with pytest.warns(Differs, match="your ClientTrainer takes"):
        FedMLRunner(args, None, _eight(), model, _Adds(model, None)).run()


def test_fednova_with_a_trainer_of_ones_own_is_said_to_be_fedavg() -> None:
    model = {"w": np.zeros(2)}
    args = _args(federated_optimizer="FedNova")
    with pytest.warns(Differs, match="your ClientTrainer says no number"):
        FedMLRunner(args, None, _eight(), model, _Adds(model, None)).run()


def test_scaffold_with_a_trainer_of_ones_own_is_refused() -> None:
    model = {"w": np.zeros(2)}
    args = _args(federated_optimizer="SCAFFOLD")
    with pytest.raises(ConfigError, match="scaffold changes every local step"):
        FedMLRunner(args, None, _eight(), model, _Adds(model, None)).run()


def test_hooks_of_an_aggregator_are_refused_on_machines() -> None:
    model = {"w": np.zeros(2)}
    args = _args(training_type="cross_silo")
    runner = FedMLRunner(args, None, _eight(), model, _Adds(model, None), _Mean(model, None))
    with pytest.raises(ConfigError, match="its own aggregate"):
        runner.run()


def test_a_script_that_changes_its_arguments_is_heeded() -> None:
    model = {"w": np.zeros(2)}
    args = _args()
    args.comm_round = 5
    result = FedMLRunner(args, None, _eight(), model, _Adds(model, None)).run()
    assert result is not None
    assert result.rounds == 5


def test_an_attribute_that_is_not_there_is_named_with_the_nearest() -> None:
    args = _args(learning_rate=0.1)
    assert args.lr == 0.1
    assert getattr(args, "nothing", None) is None
    with pytest.raises(AttributeError, match=r"no key `comm_rond`; did you mean `comm_round`\?"):
        _ = args.comm_rond


def test_a_configuration_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["main.py"])
    with pytest.raises(ConfigError, match="no configuration is named"):
        fedml.init()


def test_counts_of_a_test_become_shares() -> None:
    found = numbers({"test_correct": 8, "test_loss": 5.0, "test_total": 10, "f1": 0.7, "x": "y"})
    assert found == {"examples": 10, "accuracy": 0.8, "loss": 0.5, "f1": 0.7}
    assert numbers(None) == {}


def test_nested_parameters_have_names() -> None:
    found = to_arrays({"dense": {"w": np.ones(2)}, "rest": [np.zeros(1), np.ones(1)]})
    assert list(found) == ["dense.w", "rest.0", "rest.1"]
