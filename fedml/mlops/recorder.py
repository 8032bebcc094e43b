# SPDX-License-Identifier: Apache-2.0
"""Writes records into a directory (see `fedml_protocol.records`); whoever reads it sends them on.

One write for each record, into a file opened for appending: several processes of one task do not
mix their lines, and what was recorded is there when the process is killed the next moment. Nothing
here waits for a network, and nothing here raises because of a disk: what cannot be kept is counted,
and the count is recorded once there is room.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from fedml_protocol.records import FILE, MAX_BYTES, MAX_LINE_BYTES, MAX_NAME

_encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode
_COPY_BYTES = 1 << 20
# Beyond its cap, a task says so once for so many records.
_CONFESS_EVERY = 1000


class Recorder:
    """Appends to one directory. Any thread may call it."""

    def __init__(self, folder: Path, *, cap: int = MAX_BYTES) -> None:
        self.folder = folder
        self._cap = cap
        self._file = -1
        self._size = 0
        self._torn = False
        self._full = self._said = False
        self._lost = 0
        self._why = ""
        self._lock = threading.Lock()

    def write(self, kind: str, **facts: Any) -> None:
        """Append one record.

        Raises:
            ValueError: It is longer than a record may be, or is no JSON.
        """
        line = _encode({"kind": kind, "at": time.time(), **facts}).encode() + b"\n"
        if len(line) > MAX_LINE_BYTES:
            raise ValueError(
                f"a record has {MAX_LINE_BYTES} bytes at most, this one {len(line)}: "
                "log large things as artifacts"
            )
        with self._lock:
            if self._full:
                self._lose(self._why)
                if self._lost >= _CONFESS_EVERY:
                    self._confess()
                return
            if self._lost:
                self._confess()
            if self._size + len(line) > self._cap:
                self._full = True
                self._lose(f"the task's {self._cap} bytes of records are full")
                self._confess()  # at once: the process may be killed
            elif not self._append(line):
                self._lose(self._why)

    def close(self) -> None:
        """Record what was lost, if there is room for that now."""
        with self._lock:
            if self._lost:
                self._confess()
            if self._file >= 0:
                os.close(self._file)
                self._file = -1

    def forget_file(self) -> None:
        """In a child after a fork: the descriptor is shared, the lock may be held by nobody."""
        self._lock = threading.Lock()
        self._lost = 0

    def keep(self, source: Path) -> tuple[str, int]:
        """Keep a file's bytes under their hash. A copy: a link would change with the file.

        Raises:
            OSError: There is no such file, or no room for it.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        beside = self.folder / f".{os.getpid()}.{threading.get_ident()}.new"
        digest, size = hashlib.sha256(), 0
        try:
            with source.open("rb") as read, beside.open("wb") as written:
                while piece := read.read(_COPY_BYTES):
                    digest.update(piece)
                    written.write(piece)
                    size += len(piece)
            beside.replace(self.folder / digest.hexdigest())
        finally:
            beside.unlink(missing_ok=True)
        return digest.hexdigest(), size

    def _append(self, line: bytes) -> bool:
        try:
            if self._file < 0:
                self._open()
            # What a full disk has cut short is ended first, so that it costs itself alone.
            data = b"\n" + line if self._torn else line
            written = os.write(self._file, data)
        except OSError as error:
            self._why = error.strerror or str(error)
            return False
        self._size += written
        self._torn = written < len(data)
        if self._torn:
            self._why = "No space left on device"
        return not self._torn

    def _open(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._file = os.open(self.folder / FILE, flags, 0o600)
        self._size = os.fstat(self._file).st_size

    def _lose(self, why: str) -> None:
        if not self._said:
            self._said = True
            with contextlib.suppress(OSError, ValueError):  # a closed stderr
                sys.stderr.write(f"fedml.mlops: records are not kept: {why}\n")
        self._lost += 1
        self._why = why

    def _confess(self) -> None:
        """Record how many are missing, beyond the cap too: it is one line for many."""
        facts = {"kind": "lost", "at": time.time(), "count": self._lost, "why": self._why}
        if self._append(_encode(facts).encode() + b"\n"):
            self._lost = 0


def name_of(text: str) -> str:
    """A name as records may carry it.

    Raises:
        ValueError: It is empty or too long.
    """
    if not text or len(text) > MAX_NAME:
        raise ValueError(f"a name has 1 to {MAX_NAME} characters, got {text!r}")
    return text


def number(name: str, value: Any) -> float | None:
    """A metric's value; None for what is not finite. Numbers of NumPy and torch are numbers too.

    Raises:
        TypeError: It is no number.
    """
    if isinstance(value, str | bytes):
        raise TypeError(f"{name}: a metric is a number, got {value!r}; mlops.log_params takes text")
    try:
        found = float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: a metric is a number, got {type(value).__name__}") from error
    return found if found - found == 0.0 else None
