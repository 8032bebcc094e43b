# SPDX-License-Identifier: Apache-2.0
"""HTTPS to the broker: small JSON calls, and bytes by their hash.

Everything here blocks and is called in threads. The CA is the broker's own, pinned by the login
key; the machine's certificate says who asks. No proxy and no other trust store is used.
"""

import asyncio
import errno
import hashlib
import json
import logging
import os
import ssl
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import urllib3
from urllib3.exceptions import (
    HTTPError,
    InsecureRequestWarning,
    MaxRetryError,
    NewConnectionError,
    SSLError,
)
from urllib3.response import BaseHTTPResponse

from fedml_agent.errors import AgentError, BrokerRefused, BrokerUnreachable, KeyRefused
from fedml_agent.home import Home
from fedml_protocol.blob import Blob

log = logging.getLogger(__name__)

# The most that is lost of a transfer that is cut.
_CHUNK = 256 * 1024
# What is sent in one piece: with http.client's own 16 KB, an upload takes half as much CPU again.
_BLOCK = 256 * 1024
_TIMEOUT = urllib3.Timeout(connect=10, read=60)
# An interrupted transfer is taken up where it stopped, this often.
_RESUMPTIONS = 20
# While the broker cannot be reached, how long until somebody tries again.
PATIENCE_S = 3.0

T = TypeVar("T")


async def patiently(work: Callable[[], T], *, unless: Callable[[], bool] = lambda: False) -> T:
    """Do blocking `work` in a thread; again and again while the broker cannot be reached.

    Raises:
        BrokerUnreachable: It could not be reached, and `unless` says that nobody needs it now.
    """
    while True:
        try:
            return await asyncio.to_thread(work)
        except BrokerUnreachable as error:
            if unless():
                raise
            log.info("waiting for the broker: %s", error)
            await asyncio.sleep(PATIENCE_S)


class BlobChanged(AgentError):
    """The bytes that came do not have the promised hash."""


class Https:
    """Connections to one broker, kept open."""

    def __init__(self, url: str, context: ssl.SSLContext) -> None:
        self._url = url.rstrip("/")
        self._pool = urllib3.PoolManager(
            ssl_context=context, maxsize=4, retries=False, timeout=_TIMEOUT, blocksize=_BLOCK
        )

    @classmethod
    def of(cls, home: Home, url: str) -> "Https":
        """Connections that show the device's certificate, if it has one."""
        context = ssl.create_default_context(cafile=str(home.ca))
        if home.certificate.exists():
            context.load_cert_chain(home.certificate, home.key)
        return cls(url, context)

    @classmethod
    def anonymous(cls, home: Home, url: str) -> "Https":
        """Connections that trust the broker and show nothing of us."""
        return cls(url, ssl.create_default_context(cafile=str(home.ca)))

    def call(self, method: str, path: str, body: object = None) -> Any:
        """One JSON question and its answer.

        Raises:
            BrokerUnreachable: No answer.
            BrokerRefused: The answer is an error.
        """
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} if data else {}
        answer = self._ask(method, path, data, headers).data
        try:
            return json.loads(answer)
        except ValueError as error:
            raise BrokerUnreachable(
                f"{self._url} does not answer as a broker does: something in between does",
                "`fedml-agent diagnose` looks at the link step by step",
            ) from error

    def put_log(
        self,
        task: str,
        epoch: int,
        stream: str,
        offset: int,
        data: bytes,
        *,
        gap: int = 0,
        gzipped: bool = False,
        ordered: bool = False,
    ) -> int:
        """Append to a log, after `gap` bytes that nobody has any more; how long it is there now.

        `ordered`: its order is sent too, so that whoever reads may wait for that.
        """
        headers = {"X-Chunk-Encoding": "gzip"} if gzipped else {}
        query = f"offset={offset}&gap={gap}&ordered={int(ordered)}"
        path = f"/v1/agent/logs/{task}/{epoch}/{stream}?{query}"
        return int(json.loads(self._ask("PUT", path, data, headers).data)["size"])

    # ------------------------------------------------------------------ blobs

    def fetch(self, blob: Blob, into: Path, *, durable: bool = False) -> None:
        """Get a blob; an interrupted one goes on where it stopped.

        Args:
            durable: Its name appears only when its bytes are on the disk: for what a later boot
                of the machine may use without looking at the hash again.

        Raises:
            BlobChanged: The bytes do not have the hash.
        """
        part = into.with_name(into.name + ".part")
        part.unlink(missing_ok=True)
        digest = hashlib.sha256()
        with part.open("wb") as file:
            for attempt in range(_RESUMPTIONS):
                try:
                    self._receive(blob, file.tell(), file, digest)
                    break
                except (HTTPError, OSError) as error:
                    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                        raise  # our disk, not the way
                    if attempt == _RESUMPTIONS - 1:
                        raise BrokerUnreachable(f"{blob.sha256} did not arrive: {error}") from error
            if durable:
                file.flush()
                os.fsync(file.fileno())
        if digest.hexdigest() != blob.sha256:
            part.unlink()
            raise BlobChanged(f"the bytes that came as {blob.sha256} are others")
        part.replace(into)

    def _receive(self, blob: Blob, start: int, file: Any, digest: Any) -> None:
        headers = {"Range": f"bytes={start}-"} if start else {}
        response = self._ask("GET", f"/v1/blobs/{blob.sha256}", None, headers, preload=False)
        try:
            if start and response.status != 206:
                raise BrokerUnreachable(
                    f"{self._url} does not go on where a transfer stopped: something in between "
                    "ignores `Range`"
                )
            for chunk in response.stream(_CHUNK):
                if 0 < blob.size < file.tell() + len(chunk):
                    raise BlobChanged(f"more than the {blob.size} bytes of {blob.sha256} came")
                file.write(chunk)
                digest.update(chunk)
        finally:
            response.release_conn()

    def store(self, file: Path, blob: Blob, *, again: bool = False) -> None:
        """Put a blob.

        Args:
            again: It may have been sent before: what the broker has of it is not sent again.
        """
        path = f"/v1/blobs/{blob.sha256}"
        start = self.uploaded(blob) if again else 0
        if again and start >= blob.size:
            return
        for attempt in range(_RESUMPTIONS):
            try:
                with file.open("rb") as data:
                    data.seek(start)
                    headers = {"Content-Length": str(blob.size - start)}
                    if start:
                        last = blob.size - 1
                        headers["Content-Range"] = f"bytes {start}-{last}/{blob.size}"
                    self._ask("PUT", path, data, headers)
                return
            except BrokerUnreachable:
                if attempt == _RESUMPTIONS - 1:
                    raise
            except BrokerRefused as error:
                if error.status != 409 or attempt == _RESUMPTIONS - 1:
                    raise
            start = self.uploaded(blob)
            if start >= blob.size:
                return

    def uploaded(self, blob: Blob) -> int:
        """How many bytes of a blob the broker has."""
        try:
            response = self._pool.request("HEAD", f"{self._url}/v1/blobs/{blob.sha256}")
        except (HTTPError, OSError) as error:
            raise BrokerUnreachable(f"{self._url} does not answer: {error}") from error
        if response.status == 200:
            return blob.size
        return min(int(response.headers.get("Upload-Offset", 0)), max(blob.size - 1, 0))

    # ------------------------------------------------------------------ small print

    def _ask(
        self,
        method: str,
        path: str,
        body: Any,
        headers: Mapping[str, str],
        *,
        preload: bool = True,
    ) -> BaseHTTPResponse:
        try:
            response = self._pool.request(
                method, self._url + path, body=body, headers=headers, preload_content=preload
            )
        except (HTTPError, OSError) as error:
            raise BrokerUnreachable(
                f"{self._url} does not answer: {_plainly(error)}",
                "`fedml-agent diagnose` looks at the link step by step",
            ) from error
        if response.status < 400:
            return response
        text, hint = _problem(response)
        raise BrokerRefused(response.status, text, hint)


