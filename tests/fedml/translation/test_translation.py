# SPDX-License-Identifier: Apache-2.0
"""FedML's configurations: what they become, what is said of the rest, and what is refused."""

from __future__ import annotations

import copy
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedml import data, runfile, translation
from fedml.errors import ConfigError, DataUnavailable
from fedml.federate.algorithm import create
from fedml.federate.treatment import Treatment
from fedml.simulation import simulate
from fedml.translation import Kind, algorithms, keys
from tests.place import Place, command

# As people write them: 100 clients, ten a round, softmax regression on digits.
TYPICAL: dict[str, dict[str, Any]] = {
    "common_args": {"training_type": "simulation", "random_seed": 0},
    "data_args": {
        "dataset": "mnist",
        "data_cache_dir": "~/fedml_data",
        "partition_method": "hetero",
        "partition_alpha": 0.5,
    },
    "model_args": {"model": "lr"},
    "train_args": {
        "federated_optimizer": "FedAvg",
        "client_id_list": "[]",
        "client_num_in_total": 100,
        "client_num_per_round": 10,
        "comm_round": 3,
        "epochs": 1,
        "batch_size": 10,
        "client_optimizer": "sgd",
        "learning_rate": 0.03,
        "weight_decay": 0.001,
    },
    "validation_args": {"frequency_of_the_test": 1},
    "device_args": {"worker_num": 4, "using_gpu": False, "gpu_mapping_key": "mapping_default"},
    "comm_args": {"backend": "MPI", "is_mobile": 0},
    "tracking_args": {"enable_wandb": False, "wandb_project": "fedml", "run_name": "one"},
}

# Installed with the system packages that `make test` asks for, so that no test needs a network.
AT_HAND = {"fashion-mnist"}


