# SPDX-License-Identifier: Apache-2.0
"""Bytes by content, on disk, and how they come in and go out over HTTP.

    ROOT/sha256/ab/ab12...   whole and verified; never changed, only deleted
    ROOT/parts/              uploads under way (uploads.py)
    ROOT/trash/              what is being deleted (rubbish.py)

Over HTTP (`/v1/blobs/{sha256}`; the caller has authorised the request):

    GET   whole or one range; the ETag is the hash; If-Match, If-None-Match, If-Range are obeyed
    HEAD  200 with Content-Length, or 404 with Upload-Offset: the byte at which to go on
    PUT   the whole body or, with `Content-Range: bytes a-b/total`, the part that begins at a
          201 whole now, 200 was here already, 202 part taken, go on at Upload-Offset
          409 a is not the offset, Upload-Offset is; 422 wrong hash, what came is thrown away
          413 too large; 507 disk full and 408 nothing came, both with what came kept
          `Content-Range: bytes */total` without a body ends an upload whose bytes are all here

Reading, writing, hashing and syncing happen in threads: heartbeats share the event loop.
"""

import asyncio
import errno
import hashlib
import os
import secrets
import stat
import threading
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

from aiohttp import ClientError, HttpVersion11, hdrs, web
from aiohttp.http_exceptions import HttpProcessingError

from fedml_broker.problems import Problem
from fedml_broker.ranges import AnnouncedBody, announced_body, precondition, requested_range
from fedml_broker.rubbish import Rubbish, free_bytes
from fedml_broker.uploads import (
    UPLOAD_OFFSET,
    Upload,
    Uploads,
    disk_full,
    full_disk_is_a_problem,
    install,
    size_or_zero,
)
from fedml_protocol.blob import Blob
from fedml_protocol.errors import MalformedMessage
from fedml_protocol.ids import check_sha256

CLAIM_S = 600.0

