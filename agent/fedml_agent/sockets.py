# SPDX-License-Identifier: Apache-2.0
"""Addresses of Unix sockets on the file system, however deep their directory lies."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def address_of(path: Path) -> Iterator[str]:
    """A name for the socket at `path` that fits into a socket address (108 bytes).

    Raises:
        FileNotFoundError: Its directory is not there.
    """
    number = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{number}/{path.name}"
    finally:
        os.close(number)
