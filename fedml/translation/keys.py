# SPDX-License-Identifier: Apache-2.0
"""Every key of FedML's federated configurations: what it becomes here, or why it has no effect.

`table` is the one in docs/fedml.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Used:
    """It is honoured.

    Attributes:
        becomes: What of, in the words of our run files.
    """

    becomes: str


@dataclass(frozen=True, slots=True)
class Unused:
    """It has no effect, and a warning says so wherever it asks for something.

    Attributes:
        reason: Why.
        by_name: Only where data set and model are said by name; a script reads it for itself.
    """

    reason: str
    by_name: bool = False


_HOSTED = Unused("nothing here leaves your machines: rounds and metrics are in the results file")
_WIRE = Unused("machines speak to the broker that `fedml login` names; there is one wire")
_GPU = Unused(
    "`using_gpu`, `gpu_id` and `--device` say where a simulation trains; machines train by name "
    "on CPUs",
    by_name=True,
)
_CACHE = Unused(
    "data sets are read out of packages; `fedml data list` shows where they are", by_name=True
)
_MODEL_FILE = Unused(
    "a model starts from its seed; `fedml run download` brings the last one", by_name=True
)
_FHE = Unused("updates are not encrypted under each other: there is no homomorphic encryption")
_OWN_CODE = Unused(
    "training by name has no such setting; a script finds it in `args`", by_name=True
)

KEYS: Mapping[str, Mapping[str, Used | Unused]] = {
    "common_args": {
        "training_type": Used("the command decides: `fedml simulate` or `fedml federate`"),
        "random_seed": Used("`seed`"),
        "scenario": Used("`hierarchical`: `groups`, as `HierarchicalFL` has them"),
        "using_mlops": Used("`fedml.mlops` records either way; see mlops.md"),
        "config_version": Used("read, and the same in every version"),
        "name": Used("`name`"),
        "project": _HOSTED,
        "fedml_compat": Used("`exact`: FedML's sigmoid before the cross-entropy of `lr`"),
    },
    "environment_args": {
        "bootstrap": Unused("a federated run installs nothing on machines"),
    },
    "data_args": {
        "dataset": Used("`config.dataset`, by name or the nearest one at hand"),
        "partition_method": Used("`config.partition`: hetero (Dirichlet), homo or uniform (even)"),
        "partition_alpha": Used("`config.alpha`"),
        "data_cache_dir": _CACHE,
        "part_file": _CACHE,
        "data_file_path": _CACHE,
        "partition_file_path": _CACHE,
        "download": _CACHE,
        "synthetic_data_url": _CACHE,
        "private_local_data": _CACHE,
        "train_size": _OWN_CODE,
        "test_size": _OWN_CODE,
        "data_col_idx": _OWN_CODE,
    },
    "model_args": {
        "model": Used("`config.model`"),
        "model_file_cache_folder": _MODEL_FILE,
        "global_model_file_path": _MODEL_FILE,
        "input_dim": Unused("the data set says how large the model is", by_name=True),
        "output_dim": Unused("the data set says how large the model is", by_name=True),
        "hidden_size": _OWN_CODE,
    },
    "train_args": {
        "federated_optimizer": Used("`algorithm`"),
        "client_id_list": Used("`clients.count` of a deployed run, by its length"),
        "client_num_in_total": Used("`clients.count`"),
        "client_num_per_round": Used("`clients.per_round`"),
        "comm_round": Used("`rounds`"),
        "epochs": Used("`config.epochs`"),
        "batch_size": Used("`config.batch_size`; 0 or less takes all examples at once"),
        "client_optimizer": Used("`config.client_optimizer`: sgd, adam, adamw, adagrad, rmsprop"),
        "learning_rate": Used("`config.lr`"),
        "lr": Used("`config.lr`"),
        "weight_decay": Used("`config.weight_decay`, of SGD too"),
        "wd": Used("`config.weight_decay`"),
        "momentum": Used("`config.momentum`"),
        "nesterov": Used("`config.nesterov`"),
        "clip_grad_norm": Used("`config.clip_grad_norm`"),
        "gradient_accumulation_steps": Used("`config.gradient_accumulation_steps`"),
        "fp16": Unused("training is in float32 (`config.bf16` of a run file is for bfloat16)"),
        "server_optimizer": Used("the algorithm under FedOpt: sgd, adam, adagrad, yogi"),
        "server_lr": Used("`algorithm_config.server_lr`"),
        "server_momentum": Used("`algorithm_config`: the momentum of the server's optimiser"),
        "fedprox_mu": Used("`algorithm_config.mu`"),
        "feddyn_alpha": Used("`algorithm_config.alpha`"),
        "fa_task": Unused("a statistic is not a model: analytics have a command of their own"),
        "server_checkpoint_interval": Unused("`simulation.checkpoint_s` says how often, in time"),
        "group_num": Used("`groups.count`, where groups are asked for"),
        "group_comm_round": Used("`groups.rounds`"),
        "group_method": Used("clients are grouped at random, with a word for another way"),
    },
    "validation_args": {
        "frequency_of_the_test": Used("`evaluate.every`"),
    },
    "device_args": {
        "using_gpu": Used("`simulation.device: cuda` where torch sees a GPU, by name"),
        "gpu_id": Used("`simulation.device: cuda:N`, with `using_gpu`"),
        "gpu_mapping_file": _GPU,
        "gpu_mapping_key": _GPU,
        "device_type": _GPU,
        "worker_num": Unused("a simulation has one process per core, or `--workers`"),
    },
    "comm_args": {
        "backend": Used("every simulation backend is our simulator, every deployed one our wire"),
        "is_mobile": Unused("clients are agents; there are no phones yet"),
        "mqtt_config_path": _WIRE,
        "s3_config_path": _WIRE,
        "grpc_ipconfig_path": _WIRE,
        "customized_training_mqtt_config": _WIRE,
        "customized_training_s3_config": _WIRE,
    },
    "tracking_args": {
        "run_name": Used("`name`"),
        "log_file_dir": Unused("`--out` says where results go; `fedml run logs` prints logs"),
        "enable_tracking": _HOSTED,
        "enable_wandb": _HOSTED,
        "wandb_key": _HOSTED,
        "wandb_project": _HOSTED,
        "wandb_name": _HOSTED,
        "wandb_entity": _HOSTED,
        "wandb_only_server": _HOSTED,
    },
    "attack_args": {
        "enable_attack": Used("whether there is an attack"),
        "attack_type": Used("`simulation.attack`: byzantine, label_flipping, lazy_worker"),
        "attack_mode": Used("`simulation.attack.kind`: random, zero, flip"),
        "byzantine_client_num": Used("`simulation.attack.clients`; `treatment.robust.byzantine`"),
        "ratio_of_poisoned_client": Used("`simulation.attack.clients`, as a part of all"),
        "original_class_list": Used("`simulation.attack.from`"),
        "target_class_list": Used("`simulation.attack.to`"),
    },
    "defense_args": {
        "enable_defense": Used("whether there is a defence"),
        "defense_type": Used("`treatment.robust.rule`"),
        "norm_bound": Used("`treatment.robust.bound`"),
        "krum_param_m": Used("`treatment.robust.keep`"),
        "trim_param_b": Used("`treatment.robust.trim`"),
        "beta": Used("`treatment.robust.trim`, as a part of the round's clients"),
        "alpha": Used("`algorithm_config.server_lr` under slsgd"),
        "bucket_size": Used("`treatment.robust.mixing`: bucketing"),
        "option_type": Unused("slsgd is the trimmed mean here, its option 2"),
        "cosine_similarity_bound": Unused("no rule here looks at cosines"),
        "sigma": Unused("no rule here adds noise; `dp_args` do"),
    },
    "dp_args": {
        "enable_dp": Used("whether there is privacy"),
        "dp_solution_type": Used("`cdp` and `dp_clip`: `treatment.privacy`"),
        "mechanism_type": Used("gaussian; in the place of laplace too, with a word"),
        "epsilon": Used("`treatment.privacy.noise_multiplier`, of one round"),
        "delta": Used("`treatment.privacy.delta`"),
        "sensitivity": Used("`treatment.privacy.clip`"),
        "clipping_norm": Used("`treatment.privacy.clip`"),
        "noise_multiplier": Used("`treatment.privacy.noise_multiplier`"),
        "enable_rdp_accountant": Used("there is always one: `privacy.epsilon` in each round"),
        "rdp_alpha": Unused("the accountant tries all orders and takes the best"),
        "stop_training_at_epsilon": Unused("a run ends with its rounds; watch `privacy.epsilon`"),
    },
    "secure_aggregation_args": {
        "enable_sa": Used(
            "refused on agents: there is no secure aggregation; a simulation needs none"
        ),
        "sa_method": Unused("there is no secure aggregation"),
        "prime_number": Unused("there is no secure aggregation"),
        "precision_parameter": Unused("there is no secure aggregation"),
    },
    "fhe_args": {
        "enable_fhe": Used(
            "refused on agents: there is no homomorphic encryption; a simulation needs none"
        ),
        "scheme": _FHE,
        "scaling_factor": _FHE,
        "file_loc": _FHE,
    },
    "task_args": {
        "k": Unused("a statistic is not a model: analytics have a command of their own"),
        "use_all_data": Unused("a statistic is not a model: analytics have a command of their own"),
    },
    "fednova_args": {},
    "private_config_paths": {},
}

# Sections that do nothing unless their switch is on.
SWITCHES: Mapping[str, str] = {
    "attack_args": "enable_attack",
    "defense_args": "enable_defense",
    "dp_args": "enable_dp",
    "secure_aggregation_args": "enable_sa",
    "fhe_args": "enable_fhe",
}

# Of every key, wherever it stands: FedML flattens its sections.
BY_NAME: Mapping[str, Used | Unused] = {
    key: meaning for section in KEYS.values() for key, meaning in section.items()
}


def table() -> Iterator[str]:
    """The lines of the table in docs/fedml.md."""
    yield "| section | key | here |"
    yield "|---|---|---|"
    for section, keys in KEYS.items():
        for key, meaning in keys.items():
            text = meaning.becomes if isinstance(meaning, Used) else f"*warned:* {meaning.reason}"
            yield f"| `{section}` | `{key}` | {text} |"
