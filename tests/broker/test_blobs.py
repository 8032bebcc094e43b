# SPDX-License-Identifier: Apache-2.0
"""Blobs over real HTTP and real files: resumed, cut, damaged, crowded, and on a full disk."""

import asyncio
import hashlib
import http.client
import io
import json
import os
import random
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from multidict import CIMultiDictProxy

from fedml_broker.blobs import CLAIM_S, Blobs, Swept
from fedml_broker.identity import Identity
from fedml_broker.problems import Problem, as_problems
from fedml_broker.ranges import announced_body, requested_range
from fedml_broker.uploads import Uploads
from fedml_protocol.errors import MalformedMessage

MB = 1 << 20

# The server by itself, to be killed: prints its port. Who asks is told by the header.
SERVER = """
import asyncio, sys
from pathlib import Path
from aiohttp import web
from fedml_broker.blobs import Blobs
from fedml_broker.problems import as_problems

async def main(root, reserve_bytes):
    blobs = Blobs(root, reserve_bytes=reserve_bytes)
    app = web.Application(middlewares=[as_problems])
    def owner(request): return request.headers.get("X-Owner", "alice")
    def name(request): return request.match_info["sha256"]
    async def get(request): return await blobs.get(request, name(request))
    async def head(request): return await blobs.head(request, name(request), owner(request))
    async def put(request): return await blobs.put(request, name(request), owner(request))
    app.router.add_get("/v1/blobs/{sha256}", get, allow_head=False)
    app.router.add_head("/v1/blobs/{sha256}", head)
    app.router.add_put("/v1/blobs/{sha256}", put, expect_handler=blobs.expect)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()

asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
"""


def content(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Clock:
    """Monotonic seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Api:
    """The broker's blobs behind HTTP on loopback, and a client for them."""

    def __init__(self, blobs: Blobs, session: aiohttp.ClientSession) -> None:
        self.blobs = blobs
        self._session = session
        self.port = 0

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.port}/v1/blobs/{name}"

    async def ask(
        self, method: str, name: str, *, owner: str = "alice", body: Any = None, **headers: str
    ) -> tuple[int, CIMultiDictProxy[str], bytes]:
        """Status, headers and body; underscores in header names stand for dashes."""
        sent = {key.replace("_", "-"): value for key, value in headers.items()}
        body = io.BytesIO(body) if isinstance(body, bytes) else body
        async with self._session.request(
            method, self.url(name), data=body, headers=sent | {"X-Owner": owner}
        ) as answer:
            return answer.status, answer.headers, await answer.read()

    async def put(self, data: bytes, **more: Any) -> int:
        return (await self.ask("PUT", sha(data), body=data, **more))[0]

    async def part(self, data: bytes, start: int, stop: int, **more: Any) -> tuple[int, int]:
        """PUT one part: status, and the offset that the answer names (-1: none)."""
        status, headers, _ = await self.ask(
            "PUT",
            sha(data),
            body=data[start:stop],
            Content_Range=f"bytes {start}-{stop - 1}/{len(data)}",
            **more,
        )
        return status, int(headers.get("Upload-Offset", -1))

    async def offset(self, data: bytes, owner: str = "alice") -> int:
        status, headers, _ = await self.ask("HEAD", sha(data), owner=owner)
        assert status == 404
        return int(headers["Upload-Offset"])

    async def resume(self, data: bytes) -> int:
        """What a client does after a cut: ask, go on, and believe the offset of a 409."""
        start = await self.offset(data)
        while True:
            status, offset = await self.part(data, start, len(data))
            if status != 409:
                return status
            start = offset


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    blobs = Blobs(tmp_path / "blobs", reserve_bytes=0, max_bytes=8 * MB)
    async with aiohttp.ClientSession(auto_decompress=False) as session:
        served = Api(blobs, session)
        runner = await serve(blobs)
        served.port = runner.addresses[0][1]
        yield served
        await runner.cleanup()
    blobs.close()


async def serve(blobs: Blobs, context: ssl.SSLContext | None = None) -> web.AppRunner:
    app = web.Application(middlewares=[as_problems])

    def owner(request: web.Request) -> str:
        return request.headers.get("X-Owner", "alice")

    async def get(request: web.Request) -> web.StreamResponse:
        return await blobs.get(request, request.match_info["sha256"])

    async def head(request: web.Request) -> web.StreamResponse:
        return await blobs.head(request, request.match_info["sha256"], owner(request))

    async def put(request: web.Request) -> web.StreamResponse:
        return await blobs.put(request, request.match_info["sha256"], owner(request))

    app.router.add_get("/v1/blobs/{sha256}", get, allow_head=False)
    app.router.add_head("/v1/blobs/{sha256}", head)
    app.router.add_put("/v1/blobs/{sha256}", put, expect_handler=blobs.expect)
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    return runner


@contextmanager
def process(root: Path, *, prefix: Collection[str] = (), reserve: int = 0) -> Iterator[Any]:
    """The server as a process of its own; yields it, with its `port`."""
    command = [*prefix, sys.executable, "-c", SERVER, str(root), str(reserve)]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    try:
        started.port = int(started.stdout.readline())  # type: ignore[attr-defined]
        yield started
    finally:
        started.kill()
        started.wait(timeout=10)
        started.stdout.close()