def _config(**changes: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    found = copy.deepcopy(TYPICAL)
    for section, values in changes.items():
        found.setdefault(section, {}).update(values or {})
    return found


def _translated(
    sections: dict[str, dict[str, Any]], *, deployed: bool = False, here: set[str] = AT_HAND
) -> translation.Translation:
    return translation.translate(sections, deployed=deployed, present=lambda name: name in here)


def _said(found: translation.Translation, kind: Kind | None = None) -> str:
    return "\n".join(note.text for note in found.notes if kind in (None, note.kind))


def _file(folder: Path, sections: Any) -> Path:
    file = folder / "fedml_config.yaml"
    file.write_text(yaml.safe_dump(sections))
    return file


def test_the_most_common_file_becomes_a_run() -> None:
    found = _translated(TYPICAL_ON_CLOTHES).run
    assert found["algorithm"] == "fedavg"
    assert found["rounds"] == 3
    assert found["clients"] == {"count": 100, "per_round": 10}
    assert found["evaluate"] == {"every": 1, "devices": False, "central": True}
    assert found["name"] == "one"
    config = found["config"]
    assert (config["lr"], config["batch_size"], config["weight_decay"]) == (0.03, 10, 0.001)
    assert (config["dataset"], config["partition"], config["alpha"]) == (
        "fashion-mnist",
        "hetero",
        0.5,
    )


TYPICAL_ON_CLOTHES = _config(data_args={"dataset": "fashionmnist"})


@pytest.mark.parametrize(
    ("training_type", "backend"),
    [("simulation", "sp"), ("simulation", "MPI"), ("cross_silo", "MQTT_S3")],
)
def test_the_most_common_file_trains_offline_on_what_is_at_hand(
    tmp_path: Path, backend: str, training_type: str
) -> None:
    sections = _config(common_args={"training_type": training_type}, comm_args={"backend": backend})
    with pytest.warns(translation.Differs) as caught:
        result = simulate(_file(tmp_path, sections))
    text = "\n".join(str(warning.message) for warning in caught)
    assert "fedml data fetch mnist-5k" in text or "5,000 of its 70,000" in text
    assert "`worker_num` has no effect" in text
    losses = [row["central.loss"] for row in result.history]
    assert result.rounds == 3
    assert losses[-1] < 0.8 * losses[0]


def test_strict_refuses_a_stand_in_and_names_it(tmp_path: Path) -> None:
    file = _file(tmp_path, TYPICAL)
    done = subprocess.run(
        command("fedml", "simulate", str(file), "--strict"),
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "mnist" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "simulations").exists()


def test_the_command_warns_on_stderr_and_prints_the_result(tmp_path: Path) -> None:
    file = _file(tmp_path, TYPICAL_ON_CLOTHES)
    done = subprocess.run(
        command("fedml", "simulate", str(file), "--rounds", "1", "--strict"),
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "central.accuracy" in done.stdout
    assert "warning" not in done.stdout
    assert "`wandb_project` has no effect" in done.stderr
    assert (tmp_path / "simulations" / "one-1" / "report.html").exists()


# ---------------------------------------------------------------------- optimisers


@pytest.mark.parametrize("name", algorithms.OPTIMIZERS)
def test_every_optimizer_that_is_supported_trains(name: str) -> None:
    sections = _config(
        data_args={"dataset": "fashionmnist", "partition_method": "homo"},
        train_args={
            "federated_optimizer": name,
            "comm_round": 2,
            "client_num_in_total": 20,
            "client_num_per_round": 4,
            "fedprox_mu": 0.1,
            "server_lr": 0.1 if "Opt" in name else 1.0,
        },
    )
    with pytest.warns(translation.Differs):
        result = simulate(sections)
    assert result.rounds == 2
    assert result.metrics["central.loss"] < 0.97 * result.history[0]["central.loss"]


def test_two_processes_begin_with_the_same_model(tmp_path: Path) -> None:
    """Where torch is imported for the model, it is imported after the run has been seeded."""
    sections = _config(data_args={"dataset": "fashionmnist"}, model_args={"model": "mlp"})
    losses = set()
    for number in range(2):
        done = subprocess.run(
            command("fedml", "simulate", str(_file(tmp_path, sections)), "--rounds", "1",
                    "--out", str(tmp_path / str(number)), "--json"),
            cwd=tmp_path, capture_output=True, text=True, check=True,
        )  # fmt: skip
        losses.add(json.loads(done.stdout.splitlines()[-1])["end"]["metrics"]["central.loss"])
    assert len(losses) == 1


@pytest.mark.parametrize(
    ("asked", "algorithm", "parameters"),
    [
        ({"federated_optimizer": "FedProx", "fedprox_mu": 0.1}, "fedprox", {"mu": 0.1}),
        ({"federated_optimizer": "FedOpt", "server_optimizer": "sgd", "server_lr": 0.5,
          "server_momentum": 0.7}, "fedavgm", {"server_lr": 0.5, "momentum": 0.7}),
        ({"federated_optimizer": "FedOpt", "server_optimizer": "yogi"}, "fedyogi", {}),
        ({"federated_optimizer": "FedSGD"}, "fedsgd", {"lr": 0.03}),
        ({"federated_optimizer": "FedDyn", "feddyn_alpha": 0.2}, "feddyn", {"alpha": 0.2}),
        ({"federated_optimizer": "Mime", "server_momentum": 0.8}, "mime", {"beta": 0.8}),
        ({"federated_optimizer": "FedNova", "momentum": 0.9}, "fednova", {"momentum": 0.9}),
    ],
)  # fmt: skip
def test_an_optimizer_becomes_an_algorithm_with_its_parameters(
    asked: dict[str, Any], algorithm: str, parameters: dict[str, float]
) -> None:
    found = _translated(_config(train_args=asked)).run
    assert found["algorithm"] == algorithm
    assert found.get("algorithm_config", {}) == parameters
    create(found["algorithm"], found.get("algorithm_config"))


@pytest.mark.parametrize("name", ["FedGKT", "FedNAS", "split_nn", "base_framework", "FedAvgg"])
def test_an_optimizer_that_is_not_here_is_refused_with_those_that_are(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"no {name} here; there are FedAvg, "):
        _translated(_config(train_args={"federated_optimizer": name}))


@pytest.mark.parametrize("optimizer", ["adam", "AdamW", "adagrad", "rmsprop"])
def test_another_client_optimizer_trains_with_torch(optimizer: str) -> None:
    rate = {"learning_rate": 0.003, "client_num_in_total": 20, "client_num_per_round": 2}
    sections = _config(
        data_args={"dataset": "fashionmnist"},
        train_args={"client_optimizer": optimizer, "comm_round": 2, **rate},
    )
    with pytest.warns(translation.Differs):
        result = simulate(sections)
    assert result.metrics["central.accuracy"] > 0.4


def test_nesterov_and_clipping_are_honoured() -> None:
    asked = {"momentum": 0.9, "nesterov": True, "clip_grad_norm": 1.0}
    found = _translated(_config(train_args=asked)).run
    assert found["app"] == "optimizer.py"
    assert found["config"]["nesterov"] is True
    assert found["config"]["clip_grad_norm"] == 1.0


def test_scaffold_with_adam_is_trained_by_sgd_with_a_word() -> None:
    found = _translated(
        _config(train_args={"federated_optimizer": "SCAFFOLD", "client_optimizer": "adam"})
    )
    assert found.run["app"] == "sgd.py"
    assert "scaffold is made for plain SGD" in _said(found, Kind.INSTEAD)


# ---------------------------------------------------------------------- what is said


def test_every_key_of_the_table_is_honoured_or_named() -> None:
    """With each key asking for something, those without effect are all named, no other is."""
    sections = {
        section: {key: TYPICAL.get(section, {}).get(key, "1") for key in known}
        for section, known in keys.KEYS.items()
    }
    sections["data_args"]["dataset"] = "fashionmnist"
    sections["common_args"]["scenario"] = "horizontal"
    sections["train_args"] |= {"federated_optimizer": "FedAvg", "client_id_list": "[]"}
    sections["attack_args"] |= {"attack_type": "byzantine", "attack_mode": "flip"}
    sections["defense_args"]["defense_type"] = "wise_median"
    sections["dp_args"] |= {"dp_solution_type": "cdp", "mechanism_type": "gaussian", "delta": 1e-5}
    said = _said(_translated(sections))
    for section, known in keys.KEYS.items():
        for key, meaning in known.items():
            asks = sections[section][key] not in (False, None, "")
            unused = isinstance(meaning, keys.Unused) and asks
            assert (f"`{key}`" in said.split("has no effect: training by name")[0]) >= unused, key


def test_a_key_that_nobody_knows_is_named_with_the_nearest() -> None:
    found = _translated(_config(train_args={"comm_rounds": 3}))
    assert "`comm_rounds` has no effect" in _said(found)
    assert "did you mean `comm_round`?" in _said(found)


def test_what_asks_for_nothing_is_not_spoken_of() -> None:
    quiet = _config(tracking_args={"enable_wandb": False, "wandb_key": ""}, dp_args={"epsilon": 1})
    said = _said(_translated(quiet))
    assert "enable_wandb" not in said
    assert "wandb_key" not in said
    assert "epsilon" not in said  # enable_dp is not set


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train_args": {"comm_round": "many"}}, "`comm_round` must be a whole number.*'many'"),
        ({"train_args": {"comm_round": None}}, "there is no `comm_round`"),
        ({"train_args": {"learning_rate": "fast"}}, "`learning_rate` must be a number"),
        ({"train_args": {"client_num_in_total": 2.5}}, "`client_num_in_total` must be a whole"),
        ({"model_args": {"model": "crystal_ball"}}, "no model is called 'crystal_ball'"),
        ({"model_args": {"model": "rnn"}}, "rnn takes characters, and fashion-mnist holds images"),
        ({"data_args": {"dataset": "cora"}}, "cora cannot be trained on by name"),
    ],
)
def test_a_wrong_value_is_named(changes: dict[str, dict[str, Any]], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        _translated(_config(**changes), here={"fashion-mnist", "cora"})


def test_a_data_set_of_which_nothing_near_is_here_says_how_to_get_it() -> None:
    with pytest.raises(DataUnavailable, match="mnist is not on this machine") as caught:
        _translated(TYPICAL, here=set())
    assert "fedml data fetch mnist-5k" in caught.value.hint


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"data_args": {"dataset": "cifar10"}}, "cifar10 is in no package"),
        ({"data_args": {"partition_method": "p-hetero"}}, "p-hetero is not known here"),
        ({"model_args": {"model": "mobilenet"}}, "resnet20"),
        ({"train_args": {"client_optimizer": "lamb"}}, "lamb is none of"),
        ({"train_args": {"federated_optimizer": "HierarchicalFL"}}, "not grouped"),
        (
            {
                "train_args": {"group_num": 2, "group_method": "sorted"},
                "common_args": {"scenario": "hierarchical"},
            },
            "groups are random, not sorted",
        ),
        ({"train_args": {"client_num_per_round": 200}}, "200 of 100 clients cannot be"),
        ({"common_args": {"scenario": "hierarchical"}}, "not grouped"),
        ({"defense_args": {"enable_defense": True, "defense_type": "crfl"}}, "no crfl here"),
        ({"dp_args": {"enable_dp": True, "dp_solution_type": "ldp"}}, "no ldp here"),
        ({"attack_args": {"enable_attack": True, "attack_type": "dlg"}}, "no dlg here"),
    ],
)
def test_another_thing_than_was_asked_for_is_never_done_silently(
    values: dict[str, dict[str, Any]], said: str
) -> None:
    assert said in _said(_translated(_config(**values)), Kind.INSTEAD)


