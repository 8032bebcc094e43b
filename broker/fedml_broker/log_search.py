# SPDX-License-Identifier: Apache-2.0
"""Looking for lines in the logs of a run: bounded in time, in size, and in what a pattern can do.

Text is looked for as it stands. A pattern is RE2's, whose time grows with the text and not with
the pattern: none can keep the broker busy. What is not found in time is said not to be searched.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from fedml_broker.log_order import STREAMS, Chunk, Files, LogFile, Ordered
from fedml_broker.problems import Problem

MOST_LINES = 10_000
_MOST_BYTES = 4 << 20
_MOST_OF_A_LINE = 16 << 10
_SECONDS = 5.0
_BLOCK = 1 << 16
_PATTERN_MEMORY = 8 << 20
_MOST_OF_A_PATTERN = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """Which lines are asked for.

    Attributes:
        text: They hold this, or (`regex`) something that this fits; empty: all.
        context: So many lines before and after each, of the same task.
        since: Not those that are known to be older, seconds since 1970.
        tail: Only the last so many.
        skip, limit: Otherwise so many, behind so many.
        streams: Of these.
    """

    text: str = ""
    regex: bool = False
    ignore_case: bool = False
    context: int = 0
    since: float = 0.0
    tail: int = 0
    skip: int = 0
    limit: int = MOST_LINES
    streams: tuple[str, ...] = STREAMS

    def test(self) -> Callable[[bytes], object] | None:
        """Tells whether a line, or several at once, has it; None: every line does.

        Raises:
            Problem: 422, the pattern is none.
        """
        if len(self.text) > _MOST_OF_A_PATTERN:
            most = f"at most {_MOST_OF_A_PATTERN} characters"
            raise Problem(422, "too long to be looked for", most)
        if not self.text:
            return None
        if self.regex:
            return _pattern(self.text, self.ignore_case)
        text = self.text.encode()
        if self.ignore_case:
            folded = self.text.lower().encode()
            return lambda line: folded in line.decode(errors="replace").lower().encode()
        return lambda line: text in line


class Line(NamedTuple):
    """One line that was found; `number` counts those of its stream from 1; None: not counted."""

    task: str
    epoch: int
    stream: str
    number: int | None
    at: float | None
    match: bool
    text: str


def _pattern(text: str, ignore_case: bool) -> Callable[[bytes], object]:
    import re2  # 2 MB, and few ask

    options = re2.Options()
    options.max_mem = _PATTERN_MEMORY
    options.log_errors = False
    options.case_sensitive = not ignore_case
    try:
        found: Callable[[bytes], object] = re2.compile(text.encode(), options).search
    except re2.error as error:
        why = error.args[0].decode() if isinstance(error.args[0], bytes) else str(error)
        raise Problem(
            422, "not a pattern", why, "RE2's syntax: no look-around, no back-references"
        ) from error
    return found


def search(
    files: Files,
    run: str,
    attempts: Iterable[tuple[str, int]],
    query: Query,
    *,
    ended: bool,
    starts: Mapping[LogFile, int] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Look through the logs of some attempts at tasks; to be called in a thread.

    Args:
        ended: A last line without its end is one.
        starts: From where on, for each log.

    Returns:
        ``lines``; ``total``, how many fit, without context; ``complete``: whether all was looked
        at; ``ends``: how far each log was read, to be followed from there.

    Raises:
        Problem: 422, the pattern is none.
    """
    found = _Found(query)
    until = clock() + _SECONDS
    ends: dict[str, int] = {}
    complete = True
    for task, epoch in attempts:
        reader = _Reader(Ordered(files, run, task, epoch), query, found)
        for stream in STREAMS:
            log = LogFile(task, epoch, stream)
            begin = (starts or {}).get(log, 0)
            if query.tail and not query.text:
                begin = max(begin, _last_lines(files, run, log, min(query.tail, MOST_LINES)))
            reader.start(stream, begin)
        for chunk in reader.ordered.chunks(all_of_it=True):
            reader.take(chunk)
            if clock() > until:
                complete = False
                break
        if ended and complete:
            reader.take_rest()
        ends |= {f"{task}.{epoch}.{stream}": end for stream, end in reader.ends.items()}
        if not complete:
            break
    return {
        "lines": [line._asdict() for line in found.lines()],
        "total": found.total,
        "complete": complete and not found.full,
        "ends": ends,
    }


