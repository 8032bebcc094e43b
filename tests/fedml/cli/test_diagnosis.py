# SPDX-License-Identifier: Apache-2.0
"""`fedml env` and `fedml diagnosis`, when all is well, and for each thing that is not."""

import json
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from fedml import api, diagnosis, session
from fedml.session import Session
from fedml_broker.identity import Identity
from tests.fakes.https_server import HttpsServer
from tests.fedml.cli.conftest import Fedml


@pytest.fixture
def home(fedml: Fedml, tmp_path: Path) -> Path:
    """A home where the admin is logged in, to be spoilt."""
    key = (fedml.place.home / "broker" / "admin.key").read_text()
    session.login(tmp_path / "home", key)
    return tmp_path / "home"


def _spoil(home: Path, change: Callable[[Session], Session]) -> None:
    file = home / "user" / "session.json"
    file.write_text(json.dumps(asdict(change(session.load(home)))))


def _wrong(home: Path) -> tuple[str, str, str]:
    """The one line that is not ok."""
    (found,) = [f for f in diagnosis.findings(home) if f.state == diagnosis.WRONG]
    return found.name, found.text, found.next


def test_all_is_well(fedml: Fedml, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = fedml("diagnosis", home=home)
    assert "not ok" not in done.stdout
    found = json.loads(fedml("diagnosis", "--json", home=home).stdout)
    assert found["ok"]
    names = [check["name"] for check in found["checks"]]
    assert names[-7:] == ["dns", "tcp", "clock", "tls", "api", "token", "machines"]
    assert " of 2 are online" in found["checks"][-1]["text"]
    assert api.fedml_diagnosis(True, s3=False, home=home)
    assert "token: ok: admin, admin of default" in capsys.readouterr().out


def test_env_tells_versions_machine_and_account(fedml: Fedml, home: Path, tmp_path: Path) -> None:
    found = json.loads(fedml("env", "--json", home=home).stdout)
    assert found["versions"]["numpy"]
    assert found["machine"]["cpus"] >= 1
    assert found["broker"]["url"] == fedml.place.client.url
    assert (found["broker"]["name"], found["broker"]["role"]) == ("admin", "admin")
    shown = fedml("env", home=home).stdout
    assert fedml.place.client.url in shown
    assert session.load(home).token not in shown + json.dumps(found)
    assert "not logged in" in fedml("env", home=tmp_path / "none").stdout


def test_who_is_not_logged_in_is_told_how(fedml: Fedml, tmp_path: Path) -> None:
    done = fedml("diagnosis", home=tmp_path / "none", code=1)
    assert "next: `fedml login KEY`" in done.stdout


def test_a_token_that_others_can_read(home: Path) -> None:
    (home / "user" / "session.json").chmod(0o644)
    name, text, hint = _wrong(home)
    assert (name, hint) == ("login", f"chmod 600 {home}/user/session.json")
    assert "others can read it (mode 644)" in text


def test_a_name_that_nobody_knows(home: Path) -> None:
    _spoil(home, lambda kept: replace(kept, url="https://nobody.invalid:8443"))
    name, text, hint = _wrong(home)
    assert name == "dns"
    assert "nobody.invalid has no address" in text
    assert "DNS" in hint


def test_a_port_where_nobody_listens(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    _spoil(home, lambda kept: replace(kept, url=f"https://localhost:{port}"))
    name, _, hint = _wrong(home)
    assert name == "tcp"
    assert "fedml-broker up" in hint


def test_another_broker_in_its_place(home: Path, tmp_path: Path) -> None:
    other = Identity.open(tmp_path / "other", names=["localhost"])
    ca = other.ca_pem.decode()
    _spoil(home, lambda kept: replace(kept, ca=ca))
    name, text, hint = _wrong(home)
    assert name == "tls"
    assert "is not the broker of your login" in text
    assert "new key" in hint


def test_a_server_that_is_no_broker(home: Path, tmp_path: Path) -> None:
    identity = Identity.open(tmp_path / "other", names=["localhost"])
    with HttpsServer(identity) as server:
        ca = identity.ca_pem.decode()
        _spoil(home, lambda kept: replace(kept, url=server.url, ca=ca))
        name, text, _ = _wrong(home)
    assert name == "api"
    assert "does not answer" in text


def test_a_clock_that_is_wrong(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time
    monkeypatch.setattr(diagnosis.time, "time", lambda: now() + 86_400)
    name, text, hint = _wrong(home)
    assert name == "clock"
    assert "ahead of the broker's" in text
    assert "timedatectl" in hint


def test_a_token_that_is_none(home: Path) -> None:
    _spoil(home, lambda kept: replace(kept, token="ab" * 24))
    name, _, hint = _wrong(home)
    assert name == "token"
    assert "fedml-broker users token" in hint


def test_a_full_disk(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "DISK_BYTES", 1 << 62)
    found = [f.name for f in diagnosis.findings(home) if f.state == diagnosis.WRONG]
    assert found == ["disk home", "disk here", "disk scratch"]
