# SPDX-License-Identifier: Apache-2.0
"""What the running agent tells the other commands of its own machine, over a Unix socket.

One JSON object in, one out. The socket lies in the agent's own directory, for its owner only.
"""

import asyncio
import json
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from fedml_agent import sandbox
from fedml_agent.errors import AgentError
from fedml_agent.sockets import address_of

if TYPE_CHECKING:
    from fedml_agent.daemon import Daemon

_TIMEOUT_S = 5.0


class NotRunning(AgentError):
    """No agent works on this home."""

    exit_code = 3


class Control:
    """Serves while entered."""

    def __init__(self, path: Path, daemon: "Daemon") -> None:
        self._path = path
        self._daemon = daemon
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            with address_of(self._path) as address:
                listener.bind(address)
        finally:
            os.umask(before)
        self._server = await asyncio.start_unix_server(self._answer, sock=listener)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._server is not None:
            self._server.close()
        self._path.unlink(missing_ok=True)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                await reader.readline()
                writer.write(json.dumps(status_of(self._daemon)).encode() + b"\n")
                await writer.drain()
        except (TimeoutError, OSError):
            pass  # whoever asked has left
        finally:
            writer.close()


def status_of(daemon: "Daemon") -> dict[str, Any]:
    """The agent at this moment."""
    loop = asyncio.get_running_loop()
    return {
        "pid": os.getpid(),
        "up_s": round(loop.time() - daemon.started_at, 1),
        "link": "up" if daemon.link.up.is_set() else daemon.link.trouble,
        "draining": daemon.intake.draining,
        "refusing": daemon.intake.refusing,
        "alarms": daemon.intake.alarms,
        "sandbox_missing": sandbox.cannot(),
        "sandbox": {name: can.by for name, can in sandbox.capabilities().items() if can.works},
        "tasks": [
            {"task": e.key[0], "epoch": e.key[1], "state": e.state.name, "gpus": list(e.gpus)}
            for e in daemon.journal.held()
        ],
        "owed": [e.key[0] for e in daemon.journal.owed()],
        "sessions": sorted(daemon.stages.open),
        "unleased": [use._asdict() for use in sorted(daemon.unleased)],
    }


def ask(path: Path) -> dict[str, Any]:
    """What the running agent says of itself.

    Raises:
        NotRunning: There is none.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_TIMEOUT_S)
        try:
            with address_of(path) as address:
                connection.connect(address)
            connection.sendall(b"{}\n")
            with connection.makefile("rb") as answer:
                found: dict[str, Any] = json.loads(answer.readline())
                return found
        except (OSError, ValueError) as error:
            raise NotRunning(
                "no agent is running on this home", "start one: `fedml-agent run`"
            ) from error
