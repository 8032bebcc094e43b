# SPDX-License-Identifier: Apache-2.0
"""Run files: what a federated run, deployed or simulated, is to be.

The tables below are the format: each key with what its value must be.
"""

import json
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from fedml.errors import ConfigError
from fedml.yamlfile import Loader, Reader, as_json, flag, number, text, texts, whole, workspace_of

_FEDERATED: dict[str, Any] = {
    "app": text,
    "workspace": text,
    "name": text,
    "algorithm": text,
    "algorithm_config": as_json,
    "treatment": as_json,
    "groups": {
        "count": whole,
        "rounds": whole,
        "algorithm": text,
        "algorithm_config": as_json,
    },
    "rounds": whole,
    "seed": whole,
    "config": as_json,
    "clients": {
        "count": whole,
        "labels": texts,
        "per_round": whole,
        "over_select": number,
        "minimum": whole,
        "deadline_s": number,
    },
    "evaluate": {"every": whole, "devices": flag, "central": flag},
    "needs": {
        "gpus": whole,
        "gpu_memory_bytes": whole,
        "cpus": whole,
        "memory_bytes": whole,
        "disk_bytes": whole,
    },
}
_SIMULATION: dict[str, Any] = {
    "engine": text,
    "device": text,
    "workers": whole,
    "checkpoint_s": number,
    "data": texts,
    "attack": as_json,
    "devices": {
        "seconds_per_example": number,
        "speed_spread": number,
        "latency_s": number,
        "megabits_per_s": number,
        "dropout": number,
        "online_s": number,
        "offline_s": number,
        "trace": text,
    },
}


def read_federated(file: Path, *, within: yaml.Node | None = None) -> tuple[dict[str, Any], Path]:
    """What a federated run file asks for, and its workspace (the file's own folder if not named).

    Args:
        within: The run is not all of the file, but this mapping in it.

    Raises:
        ConfigError: With the file's name, and the line where one is to blame.
    """
    # What is said of simulations is nothing to a broker.
    found = Reader(file, within).read({**_FEDERATED, "simulation": _SIMULATION})
    found.pop("simulation", None)
    for key in ("app", "clients", "rounds"):
        if key not in found:
            raise ConfigError(f"{file}: there is no `{key}`", "docs/federate.md has every key")
    if "count" not in found["clients"]:
        raise ConfigError(f"{file}: there is no `clients.count`: how many machines take part")
    workspace = workspace_of(file, found)
    if not (workspace / found["app"]).is_file():
        raise ConfigError(f"{file}: there is no {found['app']} in the workspace {workspace}")
    request = {k: v for k, v in found.items() if k != "workspace"}
    if "groups" in found:
        request["groups"] = json.dumps(_groups(found))
    for key, default in (("name", file.stem), ("config", "{}"), ("algorithm_config", "{}")):
        request.setdefault(key, default)
    _check(file, request)
    return request, workspace


def read_mapping(
    run: Mapping[str, Any], of: Path, files: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], Path]:
    """A mapping of a run file's keys, checked as a file is.

    Args:
        of: The file that it was made of, which errors name.
        files: Texts that will be in the workspace, by name; one of them may be its `app`.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name, written in (files or {}).items():
            (Path(folder) / name).write_text(written)
        file = Path(folder) / "run.yaml"
        file.write_text(json.dumps(run))
        try:
            return read_federated(file)
        except ConfigError as error:
            raise ConfigError(str(error).replace(str(file), str(of)), error.hint) from error


def _check(file: Path, request: Mapping[str, Any]) -> None:
    """Refuse what cannot be before it is sent.

    Where algorithms are not installed (the extra ``sim``), the broker finds it, only later.
    """
    if find_spec("numpy") is None:
        return
    from fedml.federate import algorithm
    from fedml.federate.hierarchical import Groups
    from fedml.federate.round import check
    from fedml.federate.treatment import Treatment

    clients = request["clients"]
    settings = json.loads(request["algorithm_config"])
    try:
        check(
            algorithm.create(request.get("algorithm", "fedavg"), settings),
            Treatment.parse(request.get("treatment", "")),
            Groups.parse(request.get("groups", "")),
            clients["count"],
            per_round=clients.get("per_round", 0),
            minimum=clients.get("minimum", 0),
        )
    except (algorithm.UnknownAlgorithm, algorithm.BadParameter, TypeError) as error:
        raise ConfigError(f"{file}: {error}") from error


def read_simulated(file: Path) -> tuple[dict[str, Any], Path]:
    """All that a federated run file says, `simulation` included, and its workspace.

    Raises:
        ConfigError: With the file's name, and the line where one is to blame.
    """
    if is_federated_job(file):
        raise ConfigError(
            f"{file} is a federated job: it starts on machines",
            "`fedml launch` it; what is simulated is its configuration, which it names after --cf",
        )
    found = Reader(file).read({**_FEDERATED, "simulation": _SIMULATION})
    found.setdefault("name", file.stem)
    if "groups" in found:
        found["groups"] = _groups(found)
    return found, workspace_of(file, found)


def sections_with(key: str) -> list[str]:
    """The sections of a run file that have a key of this name."""
    sections = {**_FEDERATED, "simulation": _SIMULATION}
    return [name for name, keys in sections.items() if isinstance(keys, dict) and key in keys]


def _groups(found: Mapping[str, Any]) -> dict[str, Any]:
    """The section `groups`, with nothing in it as JSON."""
    groups = dict(found["groups"])
    if "algorithm_config" in groups:
        groups["algorithm_config"] = json.loads(groups["algorithm_config"])
    return groups


def is_fedml(file: Path) -> bool:
    """Whether a file is a federated configuration of FedML's, for `fedml.translation`.

    What cannot be read is not: whoever reads it as a run file says what is wrong.
    """
    return has_fedml_sections(_found(file))


def is_federated(file: Path) -> bool:
    """Whether a file describes a federated run: ours, FedML's, or a job that is one."""
    found = _found(file)
    return isinstance(found, Mapping) and (
        "app" in found or has_fedml_sections(found) or is_federated_job(file)
    )


def is_federated_job(file: Path, within: yaml.Node | None = None) -> bool:
    """Whether a job file of FedML's, or a mapping in one of ours, asks for a federated run.

    A simulation is a program on one machine, and so a job as others are.
    """
    node = _node(file) if within is None else within
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    said = {key.value: str(value.value).lower() for key, value in pairs}
    kind = said.get("job_type", said.get("task_type"))
    return kind == "federate" and said.get("job_subtype") != "simulation"


def _node(file: Path) -> yaml.Node | None:
    try:
        return yaml.compose(file.read_text(), Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None


def _found(file: Path) -> Any:
    try:
        return yaml.load(file.read_text(), Loader)  # noqa: S506 - a safe one
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None


def has_fedml_sections(found: Any) -> bool:
    """Whether a mapping has the sections of a federated configuration of FedML's."""
    if not isinstance(found, Mapping) or "app" in found:
        return False
    return "common_args" in found or "train_args" in found
