# SPDX-License-Identifier: Apache-2.0
"""What a task has recorded of itself: its records as a third log, and the files that they name.

The directory is made here and lent to the task, which may leave anything in it: what is no plain
file of its own is not followed. Nobody tells us that a line was written, for that would cost the
task more than the line: whoever ships looks now and then.
"""

import contextlib
import logging
import re
from pathlib import Path

from fedml_agent import belongings
from fedml_agent.belongings import NotAFile
from fedml_agent.errors import BrokerRefused
from fedml_agent.https import Https, file_blob
from fedml_protocol.blob import Blob
from fedml_protocol.records import ENV, FILE, STREAM

log = logging.getLogger(__name__)

__all__ = ["ENV", "FOLDER", "STREAM", "Records", "made_in"]

FOLDER = "mlops"

_SHA256 = re.compile(r"[0-9a-f]{64}")


def made_in(taskdir: Path) -> Path:
    """The directory that a task is lent."""
    folder = taskdir / FOLDER
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


class Records:
    """The directory of one task; also for a task that records nothing, or never had one."""

    def __init__(self, taskdir: Path) -> None:
        self._taskdir = taskdir

    def read(self, offset: int, limit: int) -> tuple[int, bytes, int]:
        """As `LogReader.read`; records are never dropped."""
        with (
            contextlib.suppress(FileNotFoundError, NotAFile),
            belongings.opened(self._taskdir, FOLDER, FILE) as path,
            path.open("rb") as file,
        ):
            file.seek(offset)
            return offset, file.read(limit), 0
        return offset, b"", 0

    def size(self) -> int:
        """How much is recorded."""
        with (
            contextlib.suppress(FileNotFoundError, NotAFile),
            belongings.opened(self._taskdir, FOLDER, FILE) as path,
        ):
            return path.stat().st_size
        return 0

    def files(self) -> list[str]:
        """The artifacts that wait to be sent, by their hash."""
        try:
            found = [path.name for path in (self._taskdir / FOLDER).iterdir()]
        except FileNotFoundError:
            return []
        return sorted(name for name in found if _SHA256.fullmatch(name))

    def send(self, https: Https, sha256: str) -> None:
        """Hand one artifact over and remove it here: that it is gone is how we know.

        Raises:
            BrokerUnreachable: It did not arrive.
            BrokerRefused: The broker has no room at present.
        """
        try:
            with belongings.opened(self._taskdir, FOLDER, sha256) as path:
                blob = Blob(sha256=sha256, size=path.stat().st_size)
                try:
                    # Sent before, it may be: an agent was killed, or two tasks made the same file.
                    https.store(path, blob, again=True)
                except BrokerRefused as error:
                    if not error.is_final:
                        raise
                    same = file_blob(path) == blob
                    why = str(error) if same else "its bytes are others than its record says"
                    log.warning("an artifact is not sent (%s): %s", sha256, why)
        except FileNotFoundError:
            return
        except NotAFile as error:
            log.warning("an artifact is not sent: %s", error)
        with contextlib.suppress(OSError):  # a directory of this name, say
            (self._taskdir / FOLDER / sha256).unlink()