class Answer:
    """One exchange over a connection of its own, for servers that die and property tests."""

    def __init__(self, port: int, method: str, name: str, body: Any = None, **headers: str) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        try:
            sent = {key.replace("_", "-"): value for key, value in headers.items()}
            connection.request(method, f"/v1/blobs/{name}", body, sent)
            answer = connection.getresponse()
            self.status, self.headers, self.body = answer.status, answer.headers, answer.read()
        finally:
            connection.close()


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with process(tmp_path_factory.mktemp("shared")) as server:
        yield server.port


def problem(answer: tuple[int, Any, bytes]) -> dict[str, Any]:
    status, headers, body = answer
    assert headers["Content-Type"] == "application/problem+json"
    told: dict[str, Any] = json.loads(body)
    assert told["status"] == status
    assert told["title"]
    return told


async def referencing(*names: str) -> Collection[str]:
    return set(names)


# Whole uploads and downloads


@pytest.mark.parametrize("size", [0, 1, 256 * 1024, 3 * MB + 17])
async def test_what_is_put_can_be_got(api: Api, size: int) -> None:
    data = content(size)

    assert await api.put(data) == 201
    status, headers, body = await api.ask("GET", sha(data))

    assert (status, body) == (200, data)
    assert headers["ETag"] == f'"{sha(data)}"'
    assert headers["Accept-Ranges"] == "bytes"
    assert api.blobs.path(sha(data)).read_bytes() == data
    assert api.blobs.size(sha(data)) == size


async def test_what_no_cache_holds_any_more_comes_from_the_disk(api: Api) -> None:
    data = content(2 * MB + 17)
    await api.put(data)
    # A piece in the middle that is nobody's but the disk's.
    with api.blobs.path(sha(data)).open("rb") as file:
        os.posix_fadvise(file.fileno(), MB // 2, MB, os.POSIX_FADV_DONTNEED)

    _, _, body = await api.ask("GET", sha(data))

    assert body == data


async def test_a_body_of_unknown_length_is_taken(api: Api) -> None:
    data = content(2 * MB + 5)

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(data), 100_000):
            yield data[at : at + 100_000]

    status, _, _ = await api.ask("PUT", sha(data), body=pieces())
    assert status == 201
    assert api.blobs.path(sha(data)).read_bytes() == data


async def test_a_second_put_changes_nothing(api: Api) -> None:
    data = content(MB)
    await api.put(data)
    before = api.blobs.path(sha(data)).stat()

    assert await api.put(data) == 200
    assert api.blobs.path(sha(data)).stat().st_ino == before.st_ino


async def test_head_tells_the_size_and_nothing_of_what_is_not_there(api: Api) -> None:
    data = content(1234)
    assert await api.offset(data) == 0
    await api.put(data)

    status, headers, body = await api.ask("HEAD", sha(data))
    assert (status, headers["Content-Length"], body) == (200, "1234", b"")


async def test_what_is_not_there_is_a_404_with_a_problem(api: Api) -> None:
    told = problem(await api.ask("GET", sha(b"never")))

    assert told["status"] == 404
    assert sha(b"never") in told["detail"]


async def test_other_bytes_than_the_name_says_are_thrown_away(api: Api, tmp_path: Path) -> None:
    data = content(MB)
    damaged = data[:500_000] + b"\0" + data[500_001:]

    told = problem(await api.ask("PUT", sha(data), body=damaged))

    assert told["status"] == 422
    assert sha(damaged) in told["detail"]
    assert api.blobs.size(sha(data)) is None
    assert list((tmp_path / "blobs" / "parts").iterdir()) == []
    assert await api.put(data) == 201


async def test_a_blob_over_the_limit_is_refused_before_and_while_it_comes(api: Api) -> None:
    data = content(8 * MB + 1)

    async def pieces() -> AsyncIterator[bytes]:
        yield data

    assert problem(await api.ask("PUT", sha(data), body=data))["status"] == 413
    assert problem(await api.ask("PUT", sha(data), body=pieces()))["status"] == 413


async def test_a_coded_body_is_refused(api: Api) -> None:
    answer = await api.ask("PUT", sha(b"x"), body=b"x", Content_Encoding="gzip")

    assert problem(answer)["status"] in (400, 415)
    assert api.blobs.size(sha(b"x")) is None


@pytest.mark.parametrize(
    "name",
    [
        "..%2F..%2Fetc%2Fpasswd",
        "%2e%2e%2f" + "a" * 58,
        sha(b"x").upper(),
        sha(b"x")[:-1],
        sha(b"x") + "0",
        sha(b"x")[:-1] + "g",
        sha(b"x") + "%00",
        sha(b"x") + "%0a",
        "%C3%A9" * 64,
    ],
)
@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_a_name_that_is_no_hash_reaches_no_file(port: int, method: str, name: str) -> None:
    answer = Answer(port, method, name, b"x" if method == "PUT" else None)

    assert answer.status in (400, 404)
    assert answer.headers["Content-Type"] == "application/problem+json"


@pytest.mark.parametrize("name", ["../../../etc/passwd", "", "/etc/passwd", sha(b"x").upper()])
async def test_inside_the_broker_too_a_name_must_be_a_hash(tmp_path: Path, name: str) -> None:
    blobs = Blobs(tmp_path)
    for touch in (blobs.path, blobs.size, lambda n: blobs.claim(n, "alice")):
        with pytest.raises(Problem) as refused:
            touch(name)
        assert refused.value.status == 400
    with pytest.raises(Problem):
        await blobs.discard(name)
    blobs.close()


# Expect: 100-continue


