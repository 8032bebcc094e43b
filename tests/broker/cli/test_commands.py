# SPDX-License-Identifier: Apache-2.0
"""The admin's commands against a running broker: what they print, and what they change."""

import contextlib
import json
import os
import socket
import sqlite3
import subprocess
import tarfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from safetensors.numpy import load_file

from fedml import session
from fedml.client import Client
from fedml.errors import BrokerRefused
from fedml.parts import send
from tests.place import Place, command


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A broker with one agent."""
    with Place(tmp_path_factory.mktemp("place")) as place:
        place.agent("one")
        run = place.launch("true")
        place.end(run)  # now it is known to be online
        place.client.call("DELETE", f"/v1/runs/{run}")
        yield place


def _broker(
    place: Place, *words: str, code: int = 0, answer: str = ""
) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(
        command("fedml_broker", *words),
        env={**os.environ, "FEDML_HOME": str(place.home)},
        input=answer,
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def _json(place: Place, *words: str) -> Any:
    return json.loads(_broker(place, *words, "--json").stdout)


def _blobs(place: Place) -> set[str]:
    return {p.name for p in (place.home / "broker" / "blobs" / "sha256").glob("*/*")}


def test_status_and_devices_are_for_people_and_for_scripts(place: Place) -> None:
    assert "1 of 1 online" in _broker(place, "status").stdout
    assert _json(place, "status")["online"] == 1
    (device,) = _json(place, "devices", "list")
    head, line = _broker(place, "devices", "list").stdout.splitlines()
    assert head.split() == ["NAME", "DEVICE", "STATUS", "TASKS", "HAS", "LABELS", "SEEN"]
    assert line.split()[:3] == ["one", device["id"], "online"]
    facts = _broker(place, "devices", "show", "one").stdout
    assert f"device       {device['id']}\n" in facts
    assert _json(place, "devices", "show", device["id"])["name"] == "one"


def test_labels_are_put_on_and_taken_off(place: Place) -> None:
    before = _json(place, "devices", "show", "one")["labels"]
    said = _broker(place, "devices", "label", "one", "a=1", "b=2").stdout
    assert {"a=1", "b=2"} <= set(said.split())
    _broker(place, "devices", "label", "one", "a-", "b-")
    assert _json(place, "devices", "show", "one")["labels"] == before
    assert "is not NAME=VALUE" in _broker(place, "devices", "label", "one", "x", code=2).stderr


def test_a_drained_machine_is_shown_as_such(place: Place) -> None:
    _broker(place, "devices", "drain", "one")
    assert _json(place, "devices", "show", "one")["status"] == "draining"
    _broker(place, "devices", "drain", "one", "--off")
    assert _json(place, "devices", "show", "one")["status"] == "online"


def test_keys_and_users_are_listed_with_what_became_of_them(place: Place) -> None:
    made = _json(place, "keys", "create", "--uses", "3", "--label", "site=north")
    _broker(place, "keys", "revoke", made["id"])
    key = next(k for k in _json(place, "keys", "list") if k["id"] == made["id"])
    assert (key["uses"], key["labels"], key["revoked"]) == (3, {"site": "north"}, True)
    line = next(
        text
        for text in _broker(place, "keys", "list").stdout.splitlines()
        if text.startswith(made["id"])
    )
    assert "0 of 3" in line
    assert "revoked" in line
    _broker(place, "users", "create", "kim")
    assert {"admin", "kim"} == {user["name"] for user in _json(place, "users", "list")}
    assert "member" in _broker(place, "users", "list").stdout
    for _ in range(2):
        _broker(place, "users", "token", "kim")
    said = _broker(place, "users", "revoke", "kim").stderr
    assert said == "kim is signed out everywhere: 2 tokens ended\n"
    assert "no such user" in _broker(place, "users", "revoke", "nobody", code=6).stderr


def test_a_run_that_ended_is_removed_with_logs_and_models(place: Place) -> None:
    before = _blobs(place)
    run = place.federate(rounds=2)
    assert place.end(run)["state"] == "FINISHED"
    rounds = _json(place, "runs", "show", run)["rounds"]
    models = {r["model"]["sha256"] for r in rounds if r["model"]}
    assert len(models) == 3
    assert models <= _blobs(place) - before
    model = place.folder / "model"
    place.client.download(place.model(run), model)
    assert load_file(model)["seen"].tolist() == [2.0]
    assert (place.home / "broker" / "logs" / run).exists()

    said = _broker(place, "runs", "remove", run).stderr

    assert "1 runs are deleted" in said
    assert _blobs(place) == before
    assert not (place.home / "broker" / "logs" / run).exists()
    for table in ("runs", "tasks", "rounds", "clients", "events"):
        column = "id" if table == "runs" else "run"
        assert place.query(f"SELECT 1 FROM {table} WHERE {column} = :run", run=run) == []
    assert "no such run" in _broker(place, "runs", "show", run, code=6).stderr
    assert "no such run" in _broker(place, "runs", "remove", run, code=6).stderr


def test_what_another_run_needs_stays(place: Place, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "main.sh").write_text("echo shared\n")
    before = _blobs(place)
    package = send(place.client, tmp_path / "work")
    first, second = (place.launch("sh main.sh", package=package) for _ in range(2))
    for run in (first, second):
        place.end(run)
    _broker(place, "runs", "remove", first)
    assert package["sha256"] in _blobs(place)
    assert place.stdout(second) == "shared\n"
    _broker(place, "runs", "remove", second)
    assert _blobs(place) == before  # its parts are gone, too


def test_a_run_that_goes_on_is_not_removed(place: Place) -> None:
    run = place.launch("sleep 600")
    said = _broker(place, "runs", "remove", run, code=6).stderr
    assert "the run has not ended" in said
    assert "try: stop it first" in said
    _broker(place, "runs", "stop", run)
    assert place.end(run)["state"] == "STOPPED"
    assert "STOPPED, by admin" in _broker(place, "runs", "show", run).stdout
    _broker(place, "runs", "remove", run)


def test_old_runs_are_removed_together_once_somebody_says_yes(place: Place) -> None:
    _broker(place, "runs", "remove", "--older-than", "0h", "--yes")
    runs = [place.launch("true") for _ in range(3)]
    for run in runs:
        place.end(run)
    listed = _broker(place, "runs", "list").stdout
    assert all(run in listed for run in runs)
    assert "0 runs are deleted" in _broker(place, "runs", "remove", "--older-than", "1h").stderr
    place.wait(1.1)  # ages are whole seconds
    asked = _broker(place, "runs", "remove", "--older-than", "0h", answer="n\n", code=130).stderr
    assert "Delete 3 runs" in asked
    assert len(_json(place, "runs", "list")) == 3
    _broker(place, "runs", "remove", "--older-than", "0h", "--yes")
    assert _json(place, "runs", "list") == []
    assert "no runs yet" in _broker(place, "runs", "list").stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name runs, or --older-than"),
        (["r-1", "--older-than", "3d"], "name runs, or --older-than"),
        (["--older-than", "soon"], "takes 12h, 30d or 8w, not 'soon'"),
    ],
)
def test_remove_wants_to_know_what(place: Place, words: list[str], said: str) -> None:
    assert said in _broker(place, "runs", "remove", *words, code=2).stderr


def test_only_an_admin_may_remove(place: Place) -> None:
    run = place.launch("true")
    place.end(run)
    _broker(place, "users", "create", "lee")
    token = _broker(place, "users", "token", "lee").stdout
    lee = Client(session.login(place.folder / "lee", token))
    assert lee.call("GET", f"/v1/runs/{run}")["id"] == run
    with pytest.raises(BrokerRefused, match="needs the role admin"):
        lee.call("DELETE", f"/v1/runs/{run}")


def test_a_verb_that_does_not_exist_gets_the_nearest_one(place: Place) -> None:
    assert "Did you mean 'devices'?" in _broker(place, "device", code=2).stderr


def test_a_second_broker_on_one_home_is_told_of_the_first(place: Place) -> None:
    said = _broker(place, "up", code=1).stderr
    assert "another broker works on" in said


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for option, other in (("--https-port", "--mqtt-port"), ("--mqtt-port", "--https-port")):
            done = subprocess.run(
                command("fedml_broker", "up", f"{option}={port}", f"{other}=0"),
                env={**os.environ, "FEDML_HOME": str(tmp_path / option)},
                capture_output=True,
                text=True,
            )
            assert done.returncode == 1
            assert f"port {port} on 127.0.0.1 is taken" in done.stderr
            assert "Traceback" not in done.stderr


def test_a_home_without_a_broker_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        command("fedml_broker", "status", "--home", str(tmp_path)), capture_output=True, text=True
    )
    assert done.returncode == 5
    assert "there is no broker in" in done.stderr
    assert "try: `fedml-broker up`" in done.stderr


def test_users_have_roles(place: Place) -> None:
    said = _broker(place, "users", "create", "visitor", "--role", "viewer").stderr
    assert "visitor is a viewer" in said
    _broker(place, "users", "role", "visitor", "member")
    roles = {user["name"]: user["role"] for user in _json(place, "users", "list")}
    assert roles["visitor"] == "member"
    told = _broker(place, "users", "role", "admin", "viewer", code=6)
    assert "a tenant needs an admin" in told.stderr
    both = ("users", "create", "both", "--admin", "--role", "viewer")
    assert "two different roles" in _broker(place, *both, code=2).stderr


def test_the_audit_tells_who_did_what_and_is_verified(place: Place) -> None:
    _broker(place, "devices", "label", "one", "audited=1")
    _broker(place, "devices", "label", "one", "audited-")
    listed = _json(place, "audit", "list", "--user", "admin", "--action", "device", "--since", "1h")
    assert [e["details"]["remove"] for e in listed[:2]] == [["audited"], []]
    head, *lines = _broker(place, "audit", "list", "--limit", "2").stdout.splitlines()
    assert head.split() == ["N", "WHEN", "TENANT", "WHO", "WHAT", "TO", "DETAILS"]
    assert len(lines) == 2
    assert "user/admin" in lines[0]
    anchor = _broker(place, "audit", "head").stdout.strip()
    assert _json(place, "audit", "head") == {"n": listed[0]["n"], "hash": anchor}
    _broker(place, "users", "create", "late")
    assert f"entry {listed[0]['n']} is the anchor" in (
        _broker(place, "audit", "verify", "--anchor", anchor).stdout
    )
    assert "--since takes" in _broker(place, "audit", "list", "--since", "x", code=2).stderr
    assert "64 digits" in _broker(place, "audit", "verify", "--anchor", "x", code=2).stderr
    assert "none of them has" in (
        _broker(place, "audit", "verify", "--anchor", "ab" * 32, code=1).stderr
    )


def test_doctor_finds_a_healthy_broker_and_says_what_is_not(place: Place, tmp_path: Path) -> None:
    def checks(code: int) -> dict[str, Any]:
        told = json.loads(_broker(place, "doctor", "--json", code=code).stdout)
        assert told["ok"] == (code == 0)
        return {one["name"]: one for one in told["checks"]}

    found = checks(0)
    assert {one["state"] for one in found.values()} <= {"ok", "note"}
    assert found["mqtt"]["text"].startswith("mqtts://localhost:")
    _broker(place, "backup", str(tmp_path / "b.tar.gz"), "--no-blobs")
    key = place.home / "broker" / "identity" / "ca.key"
    key.chmod(0o644)
    try:
        found = checks(1)
    finally:
        key.chmod(0o600)
    assert found["keys"]["state"] == "not ok"
    assert found["keys"]["next"] == f"chmod go= {key}"
    assert found["backup"]["state"] == "ok"
    assert str(tmp_path / "b.tar.gz") in found["backup"]["text"]
    text = _broker(place, "doctor").stdout
    assert "certificate            ok      good until 20" in text

    away = subprocess.run(
        command("fedml_broker", "doctor"),
        env={**os.environ, "FEDML_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert away.returncode == 1
    assert "holds no broker yet\n                       next: `fedml-broker up`" in away.stdout


def test_doctor_of_a_broker_that_is_down_looks_at_its_disk_and_certificates(
    tmp_path: Path,
) -> None:
    with Place(tmp_path) as place:
        pass
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "CA")])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now).not_valid_after(now + timedelta(days=100))
    ca = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    (place.home / "broker" / "identity" / "ca.pem").write_bytes(ca)
    for file in (place.home / "broker").glob("broker.db*"):  # its log of writes too
        file.unlink()
    (place.home / "broker" / "broker.db").write_bytes(b"garbage" * 1000)
    told = json.loads(_broker(place, "doctor", "--json", code=1).stdout)
    found = {one["name"]: one for one in told["checks"]}
    assert (found["store"]["state"], found["https"]["state"]) == ("not ok", "not ok")
    assert "restore a backup" in found["store"]["next"]
    assert "is `fedml-broker up` running?" in found["https"]["next"]
    assert found["CA"]["state"] == "note"
    assert "every machine must log in anew" in found["CA"]["next"]
    assert found["disk"]["state"] == "ok"


def test_a_backup_is_in_the_audit_and_holds_it(place: Place, tmp_path: Path) -> None:
    file = tmp_path / "b.tar.gz"
    before = _json(place, "audit", "head")
    _broker(place, "backup", str(file), "--no-blobs")
    assert [p.name for p in tmp_path.iterdir()] == ["b.tar.gz"]
    (entry,) = _json(place, "audit", "list", "--action", "backup", "--limit", "1")
    assert (entry["actor"], entry["object"]) == ("cli", str(file))
    assert entry["details"]["bytes"] == file.stat().st_size
    with tarfile.open(file) as archive:
        archive.extractall(tmp_path / "home", filter="data")
    other = {"FEDML_HOME": str(tmp_path / "home")}
    words = ("audit", "verify", "--anchor", before["hash"])
    told = subprocess.run(
        command("fedml_broker", *words), env={**os.environ, **other}, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr


def test_what_the_broker_deletes_during_a_backup_is_left_out_of_it(tmp_path: Path) -> None:
    home = tmp_path / "broker"
    logs = home / "logs" / "r-1"
    logs.mkdir(parents=True)
    sqlite3.connect(home / "broker.db").close()
    (home / "blobs" / "parts").mkdir(parents=True)
    (home / "blobs" / "parts" / "half").touch()
    (home / "blobs" / "sha256").mkdir()
    (home / "identity").mkdir()
    (home / "admin.key").touch()
    files = [logs / f"{n:04}.log" for n in range(4000)]
    for file in files:
        file.touch()
    process = subprocess.Popen(
        command("fedml_broker", "backup", str(tmp_path / "b.tar.gz"), "--json"),
        env={**os.environ, "FEDML_HOME": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / ".b.tar.gz.part").exists():
        assert process.poll() is None
    for file in reversed(files):  # in the middle they meet
        file.unlink()
    told = json.loads(process.communicate()[0])
    assert process.returncode == 0
    assert told["bytes"] == (tmp_path / "b.tar.gz").stat().st_size
    with tarfile.open(tmp_path / "b.tar.gz") as archive:
        assert not [n for n in archive.getnames() if "parts" in n]


def test_a_changed_and_a_shortened_audit_are_found(place: Place, tmp_path: Path) -> None:
    for n in range(3):
        _broker(place, "devices", "label", "one", f"again={n}")
    anchor = _json(place, "audit", "head")
    home = tmp_path / "broker"
    home.mkdir()
    with (
        contextlib.closing(sqlite3.connect(place.home / "broker" / "broker.db")) as source,
        contextlib.closing(sqlite3.connect(home / "broker.db")) as copy,
    ):
        source.backup(copy)
        _broker(place, "audit", "verify", "--anchor", anchor["hash"], "--home", str(tmp_path))
        copy.execute("DELETE FROM audit WHERE n = ?", (anchor["n"],))
        copy.commit()
        _broker(place, "audit", "verify", "--home", str(tmp_path))  # nobody can see this …
        words = ("--anchor", anchor["hash"], "--home", str(tmp_path))
        told = _broker(place, "audit", "verify", *words, code=1)  # … but who has kept a hash
        assert "cut off" in told.stderr
        copy.execute("UPDATE audit SET actor = 'user/eve' WHERE n = 2")
        copy.commit()
        told = _broker(place, "audit", "verify", "--home", str(tmp_path), code=1)
        assert "entry 2: its hash does not fit" in told.stderr
        copy.execute("DROP TABLE audit")
        copy.commit()
        told = _broker(place, "audit", "list", "--home", str(tmp_path), code=1)
        assert "older than the audit" in told.stderr


def test_a_revoked_admin_key_is_made_anew_at_the_next_start(tmp_path: Path) -> None:
    with Place(tmp_path) as place:
        place.client.call("POST", "/v1/users", {"name": "eva", "role": "admin"})
        token = place.client.call("POST", "/v1/users/eva/tokens", {})["key"]
        eva = Client(session.login(tmp_path / "eva", token))
        eva.call("DELETE", "/v1/users/admin/tokens")
        said = _broker(place, "users", "list", code=6).stderr
        assert "admin.key is good no more" in said
        assert "start the broker again" in said
        place.broker.stop()
        place.start_broker()
        assert {"admin", "eva"} == {user["name"] for user in _json(place, "users", "list")}
