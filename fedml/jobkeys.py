# SPDX-License-Identifier: Apache-2.0
"""The keys of job files: ours, FedML's and SkyPilot's, and what each of them may hold.

What is said of each key here and in docs/launch.md is the same.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from fedml.yamlfile import (
    NoEffect,
    Unfit,
    flag,
    is_null,
    number,
    script,
    text,
    texts,
    whole,
)

GIB = 2**30
_UNITS: dict[str, int] = {"": GIB} | {
    f"{prefix}{middle}b": base**power
    for power, prefix in enumerate("kmgt", 1)
    for middle, base in (("", 1000), ("i", 1024))
}
PRIORITIES = {"low": -50, "normal": 0, "high": 50}

# ---------------------------------------------------------------------- kinds of values


def _one_of(known: tuple[str, ...], other: Mapping[str, str]) -> Callable[..., str]:
    """A word in any case, or nothing; what is said of those that are known and cannot be."""

    def kind(loader: yaml.SafeLoader, node: yaml.Node) -> str:
        word = text(loader, node)
        if not word:
            return ""
        for refused, reason in other.items():
            if word.lower() == refused.lower():
                raise Unfit(f"is {word!r}, and cannot be launched: {reason}")
        for name in known:
            if word.lower() == name.lower():
                return name
        raise Unfit(f"must be one of {', '.join([*known, *other])}, and is {word!r}")

    return kind


def _unless(honoured: str, reason: str) -> Callable[..., str]:
    """A word that is honoured when the pattern fits, and else has no effect."""

    def kind(loader: yaml.SafeLoader, node: yaml.Node) -> str:
        word = text(loader, node)
        if word and not re.fullmatch(honoured, word, re.IGNORECASE):
            raise NoEffect(reason)
        return word

    return kind


def _off(reason: str) -> Callable[..., bool]:
    """A switch that may be off; on, it has no effect."""

    def kind(loader: yaml.SafeLoader, node: yaml.Node) -> bool:
        if not is_null(node) and flag(loader, node):
            raise NoEffect(reason)
        return False

    return kind


def _cpus(loader: yaml.SafeLoader, node: yaml.Node) -> int:
    """At least so many, as `4` or `4+`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\+?", text(loader, node))
    if found is None:
        raise Unfit(f"must be a number such as 4 or 4+, and is {node.value!r}")
    return math.ceil(float(found[1]))


def _size(loader: yaml.SafeLoader, node: yaml.Node) -> int:
    """At least so many bytes: `16` and `16+` are GiB; also `512MB`, `16GiB`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?b)?\+?", text(loader, node), re.IGNORECASE)
    if found is None:
        raise Unfit(f"must be a size such as 16, 16+ (GiB) or 512MB, and is {node.value!r}")
    return math.ceil(float(found[1]) * _UNITS[(found[2] or "").lower()])


def _accelerators(loader: yaml.SafeLoader, node: yaml.Node) -> tuple[str, int]:
    """SkyPilot's `A100`, `A100:2` and `{A100: 2}`: model and number."""
    if isinstance(node, yaml.MappingNode) and len(node.value) == 1:
        key, count = node.value[0]
        return text(loader, key), whole(loader, count)
    if not isinstance(node, yaml.ScalarNode):
        raise Unfit("must name one kind of GPU, such as A100:2")
    model, _, count = text(loader, node).partition(":")
    if count and not count.isdigit():
        raise Unfit(f"must have a whole number of GPUs, such as A100:2, and is {node.value!r}")
    return model.strip(), int(count or 1)


def _nodes(loader: yaml.SafeLoader, node: yaml.Node) -> int:
    if (count := whole(loader, node)) < 1:
        raise Unfit("must be at least 1")
    return count


def _priority(loader: yaml.SafeLoader, node: yaml.Node) -> int:
    """A whole number, or one of three words."""
    word = text(loader, node).lower()
    if word in PRIORITIES:
        return PRIORITIES[word]
    if re.fullmatch(r"[+-]?\d+", word) is None or abs(int(word)) > 100:
        raise Unfit(f"must be low, normal, high or a number from -100 to 100, and is {word!r}")
    return int(word)


