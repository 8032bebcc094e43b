# SPDX-License-Identifier: Apache-2.0
"""HTTPS to the broker over real TLS: errors say whose fault it is, transfers that are cut go on."""

import asyncio
import hashlib
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import urllib3

from fedml_agent import https
from fedml_agent.errors import BrokerRefused, BrokerUnreachable, KeyRefused
from fedml_agent.home import Home
from fedml_agent.https import BlobChanged, Https, file_blob, patiently, pinned_ca
from fedml_agent.login import _csr, _device_key
from fedml_broker.identity import Identity
from fedml_protocol.blob import Blob
from fedml_protocol.topics import Address
from tests.fakes.https_server import Asked, HttpsServer

DATA = os.urandom(5_000_000)
BLOB = Blob(sha256=hashlib.sha256(DATA).hexdigest(), size=len(DATA))
PATH = f"/v1/blobs/{BLOB.sha256}"
PART = 2_000_000


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return Identity.open(tmp_path_factory.mktemp("identity"), names=["localhost"])


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    """Another broker's."""
    return Identity.open(tmp_path_factory.mktemp("stranger"), names=["localhost"])


@pytest.fixture
def server(identity: Identity) -> Iterator[HttpsServer]:
    with HttpsServer(identity) as server:
        yield server


@pytest.fixture
def broker(server: HttpsServer, identity: Identity) -> Iterator[Https]:
    """Connections as a machine without a certificate has them."""
    broker = Https(server.url, ssl.create_default_context(cafile=str(identity.ca_file)))
    yield broker
    broker._pool.clear()


@pytest.fixture
def short_of_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(https, "_TIMEOUT", urllib3.Timeout(connect=5, read=0.2))


# ---------------------------------------------------------------------- what goes wrong, in words


def test_a_question_and_its_answer(server: HttpsServer, broker: Https) -> None:
    server.on("POST", "/v1/echo", lambda asked: asked.answer(200, asked.read()))
    assert broker.call("POST", "/v1/echo", {"what": ["ever"]}) == {"what": ["ever"]}
    assert server.heard[-1].headers["Content-Type"] == "application/json"


@pytest.mark.parametrize(
    ("detail", "text"), [("d-1 was revoked", "not known: d-1 was revoked"), ("", "not known")]
)
def test_a_refusal_is_told_in_the_brokers_own_words(
    server: HttpsServer, broker: Https, detail: str, text: str
) -> None:
    server.on("GET", "/v1/it", lambda asked: asked.problem(403, "not known", detail, "log out"))
    with pytest.raises(BrokerRefused) as refused:
        broker.call("GET", "/v1/it")
    error = refused.value
    assert (str(error), error.status, error.hint, error.exit_code) == (text, 403, "log out", 6)


@pytest.mark.parametrize("body", [b"<html>Bad gateway</html>", b'{"status": 502}'])
def test_an_error_that_is_not_the_brokers_is_told_by_its_number(
    server: HttpsServer, broker: Https, body: bytes
) -> None:
    server.on("GET", "/v1/it", lambda asked: asked.answer(502, body))
    with pytest.raises(BrokerRefused, match=r"^the broker answered 502$"):
        broker.call("GET", "/v1/it")


def test_an_answer_that_no_broker_gives_is_no_answer(server: HttpsServer, broker: Https) -> None:
    """A portal of a hotel, say, which welcomes with 200, or complains in a form of its own."""
    server.on("GET", "/v1/it", lambda asked: asked.answer(200, b"<h1>Welcome</h1>", "text/html"))
    with pytest.raises(BrokerUnreachable, match="does not answer as a broker does"):
        broker.call("GET", "/v1/it")
    server.on("GET", "/v1/it", lambda asked: asked.answer(500, b'["no", "object"]'))
    with pytest.raises(BrokerRefused, match="the broker answered 500"):
        broker.call("GET", "/v1/it")


