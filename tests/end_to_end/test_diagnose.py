# SPDX-License-Identifier: Apache-2.0
"""`fedml-agent diagnose` against a real broker: each thing that can be wrong, and what it says."""

import datetime
import json
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.place import Agent, Place, command


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with Place(tmp_path_factory.mktemp("place")) as place:
        yield place


@pytest.fixture(scope="module")
def machine(place: Place) -> Agent:
    """A machine that has joined; between two tests no agent runs on it."""
    return place.agent("machine", run=False)


@pytest.fixture
def copy(machine: Agent, tmp_path: Path) -> Path:
    """The home of that machine once more, to be spoilt."""
    return Path(shutil.copytree(machine.home, tmp_path / "copy"))


def diagnose(home: Path, **env: str) -> tuple[int, dict[str, dict[str, str]]]:
    """Exit code, and the findings by name."""
    done = subprocess.run(
        command("fedml_agent", "diagnose", "--json"),
        env={**os.environ, "FEDML_HOME": str(home), **env},
        capture_output=True,
        text=True,
    )
    assert not done.stderr, done.stderr
    said = json.loads(done.stdout)
    assert said["ok"] == (done.returncode == 0)
    return done.returncode, {one["name"]: one for one in said["checks"]}


def states(found: Mapping[str, dict[str, str]], state: str) -> set[str]:
    return {name for name, one in found.items() if one["state"] == state}


def wait_for_link(place: Place, agent: Agent) -> dict[str, Any]:
    for _ in range(100):
        done = subprocess.run(
            command("fedml_agent", "status", "--json"),
            env={**os.environ, "FEDML_HOME": str(agent.home)},
            capture_output=True,
            text=True,
        )
        if done.returncode == 0:
            found: dict[str, Any] = json.loads(done.stdout)["agent"]
            return found
        place.wait(0.1)
    raise AssertionError(agent.log.read_text())


def test_a_machine_that_has_joined_and_runs_no_agent_is_well(machine: Agent) -> None:
    code, found = diagnose(machine.home)
    assert code == 0, states(found, "not ok")
    assert found["agent"]["next"] == "start it: `fedml-agent run`"
    assert "takes this device's connection" in found["mqtt"]["text"]
    assert "good for 30.0 days" in found["certificate"]["text"]
    for name in ("home", "policy", "login", "https port", "mqtt port", "clock", "tls", "api"):
        assert found[name]["state"] == "ok"


def test_a_running_agent_keeps_its_connection(place: Place, machine: Agent) -> None:
    machine.start()
    pid = wait_for_link(place, machine)["pid"]
    code, found = diagnose(machine.home)
    assert code == 0, states(found, "not ok")
    assert found["mqtt"]["text"] == "the running agent is connected"
    assert str(pid) in found["agent"]["text"]
    assert wait_for_link(place, machine)["pid"] == pid
    assert "another agent uses" not in machine.log.read_text()
    machine.stop()


def test_what_waits_for_the_agent_still_waits_afterwards(place: Place, machine: Agent) -> None:
    machine.start()
    wait_for_link(place, machine)
    machine.stop()
    place.client.call("POST", f"/v1/devices/{machine.device}/drain", {"on": True})

    assert diagnose(machine.home)[1]["mqtt"]["state"] == "ok"

    place.broker.kill()  # which alone opens the file while it runs
    with closing(sqlite3.connect(place.home / "broker" / "mqtt.db")) as db:
        query = (
            "SELECT topic FROM message JOIN delivery ON message.id = delivery.message"
            " WHERE topic LIKE '%/dn/%'"
        )
        waiting = [str(topic) for (topic,) in db.execute(query)]
    place.start_broker()
    assert len(waiting) == 1
    assert machine.device in waiting[0]


def test_an_agent_whose_broker_went_away_says_so_itself(place: Place, machine: Agent) -> None:
    machine.start()
    wait_for_link(place, machine)
    place.broker.kill()
    code, found = diagnose(machine.home)
    place.start_broker()
    machine.stop()
    assert code == 1
    assert states(found, "not ok") == {"https port", "mqtt port", "mqtt"}
    assert "the running agent is not connected" in found["mqtt"]["text"]
    assert found["certificate"]["state"] == "ok"


