# SPDX-License-Identifier: Apache-2.0
"""Machines join, come back, are told apart, shut out and forgotten: a real store, real keys."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from fedml_broker import audit
from fedml_broker.accounts import Accounts, User
from fedml_broker.devices import (
    CapacityReport,
    Devices,
    EnrolRequest,
    Inventory,
    RecoverRequest,
)
from fedml_broker.fleet import Fleet
from fedml_broker.identity import Identity
from fedml_broker.problems import Problem
from fedml_broker.store import Store
from fedml_protocol.devices import Heartbeat
from fedml_protocol.keys import RECOVER_CONTEXT, Scope, parse_login_key
from fedml_protocol.topics import Address

ADMIN = User("ann", "acme", "admin")
INVENTORY = Inventory(
    capacity=CapacityReport(slots=2, cpus=4, memory_bytes=1 << 30, disk_bytes=1 << 30),
    hardware={"cpu": "many"},
)


class Clock:
    """Monotonic seconds that pass when the test says so."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Machine:
    """What `fedml-agent login` has on its disk."""

    key: Ed25519PrivateKey
    machine_id: str = "machine-0001"
    name: str = "node"

    @property
    def csr(self) -> str:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "whoever")])
        request = x509.CertificateSigningRequestBuilder().subject_name(subject)
        return request.sign(self.key, None).public_bytes(Encoding.PEM).decode()

    def request(self, secret: str) -> EnrolRequest:
        return EnrolRequest(
            secret=secret,
            machine_id=self.machine_id,
            name=self.name,
            csr=self.csr,
            inventory=INVENTORY,
            agent_version="1.0",
        )

    def recovery(self, address: Address, nonce: str, **changes: Any) -> RecoverRequest:
        csr = self.csr
        signature = self.key.sign(RECOVER_CONTEXT + nonce.encode() + csr.encode()).hex()
        request = RecoverRequest(
            tenant=address.tenant, device=address.device, nonce=nonce, csr=csr, signature=signature
        )
        return msgspec.structs.replace(request, **changes)


def machine(**more: Any) -> Machine:
    return Machine(Ed25519PrivateKey.generate(), **more)


class Registry:
    """A broker's devices with everything below them."""

    def __init__(self, store: Store, identity: Identity) -> None:
        self.store = store
        self.identity = identity
        self.clock = Clock()
        self.accounts = Accounts(store, url="https://b:1", ca_sha256=identity.ca_sha256)
        self.restart()

    def restart(self) -> None:
        """A new process: nothing in memory."""
        self.fleet = Fleet(heartbeat_s=10, clock=self.clock)
        self.devices = Devices(self.store, self.fleet, self.identity)
        self.devices.mqtt = ("b", 2)

    async def secret(self, uses: int | None = 5, **labels: str) -> str:
        _, key = await self.accounts.create_key(ADMIN, uses=uses, days=1, labels=labels)
        return parse_login_key(key, Scope.DEVICE).secret.hex()

    async def join(self, who: Machine, key: str = "", **changes: Any) -> Address:
        request = who.request(key or await self.secret())
        answer = await self.devices.enrol(msgspec.structs.replace(request, **changes))
        return Address(answer.tenant, answer.device)

    async def uses(self) -> list[int]:
        return [key["used"] for key in await self.accounts.list_keys("acme")]


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return Identity.open(tmp_path_factory.mktemp("identity"))


@pytest.fixture
async def registry(tmp_path: Path, identity: Identity) -> AsyncIterator[Registry]:
    store = await asyncio.to_thread(Store.open, tmp_path / "broker.db")
    yield Registry(store, identity)
    await asyncio.to_thread(store.close)