async def raw(port: int, head: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.replace("\n", "\r\n").encode() + b"Host: x\r\n\r\n")
    return reader, writer


async def test_a_blob_that_is_here_is_not_sent_by_who_asks_first(api: Api) -> None:
    data = content(3 * MB)
    await api.put(data)

    reader, writer = await raw(
        api.port,
        f"PUT /v1/blobs/{sha(data)} HTTP/1.1\nContent-Length: {len(data)}\nExpect: 100-continue\n",
    )
    head = await reader.readuntil(b"\r\n\r\n")
    writer.transport.abort()

    assert head.startswith(b"HTTP/1.1 200")
    assert b"Connection: close" in head


async def test_who_asks_first_is_told_to_go_on_once(api: Api) -> None:
    data = content(3 * MB)

    reader, writer = await raw(
        api.port,
        f"PUT /v1/blobs/{sha(data)} HTTP/1.1\nContent-Length: {len(data)}\n"
        "Expect: 100-continue\nConnection: close\n",
    )
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(data)
    answer = await reader.read()
    writer.transport.abort()

    assert answer.startswith(b"HTTP/1.1 201")
    assert answer.count(b"HTTP/1.1") == 1


async def test_who_asks_first_is_told_of_damage_too(api: Api) -> None:
    reader, writer = await raw(
        api.port,
        f"PUT /v1/blobs/{sha(b'good')} HTTP/1.1\nContent-Length: 3\nExpect: 100-continue\n",
    )
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"bad")
    head = await reader.readuntil(b"\r\n\r\n")
    writer.transport.abort()

    assert head.startswith(b"HTTP/1.1 422")
    assert b"application/problem+json" in head


async def test_who_asks_first_hears_of_a_wrong_offset_before_sending(api: Api) -> None:
    reader, writer = await raw(
        api.port,
        f"PUT /v1/blobs/{sha(b'x' * 10)} HTTP/1.1\nContent-Length: 5\n"
        "Content-Range: bytes 5-9/10\nExpect: 100-continue\n",
    )
    head = await reader.readuntil(b"\r\n\r\n")
    writer.transport.abort()

    assert head.startswith(b"HTTP/1.1 409")
    assert b"Upload-Offset: 0" in head
    assert b"Connection: close" in head


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("expect", ["Expect: 100-continue", "Expect:"])
async def test_curl_uploads_and_uploads_again(api: Api, tmp_path: Path, expect: str) -> None:
    data = content(5 * MB)
    (tmp_path / "file").write_bytes(data)

    async def curl() -> str:
        client = await asyncio.create_subprocess_exec(
            *("curl", "-sS", "-T", tmp_path / "file", "-H", expect, "-o", tmp_path / "answer"),
            *("-w", "%{http_code} %{size_upload}", api.url(sha(data))),
            stdout=asyncio.subprocess.PIPE,
        )
        said, _ = await client.communicate()
        assert client.returncode == 0
        return said.decode()

    assert await curl() == f"201 {len(data)}"
    sent_again = 0 if "100" in expect else len(data)
    assert await curl() == f"200 {sent_again}"


# Parts


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(size=st.integers(1, 700_000), cuts=st.lists(st.integers(1, 699_999), max_size=6))
def test_however_it_is_cut_into_parts_the_blob_is_the_same(
    port: int, size: int, cuts: list[int]
) -> None:
    data = content(size, seed=size + 7 * len(cuts))
    at = sorted({0, size, *(cut for cut in cuts if cut < size)})
    for start, stop in pairwise(at):
        answer = Answer(
            port,
            "PUT",
            sha(data),
            data[start:stop],
            Content_Range=f"bytes {start}-{stop - 1}/{size}",
        )
        if answer.status == 200:  # hypothesis came by here before
            break
        assert answer.status == (201 if stop == size else 202)
        if stop < size:
            assert answer.headers["Upload-Offset"] == str(stop)
    assert Answer(port, "GET", sha(data)).body == data


async def test_a_part_that_does_not_fit_is_told_where_to_go_on(api: Api) -> None:
    data = content(1000)

    assert await api.part(data, 0, 300) == (202, 300)
    assert await api.part(data, 400, 1000) == (409, 300)
    assert await api.part(data, 0, 300) == (409, 300)
    assert await api.offset(data) == 300
    assert (await api.part(data, 300, 1000))[0] == 201


async def test_a_whole_put_begins_anew(api: Api) -> None:
    data = content(1000)
    await api.part(b"x" * 1000, 0, 300)
    await api.part(data, 0, 300)

    assert await api.put(data) == 201


async def test_an_upload_whose_bytes_are_all_here_can_be_ended(api: Api, tmp_path: Path) -> None:
    data = content(1000)
    await api.part(data, 0, 400)
    (part,) = (tmp_path / "blobs" / "parts").iterdir()
    # As if the broker had died between the last byte and the rename.
    part.write_bytes(data)
    again = Blobs(tmp_path / "blobs", reserve_bytes=1 << 60)  # ending takes no room
    runner = await serve(again)
    api.port = runner.addresses[0][1]

    assert await api.offset(data) == 1000
    status, _, _ = await api.ask("PUT", sha(data), Content_Range="bytes */1000")

    assert status == 201
    assert again.path(sha(data)).read_bytes() == data
    await runner.cleanup()
    again.close()


