# SPDX-License-Identifier: Apache-2.0
"""Joining a broker, staying a member, and leaving.

`login` may be repeated: with the same key and machine it brings the same device, so that an answer
that was lost on the way costs nothing. The certificate is renewed before it ends; when it ended
while the machine was off, the device's key proves who asks.
"""

import contextlib
import json
import logging
import os
import random
import shutil
import socket
import ssl
import time
import uuid
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID

from fedml_agent.errors import AgentError, BrokerRefused, HomeUnusable, KeyRefused
from fedml_agent.home import Home, Membership, write_private
from fedml_agent.https import Https, pinned_ca
from fedml_protocol.errors import BadKey
from fedml_protocol.keys import RECOVER_CONTEXT, Scope, parse_login_key

log = logging.getLogger(__name__)

# A certificate is renewed at a moment in this part of its life, another for each machine.
_RENEW_BETWEEN = (0.7, 0.9)


def login(
    home: Home,
    key_text: str,
    *,
    name: str,
    labels: Mapping[str, str],
    inventory: Mapping[str, Any],
    version: str,
) -> Membership:
    """Join the broker that made the key.

    Raises:
        KeyRefused: The key is damaged, used up, expired, revoked, or of another broker.
        BrokerUnreachable: Nobody answers at the key's address.
        AgentError: This machine is a member of another broker already.
    """
    try:
        key = parse_login_key(key_text, Scope.DEVICE)
    except BadKey as error:
        raise KeyRefused(str(error)) from error
    home.make()
    _check_no_other(home, key.url)
    write_private(home.ca, pinned_ca(key.url, key.ca_sha256))
    request = {
        "secret": key.secret.hex(),
        "machine_id": _machine_id(home),
        "name": name,
        "csr": _csr(_device_key(home)),
        "inventory": {**inventory, "host": _host_towards(key.url)},
        "agent_version": version,
        "labels": dict(labels),
    }
    try:
        answer = Https.anonymous(home, key.url).call("POST", "/v1/enrol", request)
    except BrokerRefused as error:
        if error.status in (401, 403):
            raise KeyRefused(str(error), error.hint) from error
        raise
    write_private(home.certificate, answer["certificate"].encode())
    membership = Membership(
        url=key.url,
        tenant=answer["tenant"],
        device=answer["device"],
        mqtt_host=answer["mqtt_host"],
        mqtt_port=answer["mqtt_port"],
        heartbeat_s=answer["heartbeat_s"],
        verify_keys=answer["verify_keys"],
    )
    home.remember(membership)
    return membership


def logout(home: Home) -> None:
    """Forget the broker: key, certificate, journal, logs, what was fetched. The policy stays."""
    for folder in (
        home.private,
        home.tasks,
        home.sessions,
        home.packages,
        home.environments,
        home.logs,
    ):
        shutil.rmtree(folder, ignore_errors=True)
    if home.private.exists():
        raise HomeUnusable(f"cannot delete {home.private}", "delete it by hand")


def hello(home: Home, https: Https, inventory: Mapping[str, Any], version: str) -> Membership:
    """Say at a start what the machine is like now; what has changed at the broker."""
    membership = home.membership()
    told = {**inventory, "host": _host_towards(membership.url)}
    request = {"inventory": told, "agent_version": version}
    answer = https.call("POST", "/v1/agent/hello", request)
    changed = replace(
        membership,
        mqtt_host=answer["mqtt_host"],
        mqtt_port=answer["mqtt_port"],
        heartbeat_s=answer["heartbeat_s"],
        verify_keys=answer["verify_keys"],
    )
    if changed != membership:
        home.remember(changed)
    return changed


def _host_towards(url: str) -> str:
    """The address under which this machine reaches the broker; empty: it does not.

    Machines that reach the broker over one network reach each other there too, unless each is
    behind a router of its own. Nothing is sent: a datagram socket is only told its destination.
    """
    place = urlsplit(url)
    with contextlib.suppress(OSError):
        for family, kind, *_, address in socket.getaddrinfo(
            place.hostname, place.port or 443, type=socket.SOCK_DGRAM
        ):
            with contextlib.suppress(OSError), socket.socket(family, kind) as asking:
                asking.connect(address)
                return str(asking.getsockname()[0])
    return ""


