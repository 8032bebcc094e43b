# SPDX-License-Identifier: Apache-2.0
"""Stored objects: files and folders that people keep at the broker under a name, with facts of
their own.

The bytes are blobs, so what is there already is stored once, whoever brought it. A folder is a
package (fedml_protocol/package.py). Whoever has the role may read; what one has stored, he and the
admins may replace or delete.
"""

import time
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection

from fedml_broker import audit, packages
from fedml_broker.accounts import User
from fedml_broker.blobs import Blobs
from fedml_broker.packages import PackageRef, Uploaded
from fedml_broker.problems import Problem
from fedml_broker.runs import refer_all, release
from fedml_broker.store import Store
from fedml_broker.tables import objects
from fedml_protocol.blob import Blob

_LONGEST_NAME = 1024
_LARGEST_METADATA = 64 * 1024
_SHOWN = [c for c in objects.c if c.name not in ("id", "tenant")]


class PutObject(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a name is to stand for: an uploaded blob, or (`folder`) an uploaded package."""

    sha256: str
    folder: bool = False
    metadata: dict[str, Any] = {}


class Storage:
    """All objects of one broker."""

    def __init__(self, store: Store, blobs: Blobs) -> None:
        self._store = store
        self._blobs = blobs

    async def put(self, user: User, name: str, request: PutObject) -> dict[str, Any]:
        """Let a name stand for what was uploaded; what it stood for before is forgotten.

        Raises:
            Problem: 422 the name or metadata cannot be, or it was not uploaded; 403 it is another
                user's.
        """
        _check_name(name)
        if len(msgspec.json.encode(request.metadata)) > _LARGEST_METADATA:
            raise Problem(
                422, "too much metadata", f"at most {_LARGEST_METADATA} bytes", "store it as a file"
            )
        owner = f"u/{user.name}"
        uploaded, size = await self._uploaded(request, owner)

        def commit(tx: Connection) -> tuple[dict[str, Any], list[str]]:
            before = _find(tx, user.tenant, name)
            idle = [] if before is None else _forget(tx, user, before)
            found = tx.execute(
                objects.insert().values(
                    tenant=user.tenant,
                    name=name,
                    sha256=request.sha256,
                    size=size,
                    folder=request.folder,
                    metadata=request.metadata,
                    user=user.name,
                    created_at=time.time(),
                )
            )
            refer_all(tx, uploaded.blobs, f"object/{_key(found)}")
            audit.note(
                tx,
                user.tenant,
                audit.user(user.name),
                "storage.put",
                name,
                sha256=request.sha256,
                size=size,
                before=None if before is None else str(before["sha256"]),
            )
            row = _find(tx, user.tenant, name)
            assert row is not None
            return _shown(row), sorted({*idle} - {*uploaded.blobs})

        row, idle = await self._store.write(commit)
        uploaded.release(self._blobs, owner)
        await self._discard(idle)
        return row

    async def remove(self, user: User, name: str) -> int:
        """Forget an object; the bytes that are free now.

        Raises:
            Problem: 404, or 403 when it is another user's.
        """

        def commit(tx: Connection) -> list[str]:
            row = _known(_find(tx, user.tenant, name), name)
            idle = _forget(tx, user, row)
            facts = {"sha256": row["sha256"], "of": row["user"]}
            audit.note(tx, user.tenant, audit.user(user.name), "storage.delete", name, **facts)
            return idle

        return await self._discard(await self._store.write(commit))

    async def show(self, tenant: str, name: str) -> dict[str, Any]:
        """One object.

        Raises:
            Problem: 404.
        """
        row = await self._store.read(lambda tx: _find(tx, tenant, name))
        return _shown(_known(row, name))

    async def listed(
        self, tenant: str, *, prefix: str = "", after: str = "", limit: int = 1000
    ) -> list[dict[str, Any]]:
        """Objects by name, those after a name only."""
        query = (
            sa.select(*_SHOWN)
            .where(objects.c.tenant == tenant, objects.c.name > after)
            .where(objects.c.name.startswith(prefix, autoescape=True))
            .order_by(objects.c.name)
            .limit(limit)
        )
        return await self._store.read(lambda tx: [dict(r) for r in tx.execute(query).mappings()])

    async def _uploaded(self, request: PutObject, owner: str) -> tuple[Uploaded, int]:
        if request.folder:
            package = await packages.check(self._blobs, PackageRef(request.sha256), owner)
            return package, package.content_bytes
        size = self._blobs.size(request.sha256)
        if size is None:
            raise Problem(422, "the file was not uploaded", request.sha256, "upload it first")
        self._blobs.claim(request.sha256, owner)
        return Uploaded(Blob(sha256=request.sha256, size=size), (request.sha256,), size), size

    async def _discard(self, idle: list[str]) -> int:
        freed = 0
        for sha256 in idle:
            size = self._blobs.size(sha256) or 0
            freed += size if await self._blobs.discard(sha256) else 0
        return freed


def _find(tx: Connection, tenant: str, name: str) -> dict[str, Any] | None:
    query = sa.select(objects).where(objects.c.tenant == tenant, objects.c.name == name)
    row = tx.execute(query).mappings().first()
    return None if row is None else dict(row)


def _known(row: dict[str, Any] | None, name: str) -> dict[str, Any]:
    if row is None:
        raise Problem(404, "no such object", f"{name!r} is not stored", "`fedml storage list`")
    return row


def _forget(tx: Connection, user: User, row: dict[str, Any]) -> list[str]:
    """Drop the row; the blobs that nobody needs now."""
    if row["user"] != user.name and not user.may("admin"):
        raise Problem(
            403,
            "this is another user's object",
            f"{row['name']!r} was stored by {row['user']}",
            f"ask {row['user']} or an admin, or take another name",
        )
    tx.execute(objects.delete().where(objects.c.id == row["id"]))
    return release(tx, f"object/{row['id']}")


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    return {column.name: row[column.name] for column in _SHOWN}


def _key(inserted: sa.CursorResult[Any]) -> int:
    key = inserted.inserted_primary_key
    assert key is not None
    return int(key[0])


def _check_name(name: str) -> None:
    parts = name.split("/")
    good = name.isprintable() and not any(part in ("", ".", "..") for part in parts)
    if not good or len(name.encode()) > _LONGEST_NAME:
        raise Problem(
            422,
            "not the name of an object",
            f"{name[:80]!r}: a path such as data/train.csv, without `..`, at most "
            f"{_LONGEST_NAME} bytes",
        )
