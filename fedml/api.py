# SPDX-License-Identifier: Apache-2.0
"""The Python API: what the `fedml` command does, as functions.

    from fedml import api

    run = api.launch("job.yaml")
    print(*run.logs(follow=True), sep="", end="")
    model = api.federate("run.yaml").wait(check=True).download("model.safetensors")

Each takes `home=DIR` where the login is not in FEDML_HOME or `~/.fedml`, and raises the errors of
`fedml.errors`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from fedml import clusters, devices, session, storage, workflows
from fedml import launch as submit
from fedml.client import Client
from fedml.clusters import Cluster
from fedml.devices import Device
from fedml.runs import Run, RunLogResult, log_page
from fedml.workflows import WorkflowRun

if TYPE_CHECKING:
    from fedml.data import About

__all__ = [
    "Cluster",
    "Device",
    "Run",
    "RunLogResult",
    "WorkflowRun",
    "build",
    "cluster_create",
    "cluster_list",
    "cluster_show",
    "data_fetch",
    "data_list",
    "data_load",
    "data_show",
    "delete",
    "device_list",
    "device_show",
    "download",
    "federate",
    "federate_build",
    "fedml_build",
    "get_storage_metadata",
    "get_storage_user_defined_metadata",
    "launch",
    "launch_look",
    "list_storage_objects",
    "login",
    "logout",
    "queue",
    "run_download",
    "run_list",
    "run_logs",
    "run_show",
    "run_status",
    "run_stop",
    "run_wait",
    "train_build",
    "upload",
    "whoami",
    "workflow_delete",
    "workflow_list",
    "workflow_resume",
    "workflow_run",
    "workflow_show",
    "workflow_stop",
    "workflow_wait",
]

Home = Path | str | None


def connect(home: Home = None) -> Client:
    """The broker that this home is logged in at."""
    return Client(session.load(_home(home)))


def login(key: str, *, home: Home = None) -> str:
    """Keep a user's key (from `fedml-broker users token NAME`); the broker's address."""
    return session.login(_home(home), key).url


def logout(*, home: Home = None) -> None:
    """Forget the login."""
    session.logout(_home(home))


def whoami(*, home: Home = None) -> dict[str, str]:
    """Who you are to the broker: name, tenant, role."""
    found: dict[str, str] = connect(home).call("GET", "/v1/whoami")
    return found


def launch(
    job: Path | str,
    *,
    any_resource: bool = False,
    cluster: str = "",
    package: str = "",
    home: Home = None,
) -> Run:
    """Submit a job file; the run, which has only been queued.

    With `any_resource`, on GPUs of any model, or none where no machine has them; with `cluster`,
    on the machines that are reserved under this name. With `package` (a file of `build`, the name
    of a stored folder, a hash), with that in place of the workspace.
    """
    client = connect(home)
    run = submit.launch(
        client, Path(job), any_resource=any_resource, cluster=cluster, package=package
    )
    return Run.find(client, run)


def launch_look(
    job: Path | str, *, any_resource: bool = False, cluster: str = "", home: Home = None
) -> dict[str, Any]:
    """Where a job file would run at this moment; nothing is started. See `fedml.launch.look`."""
    return submit.look(connect(home), Path(job), any_resource=any_resource, cluster=cluster)


def cluster_create(
    name: str,
    devices: Sequence[str] = (),
    *,
    count: int = 0,
    labels: Mapping[str, str] | None = None,
    home: Home = None,
    **needs: Any,
) -> Cluster:
    """Reserve machines under a name; see `fedml.clusters.Cluster.create`."""
    return Cluster.create(connect(home), name, devices, count=count, labels=labels, **needs)


def cluster_list(*, home: Home = None) -> list[Cluster]:
    """Every cluster."""
    return clusters.everything(connect(home))


def cluster_show(name: str, *, home: Home = None) -> Cluster:
    """One cluster."""
    return Cluster.find(connect(home), name)


def queue(*, home: Home = None) -> list[dict[str, Any]]:
    """The runs that wait for machines, in the order in which they go, each with what keeps it."""
    found: list[dict[str, Any]] = connect(home).call("GET", "/v1/queue")["queue"]
    return found


def federate(file: Path | str, *, package: str = "", home: Home = None) -> Run:
    """Submit a federated run; the run, which has only been queued. For `package` see `launch`."""
    client = connect(home)
    return Run.find(client, submit.federate(client, Path(file), package=package))


def build(file: Path | str, into: Path | str) -> Path:
    """Write the package of a job or run file into a .tar.gz, and start nothing; where it is."""
    submit.build(Path(file), Path(into))
    return Path(into)


def fedml_build(file: Path | str, dest_folder: Path | str = ".") -> Path:
    """As `build`, into a folder."""
    return build(file, Path(dest_folder) / f"{Path(file).stem}.tar.gz")


def train_build(job_yaml_path: Path | str, dest_folder: Path | str = ".") -> Path:
    """The package of a job file, in a folder; where it is."""
    into = Path(dest_folder) / f"{Path(job_yaml_path).stem}.tar.gz"
    submit.build(Path(job_yaml_path), into, kind="launch")
    return into


def federate_build(job_yaml_path: Path | str, dest_folder: Path | str = ".") -> Path:
    """The package of a run file, in a folder; where it is."""
    into = Path(dest_folder) / f"{Path(job_yaml_path).stem}.tar.gz"
    submit.build(Path(job_yaml_path), into, kind="federate")
    return into


def run_list(*, limit: int = 50, home: Home = None) -> list[Run]:
    """The newest runs, newest first."""
    client = connect(home)
    return [Run(client, r) for r in client.call("GET", f"/v1/runs?limit={limit}")["runs"]]


def run_show(run: str, *, home: Home = None) -> Run:
    """One run."""
    return Run.find(connect(home), run)


def run_status(run: str, *, home: Home = None) -> str:
    """Its state: QUEUED, RUNNING, FINISHED, FAILED, STOPPED or LOST."""
    return run_show(run, home=home).state


@overload
def run_logs(run_id: str, *, follow: bool = ..., home: Home = ...) -> Iterator[str]: ...
@overload
def run_logs(
    run_id: str,
    page_num: int,
    page_size: int = ...,
    need_all_logs: bool = ...,
    *,
    home: Home = ...,
) -> RunLogResult: ...
@overload
def run_logs(run_id: str, *, need_all_logs: bool, home: Home = ...) -> RunLogResult: ...
def run_logs(
    run_id: str,
    page_num: int | None = None,
    page_size: int = 10,
    need_all_logs: bool = False,
    *,
    follow: bool = False,
    home: Home = None,
) -> Iterator[str] | RunLogResult:
    """What its tasks have printed, in pieces; with `follow` until the run has ended.

    With `page_num` (from 1) and `page_size`, or `need_all_logs`, as FedML has it: lines, how many
    there are, and the run's status in FedML's words.
    """
    run = run_show(run_id, home=home)
    if page_num is None and not need_all_logs:
        return run.logs(follow=follow)
    return log_page(run, 1 if page_num is None else page_num, page_size, everything=need_all_logs)


def run_stop(run: str, *, home: Home = None) -> None:
    """Ask for its end."""
    run_show(run, home=home).stop()


def run_wait(run: str, *, check: bool = False, home: Home = None) -> Run:
    """Until it has ended; with `check`, RunFailed if it did not finish."""
    return run_show(run, home=home).wait(check=check)


def run_download(
    run: str, into: Path | str, *, of_round: int | None = None, home: Home = None
) -> int:
    """Write the model of a federated run into a file; of which round it is."""
    return run_show(run, home=home).download(into, of_round=of_round)


def workflow_run(file: Path | str, *, home: Home = None) -> WorkflowRun:
    """Submit a workflow file; the workflow, which has only begun."""
    client = connect(home)
    return WorkflowRun.find(client, workflows.submit(client, Path(file)))


def workflow_list(*, limit: int = 50, home: Home = None) -> list[dict[str, Any]]:
    """The newest workflows, newest first, with the states of their steps."""
    return workflows.listed(connect(home), limit)


def workflow_show(name: str, *, home: Home = None) -> WorkflowRun:
    """One workflow by its id, or the newest of a name."""
    return WorkflowRun.find(connect(home), name)


def workflow_wait(name: str, *, check: bool = False, home: Home = None) -> WorkflowRun:
    """Until it has ended; with `check`, RunFailed if it did not finish."""
    return workflow_show(name, home=home).wait(check=check)


def workflow_stop(name: str, *, home: Home = None) -> None:
    """Ask for its end."""
    workflow_show(name, home=home).stop()


def workflow_resume(name: str, file: Path | str | None = None, *, home: Home = None) -> WorkflowRun:
    """Run again what has not finished, and what hangs on it; with `file`, what has changed, too."""
    found = workflow_show(name, home=home)
    found.resume(file)
    return found


def workflow_delete(name: str, *, home: Home = None) -> int:
    """Forget a workflow that has ended; how many bytes the broker has free now."""
    return workflows.delete(connect(home), name)


def device_list(*, home: Home = None) -> list[Device]:
    """Every machine that you may use."""
    return devices.everything(connect(home))


def device_show(device: str, *, home: Home = None) -> Device:
    """One machine, by name or id."""
    return devices.find(connect(home), device)


def upload(
    data_path: Path | str,
    name: str = "",
    *,
    metadata: Mapping[str, Any] | None = None,
    home: Home = None,
) -> dict[str, Any]:
    """Store a file or folder at the broker; what it knows of it. See `fedml.storage`."""
    return storage.upload(connect(home), Path(data_path), name, metadata=metadata)


def download(data_name: str, dest_path: Path | str | None = None, *, home: Home = None) -> Path:
    """Write a stored object to `dest_path` (the end of its name, here); where it is."""
    into = Path(dest_path or data_name.rpartition("/")[2])
    storage.download(connect(home), data_name, into)
    return into


def delete(data_name: str, *, home: Home = None) -> int:
    """Delete a stored object; how many bytes the broker has free now."""
    return storage.delete(connect(home), data_name)


def list_storage_objects(prefix: str = "", *, home: Home = None) -> list[dict[str, Any]]:
    """What is stored, by name."""
    return list(storage.listed(connect(home), prefix))


def get_storage_metadata(data_name: str, *, home: Home = None) -> dict[str, Any]:
    """Size, hash, who stored it when, and its `metadata`."""
    return storage.show(connect(home), data_name)


def get_storage_user_defined_metadata(data_name: str, *, home: Home = None) -> dict[str, Any]:
    """What was given with a stored object."""
    found: dict[str, Any] = get_storage_metadata(data_name, home=home)["metadata"]
    return found


def data_list(*, home: Home = None) -> list[About]:
    """Every data set that `data_load` knows."""
    from fedml import data

    return [data.describe(name, home=_home(home)) for name in data.names()]


def data_show(name: str, *, home: Home = None) -> About:
    """Licence, source, size, and whether it is here."""
    from fedml import data

    return data.describe(name, home=_home(home))


def data_fetch(name: str, *, home: Home = None) -> None:
    """Bring a data set, unless it is here already."""
    from fedml import data

    data.fetch(name, home=_home(home))


def data_load(name: str, *, fetch: bool = False, home: Home = None) -> Any:
    """Read a data set: a `fedml.data.Dataset`."""
    from fedml import data

    return data.load(name, home=_home(home), fetch=fetch)


def _home(given: Home) -> Path:
    return session.find_home(None if given is None else str(given))
