# SPDX-License-Identifier: Apache-2.0
"""Job and run files (YAML) into what the broker is asked; errors name line, key and nearest key."""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fedml.errors import ConfigError

_JOB = (
    "workspace", "job", "bootstrap", "job_type", "task_type", "job_name", "name", "computing",
    "environment_variables", "labels", "retries", "deadline", "grace",
)  # fmt: skip
_FEDERATED = (
    "name", "app", "workspace", "algorithm", "algorithm_config", "rounds", "seed", "clients",
    "evaluate", "needs", "config",
)  # fmt: skip


def read_job(file: Path) -> tuple[dict[str, Any], Path | None]:
    """What a job file asks for, and its workspace.

    Raises:
        ConfigError: With the file's name, and the line where one is to blame.
    """
    found = _read(file, _JOB)
    if not str(found.get("job", "")).strip():
        raise ConfigError(f"{file}: there is no `job`: the shell lines to run")
    computing = found.get("computing") or {}
    environment = found.get("environment_variables") or {}
    for key, value in (("computing", computing), ("environment_variables", environment)):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{file}: {key} must be a mapping")
    request = {
        "command": str(found["job"]),
        "bootstrap": str(found.get("bootstrap") or ""),
        "name": str(found.get("job_name") or found.get("name") or file.stem),
        "env": {str(k): str(v) for k, v in environment.items()},
        "needs": {"gpus": int(computing.get("minimum_num_gpus", 0))},
        "labels": {str(k): str(v) for k, v in (found.get("labels") or {}).items()},
        "retries": int(found.get("retries", 3)),
        "deadline_s": float(found.get("deadline", 0)),
        "grace_s": float(found.get("grace", 10)),
    }
    return request, _workspace(file, found) if "workspace" in found else None


def read_federated(file: Path) -> tuple[dict[str, Any], Path]:
    """What a federated run file asks for, and its workspace (the file's own folder if not named).

    Raises:
        ConfigError: With the file's name, and the line where one is to blame.
    """
    found = _read(file, _FEDERATED)
    for key in ("app", "clients", "rounds"):
        if key not in found:
            raise ConfigError(f"{file}: there is no `{key}`")
    request = {k: v for k, v in found.items() if k != "workspace"}
    for key in ("config", "algorithm_config"):
        request[key] = json.dumps(found.get(key) or {})
    request.setdefault("name", file.stem)
    return request, _workspace(file, found)


def _workspace(file: Path, found: Mapping[str, Any]) -> Path:
    folder = (file.parent / str(found.get("workspace", "."))).resolve()
    if not folder.is_dir():
        raise ConfigError(f"{file}: the workspace {folder} is not a directory")
    return folder


def _read(file: Path, known: tuple[str, ...]) -> dict[str, Any]:
    try:
        text = file.read_text()
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        found = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not YAML: {error}") from error
    if not isinstance(node, yaml.MappingNode) or not isinstance(found, dict):
        raise ConfigError(f"{file}: a mapping of keys is expected")
    for key, _ in node.value:
        if key.value not in known:
            near = difflib.get_close_matches(str(key.value), known, n=1)
            meant = f"; did you mean `{near[0]}`?" if near else ""
            line = key.start_mark.line + 1
            raise ConfigError(f"{file}, line {line}: unknown key `{key.value}`{meant}")
    return found