async def test_ending_too_early_is_a_conflict(api: Api) -> None:
    data = content(1000)
    await api.part(data, 0, 400)

    status, headers, _ = await api.ask("PUT", sha(data), Content_Range="bytes */1000")
    assert (status, headers["Upload-Offset"]) == (409, "400")


@pytest.mark.parametrize(
    "content_range",
    [
        "bytes 0-9",
        "bytes 0-9/*",
        "bytes 5-4/10",
        "bytes 0-10/10",
        "bytes 0-8/10",
        "bytes -1-8/10",
        "items 0-9/10",
        "bytes */10",
        "bytes 0-9/10, 0-9/10",
        "bytes 0-99999999999999999999/99999999999999999999",
    ],
)
async def test_a_content_range_that_makes_no_sense_is_refused(api: Api, content_range: str) -> None:
    answer = await api.ask("PUT", sha(b"x" * 10), body=b"x" * 10, Content_Range=content_range)

    assert problem(answer)["status"] == 400


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50))
def test_a_content_range_is_believed_only_if_it_fits(first: int, last: int, total: int) -> None:
    def understood() -> bool:
        try:
            announced = announced_body(f"bytes {first}-{last}/{total}", last - first + 1)
        except Problem:
            return False
        assert (announced.start, announced.total) == (first, total)
        return True

    assert understood() == (first <= last < total)


async def test_a_chunked_part_must_have_the_length_it_announced(api: Api) -> None:
    data = content(1000)

    async def pieces(upto: int) -> AsyncIterator[bytes]:
        yield data[:upto]

    short = await api.ask("PUT", sha(data), body=pieces(300), Content_Range="bytes 0-499/1000")
    assert problem(short)["status"] == 400
    assert await api.offset(data) == 300
    long = await api.ask("PUT", sha(data), body=pieces(701), Content_Range="bytes 300-999/1000")
    assert problem(long)["status"] == 400
    assert await api.resume(data) == 201


async def test_what_one_owner_uploads_another_cannot_spoil(api: Api) -> None:
    data = content(1000)
    await api.part(data, 0, 500, owner="alice")

    assert await api.offset(data, owner="mallory") == 0
    status, _, _ = await api.ask("PUT", sha(data), body=b"y" * 1000, owner="mallory")
    assert status == 422
    assert await api.resume(data) == 201


async def test_uploads_of_one_blob_at_the_same_time_all_end_well(api: Api) -> None:
    data = content(4 * MB)

    async def slowly() -> AsyncIterator[bytes]:
        for at in range(0, len(data), 64 * 1024):
            yield data[at : at + 64 * 1024]

    answers = await asyncio.gather(
        *(api.ask("PUT", sha(data), owner=f"owner {n}", body=slowly()) for n in range(6))
    )

    assert {status for status, _, _ in answers} <= {200, 201}
    assert api.blobs.path(sha(data)).read_bytes() == data


async def test_one_owners_newer_request_takes_the_upload_over(api: Api) -> None:
    data = content(2 * MB)
    started, go_on = asyncio.Event(), asyncio.Event()

    async def stuck() -> AsyncIterator[bytes]:
        yield data[: 512 * 1024]
        started.set()
        await go_on.wait()
        yield data[512 * 1024 :]

    old = asyncio.create_task(api.ask("PUT", sha(data), body=stuck()))
    await started.wait()
    # The old connection has died without a word; the client comes back on a new one.
    while (await api.offset(data)) < 512 * 1024:
        pass
    assert await api.part(data, 512 * 1024, MB) == (202, MB)
    go_on.set()
    status, headers, _ = await old

    assert status == 409
    assert headers["Upload-Offset"] == str(MB)
    assert (await api.part(data, MB, 2 * MB))[0] == 201
    assert api.blobs.path(sha(data)).read_bytes() == data


