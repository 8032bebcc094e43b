# SPDX-License-Identifier: Apache-2.0
"""Whether a service answers, looked at with real sockets."""

import asyncio
import http.server
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedml_agent import deploy
from fedml_agent.deploy import PortTaken, Services, choose_port, port_of, silent
from fedml_protocol.cause import Cause, Fault
from fedml_protocol.launch import Service


class Program:
    """A service whose answer can be changed."""

    status = 200

    @contextmanager
    def on(self, port: int) -> Iterator[None]:
        """It listens."""
        told = self

        class Answer(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(told.status)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Answer)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


class Told:
    """What a machine is told of its services."""

    def __init__(self) -> None:
        self.services = Services(self._changed)
        self.late: asyncio.Queue[Cause] = asyncio.Queue()
        self._change = asyncio.Event()

    def _changed(self) -> None:
        self._change.set()

    async def until(self, folder: Path, port: int) -> None:
        """Wait until it is said to answer there."""
        while self.services.port(folder) != port:
            self._change.clear()
            await self._change.wait()

    def watch(self, folder: Path, service: Service) -> "asyncio.Task[None]":
        """Begin to look."""
        return asyncio.create_task(self.services.watch(folder, service, self.late.put_nowait))


async def ended(task: "asyncio.Task[None]") -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for pause in ("_EVERY_S", "_AGAIN_S", "_SLOWEST_S"):
        monkeypatch.setattr(deploy, pause, 0.02)


async def test_a_service_that_falls_silent_and_recovers_is_told_each_time(tmp_path: Path) -> None:
    service, told, program = Service(path="/ready"), Told(), Program()
    choose_port(tmp_path, service)
    port = port_of(tmp_path)
    watching = told.watch(tmp_path, service)
    with program.on(port):
        await told.until(tmp_path, port)
        program.status = 503
        await told.until(tmp_path, 0)
        program.status = 200
        await told.until(tmp_path, port)
    await told.until(tmp_path, 0)
    await ended(watching)


async def test_the_next_agent_knows_that_a_service_answered(tmp_path: Path) -> None:
    service, told, program = Service(), Told(), Program()
    choose_port(tmp_path, service)
    port = port_of(tmp_path)
    with program.on(port):
        watching = told.watch(tmp_path, service)
        await told.until(tmp_path, port)
        await ended(watching)
    assert Told().services.port(tmp_path) == port  # before it has looked
    told = Told()
    watching = told.watch(tmp_path, service)
    await told.until(tmp_path, 0)
    await ended(watching)
    assert Told().services.port(tmp_path) == 0


async def test_who_is_not_ready_in_time_is_blamed_with_its_last_answer(tmp_path: Path) -> None:
    service, told, program = Service(path="/ready", within_s=0.1), Told(), Program()
    program.status = 503
    choose_port(tmp_path, service)
    port = port_of(tmp_path)
    with program.on(port):
        watching = told.watch(tmp_path, service)
        cause = await told.late.get()
        await watching
    assert cause.fault is Fault.TASK
    assert cause.message == "it was not ready within 0.1 s: GET /ready was answered with 503"
    assert f"$PORT ({port} here)" in cause.hint


def test_a_port_that_is_taken_is_refused_by_its_number(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortTaken, match=f"port {port} is in use") as refused:
            choose_port(tmp_path, Service(port=port))
    assert "leave `service.port` out" in refused.value.hint
    choose_port(tmp_path, Service(port=port))
    assert port_of(tmp_path) == port


def test_what_speaks_no_http_is_not_ready(tmp_path: Path) -> None:
    choose_port(tmp_path, Service())
    port = port_of(tmp_path)
    assert "refused" in silent(port, "")
    with socket.create_server(("127.0.0.1", port)) as server:
        assert silent(port, "") == ""

        def babble() -> None:
            server.accept()[0].close()  # that of the line above
            connection = server.accept()[0]
            connection.recv(1000)
            connection.sendall(b"220 smtp.example ready\r\n")
            connection.close()

        thread = threading.Thread(target=babble)
        thread.start()
        assert "220 smtp" in silent(port, "/")
        thread.join()