# ---------------------------------------------------------------------- protection and attack


@pytest.mark.parametrize(
    ("asked", "robust"),
    [
        ({"defense_type": "norm_diff_clipping", "norm_bound": 5.0},
         {"rule": "norm_clipping", "bound": 5.0}),
        ({"defense_type": "krum", "byzantine_client_num": 2, "krum_param_m": 3},
         {"rule": "krum", "byzantine": 2}),
        ({"defense_type": "multikrum", "byzantine_client_num": 2, "krum_param_m": 3},
         {"rule": "krum", "byzantine": 2, "keep": 3}),
        ({"defense_type": "trimmed_mean", "beta": 0.2}, {"rule": "trimmed_mean", "trim": 2}),
        ({"defense_type": "slsgd", "trim_param_b": 1, "alpha": 0.5},
         {"rule": "trimmed_mean", "trim": 1}),
        ({"defense_type": "geo_median"}, {"rule": "geometric_median"}),
        ({"defense_type": "RFA"}, {"rule": "geometric_median"}),
        ({"defense_type": "wise_median"}, {"rule": "median"}),
        ({"defense_type": "cclip", "bucket_size": 2},
         {"rule": "centred_clipping", "radius": 10.0, "mixing": {"kind": "bucketing", "size": 2}}),
    ],
)  # fmt: skip
def test_a_defence_becomes_a_robust_rule(asked: dict[str, Any], robust: dict[str, Any]) -> None:
    found = _translated(_config(defense_args={"enable_defense": True, **asked})).run
    assert found["treatment"] == {"robust": robust}
    assert Treatment.parse(json.dumps(found["treatment"])).rule is not None
    if asked["defense_type"] == "slsgd":
        assert found["algorithm_config"] == {"server_lr": 0.5}


