# SPDX-License-Identifier: Apache-2.0
"""The capped log of one output stream: the shim writes it, the agent reads it, neither waits.

Layout, in the task's directory, for the streams `out` and `err`:

    out.0  out.4194304  out.8388608  …     the number is the offset of the file's first byte

Offsets count every byte that the task ever wrote, its secrets replaced (redact.py). What lies
between the end of one file and the number of the next was dropped: the oldest files when the log
outgrew its cap, or bytes that the disk had no room for. So the directory needs no index, and a
writer that is killed leaves a log that can be read. Nothing is synced: a power cut may cost the
last seconds.

A third stream, `order`, says how the two lie in time: one record for each stretch of one of them.
"""

import contextlib
import errno
import json
import os
import struct

STREAMS = ("out", "err")
ORDER = "order"
DEFAULT_CAP = 64 << 20
DEFAULT_SEGMENT = 4 << 20
EXIT_RECORD = "exit.json"

# 16 bytes each, and files end between two.
_ORDER_RECORD = struct.Struct("<QQ")
_ORDER_CAP = 4 << 20
_ORDER_SEGMENT = 256 << 10
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class LogWriter:
    """Appends to the log of one stream in the current directory.

    Attributes:
        size: How many bytes the task has written; the offset of the next one.
        dropped: How many of them are not on disk any more, or never were.
    """

    def __init__(self, stream: str, *, cap: int, segment: int) -> None:
        """`cap` bytes are kept at most, in files of `segment` bytes; cap >= 2 * segment."""
        self._stream = stream
        self._cap = cap
        self._segment = segment
        self._kept: list[tuple[int, int]] = []  # (first offset, length) of every file but the open
        self._file = -1
        self._first = 0  # of the open file
        self.size = 0
        self.dropped = 0

    def append(self, piece: memoryview) -> None:
        """Write what there is room for; count the rest as dropped. Never raises OSError."""
        while piece:
            try:
                if self._file < 0 or self.size - self._first >= self._segment:
                    self._next_file()
                room = self._segment - (self.size - self._first)
                written = os.write(self._file, piece[:room])
            except OSError as error:
                # The newest lines are worth more than the oldest: they say how it ended. Whatever
                # else is wrong with the disk, the task shall not end for its log.
                if error.errno in _DISK_FULL and self.give_way():
                    continue
                self.close()
                self.size += len(piece)
                self.dropped += len(piece)
                return
            self.size += written
            piece = piece[written:]

    def _next_file(self) -> None:
        self.close()
        held = sum(length for _, length in self._kept)
        while self._kept and held + self._segment > self._cap:
            held -= self._kept[0][1]
            self.give_way()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._file = os.open(f"{self._stream}.{self.size}", flags, 0o600)
        self._first = self.size

    def give_way(self) -> bool:
        """Drop the oldest file, to make room on the disk; tell whether there was one to drop."""
        if not self._kept:
            return False
        first, length = self._kept.pop(0)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{self._stream}.{first}")  # noqa: PTH108 - relative on purpose: see shim.py
        self.dropped += length
        return True

    def close(self) -> None:
        """Finish the open file; the next bytes begin another."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            if self.size > self._first:
                self._kept.append((self._first, self.size - self._first))
            else:
                os.unlink(f"{self._stream}.{self._first}")  # noqa: PTH108


class LogReader:
    """Reads the log of one stream while it is being written, or afterwards."""

    def __init__(self, taskdir: str | os.PathLike[str], stream: str) -> None:
        """`stream` is "out", "err" or "order"."""
        if stream not in (*STREAMS, ORDER):
            raise ValueError(f"stream is one of {(*STREAMS, ORDER)}, got {stream!r}")
        self._taskdir = os.fspath(taskdir)
        self._stream = stream

    def read(self, offset: int, limit: int) -> tuple[int, bytes, int]:
        """Read up to `limit` bytes from `offset` on, or from where the log goes on after it.

        A read stops at the end of a file or of what is there; read again from where it ended.

        Returns:
            (offset of the first byte, the bytes, how many were dropped between the offset asked
            for and this one). No bytes: there are none yet, or, once the task has ended, no more.
        """
        while True:
            # Before the files: whoever ends after they were listed is not taken to have ended.
            final = self._final_size()
            files = self._files()
            for index, (first, name) in enumerate(files):
                if index + 1 < len(files) and files[index + 1][0] <= offset:
                    continue
                path = os.path.join(self._taskdir, name)  # noqa: PTH118
                try:
                    with open(path, "rb") as file:  # noqa: PTH123
                        begin = max(first, offset)
                        file.seek(begin - first)
                        piece = file.read(limit)
                except FileNotFoundError:
                    break  # dropped this moment: look again, it will not come back
                if piece:
                    return begin, piece, begin - offset
            else:
                end = max(offset, final)
                return end, b"", end - offset

    @property
    def is_there(self) -> bool:
        """Whether anything of it is on the disk."""
        return bool(self._files())

    def _files(self) -> list[tuple[int, str]]:
        prefix = self._stream + "."
        with contextlib.suppress(FileNotFoundError):
            return sorted(
                (int(name[len(prefix) :]), name)
                for name in os.listdir(self._taskdir)  # noqa: PTH208
                if name.startswith(prefix) and name[len(prefix) :].isdigit()
            )
        return []

    def _final_size(self) -> int:
        """How much the task wrote in all, known when it has ended: the last bytes may be lost."""
        path = os.path.join(self._taskdir, EXIT_RECORD)  # noqa: PTH118
        try:
            with open(path, "rb") as file:  # noqa: PTH123
                return int(json.load(file)["logs"][self._stream]["size"])
        except (FileNotFoundError, KeyError):  # a shim of an earlier version kept no order
            return 0


class OrderWriter:
    """Notes which of the two streams went on, how far, and when.

    A record (16 bytes, little endian): milliseconds since 1970 times two, plus 1 for `err`; and the
    offset up to which that stream had come. It covers what no record before it did. Stretches of
    one stream are one until `flush`.
    """

    def __init__(self) -> None:
        self._log = LogWriter(ORDER, cap=_ORDER_CAP, segment=_ORDER_SEGMENT)
        self._stream = 0
        self._end = -1
        self._at = 0.0

    @property
    def log(self) -> LogWriter:
        """What it writes to."""
        return self._log

    def note(self, stream: str, end: int, at: float) -> None:
        """`stream` has come to `end`, at seconds since 1970."""
        number = STREAMS.index(stream)
        if number != self._stream:
            self.flush()
        self._stream, self._end, self._at = number, end, at

    def flush(self) -> None:
        """Write what is pending."""
        if self._end >= 0:
            when = int(self._at * 1000) << 1 | self._stream
            self._log.append(memoryview(_ORDER_RECORD.pack(when, self._end)))
            self._end = -1
