# SPDX-License-Identifier: Apache-2.0
"""What people and machines get wrong: each says whose fault it is and what to do, and harms nobody.

Real commands against a real broker; a wrong job file is in tests/fedml, a rewritten MQTT message in
tests/agent/test_intake.py.
"""

import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedml.errors import BrokerRefused
from fedml.parts import send
from fedml_protocol.keys import LoginKey, Scope, parse_login_key
from fedml_protocol.package import File, Package, Part, parse
from tests.place import APP, Place, command


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """One broker for the tests that only talk to it."""
    with Place(tmp_path_factory.mktemp("broker")) as place:
        yield place


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with Place(tmp_path) as place:
        yield place


def agent(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return _run(home, "fedml_agent", *words)


def _run(home: Path, package: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(package, *words),
        env={**os.environ, "FEDML_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=30,
    )


def _says(found: subprocess.CompletedProcess[str], *texts: str) -> None:
    """It failed with a clear text and without a traceback."""
    assert found.returncode not in (0, None), found.stdout
    assert "Traceback" not in found.stderr
    for text in texts:
        assert text in found.stderr, found.stderr


# ---------------------------------------------------------------------- login keys


def _new_key(broker: Place, **wanted: object) -> str:
    return str(broker.client.call("POST", "/v1/keys", wanted)["key"])


def test_a_damaged_key_is_to_be_copied_again(broker: Place, tmp_path: Path) -> None:
    key = _new_key(broker)
    _says(agent(tmp_path, "login", key[:-5]), "damaged", "copy it again")
    _says(agent(tmp_path, "login", "hello"), "not a login key", "fedml-broker keys create")
    assert not (tmp_path / "agent" / "private" / "membership.json").exists()


def test_a_persons_key_is_not_a_machines(broker: Place, tmp_path: Path) -> None:
    token = (broker.home / "broker" / "admin.key").read_text()
    _says(agent(tmp_path, "login", token), "user's key", "fedml-broker keys create")


def test_a_key_is_good_for_as_many_machines_as_it_says(broker: Place, tmp_path: Path) -> None:
    key = _new_key(broker, uses=1)
    assert agent(tmp_path / "first", "login", key).returncode == 0
    # The same machine may say it again: the answer might have been lost.
    assert agent(tmp_path / "first", "login", key).returncode == 0
    _says(agent(tmp_path / "second", "login", key), "used up", "new key")


def test_an_expired_and_a_revoked_key_say_so(broker: Place, tmp_path: Path) -> None:
    expired = _new_key(broker, days=1e-9)
    _says(agent(tmp_path, "login", expired), "expired", "new key")
    made = broker.client.call("POST", "/v1/keys", {})
    broker.client.call("DELETE", f"/v1/keys/{made['id']}")
    _says(agent(tmp_path, "login", made["key"]), "revoked", "new key")


def test_a_key_of_another_broker_is_unknown_here(broker: Place, tmp_path: Path) -> None:
    good = parse_login_key(_new_key(broker), Scope.DEVICE)
    foreign = LoginKey(scope=Scope.DEVICE, url=good.url, ca_sha256=good.ca_sha256, secret=bytes(24))
    _says(agent(tmp_path, "login", str(foreign)), "unknown")


def test_a_broker_with_another_ca_is_not_trusted(broker: Place, tmp_path: Path) -> None:
    good = parse_login_key(_new_key(broker), Scope.DEVICE)
    forged = LoginKey(scope=Scope.DEVICE, url=good.url, ca_sha256=bytes(32), secret=good.secret)
    _says(agent(tmp_path, "login", str(forged)), "CA certificate differs", "ask its admin")


def test_a_broker_that_is_not_there_is_named(broker: Place, tmp_path: Path) -> None:
    good = parse_login_key(_new_key(broker), Scope.DEVICE)
    absent = LoginKey(
        scope=Scope.DEVICE,
        url="https://localhost:9",
        ca_sha256=good.ca_sha256,
        secret=good.secret,
    )
    found = agent(tmp_path, "login", str(absent))
    _says(found, "https://localhost:9 does not answer: Connection refused", "`fedml-broker up`")
    assert found.returncode == 5


# ---------------------------------------------------------------------- places that are taken


def test_a_taken_port_is_named_with_the_way_out(broker: Place, tmp_path: Path) -> None:
    port = broker.client.url.rpartition(":")[2]
    found = _run(tmp_path, "fedml_broker", "up", "--https-port", port, "--mqtt-port", "0")
    _says(found, f"port {port}", "0 chooses a free one")


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--https-port=80000", "not in the range"),
        ("--host=nosuch.invalid", "cannot listen on nosuch.invalid"),
        ("--lease=15", "15 s are less than two heartbeats of 10 s"),
        ("--heartbeat=0", "not in the range"),
        ("--disk-reserve-gb=-1", "not in the range"),
        ("--home=/proc/here", "/proc/here"),
    ],
)
def test_what_a_broker_cannot_serve_with_is_named(option: str, says: str, tmp_path: Path) -> None:
    found = _run(tmp_path, "fedml_broker", "up", "--https-port=0", "--mqtt-port=0", option)
    _says(found, says)