def test_each_line_is_read_by_people_too(machine: Agent) -> None:
    done = subprocess.run(
        command("fedml_agent", "diagnose", "--home", str(machine.home)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert "agent              note    none runs on this home" in lines
    assert "                   next: start it: `fedml-agent run`" in lines


def test_a_broker_that_is_down_is_told_from_one_that_is_not_there(
    copy: Path,
) -> None:
    file = copy / "agent" / "private" / "membership.json"
    member = json.loads(file.read_text())
    closed = {"url": "https://localhost:1", "mqtt_port": 1}
    file.write_text(json.dumps({**member, **closed}))
    code, found = diagnose(copy)
    assert code == 1
    assert states(found, "not ok") == {"https port", "mqtt port"}
    assert "nobody listens there" in found["https port"]["text"]
    assert "`fedml-broker status`" in found["https port"]["next"]

    file.write_text(json.dumps({**member, "url": "https://nowhere.invalid:8443"}))
    code, found = diagnose(copy)
    assert code == 1
    assert "leads nowhere" in found["https port"]["text"]
    assert "getent hosts nowhere.invalid" in found["https port"]["next"]
    assert found["mqtt"]["state"] == "ok"


def test_another_broker_at_the_address_is_not_trusted(copy: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "another CA")])
    now = datetime.datetime.now(datetime.UTC)
    other = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = copy / "agent" / "private" / "ca.crt"
    file.write_bytes(other.public_bytes(serialization.Encoding.PEM))
    code, found = diagnose(copy)
    assert code == 1
    assert states(found, "not ok") == {"tls", "certificate", "mqtt"}
    assert "is not the broker of the login key" in found["tls"]["text"]
    assert "was not issued by the broker's CA" in found["certificate"]["text"]
    assert "fedml-agent logout" in found["tls"]["next"]


def test_a_device_that_was_revoked_hears_so(place: Place) -> None:
    machine = place.agent("revoked", run=False)
    place.client.call("POST", f"/v1/devices/{machine.device}/revoke")
    code, found = diagnose(machine.home)
    assert code == 1
    assert states(found, "not ok") == {"api", "mqtt"}
    assert "does not take this device's certificate" in found["api"]["text"]
    assert "broker refuses this device's connection" in found["mqtt"]["text"]


def test_a_key_that_others_can_read_or_of_another_device_is_wrong(place: Place, copy: Path) -> None:
    private = copy / "agent" / "private"
    (private / "device.key").chmod(0o644)
    assert "can be read by others" in diagnose(copy)[1]["certificate"]["text"]
    other = place.agent("other", run=False)
    (private / "device.key").chmod(0o600)
    shutil.copy(other.home / "agent" / "private" / "device.crt", private / "device.crt")
    found = diagnose(copy)[1]
    assert "is not for the key" in found["certificate"]["text"]
    assert found["api"]["state"] == "not ok"


CLOCK = """
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
static time_t off(void) { return atol(getenv("CLOCK_OFF")); }
int clock_gettime(clockid_t id, struct timespec *at) {
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(id, at);
    if (id == CLOCK_REALTIME) at->tv_sec += off();
    return result;
}
time_t time(time_t *to) {
    struct timespec at;
    clock_gettime(CLOCK_REALTIME, &at);
    if (to) *to = at.tv_sec;
    return at.tv_sec;
}
int gettimeofday(struct timeval *at, void *zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec;
    at->tv_usec = now.tv_nsec / 1000;
    return 0;
}
"""


@pytest.fixture(scope="module")
def wrong_clock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that shifts the clock of the process that loads it by CLOCK_OFF seconds."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler, for a process with a clock of its own")
    folder = tmp_path_factory.mktemp("clock")
    (folder / "clock.c").write_text("#define _GNU_SOURCE\n" + CLOCK)
    library = folder / "clock.so"
    build = [compiler, "-shared", "-fPIC", "-o", str(library), str(folder / "clock.c"), "-ldl"]
    subprocess.run(build, check=True)
    return library


@pytest.mark.parametrize(
    ("days", "tls"),
    [
        (-2, "not yet valid"),
        (500, "has expired"),
        (2, ""),
    ],
)
def test_a_wrong_clock_is_named_as_the_cause(
    machine: Agent, wrong_clock: Path, days: int, tls: str
) -> None:
    env = {"LD_PRELOAD": str(wrong_clock), "CLOCK_OFF": str(days * 86400)}
    code, found = diagnose(machine.home, **env)
    assert code == 1
    clock = found["clock"]
    way = "ahead of" if days > 0 else "behind"
    assert (clock["state"], clock["text"]) == ("not ok", f"{abs(days)}.0 days {way} the broker's")
    assert "timedatectl" in clock["next"]
    # By the broker's clock the certificate is as good as ever.
    assert "good for 30.0 days" in found["certificate"]["text"]
    if tls:
        assert tls in found["tls"]["text"]
        assert found["tls"]["next"].startswith("set this machine's clock: `timedatectl")
    else:
        assert states(found, "not ok") == {"clock"}