def _last_lines(files: Files, run: str, log: LogFile, count: int) -> int:
    """Where the last so many lines of a log begin, without reading all of it."""
    end = files.size(run, log) or 0
    left = count + 1  # the end of the line before them
    while end > 0:
        begin = max(0, end - _BLOCK)
        at, data = files.read(run, log, begin, end - begin)
        data = data[: max(0, end - at)]
        found = data.count(b"\n")
        if found >= left:
            for _ in range(left):
                data = data[: data.rindex(b"\n")]
            return at + len(data) + 1
        left -= found
        end = begin
    return 0


class _Found:
    """Lines that are kept, within the bounds."""

    def __init__(self, query: Query) -> None:
        self.total = 0
        self.full = False
        self._query = query
        most = min(query.tail or query.limit, MOST_LINES)
        self._most = most
        self._kept: deque[Line] = deque(maxlen=most if query.tail else None)
        self._bytes = 0

    def wanted(self) -> bool:
        """Whether the next match is one to be kept."""
        return bool(self._query.tail) or self.total >= self._query.skip

    def keep(self, line: Line) -> None:
        size = len(line.text)
        if not self._query.tail and len(self._kept) >= self._most:
            return
        if self._bytes + size > _MOST_BYTES:
            self.full = True
            if not self._query.tail:
                return
        if self._query.tail and len(self._kept) == self._most:
            self._bytes -= len(self._kept[0].text)
        self._kept.append(line)
        self._bytes += size
        while self._bytes > _MOST_BYTES:
            self._bytes -= len(self._kept.popleft().text)

    def lines(self) -> list[Line]:
        """In time, where it is known of all."""
        if all(line.at is not None for line in self._kept):
            return sorted(self._kept, key=lambda line: line.at or 0.0)
        return list(self._kept)


class _Reader:
    """Makes lines of one attempt's chunks."""

    def __init__(self, ordered: Ordered, query: Query, found: _Found) -> None:
        self.ordered = ordered
        self.ends = dict.fromkeys(STREAMS, 0)  # behind the last whole line
        self._query = query
        self._found = found
        self._has = query.test()
        self._parts = dict.fromkeys(STREAMS, b"")
        self._numbers: dict[str, int | None] = dict.fromkeys(STREAMS, 0)
        self._before: deque[Line] = deque(maxlen=query.context)
        self._after = 0

    def start(self, stream: str, offset: int) -> None:
        self.ends[stream] = offset
        self._numbers[stream] = None if offset else 0
        self.ordered.skip(stream, offset)

    def take(self, chunk: Chunk) -> None:
        stream = chunk.log.stream
        if stream not in self._query.streams:
            return
        data = self._parts[stream] + chunk.data
        whole = data.rfind(b"\n") + 1
        self._parts[stream] = data[whole:]
        self.ends[stream] = chunk.end - len(data) + whole
        if whole:
            self._take_lines(chunk.log, data[: whole - 1], chunk.at)

    def take_rest(self) -> None:
        """What no line's end follows."""
        for stream, part in self._parts.items():
            if part:
                self._take_lines(LogFile(self.ordered.task, self.ordered.epoch, stream), part, None)
                self.ends[stream] += len(part)

    def _take_lines(self, log: LogFile, data: bytes, at: float | None) -> None:
        query, before = self._query, self._numbers[log.stream]
        if before is not None:
            self._numbers[log.stream] = before + data.count(b"\n") + 1
        if at is not None and at < query.since:
            return
        if self._has is not None and not query.context and not self._has(data):
            return  # a thousand times as fast as line by line
        for nth, raw in enumerate(data.split(b"\n"), 1):
            number = None if before is None else before + nth
            match = self._has is None or bool(self._has(raw))
            if match or query.context:
                self._note(log, number, at, match, raw)

    def _note(
        self, log: LogFile, number: int | None, at: float | None, match: bool, raw: bytes
    ) -> None:
        found, wanted = self._found, self._found.wanted()
        if match:
            found.total += 1
        if not (wanted or self._query.context):
            return
        text = raw[:_MOST_OF_A_LINE].decode(errors="replace").replace("\0", "")
        if len(raw) > _MOST_OF_A_LINE:
            text += f" [and {len(raw) - _MOST_OF_A_LINE} bytes]"
        line = Line(*log, number, at, match, text)
        if match and wanted:
            for before in self._before:
                found.keep(before)
            self._before.clear()
            found.keep(line)
            self._after = self._query.context
        elif self._after and not match:
            found.keep(line)
            self._after -= 1
        elif self._query.context:
            self._before.append(line)
