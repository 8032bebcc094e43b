# SPDX-License-Identifier: Apache-2.0
"""Files and folders kept at the broker under a name.

    storage.upload(client, Path("train.csv"), "data/train.csv", metadata={"from": "ward 3"})
    storage.download(client, "data/train.csv", Path("train.csv"))

What the broker has already is not sent again, whatever its name was; what was cut off goes on where
it stopped, also in another process.
"""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from fedml.client import Client, Told, silent
from fedml.errors import BrokerRefused, ConfigError
from fedml.parts import send
from fedml_protocol.errors import MalformedMessage
from fedml_protocol.package import Package, parse

_PAGE = 1000
_CHUNK = 1024 * 1024


def upload(
    client: Client,
    path: Path,
    name: str = "",
    *,
    metadata: Mapping[str, Any] | None = None,
    told: Told = silent,
) -> dict[str, Any]:
    """Store a file or a folder; what the broker knows of it (see `show`).

    Args:
        path: Of a folder goes what `fedml launch` would send: ignore files count.
        name: A path such as ``data/train.csv``; the file's own name if not given.
        metadata: Kept beside it; JSON.
        told: Hears how far the upload is, bytes.

    Raises:
        ConfigError: There is no such file.
        BrokerRefused: The name is taken by another user, or cannot be.
        BrokerUnreachable: It went away; the same call goes on where this one stopped.
    """
    if path.is_dir():
        blob = send(client, path, told)
    elif path.is_file():
        blob = client.upload(path, told)
    else:
        raise ConfigError(f"there is no file or folder {path}")
    asked = {"sha256": blob["sha256"], "folder": path.is_dir(), "metadata": dict(metadata or {})}
    found: dict[str, Any] = client.call("PUT", url(name or path.resolve().name), asked)
    return found


def show(client: Client, name: str) -> dict[str, Any]:
    """`name`, `size`, `sha256`, `folder`, `user`, `created_at`, and the `metadata` given with it.

    Raises:
        BrokerRefused: There is none.
    """
    found: dict[str, Any] = client.call("GET", url(name))
    return found


def listed(client: Client, prefix: str = "") -> Iterator[dict[str, Any]]:
    """Every object whose name begins so, by name."""
    after = ""
    while True:
        asked = urlencode({"prefix": prefix, "after": after, "limit": _PAGE})
        page = client.call("GET", f"/v1/storage?{asked}")["objects"]
        yield from page
        if len(page) < _PAGE:
            return
        after = page[-1]["name"]


def delete(client: Client, name: str) -> int:
    """Delete an object; how many bytes the broker has free now.

    Raises:
        BrokerRefused: There is none, or it is another user's.
    """
    return int(client.call("DELETE", url(name))["freed_bytes"])


def download(client: Client, name: str, into: Path, told: Told = silent) -> dict[str, Any]:
    """Write an object to `into`; what the broker knows of it.

    A file there is replaced when everything has come. A folder must not be there.

    Raises:
        BrokerRefused: There is no such object.
        ConfigError: There is something in the way.
        BrokerUnreachable: It went away; the same call goes on where this one stopped.
    """
    found = show(client, name)
    if not found["folder"]:
        if into.is_dir():
            raise ConfigError(f"{into} is a folder, and {name} a file")
        client.download(found["sha256"], into, told)
    elif into.exists():
        raise ConfigError(f"{into} is there already", "name a new folder")
    else:
        _download_folder(client, found, into, told)
    return found


def _download_folder(client: Client, found: Mapping[str, Any], into: Path, told: Told) -> None:
    """By its parts, which stay beside it until all have come."""
    coming = into.with_name(f".{into.name}.{found['sha256'][:12]}.parts")
    coming.mkdir(parents=True, exist_ok=True)
    manifest = coming / found["sha256"]
    if not manifest.exists():
        client.download(found["sha256"], manifest)
    try:
        package = parse(manifest.read_bytes())
    except MalformedMessage as error:
        raise BrokerRefused(f"what came as {found['name']} is no folder: {error}") from error
    before = 0
    for part in package.parts:
        if not (coming / part.sha256).exists():
            client.download(
                part.sha256,
                coming / part.sha256,
                lambda done, _, before=before: told(before + done, package.size),  # type: ignore[misc]
            )
        before += part.blob.size
    begun = coming / "folder"
    shutil.rmtree(begun, ignore_errors=True)
    begun.mkdir()
    _lay_out(package, coming, begun)
    begun.rename(into)
    shutil.rmtree(coming)


def _lay_out(package: Package, parts: Path, into: Path) -> None:
    for part in package.parts:
        with (parts / part.sha256).open("rb") as data:
            for file in part.files:
                target = into / file.path
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("xb") as out:
                    left = file.size
                    while left and (piece := data.read(min(left, _CHUNK))):
                        left -= out.write(piece)
                target.chmod(0o755 if file.executable else 0o644)
    for link in package.links:
        target = into / link.path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(link.target)


def url(name: str) -> str:
    """The path of an object at the broker."""
    return f"/v1/storage/{quote(name, safe='')}"
