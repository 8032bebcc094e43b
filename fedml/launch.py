# SPDX-License-Identifier: Apache-2.0
"""Asking the broker for a run: a file is read, its workspace packed and sent, the run submitted."""

import hashlib
import json
import re
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from fedml import jobfile, package, runfile, storage
from fedml.client import Client, Told, silent
from fedml.errors import ConfigError
from fedml.parts import send
from fedml_protocol.errors import MalformedMessage
from fedml_protocol.package import File, Package, Part, parse

Kind = Literal["launch", "federate"]
_SHA256 = re.compile(r"[0-9a-f]{64}")


def launch(
    client: Client,
    job: Path,
    *,
    follow: bool = False,
    any_resource: bool = False,
    cluster: str = "",
    package: str = "",
    told: Told = silent,
) -> str:
    """Submit a job file; the run's id.

    Args:
        client: The broker.
        job: A job file (docs/launch.md).
        follow: Whether somebody is going to watch: its first lines then come at once.
        any_resource: Take GPUs of any model, or none where no machine has them.
        cluster: Run it on this cluster, whatever the file says.
        package: In place of the workspace: a file that `build` made, the name of a stored folder,
            or a hash.
        told: Hears how far the upload is, bytes.

    Raises:
        ConfigError: The file or its workspace is wrong.
        BrokerRefused: No machine can ever run it, or the broker says no for another reason.
        BrokerUnreachable: No answer.
    """
    request, workspace = jobfile.read_job(job, any_resource=any_resource)
    request["cluster"] = cluster or request["cluster"]
    if package:
        request["package"] = _given(client, package, told)
        workspace = None
    request = sent(client, request, workspace, job, told)
    return client.submit("launch", {**request, "follow": follow})


def sent(
    client: Client, request: Mapping[str, Any], workspace: Path | None, job: Path, told: Told
) -> dict[str, Any]:
    """What `read_job` has read, as the broker takes it: its workspace and its `data` are there.

    Raises:
        ConfigError: They do not go together.
        BrokerRefused: There is no such object.
        BrokerUnreachable: No answer.
    """
    request = dict(request)
    data = request.pop("data", {})
    if workspace is not None:
        request["package"] = send(client, workspace, told)
    if data:
        request["package"] = _with_objects(client, request.get("package"), data, job)
    return request


def look(
    client: Client, job: Path, *, any_resource: bool = False, cluster: str = ""
) -> dict[str, Any]:
    """Where a job file would run at this moment; nothing is sent or started.

    Returns:
        `needs`: what is asked of a machine; `nodes`: how many it takes; `taken`: the id of that of
        rank 0, None where it would wait; `machines`: each with `device`, `name`, `fits` (now,
        later, never), the `rank` that it would get, or None, and `why`.

    Raises:
        ConfigError: The file or its workspace is wrong.
        BrokerRefused: The broker says no.
        BrokerUnreachable: No answer.
    """
    request, workspace = jobfile.read_job(job, any_resource=any_resource)
    request["cluster"] = cluster or request["cluster"]
    request.pop("data", None)
    if workspace is not None:
        package.files(workspace)
    found: dict[str, Any] = client.call("POST", "/v1/launch/match", request)
    return found


def federate(
    client: Client, file: Path, *, strict: bool = False, package: str = "", told: Told = silent
) -> str:
    """Submit a federated run (docs/federate.md); the run's id. Raises what `launch` does.

    Args:
        client: The broker.
        file: A run file, or a configuration of FedML's (docs/fedml.md).
        strict: Refuse a configuration where something else would be done than it asks for.
        package: As for `launch`.
        told: Hears how far the upload is, bytes.
    """
    request, workspace = read_run(file, strict=strict)
    given = package
    request["package"] = _given(client, given, told) if given else send(client, workspace, told)
    return client.submit("federate", request)