def test_where_nobody_listens_the_address_and_the_next_step_are_named(identity: Identity) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        url = f"https://localhost:{gone.getsockname()[1]}"
    nobody = Https(url, ssl.create_default_context(cafile=str(identity.ca_file)))
    with pytest.raises(BrokerUnreachable, match="Connection refused") as refused:
        nobody.call("GET", "/v1/health")
    assert url in str(refused.value)
    assert "fedml-agent diagnose" in refused.value.hint


def test_a_broker_that_accepts_and_says_nothing_is_unreachable(
    server: HttpsServer, identity: Identity, short_of_patience: None
) -> None:
    frozen = threading.Event()
    server.on("GET", "/v1/it", lambda asked: frozen.wait(50) and asked.hang_up())
    broker = Https(server.url, ssl.create_default_context(cafile=str(identity.ca_file)))
    try:
        with pytest.raises(BrokerUnreachable, match="timed out"):
            broker.call("GET", "/v1/it")
    finally:
        frozen.set()


def test_an_answer_that_is_cut_is_no_answer(server: HttpsServer, broker: Https) -> None:
    def cut(asked: Asked) -> None:
        asked.send_head(200, 100)
        asked.wfile.write(b'{"half": ')
        asked.hang_up()

    server.on("GET", "/v1/it", cut)
    with pytest.raises(BrokerUnreachable):
        broker.call("GET", "/v1/it")


def test_another_brokers_certificate_is_refused_and_named_as_the_reason(
    server: HttpsServer, stranger: Identity
) -> None:
    server.on("GET", "/v1/it", lambda asked: asked.answer(200, b"{}"))
    broker = Https(server.url, ssl.create_default_context(cafile=str(stranger.ca_file)))
    with pytest.raises(BrokerUnreachable, match="certificate verify failed"):
        broker.call("GET", "/v1/it")
    assert server.asked == []  # not a word was said to it


def test_a_machine_shows_its_certificate_and_an_anonymous_one_nothing(
    server: HttpsServer, identity: Identity, tmp_path: Path
) -> None:
    home = Home(tmp_path)
    home.make()
    home.ca.write_bytes(identity.ca_pem)
    server.on("GET", "/v1/it", lambda asked: asked.answer(200, f'"{asked.who}"'.encode()))
    assert Https.of(home, server.url).call("GET", "/v1/it") == "None"  # before its login
    csr = _csr(_device_key(home))
    home.certificate.write_bytes(identity.issue(csr.encode(), Address("acme", "one").client_id))
    assert Https.of(home, server.url).call("GET", "/v1/it") == "acme/d/one"
    assert Https.anonymous(home, server.url).call("GET", "/v1/it") == "None"


# ---------------------------------------------------------------------- fetching


def _in_parts(asked: Asked) -> None:
    """Hangs up after each million bytes."""
    begin = int(asked.headers.get("Range", "bytes=0-")[6:-1])
    asked.send_head(206 if begin else 200, len(DATA) - begin)
    asked.wfile.write(DATA[begin : begin + PART])
    asked.hang_up()


def test_a_fetch_that_is_cut_goes_on_where_it_stopped(
    server: HttpsServer, broker: Https, tmp_path: Path
) -> None:
    server.on("GET", PATH, _in_parts)
    broker.fetch(BLOB, tmp_path / "blob", durable=True)
    assert (tmp_path / "blob").read_bytes() == DATA
    begins = [int(heard.headers.get("Range", "bytes=0-")[6:-1]) for heard in server.heard]
    assert begins[0] == 0
    assert begins == sorted(set(begins))  # nothing that was there is asked for twice
    assert len(begins) > 2
    assert [p.name for p in tmp_path.iterdir()] == ["blob"]


def test_a_fetch_that_something_in_between_begins_anew_is_given_up_with_the_reason(
    server: HttpsServer, broker: Https, tmp_path: Path
) -> None:
    def deaf(asked: Asked) -> None:
        asked.send_head(200, len(DATA))
        asked.wfile.write(DATA[:PART])
        asked.hang_up()

    server.on("GET", PATH, deaf)
    with pytest.raises(BrokerUnreachable, match="ignores `Range`"):
        broker.fetch(BLOB, tmp_path / "blob")
    assert not (tmp_path / "blob").exists()


