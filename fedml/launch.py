# SPDX-License-Identifier: Apache-2.0
"""Asking the broker for a run: a file is read, its workspace packed and sent, the run submitted."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedml import jobfile
from fedml.client import Client, Told
from fedml.package import build


def _silent(done: int, total: int) -> None:
    """Nobody watches the upload."""


def launch(client: Client, job: Path, *, follow: bool = False, told: Told = _silent) -> str:
    """Submit a job file; the run's id.

    Args:
        client: The broker.
        job: A job file (docs/launch.md).
        follow: Whether somebody is going to watch: its first lines then come at once.
        told: Hears how far the upload is, bytes.

    Raises:
        ConfigError: The file or its workspace is wrong.
        BrokerRefused: No machine can ever run it, or the broker says no for another reason.
        BrokerUnreachable: No answer.
    """
    request, workspace = jobfile.read_job(job)
    if workspace is not None:
        request["package"] = _upload(client, workspace, told)
    return client.submit("launch", {**request, "follow": follow})


def federate(client: Client, file: Path, *, strict: bool = False, told: Told = _silent) -> str:
    """Submit a federated run (docs/federate.md); the run's id. Raises what `launch` does.

    Args:
        client: The broker.
        file: A run file, or a configuration of FedML's (docs/fedml.md).
        strict: Refuse a configuration where something else would be done than it asks for.
        told: Hears how far the upload is, bytes.
    """
    if jobfile.is_fedml(file):
        from fedml import translation  # brings NumPy, which a run file does not need

        request, workspace = _as_file(translation.accept(file, deployed=True, strict=strict))
    else:
        request, workspace = jobfile.read_federated(file)
    request["package"] = _upload(client, workspace, told)
    return client.submit("federate", request)


def _as_file(run: Mapping[str, Any]) -> tuple[dict[str, Any], Path]:
    """A mapping of a run file's keys, checked as a file is."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.yaml"
        file.write_text(json.dumps(run))
        return jobfile.read_federated(file)


def _upload(client: Client, workspace: Path, told: Told) -> dict[str, Any]:
    """Pack a workspace and put it where the broker finds it; what it has is not sent again."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "package.tar.gz"
        build(workspace, file)
        return client.upload(file, told)