# The hop to a thread no longer counts at this size, and encrypting one piece holds the event loop
# for a fraction of a millisecond. Over TLS it is ten times as fast as aiohttp's FileResponse.
_CHUNK = 512 * 1024
_DAY_S = 86_400.0
# Discarded blobs whose place nobody takes are deleted after so long.
_RUBBISH_S = 30.0
_P = ParamSpec("_P")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep deleted."""

    parts: int
    blobs: int
    freed_bytes: int


class Blobs:
    """All blobs of one broker. Belongs to one event loop; `close` ends its threads."""

    def __init__(
        self,
        root: Path,
        *,
        reserve_bytes: int = 1 << 30,
        max_bytes: int = 64 << 30,
        stall_s: float = 120.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            root: Created where it is missing; belongs to us alone.
            reserve_bytes: Uploads stop before less than this is left on the disk.
            max_bytes: The largest blob that is taken over HTTP.
            stall_s: A peer that moves no byte for so long is cut off.
            clock: Monotonic seconds, for claims.
        """
        self.root = root
        self._blobs, self._parts, self._trash = (root / d for d in ("sha256", "parts", "trash"))
        for directory in (
            self._parts,
            self._trash,
            *(self._blobs / f"{n:02x}" for n in range(256)),
        ):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Called with `in` or `out` and a number of bytes that went over HTTP.
        self.on_bytes: Callable[[str, int], None] = lambda direction, size: None
        self._reserve_bytes = reserve_bytes
        self._max_bytes = max_bytes
        self._stall_s = stall_s
        self._clock = clock
        self._threads = ThreadPoolExecutor(max_workers=8, thread_name_prefix="blobs")
        self._claims: dict[str, dict[str, float]] = {}
        self._tidy_at = 1024
        self._spared: set[str] | None = None
        self._uploads = Uploads(self._parts)
        self._rubbish = Rubbish(reserve_bytes=reserve_bytes)
        self._emptying: asyncio.TimerHandle | None = None

    # What is here -------------------------------------------------------------------------------

    def path(self, sha256: str) -> Path:
        """Where the bytes lie, whole and verified.

        Raises:
            Problem: 400 for what is no hash, 404 for a blob that is not here.
        """
        path = self._at(sha256)
        if not path.exists():
            raise _missing(sha256)
        return path

    def size(self, sha256: str) -> int | None:
        """Bytes of the blob; None: not here.

        Raises:
            Problem: 400 for what is no hash.
        """
        try:
            return self._at(sha256).stat().st_size
        except FileNotFoundError:
            return None

    def missing(self, blobs: Sequence[str], owner: str) -> dict[str, int]:
        """Those that are not here, with the bytes that this owner has uploaded of each.

        The others are claimed for the owner.

        Raises:
            Problem: 400 for what is no hash.
        """
        found = {}
        for sha256 in blobs:
            if self.size(sha256) is None:
                found[sha256] = self._uploads.offset(sha256, owner)
            else:
                self.claim(sha256, owner)
        return found

    async def add(self, data: bytes, *, owner: str = "broker") -> Blob:
        """Keep `data`; claimed for `owner`.

        Raises:
            Problem: 507, the disk is full.
        """
        sha256 = (await self._in_thread(hashlib.sha256, data)).hexdigest()
        self.claim(sha256, owner)
        if self.size(sha256) is None:
            await self._in_thread(self._store, data, self._at(sha256))
        return Blob(sha256=sha256, size=len(data))

    async def adopt(self, file: Path, *, owner: str = "broker") -> Blob:
        """Move a finished file in; claimed for `owner`. If its bytes are here, it is only deleted.

        Raises:
            FileNotFoundError: No such file; perhaps it was adopted before.
            ValueError: Not a regular file, or it changed meanwhile.
            Problem: 507, it lies on another file system and ours is full.
        """
        sha256, size = await self._in_thread(_hash_and_sync, file)
        self.claim(sha256, owner)
        await self._in_thread(self._move_in, file, sha256)
        return Blob(sha256=sha256, size=size)

    # What may go --------------------------------------------------------------------------------

    def claim(self, sha256: str, owner: str) -> None:
        """For ten minutes `discard` leaves the blob alone: a transaction will refer to it."""
        self._at(sha256)  # refuses what is no hash
        self._claims.setdefault(sha256, {})[owner] = self._clock() + CLAIM_S
        if self._spared is not None:
            self._spared.add(sha256)
        if len(self._claims) > self._tidy_at:
            for claimed in list(self._claims):
                self.claimed(claimed)  # forgets what has expired
            self._tidy_at = max(1024, 2 * len(self._claims))

    def release(self, sha256: str, owner: str) -> None:
        """The transaction has ended, either way. Releasing what is not claimed is harmless."""
        if sha256 in self._claims:
            self._claims[sha256].pop(owner, None)
            self.claimed(sha256)

    def claimed(self, sha256: str) -> bool:
        """Whether somebody is about to refer to the blob."""
        now = self._clock()
        alive = {who: end for who, end in self._claims.pop(sha256, {}).items() if end > now}
        if alive:
            self._claims[sha256] = alive
        return bool(alive)

    async def discard(self, sha256: str) -> bool:
        """Delete the blob unless it is claimed; the caller knows that nothing refers to it.

        Whoever is reading it reads on.

        Returns:
            Whether it was deleted.
        """
        if self.claimed(sha256):
            return False
        # Renamed here and not in a thread: no claim can come between the question and the deed.
        # (Deleting gigabytes takes long, renaming them does not.)
        rubbish = self._trash / f"{sha256}.{secrets.token_hex(4)}"
        try:
            self._at(sha256).rename(rubbish)
        except FileNotFoundError:
            return False
        await self._in_thread(self._rubbish.add, rubbish)
        if self._emptying is not None:
            self._emptying.cancel()
        self._emptying = asyncio.get_running_loop().call_later(
            _RUBBISH_S, self._threads.submit, self._rubbish.empty
        )
        return True

    async def sweep(
        self,
        referenced: Callable[[], Awaitable[Collection[str]]],
        *,
        parts_older_than_s: float = _DAY_S,
    ) -> Swept:
        """Delete blobs that nothing refers to, and uploads that nobody went on with for a day.

        Safe while uploads run: `referenced` is asked after the disk was listed, and what is claimed
        at any time during the sweep stays. One sweep at a time.
        """
        if self._spared is not None:
            raise RuntimeError("a sweep is already running")
        self._spared = {sha256 for sha256 in list(self._claims) if self.claimed(sha256)}
        blobs = freed = 0
        try:
            found = await self._in_thread(self._list)
            known = await referenced()
            for sha256, size in found.items():
                spared = sha256 in known or sha256 in self._spared
                if not spared and await self.discard(sha256):
                    blobs, freed = blobs + 1, freed + size
            busy, before = self._uploads.busy(), time.time() - parts_older_than_s
            parts, more = await self._in_thread(self._uploads.clear, busy, before)
            await self._in_thread(self._empty_trash)
        finally:
            self._spared = None
        return Swept(parts, blobs, freed + more)

    def close(self) -> None:
        """Wait for the threads; nothing can be read or written afterwards."""
        if self._emptying is not None:
            self._emptying.cancel()
        self._rubbish.empty()
        self._threads.shutdown(wait=True)

    # HTTP: out ----------------------------------------------------------------------------------

    async def head(self, request: web.Request, sha256: str, owner: str) -> web.StreamResponse:
        """How large the blob is, or how much of it this owner has uploaded."""
        size = self.size(sha256)
        if size is None:
            raise _missing(sha256, {UPLOAD_OFFSET: str(self._uploads.offset(sha256, owner))})
        if (answer := precondition(request, sha256)) is not None:
            return answer
        response = web.StreamResponse(headers=_blob_headers(sha256))
        response.content_length = size  # of the body that GET would have
        await response.prepare(request)
        return response

    async def get(self, request: web.Request, sha256: str) -> web.StreamResponse:
        """The blob, or one range of it."""
        try:
            reader = _Reader(self._at(sha256))
        except FileNotFoundError:
            raise _missing(sha256) from None
        try:
            if (answer := precondition(request, sha256)) is not None:
                return answer
            part = None
            # If-Range with a date never matches: content has no date.
            if request.headers.get(hdrs.IF_RANGE, f'"{sha256}"') == f'"{sha256}"':
                part = requested_range(request.headers.get(hdrs.RANGE), reader.size)
            headers = _blob_headers(sha256)
            if part is not None:
                headers[hdrs.CONTENT_RANGE] = f"bytes {part.start}-{part[-1]}/{reader.size}"
            response = web.StreamResponse(status=206 if part else 200, headers=headers)
            response.content_length = len(part or range(reader.size))
            await self._send(request, response, reader, part or range(reader.size))
        finally:
            # In a thread, where it waits for a read that a cancelled request has left behind.
            self._threads.submit(reader.close)
        return response

    async def _send(
        self, request: web.Request, response: web.StreamResponse, reader: "_Reader", part: range
    ) -> None:
        await response.prepare(request)
        at = part.start
        while at < part.stop:
            length = min(_CHUNK, part.stop - at)
            # What the page cache has is copied in less time than a thread needs to wake up.
            piece: bytes | bytearray = reader.cached(at, length)
            if piece:
                await asyncio.sleep(0)  # who takes as fast as we send leaves no other pause
            else:
                piece = await self._in_thread(reader.read, at, length)
            if not piece:
                raise OSError(errno.EIO, f"the file of a blob ends at byte {at} of {reader.size}")
            at += len(piece)
            try:
                async with asyncio.timeout(self._stall_s):
                    await response.write(piece)
                self.on_bytes("out", len(piece))
            except TimeoutError:
                if request.transport is not None:
                    request.transport.abort()
                raise ConnectionResetError(f"took nothing for {self._stall_s:.0f} s") from None
        await response.write_eof()

    # HTTP: in -----------------------------------------------------------------------------------

    async def expect(self, request: web.Request) -> None:
        """The `expect_handler` of the PUT route: `put` itself asks for the body, if it wants it.

        aiohttp's own asks for it before anybody has looked at the request.
        """

    async def put(self, request: web.Request, sha256: str, owner: str) -> web.StreamResponse:
        """Take the blob or a part of it; when it is whole it is claimed for `owner`."""
        waits = request.headers.get(hdrs.EXPECT, "") != "" and request.version >= HttpVersion11
        try:
            announced = self._check_head(request)
            size = self.size(sha256)
            if size is not None:
                self.claim(sha256, owner)
                if not waits:  # it sends and only then listens
                    while await self._read_body(request):
                        pass
                response = _stored(sha256, size, 200)
                if waits:
                    response.force_close()
                return response
            with self._uploads.of(sha256, owner) as upload:
                self._check_room(1 if announced.length is None else announced.length, upload)
                turn = await self._in_thread(upload.begin, announced.start)
                if waits:
                    waits = False
                    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                    request.writer.output_size = 0  # that was not the answer yet
                await self._receive(request, announced, upload, turn)
                if announced.total is not None and upload.offset < announced.total:
                    return web.Response(status=202, headers={UPLOAD_OFFSET: str(upload.offset)})
                size = upload.offset
                self.claim(sha256, owner)
                await self._in_thread(upload.finish, turn, sha256, self._at(sha256))
            return _stored(sha256, size, 201)
        except Problem as problem:
            if waits:  # the body was not asked for and will not come: this connection is spent
                problem.headers[hdrs.CONNECTION] = "close"
            raise

    def _check_head(self, request: web.Request) -> AnnouncedBody:
        if request.headers.get(hdrs.EXPECT, "100-continue").lower() != "100-continue":
            raise Problem(417, "Unknown expectation", request.headers[hdrs.EXPECT])
        if request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower() != "identity":
            raise Problem(
                415,
                "A blob travels as it is",
                f"Content-Encoding: {request.headers[hdrs.CONTENT_ENCODING]}",
                "send the bytes whose SHA-256 names the blob, without Content-Encoding",
            )
        announced = announced_body(request.headers.get(hdrs.CONTENT_RANGE), request.content_length)
        if (announced.total or 0) > self._max_bytes:
            raise self._too_large(announced.total)
        return announced

    async def _receive(
        self, request: web.Request, announced: AnnouncedBody, upload: Upload, turn: int
    ) -> None:
        """Append the body. What has come is kept, however this ends."""
        at, end = upload.offset, self._max_bytes
        if announced.start is not None and announced.length is not None:
            end = announced.start + announced.length
        pending: list[bytes] = []
        held = 0
        try:
            while piece := await self._read_body(request):
                at, held = at + len(piece), held + len(piece)
                if at > end:
                    if announced.start is None:
                        raise self._too_large(None)
                    raise Problem(400, "The body is longer than its Content-Range")
                pending.append(piece)
                if held >= _CHUNK:
                    blocks, pending, held = pending, [], 0
                    await self._in_thread(self._append, upload, turn, blocks)
        finally:
            if pending:
                await self._in_thread(self._append, upload, turn, pending)
        if announced.start is not None and at < end:
            raise Problem(400, "The body is shorter than its Content-Range", headers=upload.here())

    async def _read_body(self, request: web.Request) -> bytes:
        """The next piece of the body; empty at its end."""
        try:
            async with asyncio.timeout(self._stall_s):
                piece = await request.content.read(_CHUNK)
        except TimeoutError:
            raise Problem(
                408,
                "The body does not come",
                f"nothing for {self._stall_s:.0f} s; what came before is kept",
                f"ask with HEAD for {UPLOAD_OFFSET} and go on from there",
            ) from None
        except (ClientError, HttpProcessingError, RuntimeError, ConnectionError) as error:
            if request.transport is None or request.transport.is_closing():
                raise ConnectionResetError("cut in the middle of an upload") from error
            if isinstance(error, HttpProcessingError | ClientError):
                raise Problem(400, "The body is broken", str(error)) from error
            raise
        self.on_bytes("in", len(piece))
        return piece

    def _append(self, upload: Upload, turn: int, blocks: Sequence[bytes]) -> None:
        size = sum(map(len, blocks))
        self._rubbish.make_way(size)
        self._check_room(size, upload)
        upload.append(turn, blocks)

    def _check_room(self, wanted: int, upload: Upload) -> None:
        if wanted == 0:
            return  # to end an upload takes no room
        free = free_bytes(self._parts)
        if free - wanted < self._reserve_bytes:
            self._rubbish.empty()
            free = free_bytes(self._parts)
        if free - wanted < self._reserve_bytes:
            raise disk_full(
                f"{wanted} bytes do not fit: {free} are free, {self._reserve_bytes} stay free",
                upload.here(),
            )

    def _too_large(self, total: int | None) -> Problem:
        said = "it" if total is None else f"{total} bytes"
        return Problem(
            413,
            "The blob is too large",
            f"{said} would exceed the limit of {self._max_bytes} bytes",
            "split the file, or raise the broker's limit for blobs",
        )

    # Disk ---------------------------------------------------------------------------------------

    def _at(self, sha256: str) -> Path:
        try:
            check_sha256(sha256)
        except MalformedMessage as error:
            raise Problem(400, "Not the name of a blob", str(error)) from error
        return self._blobs / sha256[:2] / sha256

    def _store(self, data: bytes, target: Path) -> None:
        part = self._parts / f"new.{secrets.token_hex(8)}"
        try:
            with full_disk_is_a_problem(), part.open("xb") as out:
                out.write(data)
                out.flush()
                os.fsync(out.fileno())
            install(part, target)
        finally:
            part.unlink(missing_ok=True)

    def _move_in(self, file: Path, sha256: str) -> None:
        target = self._at(sha256)
        if target.exists():
            if not target.samefile(file):
                file.unlink()
            return
        try:
            install(file, target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            self._copy_in(file, sha256)

    def _copy_in(self, file: Path, sha256: str) -> None:
        part = self._parts / f"new.{secrets.token_hex(8)}"
        digest = hashlib.sha256()
        try:
            with full_disk_is_a_problem(), file.open("rb") as source, part.open("xb") as out:
                while piece := source.read(_CHUNK):
                    digest.update(piece)
                    out.write(piece)
                out.flush()
                os.fsync(out.fileno())
            if digest.hexdigest() != sha256:
                raise ValueError(f"{file} changed while it was adopted")
            install(part, self._at(sha256))
        finally:
            part.unlink(missing_ok=True)
        file.unlink()

    def _list(self) -> dict[str, int]:
        """Every blob on disk, with its size."""
        found = {}
        for directory in self._blobs.iterdir():
            for file in directory.iterdir():
                found[file.name] = size_or_zero(file)
        return found

    def _empty_trash(self) -> None:
        for file in self._trash.iterdir():
            file.unlink(missing_ok=True)  # a discard may be at it

    async def _in_thread(self, work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        run = asyncio.get_running_loop().run_in_executor
        return await run(self._threads, lambda: work(*args, **kwargs))


class _Reader:
    """An open blob; read in threads, closed when the last read is through."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        self._mutex = threading.Lock()
        self.size = os.fstat(self._file.fileno()).st_size

    def read(self, at: int, length: int) -> bytes:
        with self._mutex:
            return os.pread(self._file.fileno(), length, at)

    def cached(self, at: int, length: int) -> bytearray:
        """As much of that as can be had without waiting for the disk; perhaps nothing."""
        into = bytearray(length)
        try:
            del into[os.preadv(self._file.fileno(), [into], at, os.RWF_NOWAIT) :]
        except OSError:  # EAGAIN, or a file system that cannot tell; `read` reports what is wrong
            into.clear()
        return into

    def close(self) -> None:
        with self._mutex:
            self._file.close()


def _blob_headers(sha256: str) -> dict[str, str]:
    return {
        hdrs.ETAG: f'"{sha256}"',
        hdrs.ACCEPT_RANGES: "bytes",
        hdrs.CONTENT_TYPE: "application/octet-stream",
        "X-Content-Type-Options": "nosniff",
        hdrs.CACHE_CONTROL: "private, max-age=31536000, immutable",
    }


def _stored(sha256: str, size: int, status: int) -> web.Response:
    return web.json_response(
        {"sha256": sha256, "size": size}, status=status, headers={hdrs.ETAG: f'"{sha256}"'}
    )


def _missing(sha256: str, headers: dict[str, str] | None = None) -> Problem:
    return Problem(404, "No such blob", f"{sha256} is not here whole", headers=headers)


def _hash_and_sync(file: Path) -> tuple[str, int]:
    """SHA-256 and size of a regular file whose bytes are then on the disk."""
    handle = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(handle, "rb") as opened:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ValueError(f"{file} is not a regular file")
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
        os.fsync(handle)
        return digest, opened.tell()