def test_what_an_earlier_fetch_left_is_not_built_upon(
    server: HttpsServer, broker: Https, tmp_path: Path
) -> None:
    """Its bytes were never compared with the hash: they may be anything."""
    (tmp_path / "blob.part").write_bytes(b"left by an agent that was killed")
    server.on("GET", PATH, lambda asked: asked.answer(200, DATA))
    broker.fetch(BLOB, tmp_path / "blob")
    assert (tmp_path / "blob").read_bytes() == DATA


def test_bytes_with_another_hash_are_refused_and_not_kept(
    server: HttpsServer, broker: Https, tmp_path: Path
) -> None:
    server.on("GET", PATH, lambda asked: asked.answer(200, DATA[::-1]))
    (tmp_path / "blob").write_text("what was there")
    with pytest.raises(BlobChanged, match=f"came as {BLOB.sha256} are others"):
        broker.fetch(BLOB, tmp_path / "blob")
    assert [p.name for p in tmp_path.iterdir()] == ["blob"]
    assert (tmp_path / "blob").read_text() == "what was there"


def test_a_fetch_that_never_gets_on_is_given_up(
    server: HttpsServer, broker: Https, tmp_path: Path
) -> None:
    def nothing(asked: Asked) -> None:
        asked.send_head(200, len(DATA))
        asked.hang_up()

    server.on("GET", PATH, nothing)
    with pytest.raises(BrokerUnreachable, match=f"{BLOB.sha256} did not arrive"):
        broker.fetch(BLOB, tmp_path / "blob")
    assert len(server.asked) == https._RESUMPTIONS
    assert not (tmp_path / "blob").exists()


def test_a_blob_that_is_not_there_is_asked_for_once(
    server: HttpsServer, broker: Https, tmp_path: Path
) -> None:
    server.on("GET", PATH, lambda asked: asked.problem(404, "no such blob"))
    with pytest.raises(BrokerRefused, match="no such blob"):
        broker.fetch(BLOB, tmp_path / "blob")
    assert len(server.asked) == 1


def test_our_own_full_disk_is_not_blamed_on_the_way(
    server: HttpsServer, broker: Https, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.on("GET", PATH, lambda asked: asked.answer(200, DATA))
    (tmp_path / "blob.part").symlink_to("/dev/full")
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False: None)  # keeps the link
    with pytest.raises(OSError, match="No space left"):
        broker.fetch(BLOB, tmp_path / "blob")
    assert len(server.asked) == 1


# ---------------------------------------------------------------------- storing


class _Shelf:
    """Takes uploads as the broker does: in parts, and tells how much it has."""

    def __init__(self, server: HttpsServer, *, cut_after: int | None = None) -> None:
        self.has = b""
        self._cut_after = cut_after
        server.on("HEAD", PATH, self._head)
        server.on("PUT", PATH, self._put)

    def _head(self, asked: Asked) -> None:
        whole = len(self.has) == BLOB.size
        asked.send_head(200 if whole else 404, 0, Upload_Offset=str(len(self.has)))

    def _put(self, asked: Asked) -> None:
        begin = int(asked.headers.get("Content-Range", "bytes 0-").split()[1].split("-")[0])
        if begin != len(self.has):
            asked.read()
            asked.problem(409, "the upload goes on elsewhere")
            return
        if self._cut_after is not None:
            self.has += asked.read(self._cut_after)
            self._cut_after = None
            asked.connection.shutdown(socket.SHUT_RDWR)
            asked.hang_up()
            return
        self.has += asked.read()
        asked.answer(201, b"")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(DATA)
    assert file_blob(tmp_path / "file") == BLOB
    return tmp_path / "file"


def test_a_new_file_is_sent_without_a_question(
    server: HttpsServer, broker: Https, file: Path
) -> None:
    shelf = _Shelf(server)
    broker.store(file, BLOB)
    assert shelf.has == DATA
    assert server.asked == [("PUT", PATH)]


