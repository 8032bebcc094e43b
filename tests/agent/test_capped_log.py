# SPDX-License-Identifier: Apache-2.0
"""A capped log keeps the newest bytes under offsets that never change their meaning."""

import json
import os
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedml_agent.capped_log import LogReader, LogWriter, OrderWriter


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read_all(folder: Path, stream: str, limit: int) -> tuple[dict[int, int], int]:
    """Every byte that can be read, by its offset, and how many were said to be dropped."""
    reader, found, offset, dropped = LogReader(folder, stream), dict[int, int](), 0, 0
    while True:
        begin, piece, missing = reader.read(offset, limit)
        dropped += missing
        if not piece:
            return found, dropped
        assert begin == offset + missing
        found.update(zip(range(begin, begin + len(piece)), piece, strict=True))
        offset = begin + len(piece)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pieces=st.lists(st.binary(min_size=1, max_size=40), max_size=30),
    segment=st.integers(1, 16),
    segments=st.integers(2, 5),
    limit=st.integers(1, 50),
)
def test_the_newest_bytes_are_kept_at_their_offsets_and_the_others_counted(
    folder: Path, pieces: list[bytes], segment: int, segments: int, limit: int
) -> None:
    for old in folder.iterdir():
        old.unlink()
    cap = segment * segments
    writer = LogWriter("out", cap=cap, segment=segment)
    for piece in pieces:
        writer.append(memoryview(piece))
    written = b"".join(pieces)

    found, dropped = read_all(folder, "out", limit)

    assert writer.size == len(written)
    assert found == {at: written[at] for at in range(writer.dropped, len(written))}
    assert dropped == writer.dropped
    assert len(found) <= cap
    # At most one file less than the cap is gone when there was something to drop.
    assert writer.dropped == 0 or len(found) > cap - segment


def test_a_reader_sees_what_is_appended_while_it_reads(folder: Path) -> None:
    writer = LogWriter("err", cap=100, segment=10)
    reader = LogReader(folder, "err")
    assert reader.read(0, 10) == (0, b"", 0)
    writer.append(memoryview(b"abc"))
    assert reader.read(0, 10) == (0, b"abc", 0)
    assert reader.read(3, 10) == (3, b"", 0)
    writer.append(memoryview(b"d"))
    assert reader.read(3, 10) == (3, b"d", 0)


def test_bytes_that_the_disk_refuses_leave_a_gap_of_their_size(folder: Path) -> None:
    writer = LogWriter("out", cap=1000, segment=100)
    writer.append(memoryview(b"before"))
    writer.close()
    blocked = folder / "out.6"
    blocked.mkdir()  # stands in for a disk that lets no file be made
    writer.append(memoryview(b"lost"))
    blocked.rmdir()
    writer.append(memoryview(b"after"))
    reader = LogReader(folder, "out")
    assert reader.read(0, 100) == (0, b"before", 0)
    assert reader.read(6, 100) == (10, b"after", 4)
    assert (writer.size, writer.dropped) == (15, 4)


def test_a_lost_end_is_known_from_the_exit_record(folder: Path) -> None:
    LogWriter("out", cap=10, segment=5).append(memoryview(b"ab"))
    record = {"logs": {"out": {"size": 9, "dropped": 7}, "err": {"size": 0, "dropped": 0}}}
    (folder / "exit.json").write_text(json.dumps(record))
    assert LogReader(folder, "out").read(0, 10) == (0, b"ab", 0)
    assert LogReader(folder, "out").read(2, 10) == (9, b"", 7)
    assert LogReader(folder, "out").read(9, 10) == (9, b"", 0)


def test_an_end_that_comes_while_we_read_is_not_taken_for_a_gap(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list_files = os.listdir

    def list_files_and_end(path: str) -> list[str]:
        names = list_files(path)
        LogWriter("out", cap=10, segment=5).append(memoryview(b"ab"))
        (folder / "exit.json").write_text('{"logs": {"out": {"size": 2}}}')
        monkeypatch.setattr(os, "listdir", list_files)
        return names

    monkeypatch.setattr(os, "listdir", list_files_and_end)
    assert LogReader(folder, "out").read(0, 10) == (0, b"", 0)
    assert LogReader(folder, "out").read(0, 10) == (0, b"ab", 0)


def test_log_files_are_for_their_owner_only(folder: Path) -> None:
    LogWriter("out", cap=10, segment=5).append(memoryview(b"ab"))
    assert (folder / "out.0").stat().st_mode & 0o777 == 0o600


def test_there_are_two_streams(folder: Path) -> None:
    with pytest.raises(ValueError, match="stream is one of"):
        LogReader(folder, "log")


def records(folder: Path) -> list[tuple[int, int, int]]:
    """What the order says: milliseconds, 1 for err, offset."""
    data = b"".join(path.read_bytes() for path in sorted(folder.glob("order.*")))
    return [(when >> 1, when & 1, end) for when, end in struct.iter_unpack("<QQ", data)]


def test_the_order_has_one_record_for_each_stretch_of_a_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    order = OrderWriter()
    order.note("out", 5, 1.0)
    order.note("out", 9, 2.0)
    order.note("err", 3, 2.5)
    assert records(tmp_path) == [(2000, 0, 9)]
    order.flush()
    order.flush()
    order.note("err", 4, 3.0)
    order.flush()
    assert records(tmp_path) == [(2000, 0, 9), (2500, 1, 3), (3000, 1, 4)]
    assert LogReader(tmp_path, "order").read(0, 1 << 20)[1] == b"".join(
        struct.pack("<QQ", ms << 1 | err, end) for ms, err, end in records(tmp_path)
    )


def test_a_shim_of_an_earlier_version_has_no_order(tmp_path: Path) -> None:
    logs = {"out": {"size": 3, "dropped": 0}, "err": {"size": 0, "dropped": 0}}
    (tmp_path / "exit.json").write_text(json.dumps({"logs": logs}))
    reader = LogReader(tmp_path, "order")
    assert not reader.is_there
    assert reader.read(0, 100) == (0, b"", 0)