def test_central_privacy_becomes_a_noise_multiplier() -> None:
    asked = {"enable_dp": True, "dp_solution_type": "cdp", "epsilon": 2.0, "delta": 1e-5,
             "clipping_norm": 0.7}  # fmt: skip
    privacy = _translated(_config(dp_args=asked)).run["treatment"]["privacy"]
    assert privacy["noise_multiplier"] == pytest.approx(4.8448 / 2, abs=1e-3)  # sqrt(2 ln 125000)/2
    assert (privacy["clip"], privacy["delta"]) == (0.7, 1e-5)
    assert Treatment.parse(json.dumps({"privacy": privacy})).privacy is not None


def test_an_attack_is_for_simulations_alone() -> None:
    asked = {"enable_attack": True, "attack_type": "byzantine", "attack_mode": "flip",
             "byzantine_client_num": 3}  # fmt: skip
    sections = _config(attack_args=asked)
    assert _translated(sections).run["simulation"] == {"attack": {"kind": "flip", "clients": 3}}
    deployed = _translated(sections, deployed=True)
    assert "simulation" not in deployed.run
    assert "not made to lie" in _said(deployed, Kind.INSTEAD)


def test_false_labels_and_lazy_workers_are_attacks_too() -> None:
    flip = {"enable_attack": True, "attack_type": "label_flipping", "original_class_list": "[1]",
            "target_class_list": [7], "ratio_of_poisoned_client": 0.2}  # fmt: skip
    found = _translated(_config(attack_args=flip)).run["simulation"]["attack"]
    assert found == {"kind": "label_flip", "clients": 20, "from": 1, "to": 7}
    lazy = {"enable_attack": True, "attack_type": "lazy_worker", "byzantine_client_num": 4}
    found = _translated(_config(attack_args=lazy)).run["simulation"]["attack"]
    assert found == {"kind": "zero", "clients": 4}


