# SPDX-License-Identifier: Apache-2.0
"""Job and run files: submitted, looked at, packed."""

import shutil
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedml import launch as submit
from fedml import package
from fedml.api.account import Home, connect
from fedml.api.answers import LaunchResult, RunId
from fedml.errors import BrokerRefused, BrokerUnreachable, ConfigError, FedMLError
from fedml.runs import Run

# FedML's numbers for what can go wrong here.
_CODES = {BrokerRefused: 8, BrokerUnreachable: 10, ConfigError: 17}
_OTHER = 20


def launch_job(
    yaml_file: Path | str,
    api_key: str | None = None,
    resource_id: str | None = None,
    device_server: str | None = None,
    device_edges: Sequence[str] | None = None,
    feature_entry_point: object = None,
    *,
    home: Home = None,
) -> LaunchResult:
    """Submit a job file. Nothing is raised: the result has a code and the reason.

    `resource_id`, `device_server` and `device_edges` are of FedML's own service; a job's `labels`
    or a cluster choose its machines. A warning says so.
    """
    return _launched(yaml_file, "", api_key, home, (resource_id, device_server, device_edges))


def launch_job_on_cluster(
    yaml_file: Path | str,
    cluster: str,
    api_key: str | None = None,
    resource_id: str | None = None,
    device_server: str | None = None,
    device_edges: Sequence[str] | None = None,
    feature_entry_point: object = None,
    *,
    home: Home = None,
) -> LaunchResult:
    """The same, on the machines that are reserved under a name.

    If nothing is, as many machines as the job asks for are reserved under it now.
    """
    return _launched(yaml_file, cluster, api_key, home, (resource_id, device_server, device_edges))


def launch(
    job: Path | str,
    *,
    any_resource: bool = False,
    cluster: str = "",
    package: str = "",
    home: Home = None,
) -> Run:
    """Submit a job file; the run, which has only been queued. See `fedml.Run.submit`."""
    client = connect(home=home)
    run = submit.launch(
        client, Path(job), any_resource=any_resource, cluster=cluster, package=package
    )
    return Run.find(run, at=client)


def launch_look(
    job: Path | str, *, any_resource: bool = False, cluster: str = "", home: Home = None
) -> dict[str, Any]:
    """Where a job file would run at this moment; nothing is started. See `fedml.launch.look`."""
    return submit.look(connect(home=home), Path(job), any_resource=any_resource, cluster=cluster)


def federate(file: Path | str, *, cluster: str = "", package: str = "", home: Home = None) -> Run:
    """Submit a federated run; the run, which has only been queued. See `fedml.Run.submit`."""
    client = connect(home=home)
    run = submit.federate(client, Path(file), cluster=cluster, package=package)
    return Run.find(run, at=client)


def build(file: Path | str, into: Path | str) -> Path:
    """Write the package of a job or run file into a .tar.gz, and start nothing; where it is."""
    submit.build(Path(file), Path(into))
    return Path(into)


def train_build(job_yaml_file: Path | str, dest_folder: Path | str = ".") -> Path:
    """The package of a job file, in a folder; where it is."""
    into = _in(dest_folder, f"{Path(job_yaml_file).stem}.tar.gz")
    submit.build(Path(job_yaml_file), into, kind="launch")
    return into


def federate_build(job_yaml_file: Path | str, dest_folder: Path | str = ".") -> Path:
    """The package of a run file, in a folder; where it is."""
    into = _in(dest_folder, f"{Path(job_yaml_file).stem}.tar.gz")
    submit.build(Path(job_yaml_file), into, kind="federate")
    return into


def fedml_build(
    platform: str,
    type: str,  # noqa: A002 - FedML's name for it
    source_folder: Path | str,
    entry_point: str,
    config_folder: Path | str,
    dest_folder: Path | str,
    ignore: str = "",
) -> Path:
    """A package of a folder of sources and one of configuration; where it is.

    It is `DEST_FOLDER/dist-packages/TYPE-package.tar.gz`, with the configuration in `config/`, and
    good for `fedml launch job.yaml --package FILE`. No matter what `platform` is.

    Args:
        type: `client` or `server`.
        entry_point: A file of the sources; it must be there.
        ignore: Patterns, separated by commas.

    Raises:
        ConfigError: A folder or the entry point is not there.
    """
    source, config = Path(source_folder), Path(config_folder)
    for folder in (source, config):
        if not folder.is_dir():
            raise ConfigError(f"{folder} is not a directory")
    if not (source / entry_point).is_file():
        raise ConfigError(f"{source} has no file {entry_point}")
    ignored = shutil.ignore_patterns(*(word.strip() for word in ignore.split(",") if word.strip()))
    into = _in(Path(dest_folder) / "dist-packages", f"{type}-package.tar.gz")
    with tempfile.TemporaryDirectory() as scratch:
        workspace = Path(scratch) / "workspace"
        shutil.copytree(source, workspace, symlinks=True, ignore=ignored)
        shutil.copytree(
            config, workspace / "config", symlinks=True, ignore=ignored, dirs_exist_ok=True
        )
        package.build(workspace, into)
    return into


def _in(folder: Path | str, name: str) -> Path:
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder) / name


def _launched(
    file: Path | str,
    cluster: str,
    api_key: str | None,
    home: Home,
    pinned: tuple[object, ...],
) -> LaunchResult:
    if any(pinned):
        text = "resource_id, device_server and device_edges: `labels` or a cluster choose machines"
        warnings.warn(text, stacklevel=3)
    try:
        client = connect(api_key, home=home)
        if cluster:
            submit.reserve(client, Path(file), cluster)
        run = Run.find(submit.launch(client, Path(file), cluster=cluster), at=client)
    except FedMLError as error:
        code = next((code for kind, code in _CODES.items() if isinstance(error, kind)), _OTHER)
        text = f"{error}; try: {error.hint}" if error.hint else str(error)
        return LaunchResult(code, text)
    text = f"{run.id} is queued" + (f" on {cluster}" if cluster else "")
    given = RunId(run.id)
    return LaunchResult(0, text, given, None, given, run)