def _price(loader: yaml.SafeLoader, node: yaml.Node) -> float:
    """An amount of money, as `3`, `0.5` or `$3000`."""
    found = re.fullmatch(r"[$€£]?\s*(\d+(?:\.\d+)?)", text(loader, node))
    if found is None:
        raise Unfit(f"must be a price such as 2.5 or $2.5, and is {node.value!r}")
    return float(found[1])


def _recovery(loader: yaml.SafeLoader, node: yaml.Node) -> int:
    """SkyPilot's `job_recovery`: how often it is started again after its own failure."""
    if not isinstance(node, yaml.MappingNode):
        raise NoEffect("`retries` says how often a job is offered again")
    found = {key.value: value for key, value in node.value}
    if "max_restarts_on_errors" not in found:
        raise NoEffect("`retries` says how often a job is offered again")
    return whole(loader, found["max_restarts_on_errors"])


def _requirements(loader: yaml.SafeLoader, node: yaml.Node) -> str | list[str]:
    """The name of a file in the workspace, or packages as such a file names them."""
    if isinstance(node, yaml.SequenceNode):
        return [text(loader, line) for line in node.value]
    written = text(loader, node)
    return written.splitlines() if "\n" in written.strip() else written.strip()


def _section(loader: yaml.SafeLoader, node: yaml.Node) -> dict[str, str]:
    """A free section: the end of each variable's name, and its value as it is written."""
    if is_null(node):
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise Unfit("must be a mapping")
    loader.flatten_mapping(node)
    found: dict[str, str] = {}
    for key, value in node.value:
        name = re.sub(r"[^A-Z0-9_]", "_", str(key.value).upper())
        if isinstance(value, yaml.MappingNode):
            inner = {f"{name}_{n}": v for n, v in _section(loader, value).items()}
        elif isinstance(value, yaml.SequenceNode):
            inner = {name: json.dumps(loader.construct_object(value, deep=True), default=str)}
        else:
            inner = {name: text(loader, value)}
        if both := sorted(found.keys() & inner.keys()):
            raise Unfit(f"has two keys that would both be the variable {both[0]}")
        found |= inner
    return found


def _secrets(loader: yaml.SafeLoader, node: yaml.Node) -> dict[str, str | None]:
    """Names of variables, as a list, or with their values; None: given elsewhere."""
    if is_null(node):
        return {}
    if isinstance(node, yaml.SequenceNode):
        return {text(loader, one): None for one in node.value}
    if not isinstance(node, yaml.MappingNode):
        raise Unfit("must be a list of names of variables, or names with values")
    loader.flatten_mapping(node)
    return {
        text(loader, key): None if is_null(value) else text(loader, value)
        for key, value in node.value
    }


def _mounts(loader: yaml.SafeLoader, node: yaml.Node) -> list[dict[str, Any]]:
    """A list of `/on/the/machine:/in/the/container`, each perhaps with `:ro`, as Docker has it."""
    if is_null(node):
        return []
    if not isinstance(node, yaml.SequenceNode):
        raise Unfit("must be a list such as [/srv/data:/data:ro]")
    found = []
    for one in node.value:
        source, _, rest = text(loader, one).partition(":")
        target, _, mode = rest.partition(":")
        if not (source.startswith("/") and target.startswith("/")) or mode not in ("", "ro", "rw"):
            raise Unfit(
                f"holds {one.value!r}, and must hold absolute paths such as /srv/data:/data:ro"
            )
        found.append({"source": source, "target": target, "writable": mode != "ro"})
    return found


def _port(loader: yaml.SafeLoader, node: yaml.Node) -> int:
    if not 0 < (port := whole(loader, node)) < 65536:
        raise Unfit(f"must be a port from 1 to 65535, and is {port}")
    return port


def _probe(loader: yaml.SafeLoader, node: yaml.Node) -> dict[str, Any]:
    """What answers once it is ready, as `/ready`; SkyPilot's mapping has the seconds in it too."""
    if not isinstance(node, yaml.MappingNode):
        return {"path": _url_path(text(loader, node))}
    found: dict[str, Any] = {}
    for key, value in node.value:
        if key.value == "path":
            found["path"] = _url_path(text(loader, value))
        elif key.value == "initial_delay_seconds":
            found["within_s"] = number(loader, value)
        elif key.value != "timeout_seconds":
            raise Unfit(f"has the key {key.value!r}; `path` and `initial_delay_seconds` are known")
    return found


