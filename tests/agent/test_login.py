# SPDX-License-Identifier: Apache-2.0
"""Joining, staying and leaving: what is kept, what is said, and what a wrong broker never hears."""

import json
import stat
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedml_agent import login
from fedml_agent.errors import AgentError, BrokerRefused, HomeUnusable, KeyRefused, NotLoggedIn
from fedml_agent.home import Home, Membership
from fedml_agent.https import Https
from fedml_broker.identity import Identity
from fedml_protocol.keys import RECOVER_CONTEXT, LoginKey, Scope
from tests.fakes.https_server import Asked, HttpsServer

FACTS: dict[str, Any] = {
    "tenant": "acme",
    "device": "d-1",
    "mqtt_host": "localhost",
    "mqtt_port": 8883,
    "heartbeat_s": 10.0,
    "verify_keys": {"k-1": "00" * 32},
}
SECRET = bytes(range(24))


class Broker:
    """One that enrols whoever has the secret, once per machine id."""

    def __init__(self, server: HttpsServer, identity: Identity) -> None:
        self.server = server
        self.identity = identity
        self.enrolled: list[dict[str, Any]] = []
        self.refusal: tuple[int, str, str] | None = None
        server.on("GET", "/v1/ca", lambda asked: asked.answer(200, identity.ca_pem))
        server.on("POST", "/v1/enrol", self._enrol)

    def key(self, **changes: Any) -> str:
        """A login key of this broker."""
        facts: dict[str, Any] = {"scope": Scope.DEVICE, "url": self.server.url, "secret": SECRET}
        facts |= {"ca_sha256": self.identity.ca_sha256, **changes}
        return str(LoginKey(**facts))

    def login(self, home: Home, key: str = "", **labels: str) -> Membership:
        """As `fedml-agent login` does it."""
        return login.login(
            home, key or self.key(), name="one", labels=labels, inventory={"cpus": 2}, version="1.0"
        )

    def certificate(self, csr: str, days: int = 30, now: datetime | None = None) -> str:
        """For the key in a request."""
        return self.identity.issue(csr.encode(), "acme/d/d-1", days=days, now=now).decode()

    def _enrol(self, asked: Asked) -> None:
        body = json.loads(asked.read())
        self.enrolled.append(body)
        if self.refusal is not None:
            asked.problem(*self.refusal)
            return
        answer = {**FACTS, "certificate": self.certificate(body["csr"])}
        asked.answer(200, json.dumps(answer).encode())


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return Identity.open(tmp_path_factory.mktemp("identity"), names=["localhost"])


@pytest.fixture
def broker(identity: Identity) -> Iterator[Broker]:
    with HttpsServer(identity) as server:
        yield Broker(server, identity)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


def public_key(home: Home) -> bytes:
    """In the certificate."""
    key = x509.load_pem_x509_certificate(home.certificate.read_bytes()).public_key()
    assert isinstance(key, Ed25519PublicKey)
    return key.public_bytes(Encoding.Raw, PublicFormat.Raw)


# ---------------------------------------------------------------------- joining


def test_a_machine_that_joins_keeps_everything_for_itself(broker: Broker, home: Home) -> None:
    membership = broker.login(home, site="lab")
    assert membership == Membership(url=broker.server.url, **FACTS)
    assert home.membership() == membership
    (asked,) = broker.enrolled
    assert (asked["name"], asked["labels"], asked["inventory"]) == (
        "one",
        {"site": "lab"},
        {"cpus": 2, "host": "127.0.0.1"},
    )
    assert asked["secret"] == SECRET.hex()
    for file in home.private.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    assert stat.S_IMODE(home.private.stat().st_mode) == 0o700
    assert "PRIVATE" not in json.dumps(asked)


def test_joining_again_is_the_same_machine_with_the_same_key(broker: Broker, home: Home) -> None:
    """The answer may have been lost: the broker gives it the same device again."""
    broker.login(home)
    before = public_key(home)
    broker.login(home)
    assert public_key(home) == before
    assert len({asked["machine_id"] for asked in broker.enrolled}) == 1


def test_a_key_that_was_damaged_in_copying_is_told_before_anybody_is_asked(
    broker: Broker, home: Home
) -> None:
    key = broker.key()
    for damaged in (key[:-4], key.replace(key[20], "", 1), "rubbish", ""):
        with pytest.raises(KeyRefused):
            login.login(home, damaged, name="one", labels={}, inventory={}, version="1")
    assert broker.server.asked == []
    assert not home.root.exists()


def test_a_users_key_is_not_a_machines(broker: Broker, home: Home) -> None:
    with pytest.raises(KeyRefused, match="a machine needs a device key"):
        broker.login(home, broker.key(scope=Scope.USER))
    assert broker.server.asked == []


def test_a_broker_with_another_ca_does_not_hear_the_secret(broker: Broker, home: Home) -> None:
    with pytest.raises(KeyRefused, match="not the one that made this key") as refused:
        broker.login(home, broker.key(ca_sha256=b"\1" * 32))
    assert refused.value.exit_code == 4
    assert broker.server.asked == [("GET", "/v1/ca")]
    assert not home.ca.exists()


@pytest.mark.parametrize(("status", "error"), [(401, KeyRefused), (403, KeyRefused)])
def test_a_key_that_is_used_up_is_refused_in_the_brokers_words(
    broker: Broker, home: Home, status: int, error: type[AgentError]
) -> None:
    broker.refusal = (status, "the key is used up", "ask for a new one")
    with pytest.raises(error, match="the key is used up"):
        broker.login(home)
    with pytest.raises(NotLoggedIn):
        home.membership()


