# SPDX-License-Identifier: Apache-2.0
"""HTTP to the broker: JSON calls, uploads by hash, and the stream of a run."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import urllib3
from urllib3.exceptions import HTTPError

from fedml.errors import BrokerRefused, BrokerUnreachable
from fedml.session import Session

_CHUNK = 1024 * 1024
_RESUMPTIONS = 20


class Client:
    """One person's connection to one broker."""

    def __init__(self, session: Session) -> None:
        self._url = session.url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {session.token}"}
        self._pool = urllib3.PoolManager(
            ssl_context=session.context(),
            retries=False,
            timeout=urllib3.Timeout(connect=10, read=60),
        )

    def call(self, method: str, path: str, body: object = None) -> Any:
        """One question and its answer.

        Raises:
            BrokerUnreachable: No answer.
            BrokerRefused: The answer is an error.
        """
        data = None if body is None else json.dumps(body).encode()
        return json.loads(self._ask(method, path, data, {}).data)

    def follow(self, run: str, *, logs: bool = True) -> Iterator[dict[str, Any]]:
        """Everything of a run as it happens; a cut stream goes on where it stopped.

        Yields:
            ``{"event": …}``, ``{"log": …}``, ``{"waiting": …}``, and at last ``{"end": run}``.

        Raises:
            BrokerUnreachable: The broker has not answered for a minute.
        """
        after, seen, failures = 0, dict[tuple[str, int, str], int](), 0
        while True:
            try:
                for item in self._stream(run, after, logs):
                    failures = 0
                    if "event" in item:
                        after = item["event"]["id"]
                    if "log" in item and not _is_new(item["log"], seen):
                        continue
                    yield item
                    if "end" in item:
                        return
            except (HTTPError, OSError, BrokerUnreachable) as error:
                failures += 1
                if failures > 30:
                    raise BrokerUnreachable(f"{self._url} does not answer: {error}") from error
                time.sleep(min(0.2 * failures, 3.0))

    def _stream(self, run: str, after: int, logs: bool) -> Iterator[dict[str, Any]]:
        path = f"/v1/runs/{run}/follow?after={after}&logs={int(logs)}"
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

    def has(self, sha256: str) -> bool:
        """Whether the broker has a blob."""
        return self._head(sha256).status == 200

    def upload(self, file: Path, told: Callable[[int], None] = lambda _: None) -> dict[str, Any]:
        """Put a file; what the broker has already is not sent. Gives ``{"sha256", "size"}``."""
        with file.open("rb") as data:
            sha256 = hashlib.file_digest(data, "sha256").hexdigest()
        size = file.stat().st_size
        blob = {"sha256": sha256, "size": size}
        if self.has(sha256):
            told(size)
            return blob
        start = 0
        for attempt in range(_RESUMPTIONS):
            try:
                headers = {"Content-Length": str(size - start)}
                if start:
                    headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
                with file.open("rb") as data:
                    data.seek(start)
                    self._ask("PUT", f"/v1/blobs/{sha256}", _read(data, told), headers)
                return blob
            except BrokerUnreachable:
                if attempt == _RESUMPTIONS - 1:
                    raise
                offset = int(self._head(sha256).headers.get("Upload-Offset", 0))
                start = min(offset, max(size - 1, 0))
        return blob

    def download(self, sha256: str, into: Path) -> None:
        """Get a blob into a file.

        Raises:
            BrokerRefused: It is not there, or other bytes came.
        """
        digest = hashlib.sha256()
        response = self._ask("GET", f"/v1/blobs/{sha256}", None, {}, preload=False)
        part = into.with_name(into.name + ".part")
        with part.open("wb") as file:
            for chunk in response.stream(_CHUNK):
                digest.update(chunk)
                file.write(chunk)
        response.release_conn()
        if digest.hexdigest() != sha256:
            part.unlink()
            raise BrokerRefused(f"the bytes that came as {sha256} are others")
        part.replace(into)

    def _head(self, sha256: str) -> urllib3.BaseHTTPResponse:
        """Whether a blob is there, or how much of an upload."""
        try:
            return self._pool.request(
                "HEAD", f"{self._url}/v1/blobs/{sha256}", headers=self._headers
            )
        except (HTTPError, OSError) as error:
            raise BrokerUnreachable(f"{self._url} does not answer: {error}") from error

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
        more = {} if timeout is None else {"timeout": timeout}
        try:
            response = self._pool.request(
                method,
                self._url + path,
                body=body,
                headers={**self._headers, **headers},
                preload_content=preload,
                **more,
            )
        except (HTTPError, OSError) as error:
            raise BrokerUnreachable(
                f"the broker does not answer at {self._url}", "is `fedml-broker up` running there?"
            ) from error
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


def _read(data: Any, told: Callable[[int], None]) -> Iterator[bytes]:
    while chunk := data.read(_CHUNK):
        told(len(chunk))
        yield chunk


def _is_new(log: dict[str, Any], seen: dict[tuple[str, int, str], int]) -> bool:
    """After a cut the stream begins anew: what was shown is not shown again."""
    key = (log["task"], log["epoch"], log["stream"])
    if log["offset"] < seen.get(key, 0):
        return False
    seen[key] = log["offset"] + len(log["text"].encode())
    return True
