# SPDX-License-Identifier: Apache-2.0
"""Machines in the store: how they join, and what an admin does with them.

Joining twice with the same machine id and the same key gives the same device: an agent whose answer
was lost on the way simply asks again.
"""

import secrets
import time
from collections.abc import Mapping
from typing import Any

import msgspec
import sqlalchemy as sa
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_public_key,
)
from sqlalchemy import Connection

from fedml_broker import audit
from fedml_broker.accounts import check_labels, use_key
from fedml_broker.audit import SignInRefused
from fedml_broker.fleet import Fleet, Machine, read_capacity
from fedml_broker.identity import Identity
from fedml_broker.problems import Problem
from fedml_broker.store import Store
from fedml_broker.tables import devices
from fedml_protocol.keys import RECOVER_CONTEXT
from fedml_protocol.topics import Address

CERTIFICATE_DAYS = 30

_NONCE_S = 60.0
_MAX_NONCES = 10_000


class GpuSize(msgspec.Struct, frozen=True):
    """One accelerator that the machine lets out."""

    uuid: str
    name: str
    memory_bytes: int


class CapacityReport(msgspec.Struct, frozen=True):
    """What the machine's owner lets out of it."""

    slots: int
    cpus: int
    memory_bytes: int
    disk_bytes: int
    gpus: list[GpuSize] = []
    kinds: list[str] = msgspec.field(default_factory=lambda: ["launch", "federate"])
    price: float = 0.0
    engine: str = ""
    no_engine: str = ""
    offline: bool = False


class Inventory(msgspec.Struct, frozen=True):
    """What an agent reports of its machine: for matching, and for people."""

    capacity: CapacityReport
    hardware: dict[str, Any] = {}
    host: str = ""


class EnrolRequest(msgspec.Struct, frozen=True):
    """What `fedml-agent login` posts. `secret` is the login key's, in hex."""

    secret: str
    machine_id: str
    name: str
    csr: str
    inventory: Inventory
    agent_version: str
    labels: dict[str, str] = {}


class RenewRequest(msgspec.Struct, frozen=True):
    """A CSR with the key that the device already has."""

    csr: str


class RecoverRequest(msgspec.Struct, frozen=True):
    """A device whose certificate has expired proves that it still has its key.

    `signature` (hex) is of ``RECOVER_CONTEXT + nonce + csr`` with the key in the CSR.
    """

    tenant: str
    device: str
    nonce: str
    csr: str
    signature: str


class EnrolAnswer(msgspec.Struct, frozen=True):
    """Who the machine is from now on, and where to go."""

    device: str
    tenant: str
    certificate: str
    mqtt_host: str
    mqtt_port: int
    verify_keys: dict[str, str]
    heartbeat_s: float


class HelloAnswer(msgspec.Struct, frozen=True):
    """What an agent needs to know at each start."""

    verify_keys: dict[str, str]
    heartbeat_s: float
    mqtt_host: str
    mqtt_port: int
    labels: dict[str, str]


