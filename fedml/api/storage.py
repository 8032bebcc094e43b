# SPDX-License-Identifier: Apache-2.0
"""Files and folders kept at the broker by name. Without a response of FedML's: `fedml.storage`."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedml import storage
from fedml.api.account import Home, connect
from fedml.api.answers import FedMLResponse, ResponseCode, StorageMetadata
from fedml.client import Client
from fedml.errors import FedMLError


def upload(
    data_path: Path | str,
    api_key: str | None = None,
    tag_list: Sequence[str] = (),
    service: str = "R2",
    name: str | None = None,
    description: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    show_progress: bool = False,
    out_progress_to_err: bool = True,
    progress_desc: str | None = None,
    *,
    home: Home = None,
) -> FedMLResponse:
    """Store a file or folder; `data` is its URL. What the broker has already is not sent again.

    Nothing is archived: a file comes back as itself. No matter what `service` is. The description
    and the tags are kept in its metadata. For a bar: `fedml storage upload`.
    """
    own = dict(metadata or {})
    own |= {"description": description} if description else {}
    own |= {"tags": [*tag_list]} if tag_list else {}

    def do(client: Client) -> tuple[str, str]:
        found = storage.upload(client, Path(data_path), name or "", metadata=own)
        return f"{found['name']} is stored", f"{client.url}{storage.url(found['name'])}"

    return _response(do, api_key, home)


def download(
    data_name: str,
    api_key: str | None = None,
    service: str = "R2",
    dest_path: Path | str | None = None,
    show_progress: bool = True,
    *,
    home: Home = None,
) -> FedMLResponse:
    """Write a stored object to `dest_path` (the end of its name, here); `data` is its full path."""
    into = Path(dest_path or data_name.rpartition("/")[2]).absolute()

    def do(client: Client) -> tuple[str, str]:
        storage.download(client, data_name, into)
        return f"{data_name} is in {into}", str(into)

    return _response(do, api_key, home)


def delete(
    data_name: str, service: str = "R2", api_key: str | None = None, *, home: Home = None
) -> FedMLResponse:
    """Delete a stored object; `data` is whether it is gone."""

    def do(client: Client) -> tuple[str, bool]:
        freed = storage.delete(client, data_name)
        return f"{data_name} is gone, {freed} bytes are free", True

    return _response(do, api_key, home, otherwise=False)


def list_storage_objects(api_key: str | None = None, *, home: Home = None) -> FedMLResponse:
    """What is stored, by name; `data` is a list of `StorageMetadata`."""

    def do(client: Client) -> tuple[str, list[StorageMetadata]]:
        found = [StorageMetadata.of(told) for told in storage.listed(client)]
        return f"{len(found)} objects", found

    return _response(do, api_key, home)


def get_storage_metadata(
    data_name: str, api_key: str | None = None, *, home: Home = None
) -> FedMLResponse:
    """What the broker knows of an object; `data` is its `StorageMetadata`."""
    return _response(
        lambda client: (data_name, StorageMetadata.of(storage.show(client, data_name))),
        api_key,
        home,
    )


def get_storage_user_defined_metadata(
    data_name: str, api_key: str | None = None, *, home: Home = None
) -> FedMLResponse:
    """What was given with an object; `data` is that mapping."""
    return _response(
        lambda client: (data_name, storage.show(client, data_name)["metadata"]), api_key, home
    )


def _response(
    do: Callable[[Client], tuple[str, Any]],
    api_key: str | None,
    home: Home,
    otherwise: Any = None,
) -> FedMLResponse:
    """What was done, or why not: nothing of ours is raised."""
    try:
        text, data = do(connect(api_key, home=home))
    except FedMLError as error:
        text = f"{error}; try: {error.hint}" if error.hint else str(error)
        return FedMLResponse(ResponseCode.FAILURE, text, otherwise)
    return FedMLResponse(ResponseCode.SUCCESS, text, data)