# ---------------------------------------------------------------------- certificates


def renewal_due(home: Home, *, now: float | None = None) -> bool:
    """Whether the certificate has reached its moment of renewal.

    The clock of this machine may be wrong: then a renewal comes early, late, or is refused, and
    nothing else happens.
    """
    certificate = x509.load_pem_x509_certificate(home.certificate.read_bytes())
    begin = certificate.not_valid_before_utc.timestamp()
    end = certificate.not_valid_after_utc.timestamp()
    # The same for one certificate at each look, another for each machine.
    part = random.Random(certificate.serial_number).uniform(*_RENEW_BETWEEN)  # noqa: S311
    return (time.time() if now is None else now) >= begin + part * (end - begin)


def expired(home: Home) -> bool:
    """Whether the certificate has ended, by this machine's clock."""
    certificate = x509.load_pem_x509_certificate(home.certificate.read_bytes())
    return certificate.not_valid_after_utc < datetime.now(UTC)


def renew(home: Home, https: Https) -> None:
    """A new certificate while the present one is good; the old one stays until it is here."""
    csr = _csr(_device_key(home))
    answer = https.call("POST", "/v1/agent/renew", {"csr": csr})
    write_private(home.certificate, answer["certificate"].encode())
    log.info("the certificate was renewed")


def recover(home: Home) -> None:
    """A new certificate after the old one has ended: the device's key signs a challenge."""
    membership = home.membership()
    https = Https.anonymous(home, membership.url)
    key = _device_key(home)
    csr = _csr(key)
    nonce = https.call("POST", "/v1/agent/challenge")["nonce"]
    signature = key.sign(RECOVER_CONTEXT + nonce.encode() + csr.encode())
    answer = https.call(
        "POST",
        "/v1/agent/recover",
        {
            "tenant": membership.tenant,
            "device": membership.device,
            "nonce": nonce,
            "csr": csr,
            "signature": signature.hex(),
        },
    )
    write_private(home.certificate, answer["certificate"].encode())
    log.info("the certificate had ended and was replaced")


def mqtt_context(home: Home) -> ssl.SSLContext:
    """TLS for MQTT: the broker's CA, this device's certificate."""
    context = ssl.create_default_context(cafile=str(home.ca))
    context.load_cert_chain(home.certificate, home.key)
    return context


# ---------------------------------------------------------------------- small print


def _check_no_other(home: Home, url: str) -> None:
    try:
        text = (home.private / "membership.json").read_text()
        present = json.loads(text)["url"]
    except (OSError, ValueError, KeyError):
        return
    if present != url:
        raise AgentError(
            f"this machine is a member of {present}",
            "`fedml-agent logout` first, or use another --home",
        )


def _device_key(home: Home) -> Ed25519PrivateKey:
    try:
        key = serialization.load_pem_private_key(home.key.read_bytes(), None)
        if isinstance(key, Ed25519PrivateKey):
            return key
        raise ValueError("not an Ed25519 key")
    except FileNotFoundError:
        fresh = Ed25519PrivateKey.generate()
        pem = fresh.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        write_private(home.key, pem)
        return fresh
    except ValueError as error:
        raise HomeUnusable(
            f"cannot read {home.key}: {error}", "`fedml-agent logout`, then login again"
        ) from error


def _csr(key: Ed25519PrivateKey) -> str:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedml-agent")])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, None)
    return request.public_bytes(serialization.Encoding.PEM).decode()


def _machine_id(home: Home) -> str:
    """Random, kept in the home: several agents of one machine are several devices."""
    file = home.private / "machine-id"
    try:
        return file.read_text()
    except FileNotFoundError:
        fresh = f"{uuid.uuid4()}-{os.uname().nodename[:40]}"
        write_private(file, fresh.encode())
        return fresh
