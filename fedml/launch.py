# SPDX-License-Identifier: Apache-2.0
"""Asking the broker for a run: a file is read, its workspace packed and sent, the run submitted."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedml import jobfile, runfile
from fedml.client import Client, Told
from fedml.package import files
from fedml.parts import send


def _silent(done: int, total: int) -> None:
    """Nobody watches the upload."""


def launch(
    client: Client,
    job: Path,
    *,
    follow: bool = False,
    any_resource: bool = False,
    told: Told = _silent,
) -> str:
    """Submit a job file; the run's id.

    Args:
        client: The broker.
        job: A job file (docs/launch.md).
        follow: Whether somebody is going to watch: its first lines then come at once.
        any_resource: Take GPUs of any model, or none where no machine has them.
        told: Hears how far the upload is, bytes.

    Raises:
        ConfigError: The file or its workspace is wrong.
        BrokerRefused: No machine can ever run it, or the broker says no for another reason.
        BrokerUnreachable: No answer.
    """
    request, workspace = jobfile.read_job(job, any_resource=any_resource)
    if workspace is not None:
        request["package"] = send(client, workspace, told)
    return client.submit("launch", {**request, "follow": follow})


def look(client: Client, job: Path, *, any_resource: bool = False) -> dict[str, Any]:
    """Where a job file would run at this moment; nothing is sent or started.

    Returns:
        `needs`: what is asked of a machine; `taken`: the id of the one that would get it, or None;
        `machines`: each with `device`, `name`, `fits` (now, later, never) and `why` not.

    Raises:
        ConfigError: The file or its workspace is wrong.
        BrokerRefused: The broker says no.
        BrokerUnreachable: No answer.
    """
    request, workspace = jobfile.read_job(job, any_resource=any_resource)
    if workspace is not None:
        files(workspace)
    found: dict[str, Any] = client.call("POST", "/v1/launch/match", request)
    return found


def federate(client: Client, file: Path, *, strict: bool = False, told: Told = _silent) -> str:
    """Submit a federated run (docs/federate.md); the run's id. Raises what `launch` does.

    Args:
        client: The broker.
        file: A run file, or a configuration of FedML's (docs/fedml.md).
        strict: Refuse a configuration where something else would be done than it asks for.
        told: Hears how far the upload is, bytes.
    """
    if runfile.is_fedml(file):
        from fedml import translation  # brings NumPy, which a run file does not need

        request, workspace = _as_file(translation.accept(file, deployed=True, strict=strict))
    else:
        request, workspace = runfile.read_federated(file)
    request["package"] = send(client, workspace, told)
    return client.submit("federate", request)


def _as_file(run: Mapping[str, Any]) -> tuple[dict[str, Any], Path]:
    """A mapping of a run file's keys, checked as a file is."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.yaml"
        file.write_text(json.dumps(run))
        return runfile.read_federated(file)
