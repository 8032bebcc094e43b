# SPDX-License-Identifier: Apache-2.0
"""Who you are to which broker, and what is said when that cannot be known."""

import json
import socket
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fedml import session
from fedml_protocol.keys import Scope, parse_login_key
from tests.place import command

if TYPE_CHECKING:
    from tests.fedml.cli.conftest import Fedml


def _admin_key(fedml: "Fedml") -> str:
    return (fedml.place.home / "broker" / "admin.key").read_text()


def test_login_whoami_logout(fedml: "Fedml", tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert "logged in at https://" in fedml("login", _admin_key(fedml), home=home).stderr
    shown = fedml("whoami", home=home).stdout
    assert "admin" in shown
    found = json.loads(fedml("whoami", "--json", home=home).stdout)
    assert (found["name"], found["url"]) == ("admin", fedml.place.client.url)
    assert "logged out" in fedml("logout", home=home).stderr
    said = fedml("whoami", code=3, home=home).stderr
    assert "not logged in" in said
    assert "try: `fedml login KEY`" in said


def test_logout_with_revoke_ends_the_key_and_the_browsers_that_it_let_in(
    fedml: "Fedml", tmp_path: Path
) -> None:
    call = fedml.place.client.call
    key = call("POST", "/v1/users/admin/tokens", {})["key"]
    for name in ("laptop", "desk"):
        fedml("login", key, home=tmp_path / name)
    fedml("logout", home=tmp_path / "desk")
    fedml("whoami", home=tmp_path / "laptop")  # to forget a key is not to end it
    call("POST", "/v1/session", {"key": key})
    browsers = "SELECT count(*) FROM sessions"
    ((before,),) = fedml.place.query(browsers)
    assert "the key has ended" in fedml("logout", "--revoke", home=tmp_path / "laptop").stderr
    assert "unknown or expired" in fedml("login", key, code=6, home=tmp_path / "desk").stderr
    ((after,),) = fedml.place.query(browsers)
    assert (before, after) == (1, 0)


def test_a_key_comes_from_stdin_too(fedml: "Fedml", tmp_path: Path) -> None:
    done = subprocess.run(
        command("fedml", "login", "-", "--home", str(tmp_path)),
        input=_admin_key(fedml),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_a_machines_key_and_a_typo_are_told_apart(fedml: "Fedml") -> None:
    said = fedml("login", fedml.place.login_key, code=2).stderr
    assert "machine" in said or "device" in said
    fedml("login", _admin_key(fedml)[:-3], code=2)


@pytest.mark.parametrize("what", ["nobody", "somebody else"])
def test_a_key_of_a_broker_that_is_not_there_or_another_one(
    fedml: "Fedml", tmp_path: Path, what: str
) -> None:
    key = parse_login_key(_admin_key(fedml), Scope.USER)
    if what == "nobody":
        with socket.create_server(("127.0.0.1", 0)) as listener:
            url = f"https://localhost:{listener.getsockname()[1]}"
        other = replace(key, url=url)
        said = fedml("login", str(other), code=5, home=tmp_path).stderr
        assert f"nobody answers at {url}" in said
    else:
        other = replace(key, ca_sha256=bytes(32))
        said = fedml("login", str(other), code=6, home=tmp_path).stderr
        assert "is not the one that made this key" in said
    assert "try: " in said


def test_a_token_that_was_never_given_out_is_refused(fedml: "Fedml", tmp_path: Path) -> None:
    key = parse_login_key(_admin_key(fedml), Scope.USER)
    other = replace(key, secret=bytes(len(key.secret)))
    said = fedml("login", str(other), code=6, home=tmp_path).stderr
    assert "unknown or expired token" in said
    assert "fedml-broker users token" in said
    fedml("whoami", code=3, home=tmp_path)  # nothing was kept


def test_a_token_that_has_expired_says_when_and_what_to_do(fedml: "Fedml", tmp_path: Path) -> None:
    call = fedml.place.client.call
    call("POST", "/v1/users", {"name": "lee"})
    key = call("POST", "/v1/users/lee/tokens", {"days": 1e-9})["key"]
    said = fedml("login", key, code=6, home=tmp_path).stderr
    assert "this token has expired: it was lee's and good until 20" in said
    assert "try: `fedml login` with a new key" in said
    session.login(tmp_path, key)  # as if it had expired since
    for words in (("run", "list"), ("whoami",), ("device", "list")):
        assert "this token has expired" in fedml(*words, code=6, home=tmp_path).stderr
    assert "not ok  this token has expired" in fedml("diagnosis", code=1, home=tmp_path).stdout
    good = call("POST", "/v1/users/lee/tokens", {"days": 1})["key"]
    fedml("login", good, home=tmp_path)
    assert "good until  20" in fedml("whoami", home=tmp_path).stdout


def test_version_names_what_a_report_needs(fedml: "Fedml") -> None:
    found = json.loads(fedml("version", "--json").stdout)
    assert {"fedml", "python", "numpy"} <= found.keys()
    assert found["python"] in fedml("version").stdout


def test_a_verb_that_does_not_exist_gets_the_nearest_one(fedml: "Fedml") -> None:
    assert "launch" in fedml("lanch", code=2).stderr


def test_a_reader_that_goes_away_is_no_error_of_ours(fedml: "Fedml") -> None:
    words = " ".join(f"'{word}'" for word in command("fedml", "data", "list", "--json"))
    script = f"set -o pipefail; {words} | head -c 1 > /dev/null; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=fedml.env)
    assert done.stderr == ""
    assert done.returncode in (0, 141)