def test_a_broker_that_fails_is_not_blamed_on_the_key(broker: Broker, home: Home) -> None:
    broker.refusal = (503, "the broker cannot write to its disk", "")
    with pytest.raises(BrokerRefused, match="cannot write") as refused:
        broker.login(home)
    assert refused.value.exit_code == 6


def test_a_member_of_another_broker_is_asked_to_log_out_first(broker: Broker, home: Home) -> None:
    broker.login(home)
    with pytest.raises(AgentError, match=f"is a member of {broker.server.url}") as refused:
        broker.login(home, broker.key(url="https://other.example:8443"))
    assert "fedml-agent logout" in refused.value.hint
    assert home.membership().url == broker.server.url


def test_a_key_file_that_cannot_be_read_is_named(broker: Broker, home: Home) -> None:
    home.make()
    home.key.write_text("not a key")
    with pytest.raises(HomeUnusable, match=str(home.key)):
        broker.login(home)


# ---------------------------------------------------------------------- staying


def test_what_has_changed_at_the_broker_is_written_down_at_hello(
    broker: Broker, home: Home
) -> None:
    broker.login(home)
    moved = {"mqtt_host": "mqtt.example", "mqtt_port": 1, "heartbeat_s": 60.0, "verify_keys": {}}
    answer = json.dumps(moved).encode()
    broker.server.on(
        "POST", "/v1/agent/hello", lambda asked: asked.read() and asked.answer(200, answer)
    )
    https = Https.of(home, broker.server.url)
    told = login.hello(home, https, {"cpus": 4}, "1.1")
    assert (told.mqtt_host, told.mqtt_port, told.heartbeat_s) == ("mqtt.example", 1, 60.0)
    assert home.membership() == told
    assert told.device == "d-1"


def test_a_certificate_is_renewed_late_in_its_life_and_not_all_at_once(
    broker: Broker, home: Home
) -> None:
    moments = set()
    for n in range(8):
        home = Home(home.root.parent / str(n))
        broker.login(home)
        certificate = x509.load_pem_x509_certificate(home.certificate.read_bytes())
        begin = certificate.not_valid_before_utc.timestamp()
        life = certificate.not_valid_after_utc.timestamp() - begin
        parts = [p for p in range(101) if login.renewal_due(home, now=begin + life * p / 100)]
        assert 70 <= parts[0] <= 90
        assert parts == list(range(parts[0], 101)), "once due, it stays due"
        moments.add(parts[0])
    assert len(moments) > 1


def test_a_renewal_keeps_the_key_and_one_that_is_refused_keeps_the_certificate(
    broker: Broker, home: Home
) -> None:
    broker.login(home)
    before, key = home.certificate.read_bytes(), public_key(home)
    https = Https.of(home, broker.server.url)

    def refuse(asked: Asked) -> None:
        asked.read()  # else the connection, which is kept, begins the next question with it
        asked.problem(403, "revoked")

    broker.server.on("POST", "/v1/agent/renew", refuse)
    with pytest.raises(BrokerRefused, match="revoked"):
        login.renew(home, https)
    assert home.certificate.read_bytes() == before

    def renew(asked: Asked) -> None:
        assert asked.who == "acme/d/d-1"
        fresh = broker.certificate(json.loads(asked.read())["csr"])
        asked.answer(200, json.dumps({"certificate": fresh}).encode())

    broker.server.on("POST", "/v1/agent/renew", renew)
    login.renew(home, https)
    assert home.certificate.read_bytes() != before
    assert public_key(home) == key


def test_a_machine_that_was_off_for_too_long_proves_that_it_has_its_key(
    broker: Broker, home: Home
) -> None:
    broker.login(home)
    assert not login.expired(home)
    long_ago = datetime.now(UTC) - timedelta(days=40)
    old = broker.certificate(broker.enrolled[0]["csr"], now=long_ago)
    home.certificate.write_text(old)
    assert login.expired(home)
    nonce = b'{"nonce": "n-1"}'
    broker.server.on("POST", "/v1/agent/challenge", lambda asked: asked.answer(200, nonce))
    proofs: list[tuple[str | None, dict[str, str]]] = []

    def recover(asked: Asked) -> None:
        body = json.loads(asked.read())
        proofs.append((asked.who, body))
        fresh = broker.certificate(body["csr"])
        asked.answer(200, json.dumps({"certificate": fresh}).encode())

    broker.server.on("POST", "/v1/agent/recover", recover)
    key = public_key(home)
    login.recover(home)
    ((who, body),) = proofs
    assert who is None  # the certificate that has ended is not shown
    signed = RECOVER_CONTEXT + b"n-1" + body["csr"].encode()
    Ed25519PublicKey.from_public_bytes(key).verify(bytes.fromhex(body["signature"]), signed)
    assert (body["tenant"], body["device"], body["nonce"]) == ("acme", "d-1", "n-1")
    assert not login.expired(home)
    assert public_key(home) == key


# ---------------------------------------------------------------------- leaving


def test_logging_out_forgets_everything_but_the_owners_policy(broker: Broker, home: Home) -> None:
    broker.login(home)
    home.policy.write_text("at_once = 1\n")
    (home.tasks / "t-1.1").mkdir()
    (home.packages / "blob").write_text("")
    login.logout(home)
    assert [p.name for p in home.root.iterdir()] == ["policy.toml"]
    with pytest.raises(NotLoggedIn):
        home.membership()
    login.logout(home)  # again is harmless
    broker.login(home)
    assert len({asked["machine_id"] for asked in broker.enrolled}) == 2