def named(pem: str) -> str:
    certificate = x509.load_pem_x509_certificate(pem.encode())
    return str(certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


# ---------------------------------------------------------------------- joining


async def test_a_machine_joins_and_learns_all_that_it_needs(registry: Registry) -> None:
    who = machine()
    answer = await registry.devices.enrol(who.request(await registry.secret()))
    assert answer.tenant == "acme"
    assert named(answer.certificate) == f"acme/d/{answer.device}"
    certificate = x509.load_pem_x509_certificate(answer.certificate.encode())
    assert certificate.public_key() == who.key.public_key()
    assert (answer.mqtt_host, answer.mqtt_port, answer.heartbeat_s) == ("b", 2, 10)
    keys = {name: raw.hex() for name, raw in registry.identity.verify_keys_raw.items()}
    assert answer.verify_keys == keys
    assert registry.devices.known(Address("acme", answer.device))
    assert not registry.devices.known(Address("evil", answer.device))


async def test_joining_again_with_the_same_key_is_the_same_device_and_no_further_use(
    registry: Registry,
) -> None:
    who, secret = machine(), await registry.secret(uses=1)
    first = await registry.join(who, secret)
    more = msgspec.structs.replace(
        INVENTORY, capacity=msgspec.structs.replace(INVENTORY.capacity, slots=7)
    )
    assert await registry.join(who, secret, inventory=more, name="other") == first
    assert await registry.uses() == [1]
    (row,) = await registry.devices.everything("acme")
    assert row["name"] == "node"
    assert row["capacity"]["slots"] == 7  # what the machine is like now
    found = registry.fleet.get(first.device)
    assert found is not None
    assert found.capacity.slots == 7


async def test_another_key_or_another_machine_is_another_device(registry: Registry) -> None:
    who = machine()
    ids = {
        (await registry.join(one)).device
        for one in (who, machine(), Machine(who.key, machine_id="machine-0002"))
    }
    assert len(ids) == 3


async def test_machines_of_one_name_are_told_apart(registry: Registry) -> None:
    for n in range(3):
        await registry.join(machine(machine_id=f"machine-000{n}", name="node"))
    await registry.join(machine(machine_id="machine-other", name="  " + "x" * 80))
    names = [row["name"] for row in await registry.devices.everything("acme")]
    assert names == ["node", "node-2", "node-3", "x" * 60]


async def test_the_keys_labels_win_over_the_machines(registry: Registry) -> None:
    secret = await registry.secret(site="lab")
    address = await registry.join(machine(), secret, labels={"site": "vault", "rack": "7"})
    shown = await registry.devices.show("acme", address.device)
    assert shown["labels"] == {"site": "lab", "rack": "7"}


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"secret": "00" * 24}, 401),
        ({"secret": "no hex"}, 422),
        ({"machine_id": "short"}, 422),
        ({"machine_id": "x" * 129}, 422),
        ({"name": "  "}, 422),
        ({"csr": "rubbish"}, 422),
        ({"labels": {"a b": "c"}}, 422),
        ({"inventory": Inventory(CapacityReport(0, 1, 1, 1))}, 422),
    ],
)
async def test_what_a_machine_says_wrongly_costs_no_use_and_leaves_nothing(
    registry: Registry, changes: dict[str, Any], status: int
) -> None:
    secret = await registry.secret()
    with pytest.raises(Problem) as told:
        await registry.join(machine(), secret, **changes)
    assert told.value.status == status
    assert await registry.devices.everything("acme") == []
    assert await registry.uses() == [0]


async def test_all_that_joined_is_there_after_a_restart(registry: Registry) -> None:
    one = await registry.join(machine(name="one"))
    two = await registry.join(machine(name="two"))
    three = await registry.join(machine(name="three"))
    await registry.devices.revoke("acme", two.device, by="ann")
    await registry.devices.drain("acme", three.device, on=True, by="ann")
    registry.restart()
    await registry.devices.load()
    assert registry.devices.known(one)
    assert not registry.devices.known(two)
    found = registry.fleet.get(three.device)
    assert found is not None
    assert found.draining


# ---------------------------------------------------------------------- certificates


async def test_a_device_renews_with_its_own_key_alone(registry: Registry) -> None:
    who = machine()
    address = await registry.join(who)
    assert named(await registry.devices.renew(address, who.csr)) == address.client_id
    with pytest.raises(Problem) as told:
        await registry.devices.renew(address, machine().csr)
    assert told.value.status == 403
    with pytest.raises(Problem) as told:
        await registry.devices.renew(Address("evil", address.device), who.csr)
    assert told.value.status == 404


async def test_a_device_recovers_with_a_signed_challenge(registry: Registry) -> None:
    who = machine()
    address = await registry.join(who)
    nonce = registry.devices.challenge()
    certificate = await registry.devices.recover(who.recovery(address, nonce))
    assert named(certificate) == address.client_id


async def test_a_challenge_is_good_once_and_for_a_minute(registry: Registry) -> None:
    who = machine()
    address = await registry.join(who)
    used = registry.devices.challenge()
    await registry.devices.recover(who.recovery(address, used))
    old = registry.devices.challenge()
    registry.clock.now += 61
    for nonce in (used, old, "0" * 32, ""):
        with pytest.raises(Problem, match="too old"):
            await registry.devices.recover(who.recovery(address, nonce))


