# SPDX-License-Identifier: Apache-2.0
"""Job files, in whosever words, into what the broker is asked; `jobkeys.py` has the keys."""

import os
import re
import shlex
import warnings
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from fedml.errors import ConfigError
from fedml.jobkeys import ALIASES, KEYS
from fedml.runfile import is_federated_job
from fedml.yamlfile import Reader, workspace_of
from fedml_protocol.launch import SHORTEST_SECRET

_FREE = ("_args", "_params")
# What FedML calls these values in the environment of a job; the keys may begin with `fedml_` too.
_CALLED = {
    "data_args": {
        "DATASET_NAME": "FEDML_DATASET_NAME",
        "DATASET_PATH": "FEDML_DATASET_PATH",
        "DATASET_TYPE": "FEDML_DATASET_TYPE",
    },
    "model_args": {
        "MODEL_NAME": "FEDML_MODEL_NAME",
        "MODEL_CACHE_PATH": "FEDML_MODEL_CACHE_PATH",
        "INPUT_DIM": "FEDML_MODEL_INPUT_DIM",
        "OUTPUT_DIM": "FEDML_MODEL_OUTPUT_DIM",
    },
}


def read_job(
    file: Path, *, any_resource: bool = False, within: yaml.Node | None = None
) -> tuple[dict[str, Any], Path | None]:
    """What a job file asks for, and its workspace.

    All of it goes to the broker but `data`: stored objects by the path that they get, which
    `fedml.launch` adds to the package.

    Args:
        file: A job file (docs/launch.md).
        any_resource: Take GPUs of any model, or none where no machine has them.
        within: The job is not all of the file, but this mapping in it.

    Raises:
        ConfigError: With the file's name, and the line where one is to blame.
    """
    if is_federated_job(file, within):
        raise ConfigError(
            f"{file}: `job_type` is federate: a federated run, not a job",
            f"`fedml launch {file.name}`, `fedml federate {file.name}`",
        )
    found, env = read_keys(file, KEYS, within)
    if not found.get("job", "").strip():
        raise ConfigError(f"{file}: there is no `job`: the shell lines to run")
    needs, optional = needs_of(file, found.get("computing", {}))
    if any_resource:
        needs.pop("gpu_model", None)
        optional = needs["gpus"] > 0
    workspace = workspace_of(file, found) if "workspace" in found else None
    variables = env | found.get("environment_variables", {})
    secrets = _secret_variables(file, found.get("secrets", {}), variables)
    request = {
        "command": found["job"],
        "bootstrap": found.get("bootstrap", ""),
        "name": found.get("job_name") or file.stem,
        "env": variables | secrets,
        "needs": needs,
        "labels": found.get("labels", {}),
        "nodes": found.get("num_nodes", 1),
        "priority": found.get("priority", 0),
        "cluster": found.get("cluster", ""),
        "retries": found.get("retries", 3),
        "restarts": found.get("restarts", 0),
        "deadline_s": found.get("deadline", 0.0),
        "grace_s": found.get("grace", 10.0),
    }
    if secrets:
        request["secrets"] = sorted(secrets)
    if optional:
        request["gpus_optional"] = True
    if "preemptible" in found:
        request["preemptible"] = found["preemptible"]
    if "maximum_cost_per_hour" in found.get("computing", {}):
        request["max_price_per_hour"] = found["computing"]["maximum_cost_per_hour"]
    if found.get("data"):
        request["data"] = found["data"]
    if requirements := _required(file, found.get("requirements", ""), workspace):
        request["requirements"] = requirements
    if found.get("network"):
        request["network"] = found["network"]
    if (service := _service(file, found)) is not None:
        request["service"] = service
    if (container := _container(file, found)) is not None:
        request["container"] = container
    return request, workspace


