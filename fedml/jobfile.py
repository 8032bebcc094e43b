# SPDX-License-Identifier: Apache-2.0
"""Job and run files (YAML) into what the broker is asked.

The tables below are the two formats: each key with what its value must be. An error names the
file, the line and, for a key that nobody knows, the nearest one that is known. Keys of FedML's job
files that have no effect here are named in a warning.
"""

import difflib
import json
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fedml.errors import ConfigError


class Loader(yaml.SafeLoader):
    """YAML 1.1 but for one thing: `1e-5` is a number, as YAML 1.2 and everybody has it."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"), [*"-+0123456789"]
)


class _Unfit(Exception):
    """A value that its key cannot have; the text says what it must be."""


class _Reader:
    """One file whose values still know their lines."""

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            self._loader = Loader(file.read_text())
            node = self._loader.get_single_node()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file}: {error}") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"{file} is not YAML: {error}") from error
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{file}: a mapping of keys is expected")
        self._root = node

    def read(self, keys: Mapping[str, Any], unused: Mapping[str, Any]) -> dict[str, Any]:
        """What the file says, checked by the table `keys`."""
        return self._mapping(self._root, keys, unused, "")

    def _mapping(
        self, node: yaml.Node, keys: Mapping[str, Any], unused: Mapping[str, Any], inside: str
    ) -> dict[str, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise _Unfit("must be a mapping")
        self._loader.flatten_mapping(node)  # resolves `<<`
        found: dict[str, Any] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            shown = f"{inside}{name}"
            if name in found:
                raise ConfigError(f"{self.file}, line {line}: `{shown}` is there twice")
            if name in keys:
                found[name] = self._value(value, keys[name], unused.get(name, {}), shown, line)
            elif name in unused:
                text = f"{self.file}, line {line}: `{shown}` has no effect: {unused[name]}"
                warnings.warn(text, UserWarning, stacklevel=2)
            else:
                raise ConfigError(
                    f"{self.file}, line {line}: unknown key `{shown}`{_near(name, keys)}"
                )
        return found

    def _value(self, node: yaml.Node, kind: Any, unused: Any, shown: str, line: int) -> Any:
        try:
            if isinstance(kind, Mapping):
                return {} if _is_null(node) else self._mapping(node, kind, unused, f"{shown}.")
            return kind(self._loader, node)
        except _Unfit as error:
            raise ConfigError(f"{self.file}, line {line}: `{shown}` {error}") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"{self.file} is not YAML: {error}") from error


def _near(name: str, keys: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, keys, n=1)
    return f"; did you mean `{near[0]}`?" if near else f"; known are {', '.join(keys)}"


# ---------------------------------------------------------------------- kinds of values


def _is_null(node: yaml.Node) -> bool:
    return bool(node.tag == "tag:yaml.org,2002:null")


def _text(loader: yaml.SafeLoader, node: yaml.Node) -> str:
    """As it is written: `007` and `yes` stay what they are."""
    if not isinstance(node, yaml.ScalarNode):
        raise _Unfit("must be text")
    return "" if _is_null(node) else str(node.value)


def _script(loader: yaml.SafeLoader, node: yaml.Node) -> str:
    """Shell lines; FedML also has them by system."""
    if isinstance(node, yaml.MappingNode):
        lines = {str(key.value): value for key, value in node.value}
        if "run_on_posix" not in lines:
            raise _Unfit("has no `run_on_posix`: machines run Linux")
        return _text(loader, lines["run_on_posix"])
    return _text(loader, node)


def _texts(loader: yaml.SafeLoader, node: yaml.Node) -> dict[str, str]:
    if _is_null(node):
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise _Unfit("must be a mapping")
    loader.flatten_mapping(node)
    return {str(key.value): _text(loader, value) for key, value in node.value}


def _whole(loader: yaml.SafeLoader, node: yaml.Node) -> int:
    value = loader.construct_object(node, deep=True)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise _Unfit(f"must be a whole number, 0 or more, and is {node.value!r}")
    return value


def _number(loader: yaml.SafeLoader, node: yaml.Node) -> float:
    value = loader.construct_object(node, deep=True)
    fits = isinstance(value, int | float) and not isinstance(value, bool)
    if not fits or value < 0 or not math.isfinite(value):
        raise _Unfit(f"must be a number, 0 or more, and is {node.value!r}")
    return float(value)


def _flag(loader: yaml.SafeLoader, node: yaml.Node) -> bool:
    value = loader.construct_object(node, deep=True)
    if not isinstance(value, bool):
        raise _Unfit(f"must be true or false, and is {node.value!r}")
    return value


def _json(loader: yaml.SafeLoader, node: yaml.Node) -> str:
    """A free mapping, as JSON."""
    if _is_null(node):
        return "{}"
    if not isinstance(node, yaml.MappingNode):
        raise _Unfit("must be a mapping")
    try:
        value = loader.construct_object(node, deep=True)
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise _Unfit(f"holds what JSON cannot say: {error}") from error


# ---------------------------------------------------------------------- the two formats

_JOB: dict[str, Any] = {
    "job": _script,
    "bootstrap": _script,
    "workspace": _text,
    "job_type": _text,
    "task_type": _text,
    "job_name": _text,
    "name": _text,
    "environment_variables": _texts,
    "computing": {"minimum_num_gpus": _whole},
    "labels": _texts,
    "retries": _whole,
    "deadline": _number,
    "grace": _number,
}
_NO_CONTAINERS = "jobs run on the machine itself, without containers"
_NO_SECTION = "nothing hands it to the job yet; use `environment_variables`"
# FedML's, with the reason why they have no effect.
_JOB_UNUSED: dict[str, Any] = {
    "computing": {
        "maximum_cost_per_hour": "your own machines have no price",
        "resource_type": "machines are not chosen by the model of their GPUs; use `labels`",
        "device_type": "machines are chosen by `minimum_num_gpus` and `labels`",
        "allow_cross_cloud_resources": "a job runs on one machine",
    },
    "job_subtype": "there is one kind of launched job",
    "framework_type": "a job brings its own framework",
    "containerize": _NO_CONTAINERS,
    "docker": _NO_CONTAINERS,
    "fedml_env": "there are no projects",
    "job_args": "there are no stored jobs",
    "data_args": _NO_SECTION,
    "model_args": _NO_SECTION,
    "training_params": _NO_SECTION,
}
_FEDERATED: dict[str, Any] = {
    "app": _text,
    "workspace": _text,
    "name": _text,
    "algorithm": _text,
    "algorithm_config": _json,
    "treatment": _json,
    "groups": {
        "count": _whole,
        "rounds": _whole,
        "algorithm": _text,
        "algorithm_config": _json,
    },
    "rounds": _whole,
    "seed": _whole,
    "config": _json,
    "clients": {
        "count": _whole,
        "labels": _texts,
        "per_round": _whole,
        "over_select": _number,
        "minimum": _whole,
        "deadline_s": _number,
    },
    "evaluate": {"every": _whole, "devices": _flag, "central": _flag},
    "needs": {
        "gpus": _whole,
        "gpu_memory_bytes": _whole,
        "cpus": _whole,
        "memory_bytes": _whole,
        "disk_bytes": _whole,
    },
}
_SIMULATION: dict[str, Any] = {
    "engine": _text,
    "device": _text,
    "workers": _whole,
    "checkpoint_s": _number,
    "data": _texts,
    "attack": _json,
    "devices": {
        "seconds_per_example": _number,
        "speed_spread": _number,
        "latency_s": _number,
        "megabits_per_s": _number,
        "dropout": _number,
        "online_s": _number,
        "offline_s": _number,
        "trace": _text,
    },
}
_OTHER_COMMAND = {
    "federate": "federated runs have a file of their own: `fedml federate run.yaml`",
    "deploy": "models are not served yet",
    "serve": "models are not served yet",
}


def read_job(file: Path) -> tuple[dict[str, Any], Path | None]:
    """What a job file asks for, and its workspace.

    Raises:
        ConfigError: With the file's name, and the line where one is to blame.
    """
    found = _Reader(file).read(_JOB, _JOB_UNUSED)
    if not found.get("job", "").strip():
        raise ConfigError(f"{file}: there is no `job`: the shell lines to run")
    kind = found.get("job_type") or found.get("task_type") or "train"
    if kind in _OTHER_COMMAND:
        raise ConfigError(f"{file}: `job_type: {kind}` cannot be launched", _OTHER_COMMAND[kind])
    request = {
        "command": found["job"],
        "bootstrap": found.get("bootstrap", ""),
        "name": found.get("job_name") or found.get("name") or file.stem,
        "env": found.get("environment_variables", {}),
        "needs": {"gpus": found.get("computing", {}).get("minimum_num_gpus", 0)},
        "labels": found.get("labels", {}),
        "retries": found.get("retries", 3),
        "deadline_s": found.get("deadline", 0.0),
        "grace_s": found.get("grace", 10.0),
    }
    return request, _workspace(file, found) if "workspace" in found else None


def read_federated(file: Path) -> tuple[dict[str, Any], Path]:
    """What a federated run file asks for, and its workspace (the file's own folder if not named).

    Raises:
        ConfigError: With the file's name, and the line where one is to blame.
    """
    # What is said of simulations is nothing to a broker.
    found = _Reader(file).read({**_FEDERATED, "simulation": _SIMULATION}, {})
    found.pop("simulation", None)
    for key in ("app", "clients", "rounds"):
        if key not in found:
            raise ConfigError(f"{file}: there is no `{key}`", "docs/federate.md has every key")
    if "count" not in found["clients"]:
        raise ConfigError(f"{file}: there is no `clients.count`: how many machines take part")
    workspace = _workspace(file, found)
    if not (workspace / found["app"]).is_file():
        raise ConfigError(f"{file}: there is no {found['app']} in the workspace {workspace}")
    request = {k: v for k, v in found.items() if k != "workspace"}
    if "groups" in found:
        request["groups"] = json.dumps(groups := _groups(found))
        if groups.get("rounds", 1) > 1:
            raise ConfigError(
                f"{file}: `groups.rounds` is {groups['rounds']}: on agents, groups have no rounds "
                "of their own yet, they only add up",
                "`groups.rounds: 1`; `fedml simulate` runs both",
            )
    for key, default in (("name", file.stem), ("config", "{}"), ("algorithm_config", "{}")):
        request.setdefault(key, default)
    return request, workspace


def read_simulated(file: Path) -> tuple[dict[str, Any], Path]:
    """All that a federated run file says, `simulation` included, and its workspace.

    Raises:
        ConfigError: With the file's name, and the line where one is to blame.
    """
    found = _Reader(file).read({**_FEDERATED, "simulation": _SIMULATION}, {})
    found.setdefault("name", file.stem)
    if "groups" in found:
        found["groups"] = _groups(found)
    return found, _workspace(file, found)


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
    try:
        return has_fedml_sections(yaml.load(file.read_text(), Loader))  # noqa: S506 - a safe one
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False


def has_fedml_sections(found: Any) -> bool:
    """Whether a mapping has the sections of a federated configuration of FedML's."""
    if not isinstance(found, Mapping) or "app" in found:
        return False
    return "common_args" in found or "train_args" in found


def _workspace(file: Path, found: Mapping[str, Any]) -> Path:
    folder = (file.parent / (found.get("workspace") or ".")).resolve()
    if not folder.is_dir():
        raise ConfigError(
            f"{file}: the workspace {folder} is not a directory", "it is relative to the file"
        )
    return folder
