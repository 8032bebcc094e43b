# SPDX-License-Identifier: Apache-2.0
"""Files that a task has made, opened so that no link among them leads the agent elsewhere.

The task cannot see the agent's key, but it may well leave a link with that target where the agent
looks for an update to send.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedml_agent.errors import AgentError


class NotAFile(AgentError):
    """What the task left there is no plain file of its own."""


@contextmanager
def opened(folder: Path, *parts: str) -> Iterator[Path]:
    """A path to a file that lies in `folder` / `parts` without any link; good while entered.

    Raises:
        FileNotFoundError: It is not there.
        NotAFile: It is something else, or lies somewhere else.
    """
    number = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    try:
        for part in parts:
            if part in ("", ".", "..") or "/" in part or "\0" in part:
                raise NotAFile(f"{part!r} is no name of a file")
            inner = os.open(part, os.O_PATH | os.O_NOFOLLOW, dir_fd=number)
            os.close(number)
            number = inner
            if stat.S_ISLNK(os.fstat(number).st_mode):
                raise NotAFile(f"{'/'.join(parts)} leads over a link: {part}")
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise NotAFile(f"{'/'.join(parts)} is not a file")
        yield Path(f"/proc/self/fd/{number}")
    except NotADirectoryError as error:
        raise NotAFile(f"{'/'.join(parts)} lies in no directory") from error
    finally:
        os.close(number)