def read_keys(
    file: Path, keys: Mapping[str, Any], within: yaml.Node | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """What a file says in our words, and the variables of its free sections.

    Args:
        keys: What each key may hold, as `jobkeys.KEYS`; its aliases are known, too.

    Raises:
        ConfigError: With the file's name, and the line where one is to blame.
    """
    found = Reader(file, within).read(
        {**keys, **{alias: keys[name] for alias, name in ALIASES.items()}}
    )
    for alias, name in ALIASES.items():
        if alias in found:
            _one_way(file, found, name, alias)
            found[name] = found.pop(alias)
    env = _section_variables(found)
    if "expert_mode" in found:
        _one_way(file, found, "job", "expert_mode")
        _translate_expert(file, found, env)
    if script := found.pop("environment_args", {}).get("bootstrap"):
        _one_way(file, found, "bootstrap", "environment_args.bootstrap")
        # FedML has the name of a file in the workspace here.
        is_name = "workspace" in found and re.fullmatch(r"[\w.-][\w./-]{0,200}", script)
        is_file = is_name and (workspace_of(file, found) / script).is_file()
        found["bootstrap"] = f"bash {script}" if is_file else script
    if "resources" in found:
        _one_way(file, found, "computing", "resources")
        found["computing"] = _computing(found["resources"])
        if "job_recovery" in found["resources"]:
            _one_way(file, found, "restarts", "resources.job_recovery")
            found["restarts"] = found["resources"]["job_recovery"]
    return found, env


def _required(file: Path, said: str | list[str], workspace: Path | None) -> str:
    """What is to be installed, as the lines of a requirements file."""
    if isinstance(said, list):
        lines, where = said, f"{file}: `requirements`"
    elif not said:
        return ""
    else:
        path = None if workspace is None else (workspace / said).resolve()
        if path is None or not path.is_relative_to(workspace or path) or not path.is_file():
            raise ConfigError(
                f"{file}: there is no file {said} in the workspace, which `requirements` names",
                "packages themselves are a list: `requirements: [numpy==2.4.6]`",
            )
        try:
            lines, where = path.read_text().splitlines(), str(path)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: {error}") from error
    for line in lines:
        if re.match(r"\s*(-e|--editable)\b", line):
            raise ConfigError(
                f"{where}: {line.strip()!r} cannot be: an environment may be shared by many jobs",
                "`pip install --target=lib .` in `bootstrap`, or without -e",
            )
    return "".join(f"{line}\n" for line in lines)


def _secret_variables(
    file: Path, said: Mapping[str, str | None], variables: Mapping[str, str]
) -> dict[str, str]:
    """Each secret with its value: from the section, the other variables, or our environment."""
    found = {}
    for name, given in said.items():
        value = given if given is not None else variables.get(name, os.environ.get(name))
        if value is None:
            raise ConfigError(
                f"{file}: `secrets.{name}` has no value here and no variable of that name is set",
                f"export {name}=…, then launch again",
            )
        if len(value.strip()) < SHORTEST_SECRET:
            raise ConfigError(
                f"{file}: `secrets.{name}` is too short to be hidden: it would be found everywhere",
                f"at least {SHORTEST_SECRET} characters; what is no secret goes into "
                "`environment_variables`",
            )
        found[name] = value
    return found


def _one_way(file: Path, found: Mapping[str, Any], name: str, other: str) -> None:
    if name in found:
        raise ConfigError(f"{file}: `{other}` says the same as `{name}`", "keep one of them")


def _service(file: Path, found: Mapping[str, Any]) -> dict[str, Any] | None:
    """How a job that stays up answers; None: it does its work and ends."""
    said = found.get("service")
    if said is None:
        if (kind := found.get("job_type")) in ("deploy", "serve"):
            raise ConfigError(
                f"{file}: `job_type` is {kind}, and there is no `service`: where the job answers",
                "write `service: {readiness_probe: /ready}`; the job listens on the port in $PORT",
            )
        return None
    if "port" in said and "ports" in said:
        raise ConfigError(f"{file}: `service.ports` says the same as `service.port`")
    if found.get("network") == "none":
        raise ConfigError(f"{file}: a service needs the network, and `network` is none")
    port = said.get("port") or said.get("ports")
    probe: dict[str, Any] = said.get("readiness_probe", {})
    return probe if port is None else {"port": port} | probe


def _container(file: Path, found: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the job runs in; None: the machine itself."""
    docker = {key: value for key, value in found.get("docker", {}).items() if value}
    if image := found.get("resources", {}).get("image_id", "").removeprefix("docker:"):
        if "image" in docker:
            raise ConfigError(f"{file}: `resources.image_id` says the same as `docker.image`")
        docker["image"] = image
    wanted = found.get("containerize")
    if wanted is False:
        if docker:
            said = f"{file}: `docker` has no effect: `containerize` is false"
            warnings.warn(said, UserWarning, stacklevel=2)
        return None
    if "image" not in docker:
        if wanted or docker:
            raise ConfigError(
                f"{file}: there is no `docker.image`: what the container is made of",
                "name one, such as docker.io/library/python:3.12, or leave `containerize` out",
            )
        return None
    if "mounts" in docker and "volumes" in docker:
        raise ConfigError(f"{file}: `docker.volumes` says the same as `docker.mounts`")
    registry, image = docker.get("registry", ""), docker["image"]
    first = image.partition("/")[0]
    if registry and not ("/" in image and (set(first) & set(".:") or first == "localhost")):
        image = f"{registry.rstrip('/')}/{image}"
    container = {
        "image": image,
        "registry": registry.partition("/")[0],
        "username": docker.get("username", ""),
        "password": _secret(file, docker.get("password", "")),
        "mounts": docker.get("mounts") or docker.get("volumes", []),
    }
    return {key: value for key, value in container.items() if value}


def _secret(file: Path, written: str) -> str:
    """A password, or `$NAME`: the variable of whoever launches that holds it."""
    named = re.fullmatch(r"\$\{?([A-Za-z_][A-Za-z0-9_]*)\}?", written)
    if named is None:
        return written
    if not (value := os.environ.get(named[1], "")):
        raise ConfigError(
            f"{file}: `docker.password` is the variable {named[1]}, which is not set here",
            f"export {named[1]}=…, then launch again",
        )
    return value


def _section_variables(found: Mapping[str, Any]) -> dict[str, str]:
    """FEDML_ENV_<SECTION>_<KEY> of every free section, and FedML's older names of some."""
    variables = {}
    for section, values in found.items():
        if section.endswith(_FREE) and section != "environment_args":
            older = _CALLED.get(section.removeprefix("fedml_"), {})
            for key, value in values.items():
                variables[f"FEDML_ENV_{section.upper()}_{key}"] = value
                if key in older:
                    variables[older[key]] = value
    return variables


def _translate_expert(file: Path, found: dict[str, Any], env: dict[str, str]) -> None:
    """FedML's `expert_mode` as the command that it stands for, from the workspace."""
    expert = found["expert_mode"]
    if not expert.get("executable_file"):
        raise ConfigError(f"{file}: there is no `expert_mode.executable_file`: what to run")
    program = PurePosixPath(expert.get("executable_file_folder", "")) / expert["executable_file"]
    words = [expert.get("executable_interpreter", ""), shlex.quote(str(program))]
    if not words[0] and "/" not in words[1]:
        words[1] = f"./{words[1]}"
    if expert.get("executable_conf_file"):
        folder = PurePosixPath(expert.get("executable_conf_file_folder", ""))
        words += [
            expert.get("executable_conf_option", ""),
            shlex.quote(str(folder / expert["executable_conf_file"])),
        ]
    words.append(expert.get("executable_args", ""))
    found["job"] = " ".join(filter(None, words))
    if expert.get("bootstrap"):
        _one_way(file, found, "bootstrap", "expert_mode.bootstrap")
        found["bootstrap"] = expert["bootstrap"]
    if expert.get("data_location"):
        env["FEDML_ENV_EXPERT_MODE_DATA_LOCATION"] = expert["data_location"]
    found.setdefault("workspace", "")  # its folders are beside the file


def _computing(resources: Mapping[str, Any]) -> dict[str, Any]:
    """SkyPilot's `resources` in our words."""
    found = {k: resources[k] for k in ("cpus", "memory") if k in resources}
    if "disk_size" in resources:
        found["disk"] = resources["disk_size"]
    if "accelerators" in resources:
        found["resource_type"], found["minimum_num_gpus"] = resources["accelerators"]
    return found


def needs_of(file: Path, computing: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """What is asked of a machine, and whether the job can do without its GPUs."""
    kind, gpus = computing.get("device_type", ""), computing.get("minimum_num_gpus")
    asked = [k for k in ("resource_type", "gpu_memory") if computing.get(k)]
    if kind == "CPU" or (gpus == 0 and not kind):
        if kind == "CPU" and gpus:
            asked.insert(0, "minimum_num_gpus")
        for key in asked:
            said = f"{file}: `computing.{key}` has no effect: the file asks for no GPU"
            warnings.warn(said, UserWarning, stacklevel=2)
        gpus, asked = 0, []
    elif not gpus:
        gpus = 1 if kind or asked else 0
    needs = {
        "gpus": gpus,
        "gpu_model": computing.get("resource_type", "") if asked else "",
        "gpu_memory_bytes": computing.get("gpu_memory", 0) if asked else 0,
        "cpus": computing.get("cpus", 0),
        "memory_bytes": computing.get("memory", 0),
        "disk_bytes": computing.get("disk", 0),
    }
    return {k: v for k, v in needs.items() if v or k == "gpus"}, kind == "hybrid"


def without_gpus(needs: Mapping[str, Any]) -> dict[str, Any]:
    """The same of a machine whose processors will do."""
    gpus = ("gpu_model", "gpu_memory_bytes")
    return {k: v for k, v in needs.items() if k not in gpus} | {"gpus": 0}