def _url_path(written: str) -> str:
    if written and not written.startswith("/"):
        raise Unfit(f"must be a path such as /ready, and is {written!r}")
    return written


# ---------------------------------------------------------------------- the format

_NO_CLOUD = "jobs run on machines that have joined; nothing is rented"
_NO_PROJECTS = "there are no projects"
_NO_PORTS = "machines are not reached from outside"
_ONLY_THE_WORKSPACE = "only the workspace is sent"

KEYS: dict[str, Any] = {
    "job": script,
    "bootstrap": script,
    "requirements": _requirements,
    "data": texts,
    "workspace": text,
    "job_name": text,
    "environment_variables": texts,
    "secrets": _secrets,
    "computing": {
        "minimum_num_gpus": whole,
        "resource_type": text,
        "device_type": _one_of(("CPU", "GPU", "hybrid"), {}),
        "gpu_memory": _size,
        "cpus": _cpus,
        "memory": _size,
        "disk": _size,
        "maximum_cost_per_hour": _price,
        "allow_cross_cloud_resources": flag,
    },
    "labels": texts,
    "num_nodes": _nodes,
    "priority": _priority,
    "preemptible": flag,
    "cluster": text,
    "retries": whole,
    "restarts": whole,
    "deadline": number,
    "grace": number,
    # FedML's.
    "job_type": _one_of(
        ("train", "deploy", "serve", "federate"),
        {"dev-environment": "log in to the machine by other means, such as SSH"},
    ),
    "job_subtype": _unless(
        "general_training|generate_training|single_machine_training"
        "|cluster_distributed_training|cross_cloud_training|simulation",
        "jobs are started alike, whatever they are for",
    ),
    "expert_mode": {
        "executable_interpreter": text,
        "executable_file_folder": text,
        "executable_file": text,
        "executable_conf_option": text,
        "executable_conf_file_folder": text,
        "executable_conf_file": text,
        "executable_args": text,
        "data_location": text,
        "bootstrap": script,
    },
    "environment_args": {"bootstrap": script},
    "data_args": _section,
    "model_args": _section,
    "training_params": _section,
    "*_args": _section,
    "*_params": _section,
    "network": _one_of(("full", "none"), {}),
    "service": {
        "port": _port,
        "readiness_probe": _probe,
        # SkyPilot's.
        "replicas": _unless("1", "a job is one service; launch it as often as you need it"),
        "replica_policy": "a job is one service; launch it as often as you need it",
        "load_balancing_policy": "a job is one service; nothing stands before it",
        "ports": _port,
        "tls": "the job itself speaks TLS, or does not",
    },
    "containerize": flag,
    "docker": {
        "image": text,
        "registry": text,
        "username": text,
        "password": text,
        "mounts": _mounts,
        "volumes": _mounts,
        "ports": _NO_PORTS,
    },
    "run_api_key": "`fedml login` says who you are, and the job gets a key of its own run",
    "framework_type": "a job brings its own framework",
    "fedml_env": _NO_PROJECTS,
    "job_args": "there are no stored jobs",
    "serving_args": "there are no stored models: the workspace, or `data`, brings what is served",
    "server_job": "a launched job has no server; a federated run on several machines has",
    # SkyPilot's.
    "resources": {
        "accelerators": _accelerators,
        "cpus": _cpus,
        "memory": _size,
        "disk_size": _size,
        "use_spot": _off(_NO_CLOUD),
        "infra": _NO_CLOUD,
        "cloud": _NO_CLOUD,
        "region": _NO_CLOUD,
        "zone": _NO_CLOUD,
        "instance_type": _NO_CLOUD,
        "disk_tier": _NO_CLOUD,
        "network_tier": _NO_CLOUD,
        "labels": "these tag rented machines; our own `labels` choose one that has joined",
        "image_id": _unless("docker:.+", "only images of containers are known here"),
        "ports": _NO_PORTS,
        "job_recovery": _recovery,
        "spot_recovery": "`retries` says how often a job is offered again",
        "autostop": _NO_CLOUD,
    },
    "file_mounts": _ONLY_THE_WORKSPACE,
    "volumes": _ONLY_THE_WORKSPACE,
}
_KEEPS = "a federated run keeps its machines from its start to its end, and does not queue"
_STAGES = "a client gets its part of a round again when its machine is back"
_NOT_FEDERATED = "of a federated run every machine has a worker of ours, which trains"

