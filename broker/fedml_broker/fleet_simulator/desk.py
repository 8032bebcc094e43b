# SPDX-License-Identifier: Apache-2.0
"""Whoever enrols simulated machines at a broker, asks for tasks, and reads the broker's numbers.

Everything happens in a tenant of its own, so that nobody else's job meets a machine that only
pretends. What was made there is removed at the end, but for the tenant's one user.
"""

import asyncio
import hashlib
import ssl
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID
from prometheus_client.parser import text_string_to_metric_families

from fedml_broker.fleet_simulator.fleet import Member
from fedml_protocol.keys import LoginKey, Scope, parse_login_key
from fedml_protocol.topics import Address

TENANT = "simulated-fleet"
_AT_ONCE = 32
_GIB = 1 << 30


class SimulationFailed(Exception):
    """It cannot go on; the text is for the person who typed the command."""

    def __init__(self, text: str, hint: str = "") -> None:
        super().__init__(text)
        self.hint = hint


class Answered(SimulationFailed):
    """The broker said no."""

    def __init__(self, status: int, text: str, hint: str) -> None:
        super().__init__(f"the broker answered: {text}", hint)
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class Enrolment:
    """What the broker tells a machine that joins, where it is the same for all."""

    mqtt: tuple[str, int]
    verify_keys: dict[str, str]
    heartbeat_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """What the broker says of itself; all but memory only grow.

    Attributes:
        received, sent: MQTT messages.
        refused: Messages of machines that it did not take.
        finished: Tasks that have ended well.
    """

    cpu_s: float
    rss_bytes: float
    received: float
    sent: float
    refused: float
    finished: float


