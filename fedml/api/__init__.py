# SPDX-License-Identifier: Apache-2.0
"""FedML's Python API: its names, its arguments, and what they return; and some more.

    from fedml import api

    result = api.launch_job("job.yaml")
    if result.result_code == 0:
        print(api.run_logs(result.run_id, need_all_logs=True).log_line_list)

New programs are better off with `fedml.Run`, `fedml.Device` and `fedml.Cluster` (`fedml.aio` for
asyncio), which raise what goes wrong. Where there is an `api_key` it is a user's key, for this one
call; `home=DIR` is for a login that is not in FEDML_HOME or `~/.fedml`. docs/api.md has it all.
"""

from fedml.api.account import connect, fedml_login, login, logout, whoami
from fedml.api.answers import (
    FedMLClusterModel,
    FedMLClusterModelList,
    FedMLResponse,
    FedMLRunModel,
    FedMLRunModelList,
    LaunchResult,
    ResponseCode,
    RunLogResult,
    RunStatus,
    StorageMetadata,
)
from fedml.api.clusters import (
    cluster_autostop,
    cluster_create,
    cluster_exists,
    cluster_kill,
    cluster_killall,
    cluster_list,
    cluster_show,
    cluster_start,
    cluster_startall,
    cluster_status,
    cluster_stop,
    cluster_stopall,
)
from fedml.api.datasets import data_fetch, data_list, data_load, data_show
from fedml.api.diagnosis import fedml_diagnosis
from fedml.api.jobs import (
    build,
    federate,
    federate_build,
    fedml_build,
    launch,
    launch_job,
    launch_job_on_cluster,
    launch_look,
    train_build,
)
from fedml.api.machines import device_list, device_show, resource_type
from fedml.api.runs import (
    fedml_logs,
    queue,
    run_download,
    run_list,
    run_logs,
    run_show,
    run_status,
    run_stop,
    run_wait,
)
from fedml.api.storage import (
    delete,
    download,
    get_storage_metadata,
    get_storage_user_defined_metadata,
    list_storage_objects,
    upload,
)
from fedml.api.workflows import (
    workflow_delete,
    workflow_list,
    workflow_resume,
    workflow_run,
    workflow_show,
    workflow_stop,
    workflow_wait,
)
from fedml.clusters import Cluster
from fedml.devices import Device
from fedml.runs import Run
from fedml.workflows import WorkflowRun

__all__ = [
    "Cluster",
    "Device",
    "FedMLClusterModel",
    "FedMLClusterModelList",
    "FedMLResponse",
    "FedMLRunModel",
    "FedMLRunModelList",
    "LaunchResult",
    "ResponseCode",
    "Run",
    "RunLogResult",
    "RunStatus",
    "StorageMetadata",
    "WorkflowRun",
    "build",
    "cluster_autostop",
    "cluster_create",
    "cluster_exists",
    "cluster_kill",
    "cluster_killall",
    "cluster_list",
    "cluster_show",
    "cluster_start",
    "cluster_startall",
    "cluster_status",
    "cluster_stop",
    "cluster_stopall",
    "connect",
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
    "fedml_diagnosis",
    "fedml_login",
    "fedml_logs",
    "get_storage_metadata",
    "get_storage_user_defined_metadata",
    "launch",
    "launch_job",
    "launch_job_on_cluster",
    "launch_look",
    "list_storage_objects",
    "login",
    "logout",
    "queue",
    "resource_type",
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

_SERVING = "there are no model cards; a job file with `service` serves one"
# Names of FedML's that are not here, and why.
_NOT_HERE = {
    "device_bind": "a machine joins by its own command, `fedml-agent login KEY`",
    "device_unbind": "a machine leaves by its own command, `fedml-agent logout`",
    **dict.fromkeys(
        (
            "endpoint_delete",
            "model_create",
            "model_delete",
            "model_deploy",
            "model_list",
            "model_package",
            "model_pull",
            "model_push",
            "model_run",
        ),
        _SERVING,
    ),
}


def __getattr__(name: str) -> object:
    reason = f": {_NOT_HERE[name]}" if name in _NOT_HERE else ""
    raise AttributeError(f"module 'fedml.api' has no attribute {name!r}{reason}")