def test_hierarchical_learning_becomes_groups() -> None:
    asked = {"federated_optimizer": "HierarchicalFL", "group_num": 4, "group_comm_round": 3}
    sections = _config(train_args=asked)
    assert _translated(sections).run["groups"] == {"count": 4, "rounds": 3}
    deployed = _translated(sections, deployed=True)
    assert deployed.run["groups"] == {"count": 4, "rounds": 3}


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"secure_aggregation_args": {"enable_sa": True}}, "`enable_sa`"),
        ({"fhe_args": {"enable_fhe": True, "batch_size": 8192}}, "`enable_fhe`"),
        ({"train_args": {"federated_optimizer": "LSA"}}, "LSA runs as FedAvg"),
        ({"dp_args": {"enable_dp": True, "dp_solution_type": "ldp"}}, "no ldp here"),
        (
            {"defense_args": {"enable_defense": True, "defense_type": "foolsgold"}},
            "no foolsgold here",
        ),
    ],
)
def test_machines_never_train_without_a_protection_that_was_asked_for(
    asked: dict[str, dict[str, Any]], named: str
) -> None:
    sections = _config(**asked)
    with pytest.raises(ConfigError, match="here"):
        _translated(sections, deployed=True)
    simulated = _translated(sections)
    assert named in _said(simulated)
    assert simulated.run["config"]["batch_size"] == 10  # not that of the encryption


# ---------------------------------------------------------------------- fedml_compat, agents


def test_exact_compatibility_reproduces_the_sigmoid_and_costs_accuracy() -> None:
    sections = _config(
        data_args={"dataset": "fashionmnist", "partition_method": "homo"},
        train_args={"comm_round": 5, "client_num_in_total": 10, "batch_size": 64,
                    "learning_rate": 0.1},
    )  # fmt: skip
    exact = copy.deepcopy(sections)
    exact["common_args"]["fedml_compat"] = "exact"
    with pytest.warns(translation.Differs):
        ours, theirs = simulate(sections), simulate(exact)
    assert ours.metrics["central.accuracy"] > theirs.metrics["central.accuracy"] + 0.03


