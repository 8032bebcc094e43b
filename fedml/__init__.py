# SPDX-License-Identifier: Apache-2.0
"""The library that people and task code import.

`import fedml` costs next to nothing: what stands in `__all__` is imported when it is first used.
The names that FedML's scripts use are among it (docs/fedml.md).
"""

import importlib
from typing import Any

# Name -> where it comes from: a module, or `module:name`.
_LAZY = {
    "Cluster": "fedml.clusters:Cluster",
    "Device": "fedml.devices:Device",
    "FedMLRunner": "fedml.runner:FedMLRunner",
    "Run": "fedml.runs:Run",
    "aio": "fedml.aio",
    "api": "fedml.api",
    "arguments": "fedml.arguments",
    "core": "fedml.core",
    "data": "fedml.data",
    "device": "fedml.device",
    "federate": "fedml.federate",
    "get_env_version": "fedml.hosted:get_env_version",
    "get_local_on_premise_platform_host": "fedml.hosted:get_local_on_premise_platform_host",
    "get_local_on_premise_platform_port": "fedml.hosted:get_local_on_premise_platform_port",
    "init": "fedml.arguments:init",
    "load_arguments": "fedml.arguments:load_arguments",
    "logging": "logging",  # FedML's scripts look for it here
    "mlops": "fedml.mlops",
    "model": "fedml.model",
    "protect": "fedml.protect",
    "run_cross_cloud_client": "fedml.runner:run_cross_silo_client",
    "run_cross_cloud_server": "fedml.runner:run_cross_silo_server",
    "run_cross_silo_client": "fedml.runner:run_cross_silo_client",
    "run_cross_silo_server": "fedml.runner:run_cross_silo_server",
    # What is hierarchical about it says the configuration.
    "run_hierarchical_cross_silo_client": "fedml.runner:run_cross_silo_client",
    "run_hierarchical_cross_silo_server": "fedml.runner:run_cross_silo_server",
    "run_simulation": "fedml.runner:run_simulation",
    "set_env_version": "fedml.hosted:set_env_version",
    "set_local_on_premise_platform_host": "fedml.hosted:set_local_on_premise_platform_host",
    "set_local_on_premise_platform_port": "fedml.hosted:set_local_on_premise_platform_port",
    "simulate": "fedml.simulation:simulate",
    "workflow": "fedml.workflow",
}

__all__ = [*_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fedml' has no attribute {name!r}")
    module, _, attribute = _LAZY[name].partition(":")
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
