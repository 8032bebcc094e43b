# SPDX-License-Identifier: Apache-2.0
"""The connection to the broker when it is cut: nothing is lost, nothing comes twice."""

import hashlib
import itertools
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedml.client import Client, Seen
from fedml.errors import BrokerRefused
from fedml.session import Session
from fedml_broker.identity import Identity
from tests.place import Place

# ---------------------------------------------------------------------- following


def _pieces(text: str, cuts: list[int]) -> list[dict[str, Any]]:
    """The log items in which a broker may tell `text`: cut anywhere between characters."""
    at = [0, *sorted({cut % (len(text) + 1) for cut in cuts}), len(text)]
    items = []
    for begin, end in itertools.pairwise(at):
        place = {"offset": len(text[:begin].encode()), "end": len(text[:end].encode())}
        log = {"task": "t", "epoch": 1, "stream": "stdout", "text": text[begin:end], **place}
        items.append({"log": log})
    return items


@given(
    text=st.text(max_size=40).filter(lambda text: "\0" not in text),
    told=st.integers(min_value=0),
    before=st.lists(st.integers(min_value=0), max_size=4),
    after=st.lists(st.integers(min_value=0), max_size=4),
)
def test_a_log_that_is_told_anew_in_other_pieces_shows_each_character_once(
    text: str, told: int, before: list[int], after: list[int]
) -> None:
    seen, shown = Seen(), ""
    first = _pieces(text, before)
    for item in [*first[: told % (len(first) + 1)], *_pieces(text, after)]:
        if seen.is_new(item):
            shown += item["log"]["text"]
    assert shown == text


def test_logs_of_other_tasks_attempts_and_streams_are_apart() -> None:
    seen = Seen()
    for change in ({}, {"task": "u"}, {"epoch": 2}, {"stream": "stderr"}):
        (item,) = [i for i in _pieces("hello", []) if i["log"]["text"]]
        item["log"].update(change)
        assert seen.is_new(item)
        assert not seen.is_new(item)


def test_a_broker_that_is_killed_and_comes_back_costs_no_line(tmp_path: Path) -> None:
    with Place(tmp_path) as place:
        place.agent("one")
        run = place.launch("echo begun; for n in $(seq 200); do echo $n; sleep 0.01; done")
        text = ""
        for item in place.follow(run):
            if "log" in item:
                if not text:
                    place.broker.kill()
                    place.start_broker()
                text += item["log"]["text"]
    assert text.split() == ["begun", *map(str, range(1, 201))]


# ---------------------------------------------------------------------- blobs

DATA = os.urandom(3_000_000)
SHA256 = hashlib.sha256(DATA).hexdigest()


class _Cutting(BaseHTTPRequestHandler):
    """Serves `DATA` with ranges, and hangs up after a million bytes of each answer."""

    def do_GET(self) -> None:
        begin = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.server.asked.append(begin)  # type: ignore[attr-defined]
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(DATA) - begin))
        self.end_headers()
        body = DATA[begin : begin + 1_000_000]
        self.wfile.write(body[::-1] if self.server.lies else body)  # type: ignore[attr-defined]

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""


@pytest.fixture
def cutting(tmp_path: Path) -> Iterator[tuple[Client, ThreadingHTTPServer]]:
    """A client and the server that it asks."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Cutting)
    server.asked, server.lies = [], False  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    ca = Identity.open(tmp_path / "identity", names=["localhost"]).ca_pem.decode()
    try:
        yield Client(Session(f"http://127.0.0.1:{server.server_port}", "00", ca)), server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_download_that_is_cut_goes_on_where_it_stopped(
    cutting: tuple[Client, ThreadingHTTPServer], tmp_path: Path
) -> None:
    client, server = cutting
    told: list[tuple[int, int]] = []
    client.download(SHA256, tmp_path / "blob", lambda done, total: told.append((done, total)))
    assert (tmp_path / "blob").read_bytes() == DATA
    assert server.asked == [0, 1_000_000, 2_000_000]  # type: ignore[attr-defined]
    assert told[-1] == (len(DATA), len(DATA))
    assert {total for _, total in told} == {len(DATA)}


def test_other_bytes_than_were_asked_for_are_not_kept(
    cutting: tuple[Client, ThreadingHTTPServer], tmp_path: Path
) -> None:
    client, server = cutting
    server.lies = True  # type: ignore[attr-defined]
    (tmp_path / "blob").write_text("what was there")
    with pytest.raises(BrokerRefused, match="are others"):
        client.download(SHA256, tmp_path / "blob")
    assert (tmp_path / "blob").read_text() == "what was there"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["blob"]
