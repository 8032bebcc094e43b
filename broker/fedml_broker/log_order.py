# SPDX-License-Identifier: Apache-2.0
"""The lines of one task in the order in which it wrote them, out of two files that know of none.

The agent sends a third stream, `order`: records that say which of the two went on, how far and
when. Standard output and error stay as they were written; who reads them goes from record to
record. A record is followed only when the bytes that it tells of are here, and bytes are shown
only when a record tells of them, so that the order is the same for who watches and who comes late.
An agent that sends no order is shown as its pieces come.
"""

import codecs
import struct
from collections.abc import Iterator
from typing import NamedTuple, Protocol

ORDER = "order"
# As the agent's capped_log.OrderWriter packs them.
_RECORD = struct.Struct("<QQ")
_RECORDS_AT_ONCE = 4096
CHUNK = 256 * 1024
STREAMS = ("stdout", "stderr")


class LogFile(NamedTuple):
    """One stream of one attempt at a task."""

    task: str
    epoch: int
    stream: str


class Files(Protocol):
    """Where the bytes are: `observe.Observer`."""

    def read(self, run: str, log: LogFile, offset: int, limit: int = ...) -> tuple[int, bytes]:
        """Bytes from an offset on, over a hole."""
        ...

    def size(self, run: str, log: LogFile) -> int | None:
        """How long a log is by now; None: there is none."""
        ...


class Chunk(NamedTuple):
    """Some bytes of one stream.

    Attributes:
        offset: Of the first byte; what lies between the chunk before and it was not kept.
        at: When it was written, seconds since 1970; None: nobody has noted it.
    """

    log: LogFile
    offset: int
    data: bytes
    at: float | None

    @property
    def end(self) -> int:
        """The offset behind it."""
        return self.offset + len(self.data)


class Ordered:
    """Reads one attempt at a task from where it was read to before."""

    def __init__(self, files: Files, run: str, task: str, epoch: int) -> None:
        self.task, self.epoch = task, epoch
        self._files = files
        self._run = run
        self._read = dict.fromkeys(STREAMS, 0)
        self._covered = dict.fromkeys(STREAMS, 0)
        self._order_at = 0
        self._records: list[tuple[float, str, int]] = []  # reversed: the next one is the last

    def skip(self, stream: str, to: int) -> None:
        """What lies before is not asked for."""
        self._read[stream] = max(self._read[stream], to)

    def covered(self, stream: str) -> int:
        """How far records tell of a stream; everything, where there are none."""
        if self._size(ORDER) is None:
            return 1 << 62
        return self._covered[stream]

    def chunks(self, *, all_of_it: bool = False) -> Iterator[Chunk]:
        """What is new and in order, or (`all_of_it`) what is there at all."""
        if self._size(ORDER) is not None:
            while (record := self._next_record()) is not None:
                at, stream, end = record
                if not all_of_it and end > (self._size(stream) or 0):
                    return  # its bytes are still on their way
                yield from self._up_to(stream, end, at)
                self._covered[stream] = max(self._covered[stream], end)
                self._records.pop()
            if not all_of_it:
                return
        for stream in reversed(STREAMS):
            yield from self._up_to(stream, 1 << 62, None)

    def _up_to(self, stream: str, end: int, at: float | None) -> Iterator[Chunk]:
        log = LogFile(self.task, self.epoch, stream)
        while self._read[stream] < end:
            begin, data = self._files.read(
                self._run, log, self._read[stream], min(CHUNK, end - self._read[stream])
            )
            if not data or begin >= end:
                return
            data = data[: end - begin]
            self._read[stream] = begin + len(data)
            yield Chunk(log, begin, data, at)

    def _next_record(self) -> tuple[float, str, int] | None:
        if not self._records:
            log = LogFile(self.task, self.epoch, ORDER)
            begin, data = self._files.read(
                self._run, log, self._order_at, _RECORDS_AT_ONCE * _RECORD.size
            )
            data = data[: len(data) // _RECORD.size * _RECORD.size]
            self._order_at = begin + len(data)
            self._records = [
                ((when >> 1) / 1000, STREAMS[when & 1], end)
                for when, end in _RECORD.iter_unpack(data)
                if when  # the end of a hole reads as zeros
            ]
            self._records.reverse()
        return self._records[-1] if self._records else None

    def _size(self, stream: str) -> int | None:
        return self._files.size(self._run, LogFile(self.task, self.epoch, stream))


class Text:
    """Chunks of one stream as text: no character is cut, and a hole is told."""

    def __init__(self) -> None:
        self._end = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def begin_at(self, offset: int) -> None:
        """What lies before was not asked for; it is no hole."""
        self._end = max(self._end, offset)

    def of(self, chunk: Chunk) -> str:
        """The text of the next chunk."""
        # The end of a hole reads as NULs; a log has no other use for them.
        text = self._decoder.decode(chunk.data).replace("\0", "")
        if chunk.offset > self._end:
            text = f"\n[about {chunk.offset - self._end} bytes were not kept]\n{text}"
        self._end = chunk.end
        return text
