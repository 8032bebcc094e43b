# SPDX-License-Identifier: Apache-2.0
"""Records become rows once, in the transaction that notes how far they were taken."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from fedml_broker import runs
from fedml_broker.blobs import Blobs
from fedml_broker.observe import Observer
from fedml_broker.store import Store
from fedml_broker.tables import blob_refs
from fedml_broker.tracking import Tracker, check_artifact_name, thinned
from fedml_protocol.records import MAX_LINE_BYTES

RUN = "r-aaaaaaaa"


@pytest.fixture
async def tracker(tmp_path: Path) -> AsyncIterator[Tracker]:
    store, blobs = Store.open(tmp_path / "broker.db"), Blobs(tmp_path / "blobs", reserve_bytes=0)
    yield Tracker(store, Observer(store, tmp_path / "logs"), blobs)
    store.close()
    blobs.close()


def _line(n: int) -> bytes:
    return f'{{"kind":"metrics","at":1,"step":{n},"metrics":{{"a":{n}}}}}\n'.encode()


async def _steps(tracker: Tracker) -> list[Any]:
    found = (await tracker.metrics(RUN))["series"]
    return [p[0] for p in found[0]["points"]] if found else []


async def test_pieces_that_come_twice_or_overlap_or_too_early_count_once(tracker: Tracker) -> None:
    text = b"".join(map(_line, range(10)))
    assert await tracker.take(RUN, "t/1", 50, text[50:]) == 0
    assert await tracker.take(RUN, "t/1", 0, text[:100]) == len(_line(0))
    assert await tracker.take(RUN, "t/1", 0, text[:200]) == 3 * len(_line(0))
    assert await tracker.take(RUN, "t/1", 30, text[30:]) == len(text)
    assert await tracker.take(RUN, "t/1", 30, text[30:]) == len(text)
    assert await tracker.take(RUN, "t/1", 30, text[30:60]) == len(text)
    assert await _steps(tracker) == [*range(10)]
    # Another attempt at the task is another file.
    assert await tracker.take(RUN, "t/2", 0, text) == len(text)
    assert len(await _steps(tracker)) == 20


async def test_a_line_that_is_too_long_to_be_a_record_does_not_hold_up_the_rest(
    tracker: Tracker,
) -> None:
    long = b"x" * (MAX_LINE_BYTES + 1)
    assert await tracker.take(RUN, "t/1", 0, long) == len(long)
    rest = b"xx\n" + _line(1)
    assert await tracker.take(RUN, "t/1", len(long), rest) == len(long) + len(rest)
    assert await _steps(tracker) == [1]
    assert (await tracker.metrics(RUN))["refused"] == 2


async def test_an_artifact_of_the_same_name_replaces_the_one_before_and_its_blob(
    tracker: Tracker,
) -> None:
    offset = 0
    for name, digit in (("a", "1"), ("a/b", "2"), ("a", "3")):
        text = (
            f'{{"kind":"artifact","at":1,"name":"{name}","sha256":"{digit * 64}","size":1}}\n'
        ).encode()
        offset = await tracker.take(RUN, "t/1", offset, text)
    found = await tracker.artifacts(RUN)
    assert [(a["name"], a["sha256"][0], a["here"]) for a in found] == [
        ("a", "3", False),
        ("a/b", "2", False),
    ]
    query = sa.select(blob_refs.c.sha256).order_by(blob_refs.c.sha256)
    kept = await tracker._store.read(lambda tx: list(tx.execute(query).scalars()))
    assert kept == ["2" * 64, "3" * 64]
    idle = await tracker._store.write(lambda tx: runs.remove(tx, RUN, "me"))
    assert idle == ["2" * 64, "3" * 64]
    assert await tracker.artifacts(RUN) == []


@given(
    values=st.lists(st.none() | st.floats(-1e6, 1e6), min_size=1, max_size=300),
    points=st.integers(2, 50),
)
def test_a_thinned_series_keeps_its_extremes_its_order_and_its_bound(
    values: list[float | None], points: int
) -> None:
    rows = [(n, value, 0.0) for n, value in enumerate(values)]
    kept = thinned(iter(rows), len(rows), points)
    assert len(kept) <= points
    assert kept == sorted(kept, key=lambda row: row[0])
    numbers = [v for v in values if v is not None]
    if numbers:
        shown = [row[1] for row in kept if row[1] is not None]
        assert (min(shown), max(shown)) == (min(numbers), max(numbers))


@pytest.mark.parametrize("name", ["", "/etc", "../x", "a/../b", "a//b", "a/", ".", "a\0", "a\\b"])
def test_a_name_that_would_lead_elsewhere_is_none(name: str) -> None:
    with pytest.raises(ValueError, match="is not the name of an artifact"):
        check_artifact_name(name)