def build(file: Path, into: Path, *, kind: Kind | None = None) -> int:
    """Write the workspace of a job or run file into a .tar.gz; how many files it has.

    Args:
        kind: What the file is; None: it is looked into.

    Raises:
        ConfigError: The file or its workspace is wrong, or it names none.
    """
    return package.build(_workspace(file, kind), into)


def store(
    client: Client, file: Path, name: str = "", *, kind: Kind | None = None, told: Told = silent
) -> dict[str, Any]:
    """Store the workspace of a job or run file at the broker, as `packages/NAME`.

    Returns:
        What the broker knows of it; `name` and `sha256` are good for `launch(package=…)`.

    Raises:
        ConfigError: The file or its workspace is wrong, or it names none.
        BrokerRefused: The name is another user's.
        BrokerUnreachable: No answer.
    """
    workspace = _workspace(file, kind)
    return storage.upload(client, workspace, name or f"packages/{file.stem}", told=told)


def _workspace(file: Path, kind: Kind | None) -> Path:
    if kind == "federate" or (kind is None and runfile.is_federated(file)):
        return read_run(file)[1]
    _, workspace = jobfile.read_job(file)
    if workspace is None:
        raise ConfigError(f"{file}: there is no `workspace`: nothing to pack", "`workspace: .`")
    return workspace


def _given(client: Client, given: str, told: Told) -> dict[str, Any]:
    """A package that was made before, at the broker."""
    if Path(given).is_file():
        with tempfile.TemporaryDirectory() as folder:
            try:
                with tarfile.open(given) as archive:
                    archive.extractall(Path(folder) / "workspace", filter="data")
            except (tarfile.TarError, EOFError, OSError) as error:
                raise ConfigError(f"{given} is no package: {error}", "`fedml build`") from error
            return send(client, Path(folder) / "workspace", told, cache=Path(folder))
    if _SHA256.fullmatch(given):
        return {"sha256": given}
    found = storage.show(client, given)
    if not found["folder"]:
        raise ConfigError(f"{given} is a stored file, and no package", "`fedml build --upload`")
    return {"sha256": found["sha256"]}


def _with_objects(
    client: Client, base: Mapping[str, Any] | None, wanted: Mapping[str, str], job: Path
) -> dict[str, Any]:
    """A package and stored objects at paths in it: their bytes are there, only its list is sent."""
    content = Package() if base is None else parse(client.read(base["sha256"]))
    parts, links = list(content.parts), list(content.links)
    for path, name in wanted.items():
        found = storage.show(client, name)
        if found["folder"]:
            folder = parse(client.read(found["sha256"]))
            for part in folder.parts:
                moved = (replace(file, path=f"{path}/{file.path}") for file in part.files)
                parts.append(Part(part.sha256, tuple(moved)))
            links += [replace(link, path=f"{path}/{link.path}") for link in folder.links]
        else:
            parts.append(Part(found["sha256"], (File(path, found["size"]),)))
    manifest = Package(tuple(parts), tuple(links)).manifest()
    try:
        parse(manifest)
    except MalformedMessage as error:
        raise ConfigError(
            f"{job}: `data` and the workspace do not go together: {error}",
            "each path is inside the workspace, and not there yet",
        ) from error
    sha256 = hashlib.sha256(manifest).hexdigest()
    client.put(sha256, len(manifest), lambda start: iter([manifest[start:]]))
    return {"sha256": sha256, "size": len(manifest)}


def read_run(file: Path, *, strict: bool = False) -> tuple[dict[str, Any], Path]:
    """What a run file, or a configuration of FedML's, asks for, and its workspace.

    Raises:
        ConfigError: It is wrong.
    """
    if runfile.is_fedml(file):
        from fedml import translation  # needs NumPy, which a run file does without

        return _as_file(translation.accept(file, deployed=True, strict=strict))
    return runfile.read_federated(file)


def _as_file(run: Mapping[str, Any]) -> tuple[dict[str, Any], Path]:
    """A mapping of a run file's keys, checked as a file is."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.yaml"
        file.write_text(json.dumps(run))
        return runfile.read_federated(file)