async def test_a_challenge_that_somebody_fails_is_spent(registry: Registry) -> None:
    who = machine()
    address = await registry.join(who)
    nonce = registry.devices.challenge()
    with pytest.raises(Problem, match="signature"):
        await registry.devices.recover(who.recovery(address, nonce, signature="00" * 64))
    with pytest.raises(Problem, match="too old"):
        await registry.devices.recover(who.recovery(address, nonce))


@pytest.mark.parametrize("forge", ["stranger", "not hex", "another csr", "another nonce"])
async def test_nobody_else_recovers_a_device(registry: Registry, forge: str) -> None:
    who, thief = machine(), machine()
    address = await registry.join(who)
    nonce = registry.devices.challenge()
    request = who.recovery(address, nonce)
    match forge:
        case "stranger":
            request = thief.recovery(address, nonce)
        case "not hex":
            request = who.recovery(address, nonce, signature="zz")
        case "another csr":  # the answer would be a certificate for the thief's key
            request = who.recovery(address, nonce, csr=thief.csr)
        case "another nonce":
            signed = who.recovery(address, registry.devices.challenge())
            request = msgspec.structs.replace(signed, nonce=nonce)
    with pytest.raises(Problem) as told:
        await registry.devices.recover(request)
    assert told.value.status == 403


async def test_challenges_take_a_bounded_amount_of_memory(registry: Registry) -> None:
    for _ in range(10_000):
        registry.devices.challenge()
    with pytest.raises(Problem) as told:
        registry.devices.challenge()
    assert told.value.status == 503
    registry.clock.now += 61
    assert registry.devices.challenge()  # those that are too old make room


# ---------------------------------------------------------------------- what an admin does


async def test_who_was_revoked_stays_out_whatever_it_or_anybody_tries(registry: Registry) -> None:
    who = machine()
    address = await registry.join(who)
    assert await registry.devices.revoke("acme", "node", by="ann") == address
    secret = await registry.secret()

    nonce = registry.devices.challenge()
    for attempt in (
        registry.join(who, secret),
        registry.devices.recover(who.recovery(address, nonce)),
        registry.devices.hello(address, INVENTORY, "1.0"),
        registry.devices.drain("acme", "node", on=False, by="ann"),
        registry.devices.drain("acme", "node", on=True, by="ann"),
    ):
        with pytest.raises(Problem) as told:
            await attempt
        assert told.value.status in (403, 409)
    await registry.devices.label("acme", "node", {"a": "b"}, [], by="ann")

    assert not registry.devices.known(address)
    assert (await registry.devices.show("acme", address.device))["status"] == "revoked"
    assert (await registry.uses())[0] == 0
    # A new key pair is a new machine, with a key that somebody gives it.
    assert await registry.join(machine(), secret) != address


async def test_who_was_removed_is_unknown_and_may_join_again(registry: Registry) -> None:
    who = machine()
    address = await registry.join(who)
    await registry.devices.remove("acme", address.device, by="ann")
    assert not registry.devices.known(address)
    assert await registry.devices.everything("acme") == []
    with pytest.raises(Problem) as told:
        await registry.devices.renew(address, who.csr)
    assert told.value.status == 404
    assert await registry.join(who) != address


async def test_a_machine_is_drained_and_taken_up_again(registry: Registry) -> None:
    address = await registry.join(machine())
    registry.fleet.heard(address.device, 1, Heartbeat(free_slots=2))
    found = registry.fleet.get(address.device)
    for on, status in ((True, "draining"), (False, "online")):
        assert await registry.devices.drain("acme", "node", on=on, by="ann") == address.device
        found = registry.fleet.get(address.device)
        assert found is not None
        assert found.draining is on
        shown = await registry.devices.show("acme", "node")
        assert shown["status"] == status
        # It is there, and heard, all the time.
        assert shown["last_seen_at"] is not None
        assert await registry.devices.count("acme") == (1, 1)


async def test_a_draining_machine_is_online_and_a_revoked_one_is_not_counted(
    registry: Registry,
) -> None:
    for _ in range(2):
        address = await registry.join(machine())
        registry.fleet.heard(address.device, 1, Heartbeat(free_slots=2))
    assert await registry.devices.count("acme") == (2, 2)
    await registry.devices.drain("acme", address.device, on=True, by="ann")
    assert await registry.devices.count("acme") == (2, 2)
    await registry.devices.revoke("acme", address.device, by="ann")
    assert await registry.devices.count("acme") == (1, 1)
    assert await registry.devices.count("other") == (0, 0)


