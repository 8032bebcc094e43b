# SPDX-License-Identifier: Apache-2.0
"""An HTTPS server on loopback that answers as a test tells it to, with the broker's own kind of CA.

    with HttpsServer(Identity.open(folder)) as server:
        server.on("GET", "/v1/health", lambda asked: asked.answer(200, b"{}"))
        ...
        server.asked               # [("GET", "/v1/health")]
        server.heard[-1].headers   # those of the last question

What is answered to a question that nobody has told it: 404. `asked.send_head` and `asked.wfile` are
for answers that stop in the middle: when the function returns, the connection is closed. Clients
may show a certificate of the same CA; `asked.who` is the name in it.
"""

import json
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from fedml_broker.identity import Identity, common_name

Answer = Callable[["Asked"], object]


@dataclass(frozen=True, slots=True)
class Heard:
    """What was asked; `query` is what was behind the question mark."""

    method: str
    path: str
    query: str
    headers: Message


class Asked(BaseHTTPRequestHandler):
    """One question, as the function that answers it sees it."""

    protocol_version = "HTTP/1.1"
    server: "_Server"

    def answer(
        self, status: int, body: bytes, kind: str = "application/json", **headers: str
    ) -> None:
        """The whole answer."""
        self.send_head(status, len(body), kind, **headers)
        self.wfile.write(body)

    def problem(self, status: int, title: str, detail: str = "", hint: str = "") -> None:
        """An error as the broker tells it."""
        body = {"title": title, "status": status, "detail": detail, "hint": hint}
        self.answer(status, json.dumps(body).encode(), "application/problem+json")

    def send_head(
        self, status: int, length: int, kind: str = "application/octet-stream", **headers: str
    ) -> None:
        """The head of an answer with a body of that length; without it the connection is cut."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def read(self, length: int | None = None) -> bytes:
        """The body of the question, or that much of it."""
        if length is None:
            length = int(self.headers.get("Content-Length", 0))
        return self.rfile.read(length)

    def hang_up(self) -> None:
        """No further question comes over this connection."""
        self.close_connection = True

    @property
    def who(self) -> str | None:
        """The name in the client's certificate."""
        connection: Any = self.connection
        return common_name(connection.getpeercert() or None)

    def _handle(self) -> None:
        self.path, _, query = self.path.partition("?")
        self.server.heard.append(Heard(self.command, self.path, query, self.headers))
        answer = self.server.answers.get((self.command, self.path))
        if answer is None:
            self.problem(404, "nobody told the test's server")
        else:
            answer(self)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):
            return self._handle
        raise AttributeError(name)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Asked)
        self.answers: dict[tuple[str, str], Answer] = {}
        self.heard: list[Heard] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up, or does not like our certificate, is what tests are about."""


class HttpsServer:
    """See the module."""

    def __init__(self, identity: Identity) -> None:
        self._server = _Server()
        context = identity.server_context()
        context.verify_mode = ssl.CERT_OPTIONAL
        self._server.socket = context.wrap_socket(
            self._server.socket, server_side=True, do_handshake_on_connect=False
        )
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), name="https.server"
        )

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """Its address."""
        return f"https://localhost:{self.port}"

    @property
    def heard(self) -> list[Heard]:
        """Every question, in order."""
        return self._server.heard

    @property
    def asked(self) -> list[tuple[str, str]]:
        """Method and path of every question."""
        return [(heard.method, heard.path) for heard in self.heard]

    def on(self, method: str, path: str, answer: Answer) -> None:
        """From now on this is answered so."""
        self._server.answers[method, path] = answer

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
