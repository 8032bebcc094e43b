# SPDX-License-Identifier: Apache-2.0
"""HTTP to the broker: JSON calls, blobs by hash, and the stream of a run."""

import hashlib
import json
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import urllib3
from urllib3.exceptions import HTTPError, NewConnectionError, SSLError

from fedml.errors import BrokerRefused, BrokerUnreachable
from fedml.session import Session

# Called with how many bytes have been moved so far, and how many there are.
Told = Callable[[int, int], None]

_CHUNK = 1024 * 1024
_RESUMPTIONS = 20
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

    def __init__(self) -> None:
        self.event = 0
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


class Client:
    """One person's connection to one broker."""

    def __init__(self, session: Session) -> None:
        self.url = session.url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {session.token}"}
        self._pool = urllib3.PoolManager(
            ssl_context=session.context(),
            retries=False,
            timeout=urllib3.Timeout(connect=10, read=60),
            socket_options=_KEEP_ALIVE,
        )

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
        for attempt in range(_RESUMPTIONS):
            try:
                return str(self.call("POST", f"/v1/{word}", request)["run"])
            except BrokerUnreachable as error:
                never_heard = isinstance(error.__cause__, NewConnectionError)
                if attempt == _RESUMPTIONS - 1 or (never_heard and not attempt):
                    raise
                time.sleep(min(0.2 * (attempt + 1), 3.0))
        raise AssertionError("unreachable")

    def follow(
        self, run: str, *, logs: bool = True, stay: bool = True, seen: Seen | None = None
    ) -> Iterator[dict[str, Any]]:
        """Everything of a run as it happens; a cut stream goes on where it stopped.

        Args:
            run: Its id.
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
                for item in self._stream(run, seen.event, logs, stay):
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
                        f"what runs goes on without it; later: `fedml run logs -f {run}`",
                    ) from error
                time.sleep(min(0.2 * failures, 3.0))

    def _stream(self, run: str, after: int, logs: bool, stay: bool) -> Iterator[dict[str, Any]]:
        path = f"/v1/runs/{run}/follow?after={after}&logs={int(logs)}&stay={int(stay)}"
        # No read time-out: a run may be silent for hours.
        timeout = urllib3.Timeout(connect=10, read=None)
        response = self._ask("GET", path, None, {}, preload=False, timeout=timeout)
        rest = b""
        try:
            while data := response.read1():
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    yield json.loads(line)
        finally:
            response.close()
        raise BrokerUnreachable("the stream ended early")

    def put_records(self, run: str, offset: int, data: bytes) -> int:
        """Hand over records of a tracked run; up to which byte the broker has them now."""
        path = f"/v1/runs/{run}/records?offset={offset}"
        return int(json.loads(self._ask("PUT", path, data, {}).data)["size"])

    def has(self, sha256: str) -> bool:
        """Whether the broker has a blob."""
        return self._head(sha256).status == 200

    def upload(self, file: Path, told: Told = lambda done, total: None) -> dict[str, Any]:
        """Put a file; what the broker has already is not sent. Gives ``{"sha256", "size"}``."""
        with file.open("rb") as data:
            sha256 = hashlib.file_digest(data, "sha256").hexdigest()
        size = file.stat().st_size
        blob = {"sha256": sha256, "size": size}
        if self.has(sha256):
            told(size, size)
            return blob
        start = 0
        for attempt in range(_RESUMPTIONS):
            try:
                headers = {"Content-Length": str(size - start)}
                if start:
                    headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
                with file.open("rb") as data:
                    data.seek(start)
                    body = _read(data, start, size, told)
                    self._ask("PUT", f"/v1/blobs/{sha256}", body, headers)
                return blob
            except BrokerUnreachable:
                if attempt == _RESUMPTIONS - 1:
                    raise
                offset = int(self._head(sha256).headers.get("Upload-Offset", 0))
                start = min(offset, max(size - 1, 0))
        return blob

    def download(
        self,
        sha256: str,
        into: Path,
        told: Told = lambda done, total: None,
        *,
        resume: bool = False,
    ) -> None:
        """Get a blob into a file; a cut transfer goes on where it stopped.

        Args:
            resume: Also one that an earlier process has begun: what has come stays in
                `INTO.SHA256.part`, for the next, when this one fails.

        Raises:
            BrokerRefused: It is not there, or other bytes came.
            BrokerUnreachable: The broker went away and did not come back.
        """
        part = into.with_name(f"{into.name}.{sha256[:12]}.part" if resume else into.name + ".part")
        kept = False
        try:
            with part.open("a+b" if resume else "w+b") as file:
                kept = resume
                found = self._fetch(sha256, file, told)
            if found != sha256:
                raise BrokerRefused(f"the bytes that came as {sha256} are others")
            part.replace(into)
        except BrokerRefused:
            kept = False  # it is gone there, or what is here is not the beginning of it
            raise
        finally:
            if not kept:
                part.unlink(missing_ok=True)

    def _fetch(self, sha256: str, file: Any, told: Told) -> str:
        file.seek(0)
        digest, failures = hashlib.file_digest(file, "sha256"), 0
        done = file.tell()
        while not done or digest.hexdigest() != sha256:
            headers = {"Range": f"bytes={done}-"} if done else {}
            try:
                response = self._ask("GET", f"/v1/blobs/{sha256}", None, headers, preload=False)
                total = done + int(response.headers.get("Content-Length", 0))
                # In the pieces that come, not in full ones: a cut loses none of what was there.
                while chunk := response.read1(_CHUNK):
                    digest.update(chunk)
                    file.write(chunk)
                    done, failures = done + len(chunk), 0
                    told(done, total)
                if done >= total:
                    response.release_conn()
                    return digest.hexdigest()
                response.close()
            except (HTTPError, BrokerUnreachable) as error:
                if failures >= _RESUMPTIONS:
                    raise BrokerUnreachable(f"{self.url} does not answer: {error}") from error
            failures += 1
            time.sleep(min(0.1 * (failures - 1), 3.0))
        return sha256  # an earlier process had got all of it

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


def _read(data: Any, done: int, size: int, told: Told) -> Iterator[bytes]:
    while chunk := data.read(_CHUNK):
        yield chunk
        done += len(chunk)
        told(done, size)