def test_a_second_broker_on_one_home_is_refused(broker: Place) -> None:
    found = _run(broker.home, "fedml_broker", "up", "--https-port", "0", "--mqtt-port", "0")
    _says(found, "another broker works on", "--home")


def test_a_second_agent_on_one_home_is_refused(place: Place) -> None:
    one = place.agent("one")
    place.finishes(place.launch("true"))  # it runs
    _says(agent(one.home, "run"), f"pid {one.pid}", "--home")
    place.finishes(place.launch("true"))  # and goes on


def test_an_agent_that_has_not_joined_says_how(tmp_path: Path) -> None:
    _says(agent(tmp_path, "run"), "not joined", "fedml-agent login KEY")


# ---------------------------------------------------------------------- damage


def test_an_agent_with_a_corrupt_journal_sets_it_aside_and_works(place: Place) -> None:
    one = place.agent("one")
    place.finishes(place.launch("true"))
    one.kill()
    journal = one.home / "agent" / "private" / "journal.db"
    for file in journal.parent.glob("journal.db*"):
        file.write_bytes(b"\xff" * 8192)

    one.start()

    place.finishes(place.launch("true"))
    (aside,) = journal.parent.glob("journal.db.damaged-*")
    assert aside.read_bytes() == b"\xff" * 8192


def test_a_package_with_another_hash_never_runs(place: Place) -> None:
    place.agent("one")
    package = _package(place, "echo ran > ran")
    blobs = place.home / "broker" / "blobs"
    (manifest,) = blobs.rglob(str(package["sha256"]))
    (part,) = parse(manifest.read_bytes()).parts
    (blob,) = blobs.rglob(part.sha256)
    blob.chmod(0o600)
    blob.write_bytes(b"X" * blob.stat().st_size)
    run = place.launch("sh script.sh", package=package)
    end = place.end(run)
    assert end["state"] == "FAILED"
    assert "not the one that was offered" in end["cause"]["message"]
    assert place.stdout(run) == ""


def test_a_package_that_is_not_all_there_or_none_is_refused_before_anything_runs(
    broker: Place,
) -> None:
    data = b"no manifest"
    sha256 = hashlib.sha256(data).hexdigest()
    broker.client.put(sha256, len(data), lambda start: iter([data[start:]]))
    with pytest.raises(BrokerRefused, match="not a package"):
        broker.launch("true", package={"sha256": sha256, "size": len(data)})
    manifest = Package((Part("ab" * 32, (File("a", 7),)),)).manifest()
    sha256 = hashlib.sha256(manifest).hexdigest()
    broker.client.put(sha256, len(manifest), lambda start: iter([manifest[start:]]))
    with pytest.raises(BrokerRefused, match="part of the package was not uploaded: abab"):
        broker.launch("true", package={"sha256": sha256, "size": len(manifest)})


def _package(place: Place, script: str) -> dict[str, object]:
    folder = place.folder / "workspace"
    folder.mkdir()
    (folder / "script.sh").write_text(script)
    return send(place.client, folder, cache=place.folder / "cache")


def test_a_store_that_is_no_database_is_named_and_left_alone(tmp_path: Path) -> None:
    home = tmp_path / "broker"
    home.mkdir()
    (home / "broker.db").write_bytes(b"garbage" * 1000)
    found = _run(tmp_path, "fedml_broker", "up", "--https-port", "0", "--mqtt-port", "0")
    _says(found, "broker.db", "doctor")
    assert (home / "broker.db").read_bytes() == b"garbage" * 1000


# ---------------------------------------------------------------------- disks


def test_a_full_agent_refuses_with_the_reason_and_takes_work_when_there_is_room(
    place: Place,
) -> None:
    one = place.agent("one")
    place.finishes(place.launch("true"))
    policy = one.home / "agent" / "policy.toml"
    policy.write_text('[resources]\ndisk_reserve = "900TB"\n')

    def waits_or_ends(item: dict[str, Any]) -> bool:
        return "disk" in item.get("waiting", "") or "end" in item

    # The agent looks at its disk with every heartbeat: some jobs may still get through.
    run = place.launch("echo here")
    while "end" in place.until(run, waits_or_ends):
        run = place.launch("echo here")
    policy.write_text("")
    place.finishes(run)


def test_a_full_broker_says_so_and_keeps_what_it_has(tmp_path: Path) -> None:
    with Place(tmp_path, more=("--disk-reserve-gb=900000",)) as place:
        place.agent("one")
        place.finishes(place.launch("true"))
        with pytest.raises(BrokerRefused, match="disk is full") as refused:
            _package(place, "true")
        assert "give it more disk" in refused.value.hint