async def test_an_upload_cut_in_the_middle_goes_on(
    api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    data = content(6 * MB)
    _, writer = await raw(
        api.port, f"PUT /v1/blobs/{sha(data)} HTTP/1.1\nContent-Length: {len(data)}\n"
    )
    writer.write(data[: 4 * MB])
    await writer.drain()
    while not await api.offset(data):
        pass
    writer.transport.abort()

    assert 0 < await api.offset(data) <= 4 * MB
    assert await api.resume(data) == 201
    assert api.blobs.path(sha(data)).read_bytes() == data
    assert [entry for entry in caplog.records if entry.levelname == "ERROR"] == []


async def test_who_sends_nothing_is_cut_off_and_what_came_is_kept(tmp_path: Path) -> None:
    data = content(1000)
    blobs = Blobs(tmp_path, reserve_bytes=0, stall_s=0.05)
    runner = await serve(blobs)
    reader, writer = await raw(
        runner.addresses[0][1],
        f"PUT /v1/blobs/{sha(data)} HTTP/1.1\nContent-Length: {len(data)}\n",
    )
    writer.write(data[:400])
    answer = await reader.readuntil(b"\r\n\r\n")
    writer.transport.abort()
    await runner.cleanup()
    blobs.close()

    assert answer.startswith(b"HTTP/1.1 408")
    (part,) = (tmp_path / "parts").iterdir()
    assert part.read_bytes() == data[:400]


async def test_who_takes_nothing_is_cut_off_without_an_alarm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data = content(32 * MB)
    blobs = Blobs(tmp_path, stall_s=0.05)
    blob = await blobs.add(data)
    send, ended = blobs.get, asyncio.Event()

    async def get(request: web.Request, sha256: str) -> web.StreamResponse:
        try:
            return await send(request, sha256)
        finally:
            ended.set()

    monkeypatch.setattr(blobs, "get", get)
    runner = await serve(blobs)
    reader, writer = await raw(runner.addresses[0][1], f"GET /v1/blobs/{blob.sha256} HTTP/1.1\n")
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    await ended.wait()
    writer.transport.resume_reading()  # type: ignore[attr-defined]

    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await reader.readexactly(len(data))
    writer.transport.abort()
    await runner.cleanup()
    blobs.close()
    assert [entry for entry in caplog.records if entry.levelname == "ERROR"] == []


def test_an_upload_survives_the_death_of_the_broker(tmp_path: Path) -> None:
    data = content(4 * MB)
    with process(tmp_path) as server:
        first = Answer(
            server.port, "PUT", sha(data), data[:MB], Content_Range=f"bytes 0-{MB - 1}/{4 * MB}"
        )
        assert first.status == 202
        second = http.client.HTTPConnection("127.0.0.1", server.port)
        second.putrequest("PUT", f"/v1/blobs/{sha(data)}")
        second.putheader("Content-Range", f"bytes {MB}-{4 * MB - 1}/{4 * MB}")
        second.putheader("Content-Length", str(3 * MB))
        second.endheaders(data[MB : 3 * MB])
        while int(Answer(server.port, "HEAD", sha(data)).headers["Upload-Offset"]) == MB:
            pass
        server.kill()
        server.wait(timeout=10)
        second.close()
    with process(tmp_path) as server:
        at = int(Answer(server.port, "HEAD", sha(data)).headers["Upload-Offset"])
        assert MB < at <= 3 * MB
        rest = Answer(
            server.port,
            "PUT",
            sha(data),
            data[at:],
            Content_Range=f"bytes {at}-{4 * MB - 1}/{4 * MB}",
        )
        assert rest.status == 201
        assert Answer(server.port, "GET", sha(data)).body == data


def test_a_part_damaged_while_the_broker_was_down_is_found_out(tmp_path: Path) -> None:
    data = content(MB)
    half = MB // 2
    with process(tmp_path) as server:
        Answer(server.port, "PUT", sha(data), data[:half], Content_Range=f"bytes 0-{half - 1}/{MB}")
    (part,) = (tmp_path / "parts").iterdir()
    part.write_bytes(bytes(half))
    with process(tmp_path) as server:
        rest = Answer(
            server.port, "PUT", sha(data), data[half:], Content_Range=f"bytes {half}-{MB - 1}/{MB}"
        )
        assert rest.status == 422
        assert Answer(server.port, "HEAD", sha(data)).headers["Upload-Offset"] == "0"
        assert Answer(server.port, "PUT", sha(data), data).status == 201


def test_more_idle_uploads_than_are_remembered_are_read_again(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path, known=2)
    parts = {name: content(50, seed=name) for name in range(5)}
    for data in parts.values():
        with uploads.of(sha(data), "alice") as upload:
            upload.append(upload.begin(0), [data[:20]])
    for data in parts.values():
        assert uploads.offset(sha(data), "alice") == 20
        with uploads.of(sha(data), "alice") as upload:
            turn = upload.begin(20)
            upload.append(turn, [data[20:]])
            upload.finish(turn, sha(data), tmp_path / f"{sha(data)}.whole")

    assert {file.read_bytes() for file in tmp_path.glob("*.whole")} == set(parts.values())
    assert {file.suffix for file in tmp_path.iterdir()} == {".whole"}


@pytest.mark.parametrize("found", [b"only 5", b"more than was ever written here" * 9])
def test_a_part_that_somebody_touched_never_becomes_a_wrong_blob(
    tmp_path: Path, found: bytes
) -> None:
    uploads, data, whole = Uploads(tmp_path), content(100), tmp_path / "whole"
    with uploads.of(sha(data), "alice") as upload:
        upload.append(upload.begin(0), [data[:50]])
        if len(found) < 50:
            upload.path.write_bytes(found)
            with pytest.raises(Problem, match="stands at 6"):
                upload.begin(50)
        else:
            upload.path.write_bytes(data[:50] + found)
            turn = upload.begin(50)
            upload.append(turn, [data[50:]])
            upload.finish(turn, sha(data), whole)
            assert whole.read_bytes() == data


def test_who_comes_too_late_writes_nothing(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path)
    with uploads.of(sha(b"x"), "alice") as upload:
        late = upload
    with pytest.raises(Problem, match="taken over"):
        late.begin(None)
    assert list(tmp_path.iterdir()) == []


# Ranges


@given(st.binary(min_size=1, max_size=40), st.integers(0, 60), st.integers(0, 60) | st.none())
def test_a_range_is_a_slice(data: bytes, first: int, last: int | None) -> None:
    header = f"bytes={first}-{'' if last is None else last}"
    expected = data[first:] if last is None else data[first : last + 1]
    if not expected:
        with pytest.raises(Problem) as refused:
            requested_range(header, len(data))
        assert refused.value.status == 416
        assert refused.value.headers["Content-Range"] == f"bytes */{len(data)}"
    else:
        part = requested_range(header, len(data))
        assert part is not None
        assert data[part.start : part.stop] == expected


@given(st.binary(min_size=1, max_size=40), st.integers(1, 60))
def test_a_suffix_is_the_end_of_the_blob(data: bytes, length: int) -> None:
    part = requested_range(f"bytes=-{length}", len(data))

    assert part is not None
    assert data[part.start : part.stop] == data[-length:]


@given(st.text(max_size=30) | st.text("0123456789-,= ", max_size=12), st.integers(0, 100))
def test_no_header_makes_a_range_outside_the_blob(text: str, size: int) -> None:
    with suppress(Problem):
        part = requested_range(f"bytes={text}", size)
        assert part is None or 0 <= part.start < part.stop <= size


@settings(max_examples=40, deadline=None)
@given(first=st.integers(0, 600_000), length=st.integers(1, 600_000))
def test_ranges_over_http_are_slices(port: int, first: int, length: int) -> None:
    data = content(600_000)
    if Answer(port, "HEAD", sha(data)).status == 404:
        assert Answer(port, "PUT", sha(data), data).status == 201
    answer = Answer(port, "GET", sha(data), Range=f"bytes={first}-{first + length - 1}")
    expected = data[first : first + length]

    if expected:
        assert answer.status == 206
        assert answer.body == expected
        last = first + len(expected) - 1
        assert answer.headers["Content-Range"] == f"bytes {first}-{last}/600000"
    else:
        assert answer.status == 416
        assert answer.headers["Content-Range"] == "bytes */600000"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"If_Match": '"{sha}"'}, 200),
        ({"If_Match": "*"}, 200),
        ({"If_Match": '"other"'}, 412),
        ({"If_Match": 'W/"{sha}"'}, 412),
        ({"If_None_Match": '"{sha}"'}, 304),
        ({"If_None_Match": 'W/"{sha}"'}, 304),
        ({"If_None_Match": '"other"'}, 200),
        ({"Range": "bytes=0-3", "If_Range": '"{sha}"'}, 206),
        ({"Range": "bytes=0-3", "If_Range": '"other"'}, 200),
        ({"Range": "bytes=900-", "If_Range": '"other"'}, 200),
        ({"Range": "bytes=0-3", "If_Range": "Wed, 21 Oct 2015 07:28:00 GMT"}, 200),
        ({"Range": "bytes=0-3", "If_Match": '"other"'}, 412),
        ({"Range": "bytes=0-3,5-6"}, 200),
        ({"Range": "lines=0-3"}, 200),
        ({"Range": "bytes=3-0"}, 416),
        ({"Range": "bytes=-0"}, 416),
        ({"Range": "bytes=x"}, 416),
    ],
)
async def test_conditions_decide_what_is_sent(
    api: Api, headers: dict[str, str], status: int
) -> None:
    data = content(100)
    await api.put(data)
    sent = {name: value.replace("{sha}", sha(data)) for name, value in headers.items()}

    answer = await api.ask("GET", sha(data), **sent)

    assert answer[0] == status
    assert answer[2] == {200: data, 206: data[:4], 304: b""}.get(status, answer[2])
    if status > 400:
        problem(answer)