def test_a_cross_silo_file_trains_on_machines(tmp_path: Path) -> None:
    sections = _config(
        common_args={"training_type": "cross_silo"},
        comm_args={"backend": "MQTT_S3", "mqtt_config_path": "config/mqtt.yaml"},
        train_args={"client_num_in_total": 1000, "client_num_per_round": 2, "batch_size": 256,
                    "client_id_list": "[1, 2]", "comm_round": 2, "learning_rate": 0.1},
    )  # fmt: skip
    file = _file(tmp_path, sections)
    with Place(tmp_path) as place:
        place.agent("one")
        place.agent("two")
        done = subprocess.run(
            command("fedml", "federate", str(file), "--home", str(tmp_path / "me"), "--json"),
            cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1000 clients on 2 machines" in done.stderr
    assert "`mqtt_config_path` has no effect" in done.stderr
    rounds = [json.loads(line) for line in done.stdout.splitlines()]
    assert "devices.accuracy" in done.stdout
    assert rounds


@pytest.mark.parametrize("optimizer", ["Async_FedAvg", "Mime"])
def test_what_is_no_single_stage_trains_on_machines_too(optimizer: str, machines: Place) -> None:
    sections = _config(
        common_args={"training_type": "cross_silo"},
        data_args={"dataset": "fashionmnist"},
        train_args={"client_num_in_total": 2, "client_num_per_round": 2, "batch_size": 512,
                    "federated_optimizer": optimizer, "comm_round": 2, "learning_rate": 0.1},
    )  # fmt: skip
    file = _file(machines.folder, sections)
    home = str(machines.folder / "me")
    done = subprocess.run(
        command("fedml", "federate", str(file), "--home", home, "--json"),
        cwd=machines.folder, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "federated_optimizer" not in done.stderr
    (row,) = machines.query("SELECT spec FROM runs ORDER BY created_at DESC LIMIT 1")
    assert json.loads(row.spec)["algorithm"] == {"Async_FedAvg": "fedasync"}.get(optimizer, "mime")


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with Place(tmp_path_factory.mktemp("machines")) as place:
        place.agent("one")
        place.agent("two")
        yield place


@pytest.mark.parametrize(
    ("asked", "gpus", "device", "said"),
    [
        ({"using_gpu": True}, 2, "cuda", ""),
        ({"using_gpu": True, "gpu_id": 1}, 2, "cuda:1", ""),
        ({"using_gpu": True, "gpu_id": 2}, 2, None, "there is no number 2; CPUs train"),
        ({"using_gpu": True, "gpu_id": 0}, 0, None, "torch sees no GPU here; CPUs train"),
        ({"using_gpu": False, "gpu_id": 0}, 2, None, ""),
    ],
)
def test_a_gpu_is_used_where_torch_sees_it(
    asked: dict[str, Any], gpus: int, device: str | None, said: str
) -> None:
    sections = _config(data_args={"dataset": "fashionmnist"}, device_args=asked)
    found = translation.translate(sections, present=AT_HAND.__contains__, gpus=lambda: gpus)
    assert found.run.get("simulation", {}).get("device") == device
    assert found.run["config"].get("torch", False) is (device is not None)
    text = _said(found)
    assert said in text
    assert ("`using_gpu`: " in text) == bool(said)


def test_a_gpu_has_no_use_on_machines_or_where_updates_are_treated_one_by_one() -> None:
    sections = _config(data_args={"dataset": "fashionmnist"}, device_args={"using_gpu": True})
    deployed = translation.translate(sections, deployed=True, gpus=lambda: 1)
    assert "simulation" not in deployed.run
    assert "`using_gpu` has no effect" in _said(deployed)
    sections["defense_args"] = {"enable_defense": True, "defense_type": "wise_median"}
    treated = translation.translate(sections, present=AT_HAND.__contains__, gpus=lambda: 1)
    assert "device" not in treated.run.get("simulation", {})
    assert "`using_gpu`: updates are treated one by one" in _said(treated)


def test_a_run_file_of_ours_is_left_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("app: task.py\nrounds: 1\nclients: {count: 1}\n")
    assert translation.accept(file) is file
    mapping = {"app": "task.py", "rounds": 1}
    assert translation.accept(mapping) is mapping


def test_a_section_that_is_no_mapping_is_named_and_an_empty_one_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"fedml_config\.yaml: the section `train_args` must be"):
        translation.accept(_file(tmp_path, {**TYPICAL, "train_args": [1]}))
    file = _file(tmp_path, {**TYPICAL_ON_CLOTHES, "environment_args": None})
    with pytest.warns(translation.Differs):
        assert translation.accept(file, strict=True)["algorithm"] == "fedavg"


def test_a_translation_is_a_run_file_that_is_accepted(tmp_path: Path) -> None:
    found = _translated(TYPICAL_ON_CLOTHES, deployed=True).run
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(found))
    request, workspace = runfile.read_federated(file)
    assert json.loads(request["config"])["local_test"] is True
    assert {path.name for path in workspace.glob("*.py")} == {
        "__init__.py",
        "sgd.py",
        "optimizer.py",
    }


def test_every_model_by_name_fits_its_data() -> None:
    from fedml import named

    for name, family in named.MODELS.items():
        sets = [s for s, shape in named.SHAPES.items() if shape.kind in family.kinds]
        made = named.model({"dataset": sets[0], "model": name})
        assert made is not None
    assert set(named.SHAPES) <= set(data.names())


def test_the_page_holds_the_table_of_keys() -> None:
    page = (Path(__file__).parents[3] / "docs" / "fedml.md").read_text()
    assert "\n".join(keys.table()) in page