async def test_labels_are_put_and_taken_by_id_or_name(registry: Registry) -> None:
    address = await registry.join(machine(), labels={"old": "1", "both": "2"})
    devices = registry.devices
    assert await devices.label("acme", "node", {"new": "3", "both": "4"}, ["old"], by="ann") == {
        "both": "4",
        "new": "3",
    }
    assert await devices.label("acme", address.device, {}, ["new", "never"], by="ann") == {
        "both": "4"
    }
    found = registry.fleet.get(address.device)
    assert found is not None
    assert found.labels == {"both": "4"}
    with pytest.raises(Problem):
        await devices.label("acme", "node", {"new": "two words"}, [], by="ann")
    with pytest.raises(Problem) as told:
        await devices.label("evil", address.device, {}, [], by="ann")
    assert told.value.status == 404


async def test_what_a_machine_says_at_its_start_is_what_it_is(registry: Registry) -> None:
    address = await registry.join(machine())
    registry.fleet.heard(address.device, 3, Heartbeat(free_slots=2, refusing="full"))
    more = Inventory(msgspec.structs.replace(INVENTORY.capacity, slots=9), {"gpu": "new"})
    answer = await registry.devices.hello(address, more, "2.0")
    assert (answer.mqtt_host, answer.mqtt_port) == ("b", 2)
    shown = await registry.devices.show("acme", "node")
    assert (shown["agent_version"], shown["hardware"]) == ("2.0", {"gpu": "new"})
    found = registry.fleet.get(address.device)
    assert found is not None
    assert (found.capacity.slots, found.boot_n) == (9, 3)  # what was heard of it stays
    assert shown["refusing"] == "full"
    with pytest.raises(Problem):
        await registry.devices.hello(address, Inventory(CapacityReport(0, 1, 1, 1)), "2.0")


async def test_a_silent_machine_is_offline_and_was_seen_when_it_was(registry: Registry) -> None:
    address = await registry.join(machine())
    assert (await registry.devices.show("acme", "node"))["status"] == "offline"
    registry.fleet.heard(address.device, 1, Heartbeat(free_slots=2))
    assert (await registry.devices.show("acme", "node"))["status"] == "online"
    await registry.devices.seen()
    registry.clock.now += 36  # 3.5 beats and a bit
    shown = await registry.devices.show("acme", "node")
    assert shown["status"] == "offline"
    assert shown["last_seen_at"] > shown["enrolled_at"]
    await registry.devices.seen()
    assert (await registry.devices.show("acme", "node"))["last_seen_at"] == shown["last_seen_at"]


# ---------------------------------------------------------------------- the audit


async def test_whatever_is_done_with_a_machine_leaves_one_entry(registry: Registry) -> None:
    who, devices = machine(), registry.devices
    secret = await registry.secret(site="north")
    address = await registry.join(who, secret)
    await registry.join(who, secret)
    await devices.recover(who.recovery(address, devices.challenge()))
    for _ in range(2):  # what changes nothing leaves nothing
        await devices.label("acme", "node", {"a": "b"}, ["site"], by="ann")
        await devices.drain("acme", "node", on=True, by="ann")
    await devices.drain("acme", "node", on=False, by="bob")
    for _ in range(2):
        await devices.revoke("acme", "node", by="ann")
    with pytest.raises(Problem):
        await devices.drain("acme", "node", on=True, by="ann")
    await devices.remove("acme", "node", by="ann")
    with pytest.raises(Problem):
        await devices.remove("acme", "node", by="ann")
    found = await registry.store.read(lambda tx: audit.entries(tx, action="device"))
    itself = f"device/{address.device}"
    assert [(e["actor"], e["action"]) for e in found[::-1]] == [
        (itself, "device.enrol"),
        (itself, "device.re-enrol"),
        (itself, "device.recover"),
        ("user/ann", "device.label"),
        ("user/ann", "device.drain"),
        ("user/bob", "device.undrain"),
        ("user/ann", "device.revoke"),
        ("user/ann", "device.remove"),
    ]
    assert {(e["tenant"], e["object"]) for e in found} == {("acme", address.device)}
    assert found[-1]["details"]["labels"] == {"site": "north"}