def can_mount() -> bool:
    return (
        os.geteuid() == 0 and not subprocess.run(["unshare", "-m", "true"], check=False).returncode
    )


@pytest.mark.skipif(not can_mount(), reason="needs root, to mount a small disk")
def test_nothing_starts_on_a_disk_without_a_byte_and_each_says_so(
    broker: Place, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    # What is there already is copied onto a small disk, and the rest of it is filled.
    small = (
        'mount -t tmpfs -o size=1m none "$0" && cp -a "$1/." "$0" && shift '
        '&& { head -c 2m /dev/zero > "$0/fill" 2>/dev/null; "$@"; }'
    )

    def on_full_disk(old: Path, package: str, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["unshare", "-m", "sh", "-c", small, str(disk), str(old), *command(package, *words)],
            env={**os.environ, "FEDML_HOME": str(disk)},
            capture_output=True,
            text=True,
            timeout=30,
        )

    new, joined = tmp_path / "new", tmp_path / "joined"
    new.mkdir()
    key = _new_key(broker)
    found = on_full_disk(new, "fedml_agent", "login", key)
    _says(found, "No space left on device", str(disk), "make room")
    assert found.returncode == 8
    assert agent(joined, "login", key).returncode == 0  # the key was not used up
    found = on_full_disk(joined, "fedml_agent", "run")
    _says(found, "No space left on device", str(disk), "make room")
    assert found.returncode == 8
    found = on_full_disk(joined, "fedml_agent", "diagnose")
    assert "agent              not ok" in found.stdout
    assert "next: make room on that disk" in found.stdout
    found = on_full_disk(new, "fedml_broker", "up", "--https-port=0", "--mqtt-port=0")
    _says(found, "No space left on device", str(disk), "make room")


# ---------------------------------------------------------------------- updates


BAD_UPDATES = {
    "nan": "model['w'][3] = np.nan",
    "infinite": "model['w'][3] = np.inf",
    "shape": "model['w'] = np.zeros(63)",
    "missing": "del model['w']",
}


@pytest.mark.parametrize("how", BAD_UPDATES)
def test_a_bad_update_is_refused_and_counted_and_the_round_goes_on(place: Place, how: str) -> None:
    for name in ("one", "two", "three"):
        place.agent(name)
    spoil = BAD_UPDATES[how]
    # The client that spoils its update is the third one; its data are as many rows as its number.
    app = APP.replace("time.sleep", f"if y.sum() == SPOILT: {spoil}\n    time.sleep").replace(
        "def model",
        "_rng = np.random.default_rng(2)\n"
        "_x = _rng.normal(size=(40, 64))\n"
        "SPOILT = (_x @ np.linspace(-1, 1, 64)).sum()\n\n\ndef model",
    )
    clients = {"count": 3, "minimum": 2, "deadline_s": 30}

    run = place.federate(app, rounds=2, clients=clients)

    refused, complaints = [], []
    for item in place.follow(run):
        event = item.get("event", {})
        if event.get("kind") == "round_ends" and event["data"]["round"]:
            refused.append((event["data"]["replies"], event["data"]["refused"]))
        if event.get("kind") == "client_failed":
            complaints.append((event["data"]["name"], event["data"]["cause"]["message"]))
    place.finishes(run)
    assert refused == [(2, 1), (2, 1)]
    assert {name for name, _ in complaints} == {"two"}  # third by name
    assert [text for _, text in complaints if "'w'" not in text] == []
    assert not any(text.startswith(("KeyError", "ValueError")) for _, text in complaints)


def test_a_train_function_that_raises_shows_its_own_traceback(place: Place) -> None:
    place.agent("one")
    app = APP.replace("    time.sleep", "    spoons = {}['no such key']\n    time.sleep")
    end = place.end(place.federate(app, rounds=2))
    assert end["state"] == "FAILED"
    assert "KeyError" in end["cause"]["message"]
    assert "spoons = {}['no such key']" in end["cause"]["traceback"]


def test_what_no_machine_can_do_says_why_machine_by_machine(place: Place) -> None:
    place.agent("one")
    place.agent("two")
    place.finishes(place.launch("true"))
    with pytest.raises(BrokerRefused) as refused:
        place.launch("true", needs={"gpus": 64})
    text = str(refused.value)
    assert "one:" in text
    assert "two:" in text
    assert "GPU" in text


def test_one_run_id_starts_one_run(broker: Place, tmp_path: Path) -> None:
    with Place(tmp_path) as place:
        place.agent("one")
        run = place.launch("echo once", run="r-chosenbyme1")
        assert place.launch("echo once", run="r-chosenbyme1") == run == "r-chosenbyme1"
        place.finishes(run)
        assert place.stdout(run) == "once\n"
        with pytest.raises(BrokerRefused, match="taken"):
            place.launch("echo twice", run="r-chosenbyme1")
        with pytest.raises(BrokerRefused, match="not a run's id"):
            place.launch("echo once", run="../../etc")