class Desk:
    """One admin's connection to a broker. Made by `Desk.of`."""

    def __init__(self, session: aiohttp.ClientSession, key: LoginKey, ca_pem: str) -> None:
        self.ca_pem = ca_pem
        self._session = session
        self._url = key.url
        self._admin = key.secret.hex()
        self._own = ""
        self._login_key = ""

    @classmethod
    @asynccontextmanager
    async def of(cls, key: LoginKey) -> AsyncIterator["Desk"]:
        """Trusts the broker whose CA the key names, and nobody else.

        Raises:
            SimulationFailed: It does not answer, or is another broker.
        """
        ca_pem = await _pinned_ca(key)
        context = ssl.create_default_context(cadata=ca_pem)
        connector = aiohttp.TCPConnector(ssl=context, limit=_AT_ONCE)
        async with aiohttp.ClientSession(connector=connector) as session:
            yield cls(session, key, ca_pem)

    async def call(self, method: str, path: str, body: object = None, *, token: str = "") -> Any:
        """One question and its answer.

        Raises:
            Answered: The answer is an error.
            SimulationFailed: There is no answer.
        """
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            async with self._session.request(
                method, self._url + path, json=body, headers=headers
            ) as response:
                if response.status < 400:
                    return await response.json()
                found = await response.json(content_type=None)
        except (aiohttp.ClientError, OSError) as error:
            raise SimulationFailed(f"the broker does not answer at {self._url}: {error}") from error
        raise Answered(
            response.status, f"{found['title']}: {found.get('detail', '')}", found.get("hint", "")
        )

    # ------------------------------------------------------------------ before and after

    async def settle_in(self, machines: int) -> None:
        """The tenant, its user, and a login key for so many machines.

        Raises:
            Answered: The key is not that of an admin of the first tenant.
        """
        user = {"name": TENANT, "role": "admin", "tenant": TENANT}
        try:
            await self.call("POST", "/v1/users", user, token=self._admin)
        except Answered as error:
            if error.status != 409:
                raise
        token = await self.call(
            "POST", f"/v1/users/{TENANT}/tokens", {"days": 1}, token=self._admin
        )
        self._own = parse_login_key(token["key"], Scope.USER).secret.hex()
        key = await self.call("POST", "/v1/keys", {"uses": machines, "days": 1}, token=self._own)
        self._login_key = key["key"]

    async def enrol(
        self, machines: int, slots: int, told: Callable[[int], None]
    ) -> tuple[list[Member], Enrolment]:
        """Let so many machines join."""
        secret = parse_login_key(self._login_key, Scope.DEVICE).secret.hex()
        batch = uuid.uuid4().hex
        members: dict[int, Member] = {}
        common: list[Enrolment] = []

        async def one(number: int) -> None:
            key = Ed25519PrivateKey.generate()
            answer = await self.call(
                "POST", "/v1/enrol", _request(secret, batch, number, slots, key)
            )
            pem = answer["certificate"].encode() + key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
            address = Address(answer["tenant"], answer["device"])
            members[number] = Member(address=address, certificate=pem)
            if not common:
                common.append(
                    Enrolment(
                        mqtt=(answer["mqtt_host"], answer["mqtt_port"]),
                        verify_keys=answer["verify_keys"],
                        heartbeat_s=answer["heartbeat_s"],
                    )
                )
            told(len(members))

        await _each(range(machines), one)
        return [members[number] for number in sorted(members)], common[0]

    async def clean_up(self, told: Callable[[int, int], None]) -> None:
        """Remove the tenant's runs and machines, those of earlier simulations among them."""
        while True:
            found = await self.call("GET", "/v1/runs?limit=1000", token=self._own)
            paths = [f"/v1/runs/{run['id']}" for run in found["runs"] if run["ended_at"]]
            if not paths:
                break
            await self._delete(paths, told)
        found = await self.call("GET", "/v1/devices", token=self._own)
        await self._delete([f"/v1/devices/{row['id']}" for row in found["devices"]], told)
        for key in (await self.call("GET", "/v1/keys", token=self._own))["keys"]:
            if not key["revoked"]:
                await self.call("DELETE", f"/v1/keys/{key['id']}", token=self._own)

    async def _delete(self, paths: list[str], told: Callable[[int, int], None]) -> None:
        done = 0

        async def one(path: str) -> None:
            nonlocal done
            await self.call("DELETE", path, token=self._own)
            done += 1
            told(done, len(paths))

        await _each(paths, one)

    # ------------------------------------------------------------------ meanwhile

    async def launch(self, run: str) -> None:
        """Ask for one task."""
        body = {"command": "simulated", "name": "simulated", "run": run, "follow": False}
        await self.call("POST", "/v1/launch", body, token=self._own)

    async def numbers(self) -> Numbers:
        """How the broker is."""
        headers = {"Authorization": f"Bearer {self._admin}"}
        try:
            async with self._session.get(self._url + "/metrics", headers=headers) as response:
                text = await response.text()
        except (aiohttp.ClientError, OSError) as error:
            raise SimulationFailed(f"the broker does not answer at {self._url}: {error}") from error
        found = {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        return Numbers(
            cpu_s=found["process_cpu_seconds_total",],
            rss_bytes=found["process_resident_memory_bytes",],
            received=found["fedml_broker_messages_total", "in"],
            sent=found["fedml_broker_messages_total", "out"],
            refused=found["fedml_broker_messages_refused_total",],
            finished=found["fedml_broker_tasks_ended_total", "FINISHED"],
        )


async def _pinned_ca(key: LoginKey) -> str:
    """The broker's CA certificate, if it is the one that the key names."""
    try:
        async with (
            aiohttp.ClientSession() as session,
            # This connection proves nothing; the hash below decides.
            session.get(f"{key.url}/v1/ca", ssl=False) as response,
        ):
            pem = await response.text()
        der = ssl.PEM_cert_to_DER_cert(pem)
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise SimulationFailed(
            f"no broker answers at {key.url}: {error}", "is `fedml-broker up` running there?"
        ) from error
    if hashlib.sha256(der).digest() != key.ca_sha256:
        raise SimulationFailed(
            f"the broker at {key.url} is not the one that made this key: its CA differs"
        )
    return pem


def _request(
    secret: str, batch: str, number: int, slots: int, key: Ed25519PrivateKey
) -> dict[str, Any]:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedml-agent")])
    csr = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, None)
    return {
        "secret": secret,
        "machine_id": f"{batch}-{number}",
        "name": f"simulated-{number:05}",
        "csr": csr.public_bytes(serialization.Encoding.PEM).decode(),
        "inventory": {
            "capacity": {
                "slots": slots,
                "cpus": 8,
                "memory_bytes": 32 * _GIB,
                "disk_bytes": 200 * _GIB,
                "gpus": [],
                "kinds": ["launch"],
            },
            "hardware": {"simulated": True},
        },
        "agent_version": "simulated",
    }


async def _each(things: Iterable[Any], work: Callable[[Any], Any]) -> None:
    """Do the work for each thing, a few at one time; the first error ends it."""
    queue = iter(things)

    async def some() -> None:
        for thing in queue:
            await work(thing)

    workers = [asyncio.create_task(some(), name="desk") for _ in range(_AT_ONCE)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