async def test_a_blob_deleted_under_a_reader_is_read_to_its_end(api: Api) -> None:
    data = content(8 * MB)
    blob = await api.blobs.add(data)
    reader, writer = await raw(
        api.port, f"GET /v1/blobs/{blob.sha256} HTTP/1.1\nConnection: close\n"
    )
    head = await reader.readuntil(b"\r\n\r\n")
    api.blobs.release(blob.sha256, "broker")
    assert await api.blobs.discard(blob.sha256)

    assert head.startswith(b"HTTP/1.1 200")
    assert await reader.readexactly(len(data)) == data
    writer.close()


async def test_a_file_that_lost_its_end_never_looks_whole(
    api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    data = content(4 * MB)
    await api.put(data)
    reader, writer = await raw(api.port, f"GET /v1/blobs/{sha(data)} HTTP/1.1\n")
    await reader.readuntil(b"\r\n\r\n")
    os.truncate(api.blobs.path(sha(data)), MB)

    # What is on the way already may still come, but not all of it.
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await reader.readexactly(len(data))
    writer.transport.abort()
    assert "in the middle of the answer" in caplog.text


# What may go


async def test_a_claim_keeps_a_blob_until_it_is_released_or_runs_out(tmp_path: Path) -> None:
    clock = Clock()
    blobs = Blobs(tmp_path, clock=clock)
    blob = await blobs.add(b"model", owner="run 1")
    blobs.claim(blob.sha256, "run 2")

    blobs.release(blob.sha256, "run 1")
    assert not await blobs.discard(blob.sha256)
    clock.now += CLAIM_S - 1
    assert not await blobs.discard(blob.sha256)
    clock.now += 1
    assert await blobs.discard(blob.sha256)
    assert blobs.size(blob.sha256) is None
    assert not await blobs.discard(blob.sha256)
    assert list((tmp_path / "trash").iterdir()) == []
    blobs.close()


async def test_an_upload_is_claimed_for_its_owner(api: Api) -> None:
    data = content(10)
    for _ in range(2):  # the second finds it here already
        await api.put(data, owner="bob")
        assert not await api.blobs.discard(sha(data))
        api.blobs.release(sha(data), "bob")
    assert await api.blobs.discard(sha(data))


async def test_claims_that_ran_out_take_no_memory(tmp_path: Path) -> None:
    clock = Clock()
    blobs = Blobs(tmp_path, clock=clock)
    for n in range(3000):
        blobs.claim(sha(b"%d" % n), "alice")
        clock.now += 1
    assert len(blobs._claims) < 2000
    blobs.close()


async def test_a_sweep_takes_what_nothing_refers_to(tmp_path: Path) -> None:
    clock = Clock()
    blobs = Blobs(tmp_path, clock=clock)
    kept, lost = await blobs.add(b"kept"), await blobs.add(b"lost")
    clock.now += CLAIM_S
    fresh = await blobs.add(b"fresh")
    uploads = tmp_path / "parts"
    old, young = uploads / f"{sha(b'old')}.0", uploads / f"{sha(b'young')}.0"
    for part in (old, young):
        part.write_bytes(b"12345")
    os.utime(old, (1, 1))
    (tmp_path / "trash" / "half deleted").write_bytes(b"")

    assert await blobs.sweep(lambda: referencing(kept.sha256)) == Swept(1, 1, 9)
    assert [blobs.size(b.sha256) for b in (kept, lost, fresh)] == [4, None, 5]
    assert list(uploads.iterdir()) == [young]
    assert list((tmp_path / "trash").iterdir()) == []
    blobs.close()


async def test_a_sweep_spares_what_is_claimed_and_referred_to_while_it_runs(
    tmp_path: Path,
) -> None:
    clock = Clock()
    blobs = Blobs(tmp_path, clock=clock)
    await blobs.add(b"before")
    clock.now += CLAIM_S
    await blobs.add(b"after")
    clock.now += 1

    async def while_transactions_commit() -> Collection[str]:
        # The answer is taken; then two transactions commit and release their claims.
        await blobs.add(b"before", owner="run")
        for data, owner in ((b"before", "run"), (b"after", "broker")):
            blobs.release(sha(data), owner)
        return set()

    assert await blobs.sweep(while_transactions_commit) == Swept(0, 0, 0)
    assert (await blobs.sweep(referencing)).blobs == 2
    blobs.close()


async def test_a_sweep_leaves_running_uploads_alone(api: Api, tmp_path: Path) -> None:
    data = content(MB)
    started, go_on = asyncio.Event(), asyncio.Event()

    async def halting() -> AsyncIterator[bytes]:
        yield data[: MB // 2]
        started.set()
        await go_on.wait()
        yield data[MB // 2 :]

    upload = asyncio.create_task(api.ask("PUT", sha(data), body=halting()))
    await started.wait()
    while not await api.offset(data):
        pass
    swept = await api.blobs.sweep(referencing, parts_older_than_s=-60)
    go_on.set()

    assert swept.parts == 0
    assert (await upload)[0] == 201


async def test_an_idle_upload_that_was_swept_begins_anew(api: Api) -> None:
    data = content(1000)
    await api.part(data, 0, 400)
    assert (await api.blobs.sweep(referencing, parts_older_than_s=-60)).parts == 1

    assert await api.part(data, 400, 1000) == (409, 0)
    assert await api.resume(data) == 201


# Files of our own


async def test_a_finished_file_is_moved_in(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "blobs")
    file = tmp_path / "package"
    file.write_bytes(b"content")
    inode = file.stat().st_ino

    blob = await blobs.adopt(file)

    assert (blob.sha256, blob.size) == (sha(b"content"), 7)
    assert blobs.path(blob.sha256).stat().st_ino == inode
    assert not file.exists()
    with pytest.raises(FileNotFoundError):
        await blobs.adopt(file)
    file.write_bytes(b"content")
    assert await blobs.adopt(file) == blob
    assert blobs.path(blob.sha256).stat().st_ino == inode
    assert await blobs.adopt(blobs.path(blob.sha256)) == blob
    assert blobs.path(blob.sha256).read_bytes() == b"content"
    blobs.close()


@pytest.mark.skipif(
    not Path("/dev/shm").is_dir() or Path("/dev/shm").stat().st_dev == Path("/tmp").stat().st_dev,
    reason="needs two file systems",
)
async def test_a_file_on_another_disk_is_copied_in(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    file = Path("/dev/shm") / f"fedml-test-{os.getpid()}"
    data = content(MB)
    file.write_bytes(data)
    try:
        blob = await blobs.adopt(file)
        assert not file.exists()
    finally:
        file.unlink(missing_ok=True)
    assert blobs.path(blob.sha256).read_bytes() == data
    assert list((tmp_path / "parts").iterdir()) == []
    blobs.close()


async def test_a_file_that_changes_while_it_is_copied_in_is_refused(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "blobs")
    file = tmp_path / "file"
    file.write_bytes(b"after")

    with pytest.raises(ValueError, match="changed"):
        blobs._copy_in(file, sha(b"before"))
    assert blobs.size(sha(b"before")) is None
    assert file.exists()
    blobs.close()


async def test_a_link_or_a_pipe_is_not_adopted(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "blobs")
    (tmp_path / "link").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "pipe")

    with pytest.raises(OSError, match="symbolic links"):
        await blobs.adopt(tmp_path / "link")
    with pytest.raises(ValueError, match="not a regular file"):
        await blobs.adopt(tmp_path / "pipe")
    blobs.close()


# Full disks


async def test_an_upload_stops_at_the_reserve(tmp_path: Path) -> None:
    data = content(1000)
    blobs = Blobs(tmp_path, reserve_bytes=1 << 60)
    runner = await serve(blobs)

    answer = await asyncio.to_thread(Answer, runner.addresses[0][1], "PUT", sha(data), data)
    await runner.cleanup()
    blobs.close()

    told = json.loads(answer.body)
    assert answer.status == told["status"] == 507
    assert "stay free" in told["detail"]
    assert "more disk" in told["hint"]


def can_mount() -> bool:
    return (
        os.geteuid() == 0 and not subprocess.run(["unshare", "-m", "true"], check=False).returncode
    )


@pytest.mark.skipif(not can_mount(), reason="needs root, to mount a small disk")
@pytest.mark.parametrize("reserve", [0, -(1 << 60)], ids=["foreseen", "ENOSPC"])
def test_a_disk_that_fills_up_keeps_what_came(tmp_path: Path, reserve: int) -> None:
    data = content(6 * MB)
    script = 'mount -t tmpfs -o size=8m none "$0" && exec "$@"'
    prefix = ("unshare", "-m", "sh", "-c", script, str(tmp_path))
    with process(tmp_path, prefix=prefix, reserve=reserve) as server:
        # What the server sees: its mount is private.
        disk = Path(f"/proc/{server.pid}/root{tmp_path}")
        (disk / "filler").write_bytes(bytes(5 * MB))

        chunked = Answer(server.port, "PUT", sha(data), iter([data]))
        assert chunked.status == 507
        assert json.loads(chunked.body)["hint"]
        at = int(chunked.headers["Upload-Offset"])
        assert 2 * MB < at <= 3 * MB

        (disk / "filler").unlink()
        assert Answer(server.port, "HEAD", sha(data)).headers["Upload-Offset"] == str(at)
        rest = Answer(
            server.port,
            "PUT",
            sha(data),
            data[at:],
            Content_Range=f"bytes {at}-{6 * MB - 1}/{6 * MB}",
        )
        assert rest.status == 201
        assert Answer(server.port, "GET", sha(data)).body == data


# The event loop, and TLS


async def test_hashing_and_syncing_leave_the_loop_free(tmp_path: Path) -> None:
    data = content(48 * MB)
    (tmp_path / "file").write_bytes(data)
    identity = Identity.open(tmp_path / "identity")
    blobs = Blobs(tmp_path / "blobs", reserve_bytes=0)
    runner = await serve(blobs, identity.server_context())
    url = f"https://localhost:{runner.addresses[0][1]}/v1/blobs/{sha(data)}"

    async def longest_turn(*arguments: object) -> float:
        """CPU seconds that the loop's thread spent in one go (its wall clock has neighbours)."""
        client = await asyncio.create_subprocess_exec(
            *("curl", "-sS", "--cacert", str(identity.ca_file), *map(str, arguments), url)
        )
        running = asyncio.create_task(client.wait())
        turns = []
        while not running.done():
            before = time.thread_time()
            await asyncio.sleep(0)
            turns.append(time.thread_time() - before)
        assert running.result() == 0
        return max(turns)

    coming = await longest_turn("-T", tmp_path / "file", "-o", tmp_path / "answer")
    going = await longest_turn("-o", tmp_path / "got")
    again = await longest_turn("-T", tmp_path / "file", "-o", tmp_path / "answer")
    await runner.cleanup()
    blobs.close()

    assert (tmp_path / "got").read_bytes() == data
    before = time.thread_time()
    sha(data)
    hashing = time.thread_time() - before  # on this machine, as busy as it is
    assert max(coming, going, again) < 0.6 * hashing


# Problems


class Wanted(msgspec.Struct):
    count: int


async def fail(error: Exception) -> tuple[int, Any, bytes]:
    """What a client sees of a route that raises `error`."""

    async def route(_request: web.Request) -> web.StreamResponse:
        raise error

    app = web.Application(middlewares=[as_problems])
    app.router.add_get("/", route)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/"
    async with (
        aiohttp.ClientSession() as session,
        session.get(url, allow_redirects=False) as answer,
    ):
        seen = answer.status, answer.headers, await answer.read()
    await runner.cleanup()
    return seen


def invalid() -> Exception:
    try:
        msgspec.json.decode(b'{"count": "many"}', type=Wanted)
    except msgspec.ValidationError as error:
        return error
    raise AssertionError


@pytest.mark.parametrize(
    ("error", "status", "detail"),
    [
        (Problem(418, "A teapot", "short and stout", "pour"), 418, "short and stout"),
        (invalid(), 400, "$.count"),
        (MalformedMessage("no such id"), 400, "no such id"),
        (web.HTTPForbidden(text="not yours"), 403, "not yours"),
    ],
)
async def test_each_error_is_told_as_a_problem(error: Exception, status: int, detail: str) -> None:
    answer = await fail(error)

    told = problem(answer)
    assert (answer[0], told["type"]) == (status, "about:blank")
    assert detail in told["detail"]


async def test_an_unexpected_error_is_logged_under_the_reference_that_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    answer = await fail(RuntimeError("the password is 1234"))

    told = problem(answer)
    assert answer[0] == 500
    assert b"1234" not in answer[2]
    reference = told["detail"].removeprefix("reference ")
    assert reference in caplog.text
    assert "the password is 1234" in caplog.text


async def test_what_http_needs_beside_the_body_is_kept(api: Api) -> None:
    answer = await api.ask("DELETE", sha(b"x"))

    assert problem(answer)["status"] == 405
    assert set(answer[1]["Allow"].split(",")) == {"GET", "HEAD", "PUT"}


async def test_a_redirect_is_no_problem() -> None:
    status, headers, _ = await fail(web.HTTPFound("/there"))

    assert (status, headers["Location"]) == (302, "/there")
    assert "problem" not in headers["Content-Type"]
