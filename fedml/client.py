# SPDX-License-Identifier: Apache-2.0
"""HTTP to the broker: JSON calls, blobs by hash, and the stream of a run."""

import contextlib
import copy
import hashlib
import json
import secrets
import socket
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlencode

import urllib3
from urllib3.exceptions import HTTPError, NewConnectionError, SSLError

from fedml import session
from fedml.errors import BrokerRefused, BrokerUnreachable
from fedml.session import Session
from fedml.traces import traced

# Called with how many bytes have been moved so far, and how many there are.
Told = Callable[[int, int], None]


def silent(done: int, total: int) -> None:
    """Nobody watches."""


_CHUNK = 1024 * 1024
_RESUMPTIONS = 20
_ASKED_TOGETHER = 10_000
_IDLE_CONNECTIONS = 8
# A followed run may be silent for hours; a peer that is gone is noticed in a minute all the same.
_KEEP_ALIVE = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
]


class Seen:
    """How far somebody has followed a run.

    Attributes:
        event: Id of the newest event.
    """

    def __init__(self, starts: str = "") -> None:
        """`starts`: what of logs is known, `TASK.EPOCH.STREAM:OFFSET,…`."""
        self.event = 0
        self.starts = starts
        self._logs: dict[tuple[str, int, str], int] = {}

    def is_new(self, item: dict[str, Any]) -> bool:
        """Note an item of the stream; False when it has been told before.

        After a cut the logs begin anew, in other pieces: what was told is cut off the item.
        """
        if "event" in item:
            self.event = item["event"]["id"]
        if "log" not in item:
            return True
        log = item["log"]
        key = (log["task"], log["epoch"], log["stream"])
        told = self._logs.get(key, 0)
        if log["end"] <= told:
            return False
        if log["offset"] < told:
            # By bytes, as offsets are; only where a program printed no UTF-8 it is off by a few.
            rest = log["text"].encode()[told - log["offset"] :]
            log.update(offset=told, text=rest.decode(errors="replace"))
        self._logs[key] = log["end"]
        return True


class Severed(Exception):
    """Whoever waited for this has gone: `Client.sever`."""