# What is otherwise where `job_type` is `federate` (docs/fedml.md): `federatedjob.py` reads these.
FEDERATED: dict[str, Any] = KEYS | {
    "job_type": _one_of(("federate",), {}),
    "job_subtype": _one_of(
        ("cross_silo", "simulation"),
        {
            "web": "browsers are no clients here; `cross_silo` trains on machines",
            "smart_phone": "phones are no clients here; `cross_silo` trains on machines",
        },
    ),
    "server_job": script,
    "num_nodes": "`client_num_in_total` of the configuration says how many machines take part",
    "priority": _KEEPS,
    "preemptible": _off(_KEEPS),
    "retries": _STAGES,
    "restarts": _STAGES,
    "deadline": "a federated run ends with its rounds, or by `fedml run stop`",
    "grace": "a part of a round that is given up has nothing to save",
    "network": "the owner of a machine says whether federated runs have a network there",
    "service": _NOT_FEDERATED,
    "containerize": _off(_NOT_FEDERATED),
    "docker": _NOT_FEDERATED,
}
# Other names of the same.
ALIASES = {
    "task_type": "job_type",
    "name": "job_name",
    "run": "job",
    "setup": "bootstrap",
    "workdir": "workspace",
    "envs": "environment_variables",
    "gpu_requirements": "computing",
}

# What `fedml launch init` writes. The lines `#key` and `#  key` may all be switched on.
EXAMPLE = """\
# A job: shell lines that run on one of your machines.  `fedml launch job.yaml`
# Every key: docs/launch.md.  Where it would run, and why: `fedml launch job.yaml --dry-run`

job: |
  echo "hello from $(hostname)"
  echo "GPUs: ${CUDA_VISIBLE_DEVICES:-none}"

# How lists call it.
#job_name: hello

# A folder beside this file, sent along; .gitignore is honoured. The job starts in it.
#workspace: .

# Run before the job in the same shell; the job runs only if this ends with 0.
#bootstrap: |
#  echo "preparing"

# Given to the job as they are written.
# Python packages, or the name of a requirements file in the workspace; in a virtual environment
# that is kept for the next job which requires the same.
#requirements:
#  - tqdm

# Files and folders of `fedml storage`, and where the job finds them.
#data:
#  data/train.csv: ward-3/train.csv

#environment_variables:
#  SEED: "7"

# Variables that no log shows. Without a value (`HF_TOKEN:`), it comes from the terminal in which
# you type `fedml launch`.
#secrets:
#  DEMO_PASSWORD: correct-horse

# Free sections, given as FEDML_ENV_<SECTION>_<KEY>: here FEDML_ENV_TRAINING_PARAMS_EPOCHS.
#training_params:
#  epochs: 3

# What the machine must have, at least; sizes are GiB.
#computing:
#  cpus: 1
#  memory: 0.25
#  disk: 0.1
#  maximum_cost_per_hour: 2.5   # of each machine, as its owner has declared it
#  minimum_num_gpus: 1
#  resource_type: RTX-4090   # a model; also A100-80G, T4 ...
#  gpu_memory: 20            # of each GPU
#  device_type: hybrid       # CPU, GPU, or hybrid: without GPUs where no machine has these

# Labels that the machine must wear, such as `site: north`.
#labels: {}

# A job that stays up: it listens on the port in $PORT, and is ready when GET /ready answers 200.
# See docs/deploy.md.
#service:
#  readiness_probe: /ready

# On how many machines at once, one task on each: all start, or none. Each knows the others by
# MASTER_ADDR, RANK, WORLD_SIZE ...; `torchrun train.py` needs no options.
#num_nodes: 2

# Who goes first when machines are scarce: low, normal, high (admins), or -100 to 100. Whether it
# may be ended and queued again for a higher priority; low ones may, if nothing else is said.
#priority: low
#preemptible: true

# The machines that were reserved by `fedml cluster create NAME`.
#cluster: NAME

# How often it is offered again when its machine is lost, and how often it is started again when
# it fails itself; seconds until it is stopped; seconds between TERM and KILL when it is.
#retries: 3
#restarts: 0
#deadline: 7200
#grace: 10
"""
