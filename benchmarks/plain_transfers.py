# SPDX-License-Identifier: Apache-2.0
"""No benchmark, but a peer of some: `curl` against a plain file server over TLS.

It knows nothing: a GET is a file, a PUT becomes one, a thread per connection, no hash, no fsync.

    with Plain(folder) as plain:
        wall_s, cpu_s = plain.round(clients=10, size=100_000_000)   # so many down, then up
"""

import http.server
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

from deployment import cpu_of

from fedml_broker.identity import Identity

_CHUNK = 1 << 20


class Plain:
    """The server in a process of its own, and what `curl` does with it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._folder.mkdir()
        self._identity = Identity.open(folder / "identity", names=["localhost"])
        self._size = 0

    def __enter__(self) -> Self:
        self._server = subprocess.Popen(
            [sys.executable, __file__, str(self._folder)], stdout=subprocess.PIPE, text=True
        )
        assert self._server.stdout is not None
        self._url = f"https://localhost:{int(self._server.stdout.readline())}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.kill()
        self._server.wait()
        assert self._server.stdout is not None
        self._server.stdout.close()

    def round(self, clients: int, size: int) -> tuple[float, float]:
        """So many clients at once fetch a file of so many bytes, then send one; wall and CPU s."""
        model = self._folder / "model"
        if size != self._size:
            model.write_bytes(os.urandom(_CHUNK) * (size // _CHUNK) + bytes(size % _CHUNK))
            self._size = size
        began, cpu = time.perf_counter(), self._cpu_s()
        self._curl(
            [["-o", f"{self._folder}/down-{n}", f"{self._url}/model"] for n in range(clients)]
        )
        self._curl(
            [["-T", f"{self._folder}/down-{n}", f"{self._url}/up-{n}"] for n in range(clients)]
        )
        took = time.perf_counter() - began, self._cpu_s() - cpu
        for n in range(clients):
            assert (self._folder / f"up-{n}").stat().st_size == size
            (self._folder / f"up-{n}").unlink()
            (self._folder / f"down-{n}").unlink()
        return took

    def _curl(self, calls: list[list[str]]) -> None:
        words = ["curl", "-sS", "--fail", "--cacert", str(self._identity.ca_file)]
        running = [subprocess.Popen([*words, *call]) for call in calls]
        for process in running:
            assert process.wait() == 0

    def _cpu_s(self) -> float:
        curls = resource.getrusage(resource.RUSAGE_CHILDREN)
        return curls.ru_utime + curls.ru_stime + cpu_of([self._server.pid])


class _Files(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        with Path(self.path[1:]).open("rb") as file:
            self.send_response(200)
            self.send_header("Content-Length", str(os.fstat(file.fileno()).st_size))
            self.end_headers()
            while piece := file.read(_CHUNK):
                self.wfile.write(piece)

    def do_PUT(self) -> None:
        left = int(self.headers["Content-Length"])
        if self.headers.get("Expect"):
            self.send_response_only(100)
            self.end_headers()
        with Path(self.path[1:]).open("wb") as file:
            while left:
                piece = self.rfile.read1(min(left, _CHUNK))
                file.write(piece)
                left -= len(piece)
        self.send_response(201)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def _serve(folder: Path) -> None:
    os.chdir(folder)
    context = Identity.open(folder / "identity").server_context()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Files)
    # The handshake belongs to the connection's thread, not to the one that accepts.
    server.socket = context.wrap_socket(
        server.socket, server_side=True, do_handshake_on_connect=False
    )
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
