# SPDX-License-Identifier: Apache-2.0
"""Services: jobs that stay up and answer on a port of this machine.

A job learns its port from PORT. The machine looks whether it answers, and each heartbeat says where
it does: so the broker knows it, whatever was lost on the way.
"""

import asyncio
import errno
import http.client
import logging
import socket
from collections.abc import Callable
from pathlib import Path

from fedml_agent.errors import AgentError
from fedml_protocol.cause import Cause, Fault
from fedml_protocol.launch import Service

log = logging.getLogger(__name__)

_HOST = "127.0.0.1"
_ANSWER_S = 5.0
# While it begins, and once it answers.
_FIRST_S, _SLOWEST_S = 0.05, 2.0
_EVERY_S = 10.0
# A program that is busy for a moment is not gone.
_MISSES, _AGAIN_S = 3, 1.0

# Beside the job's own files: its port, and whether it answered when that was last looked at.
_PORT, _ANSWERS = "port", "answers"


class PortTaken(AgentError):
    """Another program has the port that a service asks for."""


def choose_port(folder: Path, service: Service) -> None:
    """Find the port for a task that is about to start.

    Raises:
        PortTaken: It asks for one, and that is not free.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", service.port))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            why = "in use" if error.errno == errno.EADDRINUSE else "not for this user"
            raise PortTaken(
                f"port {service.port} is {why} on this machine",
                "leave `service.port` out: the machine then chooses one that is free",
            ) from error
        (folder / _PORT).write_text(str(probe.getsockname()[1]))


def port_of(folder: Path) -> int:
    """The port that was found for a task."""
    return int((folder / _PORT).read_text())


class Services:
    """Where the services of this machine answer at this moment."""

    def __init__(self, changed: Callable[[], None]) -> None:
        """
        Args:
            changed: Is called whenever one begins to answer, or no longer does.
        """
        self._changed = changed
        self._answering: dict[Path, int] = {}

    def port(self, folder: Path) -> int:
        """Where the task of a folder answers; 0: nowhere.

        What an earlier agent has found holds until this one has looked.
        """
        if (port := self._answering.get(folder)) is not None:
            return port
        return port_of(folder) if (folder / _ANSWERS).exists() else 0

    async def watch(self, folder: Path, service: Service, late: Callable[[Cause], None]) -> None:
        """Look whether the task of a folder answers, until cancelled.

        Args:
            late: Is called when it was not ready in time.
        """
        now = asyncio.get_running_loop().time
        port, begun, misses, pause = port_of(folder), now(), 0, _FIRST_S
        self._answering[folder] = self.port(folder)
        ready = self.port(folder) > 0
        try:
            while True:
                if not (why := await asyncio.to_thread(silent, port, service.path)):
                    ready, misses, pause = True, 0, _EVERY_S
                    self._set(folder, port)
                elif self.port(folder):
                    misses, pause = misses + 1, _AGAIN_S
                    if misses >= _MISSES:
                        log.warning("%s no longer answers: %s", folder.name, why)
                        self._set(folder, 0)
                elif not ready and now() - begun > service.within_s:
                    message = f"it was not ready within {service.within_s:g} s: {why}"
                    hint = f"it has to listen on the port in $PORT ({port} here), also for {_HOST}"
                    late(Cause(fault=Fault.TASK, message=message, hint=hint))
                    return
                else:
                    pause = min(1.5 * pause, _SLOWEST_S)
                await asyncio.sleep(pause)
        finally:
            self._answering.pop(folder, None)

    def _set(self, folder: Path, port: int) -> None:
        if self.port(folder) != port:
            self._answering[folder] = port
            if port:
                (folder / _ANSWERS).touch()
            else:
                (folder / _ANSWERS).unlink(missing_ok=True)
            self._changed()


def silent(port: int, path: str) -> str:
    """Why nobody is ready on a port of this machine; empty: somebody is. Blocks."""
    try:
        if not path:
            socket.create_connection((_HOST, port), timeout=_ANSWER_S).close()
            return ""
        connection = http.client.HTTPConnection(_HOST, port, timeout=_ANSWER_S)
        try:
            connection.request("GET", path)
            status = connection.getresponse().status
        finally:
            connection.close()
        return "" if status == http.client.OK else f"GET {path} was answered with {status}"
    except (OSError, http.client.HTTPException) as error:
        return f"port {port}: {str(error) or type(error).__name__}"