class Devices:
    """Enrolled machines; keeps the fleet in memory in step with the store."""

    def __init__(self, store: Store, fleet: Fleet, identity: Identity) -> None:
        self._store = store
        self._fleet = fleet
        self._identity = identity
        # Where agents find MQTT; known once the endpoint listens.
        self.mqtt: tuple[str, int] = ("", 0)
        self._nonces: dict[str, float] = {}

    async def load(self) -> None:
        """Fill the fleet from the store."""
        query = sa.select(devices).where(devices.c.state != "revoked")
        rows = await self._store.read(lambda tx: tx.execute(query).mappings().all())
        for row in rows:
            self._fleet.put(_machine(row))

    async def enrol(self, request: EnrolRequest) -> EnrolAnswer:
        """Let a machine join.

        Raises:
            Problem: 401 or 403 for the key, 422 for what the machine says of itself.
        """
        try:
            secret = bytes.fromhex(request.secret)
        except ValueError as error:
            raise Problem(422, "not a secret", "it must be hexadecimal") from error
        check_labels(request.labels)
        if not 8 <= len(request.machine_id) <= 128 or not request.name.strip():
            raise Problem(422, "the machine does not say who it is", "machine_id and name")
        if request.inventory.capacity.slots < 1:
            raise Problem(422, "a machine needs at least one slot", "its policy allows no task")
        public_key = _public_key(request.csr)
        row = await self._store.write(lambda tx: self._join(tx, secret, request, public_key))
        address = Address(row["tenant"], row["id"])
        certificate = await self._certify(address, request.csr)
        self._fleet.put(_machine(row))
        return EnrolAnswer(
            device=address.device,
            tenant=address.tenant,
            certificate=certificate,
            mqtt_host=self.mqtt[0],
            mqtt_port=self.mqtt[1],
            verify_keys=self._verify_keys(),
            heartbeat_s=self._fleet.heartbeat_s,
        )

    def _join(
        self, tx: Connection, secret: bytes, request: EnrolRequest, public_key: bytes
    ) -> dict[str, Any]:
        known = (
            tx.execute(
                sa.select(devices).where(
                    devices.c.machine_id == request.machine_id,
                    devices.c.public_key == public_key,
                )
            )
            .mappings()
            .first()
        )
        grant = use_key(tx, secret, again=known is not None)
        if known is not None:
            if known["state"] == "revoked":
                raise SignInRefused(
                    403,
                    "this machine was revoked",
                    f"device {known['id']} ({known['name']})",
                    hint="`fedml-agent logout` on it, then login with a new key",
                    tenant=known["tenant"],
                    thing=known["id"],
                )
            changed = {
                "inventory": msgspec.to_builtins(request.inventory),
                "agent_version": request.agent_version,
            }
            tx.execute(devices.update().where(devices.c.id == known["id"]).values(changed))
            _note(tx, known, audit.device(known["id"]), "re-enrol", key=grant.key)
            return {**known, **changed}
        row = {
            "id": "d-" + secrets.token_hex(5),
            "tenant": grant.tenant,
            "name": _free_name(tx, grant.tenant, request.name.strip()[:60]),
            "machine_id": request.machine_id,
            "public_key": public_key,
            # What the key grants wins: a machine cannot talk itself into another group.
            "labels": {**request.labels, **grant.labels},
            "inventory": msgspec.to_builtins(request.inventory),
            "state": "active",
            "counter": 0,
            "boot_n": 0,
            "agent_version": request.agent_version,
            "enrolled_at": time.time(),
            "last_seen_at": None,
            "certificate_expires_at": time.time() + CERTIFICATE_DAYS * 86400,
        }
        tx.execute(devices.insert().values(row))
        actor = audit.device(str(row["id"]))
        _note(tx, row, actor, "enrol", key=grant.key, labels=grant.labels)
        return row

    async def renew(self, address: Address, csr: str) -> str:
        """A new certificate for the key that the device already has.

        Raises:
            Problem: 403 another key, 404 no such device.
        """
        public_key = _public_key(csr)
        row = await self._row(address.tenant, address.device)
        if row["public_key"] != public_key:
            raise Problem(403, "this is not the device's key", "a new key needs a new login")
        return await self._certify(address, csr)

    def challenge(self) -> str:
        """A nonce, good once and for a minute."""
        now = self._fleet.clock()
        if len(self._nonces) >= _MAX_NONCES:
            self._nonces = {n: end for n, end in self._nonces.items() if end > now}
        if len(self._nonces) >= _MAX_NONCES:
            raise Problem(503, "too many machines ask at once", "try again in a minute")
        nonce = secrets.token_hex(16)
        self._nonces[nonce] = now + _NONCE_S
        return nonce

    async def recover(self, request: RecoverRequest) -> str:
        """A new certificate for a device whose old one has expired while it was offline.

        Raises:
            Problem: 403 the nonce is old or the signature wrong, 404 no such device.
        """
        address = Address(request.tenant, request.device)
        if self._nonces.pop(request.nonce, 0.0) < self._fleet.clock():
            raise Problem(403, "the challenge is too old", "ask for another one")
        row = await self._row(address.tenant, address.device)
        key = load_der_public_key(row["public_key"])
        message = RECOVER_CONTEXT + request.nonce.encode() + request.csr.encode()
        whose = {"tenant": row["tenant"], "thing": row["id"]}
        try:
            if not isinstance(key, Ed25519PublicKey):
                raise InvalidSignature
            key.verify(bytes.fromhex(request.signature), message)
        except (InvalidSignature, ValueError) as error:
            raise SignInRefused(
                403, "this is not the device's key", "the signature is wrong", **whose
            ) from error
        if row["state"] == "revoked":
            raise SignInRefused(403, "this machine was revoked", f"device {row['id']}", **whose)
        if row["public_key"] != _public_key(request.csr):
            raise Problem(403, "this is not the device's key", "a new key needs a new login")
        return await self._certify(address, request.csr, recovered=row)

    async def _certify(
        self, address: Address, csr: str, *, recovered: Mapping[Any, Any] | None = None
    ) -> str:
        pem = self._identity.issue(csr.encode(), address.client_id, days=CERTIFICATE_DAYS)
        expires = time.time() + CERTIFICATE_DAYS * 86400

        def commit(tx: Connection) -> None:
            tx.execute(
                devices.update()
                .where(devices.c.id == address.device)
                .values(certificate_expires_at=expires)
            )
            if recovered is not None:
                _note(tx, recovered, audit.device(address.device), "recover")

        await self._store.write(commit)
        return pem.decode()

    async def hello(self, address: Address, inventory: Inventory, version: str) -> HelloAnswer:
        """An agent has started: note what its machine is like now.

        Raises:
            Problem: 403 revoked, 404 no such device.
        """
        if inventory.capacity.slots < 1:
            raise Problem(422, "a machine needs at least one slot", "its policy allows no task")
        changed = {
            "inventory": msgspec.to_builtins(inventory),
            "agent_version": version,
            "last_seen_at": time.time(),
        }
        await self._store.write(
            lambda tx: tx.execute(
                devices.update().where(devices.c.id == address.device).values(changed)
            )
        )
        row = await self._row(address.tenant, address.device)
        if row["state"] == "revoked":
            raise SignInRefused(
                403,
                "this machine was revoked",
                f"device {row['id']}",
                tenant=row["tenant"],
                thing=row["id"],
            )
        self._fleet.put(_machine(row))
        return HelloAnswer(
            verify_keys=self._verify_keys(),
            heartbeat_s=self._fleet.heartbeat_s,
            mqtt_host=self.mqtt[0],
            mqtt_port=self.mqtt[1],
            labels=row["labels"],
        )

    def known(self, address: Address) -> bool:
        """Whether the device may speak: enrolled, of this tenant, not revoked."""
        machine = self._fleet.get(address.device)
        return machine is not None and machine.address == address

    async def everything(self, tenant: str) -> list[dict[str, Any]]:
        """Every device of a tenant, as people and scripts see it."""
        query = sa.select(devices).where(devices.c.tenant == tenant).order_by(devices.c.name)
        rows = await self._store.read(lambda tx: tx.execute(query).mappings().all())
        return [self._describe(row) for row in rows]

    async def count(self, tenant: str) -> tuple[int, int]:
        """How many devices a tenant has, without those it revoked, and how many of them beat."""
        query = sa.select(sa.func.count()).where(
            devices.c.tenant == tenant, devices.c.state != "revoked"
        )
        known = await self._store.read(lambda tx: tx.execute(query).scalar_one())
        return known, len(self._fleet.online_of(tenant))

    async def show(self, tenant: str, device: str) -> dict[str, Any]:
        """One device, by id or name.

        Raises:
            Problem: 404.
        """
        row = await self._row(tenant, device)
        return {**self._describe(row), "hardware": row["inventory"]["hardware"]}

    async def label(
        self, tenant: str, device: str, put: Mapping[str, str], remove: list[str], *, by: str
    ) -> dict[str, str]:
        """Change labels; the new set.

        Raises:
            Problem: 404, 422.
        """
        check_labels(put)

        def change(tx: Connection) -> dict[str, Any]:
            row = _find(tx, tenant, device)
            labels = {k: v for k, v in {**row["labels"], **put}.items() if k not in remove}
            if labels != row["labels"]:
                _note(tx, row, audit.user(by), "label", put=put, remove=remove)
            return _change(tx, row, labels=labels)

        row = await self._store.write(change)
        self._mirror(row)
        return dict(row["labels"])

    async def drain(self, tenant: str, device: str, on: bool, *, by: str) -> str:
        """Give the device nothing more (or again); its id.

        Raises:
            Problem: 404, 409 revoked.
        """
        state = "draining" if on else "active"

        def change(tx: Connection) -> dict[str, Any]:
            row = _find(tx, tenant, device)
            if row["state"] == "revoked":
                raise Problem(
                    409,
                    "this machine was revoked",
                    f"device {row['id']} ({row['name']}) is out for good",
                    hint="let it join again with a new login key",
                )
            if row["state"] != state:
                _note(tx, row, audit.user(by), "drain" if on else "undrain")
            return _change(tx, row, state=state)

        row = await self._store.write(change)
        self._mirror(row)
        return str(row["id"])

    async def revoke(self, tenant: str, device: str, *, by: str) -> Address:
        """Shut a device out for good; who it was, so that its connections can be cut."""

        def change(tx: Connection) -> dict[str, Any]:
            row = _find(tx, tenant, device)
            if row["state"] != "revoked":
                _note(tx, row, audit.user(by), "revoke")
            return _change(tx, row, state="revoked")

        row = await self._store.write(change)
        self._mirror(row)
        return Address(tenant, row["id"])

    async def remove(self, tenant: str, device: str, *, by: str) -> Address:
        """Forget a device; its machine must log in again."""

        def forget(tx: Connection) -> str:
            row = _find(tx, tenant, device)
            tx.execute(devices.delete().where(devices.c.id == row["id"]))
            _note(tx, row, audit.user(by), "remove")
            return str(row["id"])

        gone = await self._store.write(forget)
        self._fleet.drop(gone)
        return Address(tenant, gone)

    async def seen(self) -> None:
        """Write down when each machine that beats now was last heard (for people)."""
        online = [m.address.device for m in self._fleet if self._fleet.online(m)]
        if online:
            query = (
                devices.update().where(devices.c.id.in_(online)).values(last_seen_at=time.time())
            )
            await self._store.write(lambda tx: tx.execute(query))

    def _mirror(self, row: Mapping[Any, Any]) -> None:
        """Have the fleet know what the store says now."""
        if row["state"] == "revoked":
            self._fleet.drop(row["id"])
        else:
            self._fleet.put(_machine(row))

    async def _row(self, tenant: str, device: str) -> Mapping[Any, Any]:
        return await self._store.read(lambda tx: _find(tx, tenant, device))

    def live(self, machine: Machine) -> dict[str, Any]:
        """What changes from one heartbeat to the next."""
        beat = machine.beat
        if not self._fleet.online(machine):
            status = "offline"
        else:
            status = "draining" if machine.draining else "online"
        return {
            "id": machine.address.device,
            "name": machine.name,
            "status": status,
            "labels": machine.labels,
            "cluster": machine.cluster,
            "tasks": sorted(machine.holds),
            "refusing": beat.refusing if beat is not None else "",
            "cpu_percent": beat.cpu_percent if beat is not None else None,
            "memory_used_bytes": beat.memory_used_bytes if beat is not None else None,
            "disk_free_bytes": beat.disk_free_bytes if beat is not None else None,
            "gpus": [msgspec.to_builtins(gpu) for gpu in beat.gpus] if beat is not None else [],
        }

    def _describe(self, row: Mapping[Any, Any]) -> dict[str, Any]:
        # Of one that was revoked there is no machine any more: as one that was never heard.
        machine = self._fleet.get(row["id"])
        live = self.live(machine or _machine(row))
        if row["state"] == "revoked" or machine is None:
            live["status"] = "revoked"
        return {
            **live,
            "capacity": row["inventory"]["capacity"],
            # All that it has, of which `capacity` is let out; agents say it among the hardware.
            "memory_bytes": row["inventory"]["hardware"].get("memory"),
            "agent_version": row["agent_version"],
            "enrolled_at": row["enrolled_at"],
            "last_seen_at": time.time()
            if live["status"] in ("online", "draining")
            else row["last_seen_at"],
            "certificate_expires_at": row["certificate_expires_at"],
        }

    def _verify_keys(self) -> dict[str, str]:
        return {name: raw.hex() for name, raw in self._identity.verify_keys_raw.items()}


