# SPDX-License-Identifier: Apache-2.0
"""What a report of a problem should say: versions, this machine, and who is signed in where.

`fedml --version` asks here too: whatever is more than that imports what it needs by itself.
"""

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

from fedml.errors import FedMLError, NotLoggedIn

_LIBRARIES = (
    "numpy", "torch", "safetensors", "ray", "click", "cryptography", "protobuf", "urllib3",
)  # fmt: skip


def ours() -> str:
    """The installed version, or that of a source tree."""
    return _version("fedml-agent") or "0+source"


def versions() -> dict[str, str]:
    """Of fedml, Python, and those of its libraries that are installed."""
    found = {"fedml": ours(), "python": platform.python_version()}
    return found | {name: text for name in _LIBRARIES if (text := _version(name))}


def machine() -> dict[str, Any]:
    """This machine's hardware. Of GPUs what NVML knows; None, if it is not there."""
    import psutil

    return {
        "os": f"{_distribution()}, {platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "python": sys.executable,
        "cpus": os.cpu_count() or 1,
        "memory_bytes": psutil.virtual_memory().total,
        "memory_free_bytes": psutil.virtual_memory().available,
        "gpus": _gpus(),
    }


def account(home: Path) -> dict[str, str]:
    """Who is signed in at which broker; `error`, where that cannot be said, and `hint`."""
    from fedml import session
    from fedml.client import Client

    try:
        client = Client(session.load(home))
    except NotLoggedIn as error:
        return {"error": str(error), "hint": error.hint}
    try:
        health = client.call("GET", "/v1/health")
        whose = client.call("GET", "/v1/whoami")
    except FedMLError as error:
        return {"url": client.url, "error": str(error), "hint": error.hint}
    return {"url": client.url, "version": health["version"], **whose}


def _gpus() -> list[dict[str, Any]] | None:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return [
            {
                "name": str(pynvml.nvmlDeviceGetName(handle)),
                "memory_bytes": int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
                "driver": str(pynvml.nvmlSystemGetDriverVersion()),
            }
            for handle in map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        ]
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return "Linux"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
