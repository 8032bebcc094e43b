# SPDX-License-Identifier: Apache-2.0
"""Asking the broker for a run: a file is read, its workspace packed and sent, the run submitted."""

import hashlib
import re
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import yaml

from fedml import jobfile, package, runfile, storage
from fedml.client import Client, Told, silent
from fedml.clusters import Cluster
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
    strict: bool = False,
    told: Told = silent,
) -> str:
    """Submit a job file; the run's id.

    One of `job_type: federate` is submitted as `federate` does it.

    Args:
        client: The broker.
        job: A job file (docs/launch.md).
        follow: Whether somebody is going to watch: its first lines then come at once.
        any_resource: Take GPUs of any model, or none where no machine has them.
        cluster: Run it on this cluster, whatever the file says.
        package: In place of the workspace: a file that `build` made, the name of a stored folder,
            or a hash.
        strict: Of a federated job: see `federate`.
        told: Hears how far the upload is, bytes.

    Raises:
        ConfigError: The file or its workspace is wrong.
        BrokerRefused: No machine can ever run it, or the broker says no for another reason.
        BrokerUnreachable: No answer.
    """
    if runfile.is_federated_job(job):
        return federate(
            client, job, any_resource=any_resource, cluster=cluster, package=package,
            strict=strict, told=told,
        )  # fmt: skip
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
    """What `read_job` or `read_run` has read, as the broker takes it: all that it needs is there.

    Raises:
        ConfigError: They do not go together.
        BrokerRefused: There is no such object.
        BrokerUnreachable: No answer.
    """
    request = dict(request)
    data, files = request.pop("data", {}), request.pop("files", {})
    if workspace is not None:
        request["package"] = send(client, workspace, told)
    if data or files:
        request["package"] = _with_more(client, request.get("package"), data, files, job)
    return request


def look(
    client: Client, job: Path, *, any_resource: bool = False, cluster: str = ""
) -> dict[str, Any]:
    """Where a job file would run at this moment; nothing is sent or started.

    Returns:
        `needs`: what is asked of a machine; `nodes`: how many it takes; `taken`: the id of the
        first, None where it would wait; `machines`: each with `device`, `name`, `fits` (now,
        later, never), the `rank` that it would get, or None, and `why`.

    Raises:
        ConfigError: The file or its workspace is wrong.
        BrokerRefused: The broker says no.
        BrokerUnreachable: No answer.
    """
    if runfile.is_federated_job(job):
        word = "federate"
        run = _asked(read_run(job)[0], any_resource=any_resource, cluster=cluster)
        request = {key: run[key] for key in _OF_MACHINES if key in run}
    else:
        word = "launch"
        request, workspace = jobfile.read_job(job, any_resource=any_resource)
        request["cluster"] = cluster or request["cluster"]
        request.pop("data", None)
        if workspace is not None:
            package.files(workspace)
    found: dict[str, Any] = client.call("POST", f"/v1/{word}/match", request)
    return found


# What `federate` and `look` ask of machines for a federated run.
_OF_MACHINES = ("clients", "needs", "cluster", "max_price_per_hour")


def reserve(
    client: Client,
    job: Path,
    cluster: str,
    *,
    any_resource: bool = False,
    wanted: Callable[[], bool] = lambda: True,
) -> Cluster | None:
    """Reserve under a name what a job file asks for; None: the name is known, nothing is done.

    Args:
        client: The broker.
        job: A job file.
        cluster: The name.
        any_resource: As for `launch`.
        wanted: Asked whether a name that is not known is meant; nothing is done if not.

    Raises:
        ConfigError: The file is wrong.
        BrokerRefused: Too few machines fit that nobody has reserved.
        BrokerUnreachable: No answer.
    """
    if any(known.name == cluster for known in Cluster.list(at=client)) or not wanted():
        return None
    if runfile.is_federated_job(job):
        asked = _asked(read_run(job)[0], any_resource=any_resource, cluster=cluster)
        count, labels = asked["clients"]["count"], asked["clients"]["labels"]
    else:
        asked, _ = jobfile.read_job(job, any_resource=any_resource)
        count, labels = asked["nodes"], asked["labels"]
    return Cluster.create(cluster, count=count, labels=labels, at=client, **asked["needs"])


def federate(
    client: Client,
    file: Path,
    *,
    any_resource: bool = False,
    cluster: str = "",
    strict: bool = False,
    package: str = "",
    told: Told = silent,
) -> str:
    """Submit a federated run (docs/federate.md); the run's id. Raises what `launch` does.

    Args:
        client: The broker.
        file: A run file, or a configuration or federated job of FedML's (docs/fedml.md).
        any_resource: Take machines without GPUs, too.
        cluster: As for `launch`.
        strict: Refuse a file of FedML's where something else would be done than it asks for.
        package: As for `launch`.
        told: Hears how far the upload is, bytes.
    """
    request, workspace = read_run(file, strict=strict)
    request = _asked(request, any_resource=any_resource, cluster=cluster)
    if package:
        request["package"] = _given(client, package, told)
    request = sent(client, request, None if package else workspace, file, told)
    return client.submit("federate", request)


def _asked(request: Mapping[str, Any], *, any_resource: bool, cluster: str) -> dict[str, Any]:
    """A federated run on these machines."""
    asked = {**request, "cluster": cluster or request.get("cluster", "")}
    if any_resource:
        asked["needs"] = jobfile.without_gpus(request.get("needs", {}))
    return asked


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


def _with_more(
    client: Client,
    base: Mapping[str, Any] | None,
    wanted: Mapping[str, str],
    texts: Mapping[str, str],
    job: Path,
) -> dict[str, Any]:
    """A package and, at paths in it, stored objects and texts. Of objects, only a list is sent."""
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
    for path, text in texts.items():
        blob = _put(client, text.encode())
        parts.append(Part(blob["sha256"], (File(path, blob["size"]),)))
    manifest = Package(tuple(parts), tuple(links)).manifest()
    try:
        parse(manifest)
    except MalformedMessage as error:
        raise ConfigError(
            f"{job}: `{'data' if wanted else 'workspace'}` and what is added to the workspace do "
            f"not go together: {error}",
            "each path is inside the workspace, and not there yet",
        ) from error
    return _put(client, manifest)


def _put(client: Client, content: bytes) -> dict[str, Any]:
    sha256 = hashlib.sha256(content).hexdigest()
    client.put(sha256, len(content), lambda start: iter([content[start:]]))
    return {"sha256": sha256, "size": len(content)}


def read_run(
    file: Path, *, within: yaml.Node | None = None, strict: bool = False
) -> tuple[dict[str, Any], Path]:
    """What a run file, or a configuration or a federated job of FedML's, asks for; its workspace.

    Of a federated job, `data` and `files` do not go to the broker: `sent` adds them to the package.

    Args:
        within: The run is not all of the file, but this mapping in it.
        strict: Refuse a file of FedML's where something else would be done than it asks for.

    Raises:
        ConfigError: It is wrong.
    """
    if runfile.is_federated_job(file, within):
        from fedml import federatedjob

        return federatedjob.read(file, within, strict=strict)
    if within is None and runfile.is_fedml(file):
        from fedml import translation  # needs NumPy, which a run file does without

        return runfile.read_mapping(translation.accept(file, deployed=True, strict=strict), file)
    return runfile.read_federated(file, within=within)