def _find(tx: Connection, tenant: str, device: str) -> Mapping[Any, Any]:
    """A device of the tenant, by id or name.

    Raises:
        Problem: 404.
    """
    query = sa.select(devices).where(
        devices.c.tenant == tenant, sa.or_(devices.c.id == device, devices.c.name == device)
    )
    row = tx.execute(query).mappings().first()
    if row is None:
        raise Problem(
            404, "no such device", f"{device!r} is unknown", hint="`fedml-broker devices list`"
        )
    return row


def _change(tx: Connection, row: Mapping[Any, Any], **values: Any) -> dict[str, Any]:
    tx.execute(devices.update().where(devices.c.id == row["id"]).values(values))
    return {**row, **values}


def _note(
    tx: Connection, row: Mapping[Any, Any], actor: str, verb: str, **details: audit.Detail
) -> None:
    """Into the audit, with the name by which people know the machine."""
    audit.note(tx, row["tenant"], actor, f"device.{verb}", row["id"], name=row["name"], **details)


def _machine(row: Mapping[Any, Any]) -> Machine:
    return Machine(
        address=Address(row["tenant"], row["id"]),
        name=row["name"],
        labels=row["labels"],
        capacity=read_capacity(row["inventory"]),
        host=row["inventory"].get("host", ""),
        draining=row["state"] == "draining",
    )


def _public_key(csr: str) -> bytes:
    try:
        key = x509.load_pem_x509_csr(csr.encode()).public_key()
    except ValueError as error:
        raise Problem(422, "not a certificate request", str(error)) from error
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _free_name(tx: Connection, tenant: str, name: str) -> str:
    """`name`, or `name-2`, … : people tell machines apart by their names."""
    # One piece of the index holds them all: "." comes right after "-".
    query = sa.select(devices.c.name).where(
        devices.c.tenant == tenant, devices.c.name >= name, devices.c.name < f"{name}."
    )
    taken = set(tx.execute(query).scalars())
    candidate, n = name, 2
    while candidate in taken:
        candidate, n = f"{name}-{n}", n + 1
    return candidate