def pinned_ca(url: str, ca_sha256: bytes) -> bytes:
    """The broker's CA certificate (PEM), if it is the one that the login key names.

    The connection by which it comes proves nothing; its hash does.

    Raises:
        BrokerUnreachable: No answer.
        KeyRefused: Another CA: this is not the broker that made the key.
    """
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with warnings.catch_warnings():
        # That this connection proves nothing is the point; the hash below decides.
        warnings.simplefilter("ignore", InsecureRequestWarning)
        try:
            pem = bytes(Https(url, context)._ask("GET", "/v1/ca", None, {}).data)
        except BrokerUnreachable as error:
            # `diagnose` knows no address yet.
            hint = "is `fedml-broker up` running there, and does a firewall let this machine out?"
            raise BrokerUnreachable(str(error), hint) from error
        except BrokerRefused as error:
            if error.status != 404:
                raise
            hint = "something else answers there, or in between: ask the broker's admin"
            raise KeyRefused(f"no broker answers at {url}: {error}", hint) from error
    try:
        der = ssl.PEM_cert_to_DER_cert(pem.decode())
    except ValueError as error:
        raise KeyRefused(f"{url} does not answer as a broker does") from error
    if hashlib.sha256(der).digest() != ca_sha256:
        raise KeyRefused(
            f"the broker at {url} is not the one that made this key: its CA certificate differs",
            "somebody may be in between, or it was set up anew: ask its admin for a new key",
        )
    return pem


def file_blob(path: Path) -> Blob:
    """The name of a file's content."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Blob(sha256=digest, size=path.stat().st_size)


def _problem(response: BaseHTTPResponse) -> tuple[str, str]:
    try:
        problem = json.loads(response.data)
        detail = problem.get("detail", "")
        return problem["title"] + (f": {detail}" if detail else ""), problem.get("hint", "")
    except (ValueError, KeyError, TypeError, AttributeError, HTTPError):
        return f"the broker answered {response.status}", ""


def _plainly(error: Exception) -> str:
    """The innermost reason, without the library's wrapping."""
    if isinstance(error, MaxRetryError | SSLError) and error.args:
        return str(error.args[-1])
    if isinstance(error, NewConnectionError) and isinstance(error.__cause__, OSError):
        return error.__cause__.strerror or str(error.__cause__)
    return str(error)