class Client:
    """One person's connection to one broker; threads may share it."""

    def __init__(self, session: Session, *, connect_s: float = 10.0, read_s: float = 60.0) -> None:
        self.url = session.url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {session.token}"}
        self._pool = urllib3.PoolManager(
            ssl_context=session.context(),
            retries=False,
            timeout=urllib3.Timeout(connect=connect_s, read=read_s),
            socket_options=_KEEP_ALIVE,
            maxsize=_IDLE_CONNECTIONS,
        )
        self._severed = threading.Event()
        self._streams: set[urllib3.BaseHTTPResponse] = set()

    def severable(self) -> Self:
        """The same connection for one call, which `sever` ends from another thread."""
        other = copy.copy(self)
        other._severed, other._streams = threading.Event(), set()
        return other

    def sever(self) -> None:
        """Nobody waits any more: what goes on through this client ends with `Severed`."""
        self._severed.set()
        for response in tuple(self._streams):
            with contextlib.suppress(OSError, ValueError):  # it has just ended by itself
                response.shutdown()

    def call(self, method: str, path: str, body: object = None) -> Any:
        """One question and its answer.

        Raises:
            BrokerUnreachable: No answer.
            BrokerRefused: The answer is an error.
        """
        data = None if body is None else json.dumps(body).encode()
        return json.loads(self._ask(method, path, data, {}).data)

    def submit(self, word: str, request: dict[str, Any]) -> str:
        """Start a run (`launch`, `federate`); its id.

        A broker that goes away while it is asked is asked again, and starts the run once: its id
        is chosen here.

        Raises:
            BrokerUnreachable: Nobody listens there, or it did not come back.
            BrokerRefused: The run cannot be.
        """
        request = {"run": "r-" + secrets.token_hex(5), **request}
        with traced(word, request["run"]) as headers:
            return str(self.post_once(f"/v1/{word}", request, headers)["run"])

    def submit_workflow(self, request: dict[str, Any]) -> str:
        """Start a workflow; its id. As with `submit`, it is started once, and raises the same."""
        request = {"workflow": "w-" + secrets.token_hex(5), **request}
        return str(self.post_once("/v1/workflows", request)["workflow"])

    def post_once(
        self, path: str, body: dict[str, Any], headers: dict[str, str] | None = None
    ) -> Any:
        """The answer to a request that has an effect once, as the id in its body is chosen here.

        Raises:
            BrokerUnreachable: Nobody listens there, or it did not come back.
            BrokerRefused: The answer is an error.
        """
        for attempt in range(_RESUMPTIONS):
            try:
                answer = self._ask("POST", path, json.dumps(body).encode(), headers or {})
                return json.loads(answer.data)
            except BrokerUnreachable as error:
                never_heard = isinstance(error.__cause__, NewConnectionError)
                if attempt == _RESUMPTIONS - 1 or (never_heard and not attempt):
                    raise
                self._pause(min(0.2 * (attempt + 1), 3.0))
        raise AssertionError("unreachable")

    def follow(
        self,
        run: str,
        *,
        of: str = "runs",
        logs: bool = True,
        stay: bool = True,
        seen: Seen | None = None,
    ) -> Generator[dict[str, Any], None, None]:
        """Everything of a run as it happens; a cut stream goes on where it stopped.

        Args:
            run: Its id.
            of: What it is the id of: `runs`, or `workflows` (which have no logs of their own).
            logs: What its tasks print, too.
            stay: Until the run has ended; otherwise only what there is by now.
            seen: Kept up to date; given again to a second call, nothing is told twice.

        Yields:
            ``{"event": …}``, ``{"log": …}``, ``{"waiting": …}``, and at last ``{"end": run}``.

        Raises:
            BrokerUnreachable: The broker has not answered for a minute.
        """
        seen, failures = seen or Seen(), 0
        while True:
            try:
                for item in self._stream(f"{of}/{run}", seen, logs, stay):
                    failures = 0
                    if seen.is_new(item):
                        yield item
                    if "end" in item:
                        return
            except (HTTPError, OSError, BrokerUnreachable) as error:
                failures += 1
                if failures > 30:
                    raise BrokerUnreachable(
                        f"{self.url} does not answer any more: {error}",
                        "what runs goes on without it; later: "
                        + f"`fedml {'run logs -f' if of == 'runs' else 'workflow status'} {run}`",
                    ) from error
                self._pause(min(0.2 * failures, 3.0))

    def _stream(self, what: str, seen: Seen, logs: bool, stay: bool) -> Iterator[dict[str, Any]]:
        path = f"/v1/{what}/follow?after={seen.event}&logs={int(logs)}&stay={int(stay)}"
        if seen.starts:
            path += f"&from={seen.starts}"
        # No read time-out: a run may be silent for hours.
        timeout = urllib3.Timeout(connect=10, read=None)
        response = self._ask("GET", path, None, {}, preload=False, timeout=timeout)
        rest = b""
        with self._reading(response):
            while data := response.read1():
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    yield json.loads(line)
        raise BrokerUnreachable("the stream ended early")

    def logs(self, run: str, **query: str | float) -> dict[str, Any]:
        """Lines of a run's logs: `GET /v1/runs/{run}/logs` with what is not empty of the query."""
        asked = urlencode({name: value for name, value in query.items() if value != ""})
        found: dict[str, Any] = self.call("GET", f"/v1/runs/{run}/logs?{asked}")
        return found

    def put_records(self, run: str, offset: int, data: bytes) -> int:
        """Hand over records of a tracked run; up to which byte the broker has them now."""
        path = f"/v1/runs/{run}/records?offset={offset}"
        return int(json.loads(self._ask("PUT", path, data, {}).data)["size"])

    def has(self, sha256: str) -> bool:
        """Whether the broker has a blob."""
        return self._head(sha256).status == 200

    def lacks(self, blobs: Sequence[str]) -> dict[str, int]:
        """Which blobs the broker does not have whole, each with the bytes that it has of it."""
        found: dict[str, int] = {}
        for at in range(0, len(blobs), _ASKED_TOGETHER):
            asked = {"blobs": blobs[at : at + _ASKED_TOGETHER]}
            found |= self.call("POST", "/v1/blobs/missing", asked)["missing"]
        return found

    def upload(self, file: Path, told: Told = silent) -> dict[str, Any]:
        """Put a file; what the broker has of it is not sent again. Gives ``{"sha256", "size"}``."""
        with file.open("rb") as data:
            sha256 = hashlib.file_digest(data, "sha256").hexdigest()
        size = file.stat().st_size
        lacks = self.lacks([sha256])
        if lacks:
            self.put(sha256, size, lambda start: _read(file, start), told, start=lacks[sha256])
        else:
            told(size, size)
        return {"sha256": sha256, "size": size}

    def put(
        self,
        sha256: str,
        size: int,
        read: Callable[[int], Iterator[bytes]],
        told: Told = silent,
        *,
        start: int = 0,
    ) -> None:
        """Put a blob; a cut transfer goes on where it stopped.

        Args:
            read: Gives its bytes from a place on.
            start: So many bytes the broker has already.

        Raises:
            BrokerUnreachable: The broker went away and did not come back.
            BrokerRefused: It says no.
        """
        for attempt in range(_RESUMPTIONS):
            start = min(start, max(size - 1, 0))
            headers = {"Content-Length": str(size - start)}
            if start:
                headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
            try:
                body = self._counted(read(start), start, size, told)
                self._ask("PUT", f"/v1/blobs/{sha256}", body, headers)
                return
            except _ElsewhereByNow as error:  # the rest of a part that was cut has come meanwhile
                if attempt == _RESUMPTIONS - 1:
                    raise
                start = error.offset
            except BrokerUnreachable as error:
                found = self._uploaded(sha256) if attempt < _RESUMPTIONS - 1 else None
                if found is None:
                    raise BrokerUnreachable(
                        f"the upload was cut off: {error}",
                        "what has come is kept there: the same command goes on from there",
                    ) from error
                if found.status == 200:  # only the answer was lost
                    return
                start = int(found.headers.get("Upload-Offset", 0))

    def _uploaded(self, sha256: str) -> urllib3.BaseHTTPResponse | None:
        """How much of an upload is there; None: the broker did not come back within a minute."""
        for attempt in range(_RESUMPTIONS):
            with contextlib.suppress(BrokerUnreachable):
                return self._head(sha256)
            self._pause(min(0.1 * attempt, 3.0))
        return None

    def read(self, sha256: str) -> bytes:
        """A small blob, whole.

        Raises:
            BrokerRefused: It is not there, or other bytes came.
            BrokerUnreachable: No answer.
        """
        data: bytes = self._ask("GET", f"/v1/blobs/{sha256}", None, {}).data
        if hashlib.sha256(data).hexdigest() != sha256:
            raise BrokerRefused(f"the bytes that came as {sha256} are others")
        return data

    def download(self, sha256: str, into: Path, told: Told = silent) -> None:
        """Get a blob into a file; a cut transfer goes on where it stopped, also the next time.

        Raises:
            BrokerRefused: It is not there, or other bytes came.
            BrokerUnreachable: The broker went away and did not come back.
        """
        part = into.with_name(f".{into.name}.{sha256[:12]}.part")
        with part.open("a+b") as file:
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256")
            try:
                self._fetch(sha256, file, digest, told)
            except BrokerRefused:
                part.unlink()
                raise
        if digest.hexdigest() != sha256:
            part.unlink()
            raise BrokerRefused(f"the bytes that came as {sha256} are others")
        part.replace(into)

    def _fetch(self, sha256: str, file: Any, digest: Any, told: Told) -> None:
        """Append to what the file holds, of which `digest` is, until the blob is whole."""
        failures, size = 0, file.tell()
        if size:  # of a whole one there is no rest to be asked for
            head = self._head(sha256)
            if head.status == 200 and int(head.headers["Content-Length"]) <= size:
                return
        while True:
            headers = {"Range": f"bytes={size}-"} if size else {}
            try:
                response = self._ask("GET", f"/v1/blobs/{sha256}", None, headers, preload=False)
                total = size + int(response.headers.get("Content-Length", 0))
                with self._reading(response):
                    # In the pieces that come, not in full ones: a cut loses none of them.
                    while chunk := response.read1(_CHUNK):
                        digest.update(chunk)
                        file.write(chunk)
                        size, failures = size + len(chunk), 0
                        told(size, total)
                    if size >= total:
                        response.release_conn()
                        return
            except (HTTPError, BrokerUnreachable) as error:
                if failures >= _RESUMPTIONS:
                    raise BrokerUnreachable(
                        f"{self.url} does not answer: {error}",
                        "what has come is kept: the same command goes on from there",
                    ) from error
            failures += 1
            self._pause(min(0.1 * (failures - 1), 3.0))

    def _counted(
        self, pieces: Iterator[bytes], done: int, size: int, told: Told
    ) -> Iterator[bytes]:
        for piece in pieces:
            self._pause(0)
            yield piece
            done += len(piece)
            told(done, size)

    def _pause(self, seconds: float) -> None:
        """Let time pass, unless nobody waits any more."""
        if self._severed.wait(seconds):
            raise Severed

    @contextlib.contextmanager
    def _reading(self, response: urllib3.BaseHTTPResponse) -> Iterator[None]:
        self._streams.add(response)
        try:
            self._pause(0)
            yield
        finally:
            self._streams.discard(response)
            response.close()

    def _head(self, sha256: str) -> urllib3.BaseHTTPResponse:
        """Whether a blob is there, or how much of an upload."""
        try:
            return self._pool.request(
                "HEAD", f"{self.url}/v1/blobs/{sha256}", headers=self._headers
            )
        except (HTTPError, OSError) as error:
            raise self._unreachable(error) from error

    def _ask(
        self,
        method: str,
        path: str,
        body: Any,
        headers: dict[str, str],
        *,
        preload: bool = True,
        timeout: urllib3.Timeout | None = None,
    ) -> urllib3.BaseHTTPResponse:
        self._pause(0)
        more: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
        try:
            response = self._pool.request(
                method,
                self.url + path,
                body=body,
                headers={**self._headers, **headers},
                preload_content=preload,
                **more,
            )
        except (HTTPError, OSError) as error:
            raise self._unreachable(error) from error
        if response.status < 400:
            return response
        try:
            problem = json.loads(response.data)
            detail = problem.get("detail", "")
            text = problem["title"] + (f": {detail}" if detail else "")
            hint = problem.get("hint", "")
        except (ValueError, KeyError, TypeError):
            text, hint = f"the broker answered {response.status}", ""
        if response.status == 409 and "Upload-Offset" in response.headers:
            raise _ElsewhereByNow(text, hint, int(response.headers["Upload-Offset"]))
        raise BrokerRefused(text, hint)

    def _unreachable(self, error: Exception) -> BrokerUnreachable | BrokerRefused:
        if isinstance(error, SSLError) and "certificate verify failed" in str(error).lower():
            return BrokerRefused(
                f"who answers at {self.url} is not the broker that you logged in at",
                "somebody may be in between, or it was set up anew: ask its admin for a new key",
            )
        return BrokerUnreachable(
            f"the broker does not answer at {self.url}", "is `fedml-broker up` running there?"
        )


class _ElsewhereByNow(BrokerRefused):
    """An upload does not stand where this part begins."""

    def __init__(self, message: str, hint: str, offset: int) -> None:
        super().__init__(message, hint)
        self.offset = offset


def _read(file: Path, start: int) -> Iterator[bytes]:
    with file.open("rb") as data:
        data.seek(start)
        while chunk := data.read(_CHUNK):
            yield chunk


# A broker: a client of it, a session at it, the home of a login (None: `~/.fedml`).
At = Client | Session | Path | str | None


def at(where: At) -> Client:
    """The broker that is meant: a client of it, a session, or the home of a login.

    Raises:
        NotLoggedIn: That home has none.
    """
    if isinstance(where, Client):
        return where
    if not isinstance(where, Session):
        where = session.load(session.find_home(None if where is None else str(where)))
    return Client(where)