def test_an_upload_that_is_cut_goes_on_where_it_stopped(
    server: HttpsServer, broker: Https, file: Path
) -> None:
    shelf = _Shelf(server, cut_after=PART)
    broker.store(file, BLOB)
    assert shelf.has == DATA
    first, second = (heard for heard in server.heard if heard.method == "PUT")
    assert first.headers["Content-Range"] is None
    assert second.headers["Content-Range"] == f"bytes {PART}-{BLOB.size - 1}/{BLOB.size}"


def test_what_the_broker_has_is_not_sent_again(
    server: HttpsServer, broker: Https, file: Path
) -> None:
    shelf = _Shelf(server)
    shelf.has = DATA
    broker.store(file, BLOB, again=True)
    assert server.asked == [("HEAD", PATH)]
    shelf.has = DATA[:PART]
    broker.store(file, BLOB, again=True)
    assert shelf.has == DATA
    assert int(server.heard[-1].headers["Content-Length"]) == len(DATA) - PART


def test_where_an_upload_goes_on_the_broker_decides(
    server: HttpsServer, broker: Https, file: Path
) -> None:
    """Another upload of the same bytes has been there meanwhile."""
    shelf = _Shelf(server)
    shelf.has = DATA[:PART]
    broker.store(file, BLOB)
    assert shelf.has == DATA
    assert [method for method, _ in server.asked] == ["PUT", "HEAD", "PUT"]


def test_an_upload_that_is_refused_is_not_tried_again(
    server: HttpsServer, broker: Https, file: Path
) -> None:
    def refuse(asked: Asked) -> None:
        asked.read()
        asked.problem(507, "the broker's disk is full")

    server.on("PUT", PATH, refuse)
    with pytest.raises(BrokerRefused, match="disk is full"):
        broker.store(file, BLOB)
    assert len(server.asked) == 1


# ---------------------------------------------------------------------- the pinned CA


def test_the_ca_that_the_key_names_is_taken_and_no_other(
    server: HttpsServer, identity: Identity, stranger: Identity
) -> None:
    server.on("GET", "/v1/ca", lambda asked: asked.answer(200, identity.ca_pem))
    assert pinned_ca(server.url, identity.ca_sha256) == identity.ca_pem
    with pytest.raises(KeyRefused, match="not the one that made this key") as refused:
        pinned_ca(server.url, stranger.ca_sha256)
    assert "ask its admin for a new key" in refused.value.hint


def test_something_else_than_a_broker_says_so(server: HttpsServer, identity: Identity) -> None:
    server.on("GET", "/v1/ca", lambda asked: asked.answer(200, b"<html>Welcome</html>"))
    with pytest.raises(KeyRefused, match="does not answer as a broker does"):
        pinned_ca(server.url, identity.ca_sha256)
    server.on("GET", "/v1/ca", lambda asked: asked.problem(404, "not found"))
    with pytest.raises(KeyRefused, match=f"no broker answers at {server.url}"):
        pinned_ca(server.url, identity.ca_sha256)


# ---------------------------------------------------------------------- patience


async def test_a_broker_that_is_away_is_waited_for_and_one_that_refuses_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(https, "PATIENCE_S", 0.0)
    left = [BrokerUnreachable("away"), BrokerUnreachable("away"), None, BrokerRefused(403, "no")]

    def work() -> str:
        if (error := left.pop(0)) is not None:
            raise error
        return "done"

    assert await patiently(work) == "done"
    with pytest.raises(BrokerRefused):
        await patiently(work)
    assert left == []


async def test_nobody_waits_for_what_is_not_needed_any_more() -> None:
    wanted = asyncio.Event()
    wanted.set()

    def work() -> None:
        wanted.clear()
        raise BrokerUnreachable("away")

    with pytest.raises(BrokerUnreachable):
        await patiently(work, unless=lambda: not wanted.is_set())
