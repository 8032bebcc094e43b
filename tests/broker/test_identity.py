# SPDX-License-Identifier: Apache-2.0
"""The broker's CA and keys: real files, real handshakes, a real Mosquitto."""

import asyncio
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import paho.mqtt.client as mqtt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from paho.mqtt.enums import CallbackAPIVersion

from fedml_broker.identity import Identity, IdentityUnusable, common_name
from fedml_broker.problems import Problem
from fedml_protocol.keys import fingerprint, sign, verify
from fedml_protocol.tasks import Drain, Order

NAME = "acme/d/node-7"
DAY = timedelta(days=1)
_Key = Ed25519PrivateKey | ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


def csr_of(key: _Key, name: str = "somebody else") -> bytes:
    algorithm = None if isinstance(key, Ed25519PrivateKey) else hashes.SHA256()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, algorithm)
    return request.public_bytes(serialization.Encoding.PEM)


def key_pem(key: _Key) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


class Device:
    """A device with a key and a certificate from `identity`, on disk as ssl wants it."""

    def __init__(
        self,
        identity: Identity,
        directory: Path,
        key: _Key | None = None,
        at: datetime | None = None,
    ) -> None:
        key = key or Ed25519PrivateKey.generate()
        self.certificate, self.key = directory / "device.pem", directory / "device.key"
        self.certificate.write_bytes(identity.issue(csr_of(key), NAME, now=at))
        self.key.write_bytes(key_pem(key))
        self.ca_pem = identity.ca_pem.decode()

    def context(self) -> ssl.SSLContext:
        context = client_context(self.ca_pem)
        context.load_cert_chain(self.certificate, self.key)
        return context


def client_context(ca_pem: str) -> ssl.SSLContext:
    """As newer Pythons check by default: RFC 5280 to the letter."""
    context = ssl.create_default_context(cadata=ca_pem)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    return context


@asynccontextmanager
async def server(context: ssl.SSLContext, host: str = "127.0.0.1") -> AsyncIterator[int]:
    """Tells each client the name that it came under."""

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):  # a client that only wanted the handshake
            await reader.readline()
        writer.write(f"{common_name(writer.get_extra_info('peercert'))}\n".encode())
        writer.close()

    async with await asyncio.start_server(greet, host, 0, ssl=context) as listening:
        yield listening.sockets[0].getsockname()[1]


async def name_seen(
    port: int, context: ssl.SSLContext, host: str = "127.0.0.1", called: str | None = None
) -> str:
    """What the server says the client is called; an ssl or connection error if it is refused."""
    reader, writer = await asyncio.open_connection(
        host, port, ssl=context, server_hostname=called or host
    )
    try:
        # With TLS 1.3 a refusal comes after the client's handshake: the first read meets it.
        writer.write(b"who am I?\n")
        line = await reader.readline()
        if not line:
            raise ConnectionResetError("refused")
        return line.decode().strip()
    finally:
        writer.transport.abort()


def certificate_of(identity: Identity) -> x509.Certificate:
    return x509.load_pem_x509_certificate(identity.server_files[0].read_bytes())


@pytest.fixture
def identity(tmp_path: Path) -> Identity:
    return Identity.open(tmp_path / "identity", names=["broker.example.org", "192.0.2.7"])


@pytest.fixture
def device(identity: Identity, tmp_path: Path) -> Device:
    return Device(identity, tmp_path)


def test_a_second_open_finds_the_same_identity(identity: Identity, tmp_path: Path) -> None:
    again = Identity.open(tmp_path / "identity", names=["broker.example.org", "192.0.2.7"])

    assert again.ca_sha256 == identity.ca_sha256
    assert again.verify_keys_raw == identity.verify_keys_raw
    assert certificate_of(again) == certificate_of(identity)
    assert len(identity.ca_sha256) == 32


def test_the_ca_is_pinned_by_the_hash_of_its_der(identity: Identity) -> None:
    der = ssl.PEM_cert_to_DER_cert(identity.ca_pem.decode())
    digest = hashes.Hash(hashes.SHA256())
    digest.update(der)

    assert identity.ca_sha256 == digest.finalize()


def test_files_are_for_the_broker_alone_and_closed_again_when_they_were_opened(
    identity: Identity, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "identity"

    def modes() -> set[int]:
        return {stat.S_IMODE(file.stat().st_mode) for file in directory.iterdir()}

    assert modes() == {0o600}
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700

    (directory / "ca.key").chmod(0o644)
    Identity.open(directory)
    assert modes() == {0o600}
    assert "ca.key was open to other users" in caplog.text


@pytest.mark.parametrize(
    ("host", "called"),
    [
        ("127.0.0.1", "broker.example.org"),
        ("127.0.0.1", "192.0.2.7"),
        ("127.0.0.1", "localhost"),
        ("127.0.0.1", "127.0.0.1"),
        ("::1", "::1"),
    ],
)
async def test_the_server_is_believed_under_each_of_its_names(
    identity: Identity, device: Device, host: str, called: str
) -> None:
    if host == "::1" and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    async with server(identity.mqtt_context(), host) as port:
        assert await name_seen(port, device.context(), host, called) == NAME


async def test_the_server_is_not_believed_under_another_name(
    identity: Identity, device: Device
) -> None:
    async with server(identity.mqtt_context()) as port:
        with pytest.raises(ssl.SSLCertVerificationError):
            await name_seen(port, device.context(), called="example.com")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("kind", ["ed25519", "p256"])
async def test_a_device_is_known_by_the_name_we_gave_it(
    identity: Identity, tmp_path: Path, kind: str, version: ssl.TLSVersion
) -> None:
    key = ec.generate_private_key(ec.SECP256R1()) if kind == "p256" else None
    context = Device(identity, tmp_path, key).context()
    context.minimum_version = context.maximum_version = version

    async with server(identity.server_context()) as port:
        assert await name_seen(port, context) == NAME


async def test_without_a_certificate_https_is_open_and_mqtt_is_not(identity: Identity) -> None:
    context = client_context(identity.ca_pem.decode())

    async with server(identity.server_context()) as port:
        assert await name_seen(port, context) == "None"
    async with server(identity.mqtt_context()) as port:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await name_seen(port, context)


def test_nothing_older_than_tls_1_2_is_spoken(identity: Identity) -> None:
    assert identity.server_context().minimum_version == ssl.TLSVersion.TLSv1_2
    assert identity.mqtt_context().minimum_version == ssl.TLSVersion.TLSv1_2


async def test_another_brokers_device_is_refused(identity: Identity, tmp_path: Path) -> None:
    context = Device(Identity.open(tmp_path / "other"), tmp_path).context()
    context.load_verify_locations(cadata=identity.ca_pem.decode())

    for ours in (identity.server_context(), identity.mqtt_context()):
        async with server(ours) as port:
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await name_seen(port, context)


async def test_an_expired_certificate_is_refused(identity: Identity, tmp_path: Path) -> None:
    expired = Device(identity, tmp_path, at=datetime.now(UTC) - 31 * DAY)

    async with server(identity.mqtt_context()) as port:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await name_seen(port, expired.context())


async def test_the_servers_certificate_opens_no_door_as_a_client(identity: Identity) -> None:
    context = client_context(identity.ca_pem.decode())
    context.load_cert_chain(*identity.server_files)

    async with server(identity.mqtt_context()) as port:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await name_seen(port, context)


async def test_a_device_cannot_pose_as_the_broker(identity: Identity, device: Device) -> None:
    impostor = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    impostor.load_cert_chain(device.certificate, device.key)
    victim = client_context(identity.ca_pem.decode())
    victim.check_hostname = False  # leaves the purpose of the certificate as the only defence

    async with server(impostor) as port:
        with pytest.raises(ssl.SSLCertVerificationError, match="purpose"):
            await name_seen(port, victim)


async def test_the_brokers_own_client_is_called_broker(identity: Identity) -> None:
    async with server(identity.mqtt_context()) as port:
        assert await name_seen(port, identity.client_context()) == "broker"


async def test_a_resumed_session_still_has_its_name(identity: Identity, device: Device) -> None:
    context = device.context()
    async with server(identity.server_context()) as port:

        def twice() -> tuple[bytes, bytes, bool]:
            def visit(session: ssl.SSLSession | None) -> tuple[bytes, ssl.SSLSession | None, bool]:
                with (
                    socket.create_connection(("127.0.0.1", port)) as plain,
                    context.wrap_socket(
                        plain, server_hostname="127.0.0.1", session=session
                    ) as secure,
                ):
                    secure.sendall(b"who am I?\n")
                    name = secure.recv(100)
                    return name, secure.session, bool(secure.session_reused)

            first, session, _ = visit(None)
            second, _, reused = visit(session)
            return first, second, reused

        first, second, reused = await asyncio.to_thread(twice)
    assert reused
    assert first.decode().strip() == second.decode().strip() == NAME


def test_a_device_certificate_is_a_leaf_for_clients_that_began_an_hour_ago(
    identity: Identity,
) -> None:
    now = datetime(2026, 5, 4, 3, 2, 1, tzinfo=UTC)
    key = Ed25519PrivateKey.generate()
    made = [
        x509.load_pem_x509_certificate(identity.issue(csr_of(key), NAME, now=now)) for _ in range(2)
    ]

    for certificate in made:
        assert certificate.subject.rfc4514_string() == f"CN={NAME}"
        assert certificate.not_valid_before_utc == now - timedelta(hours=1)
        assert certificate.not_valid_after_utc == now + 30 * DAY
        extensions = certificate.extensions
        assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        usage = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
        assert certificate.public_key() == key.public_key()
    assert made[0].serial_number != made[1].serial_number


def test_no_certificate_outlives_the_ca(identity: Identity) -> None:
    ca = x509.load_pem_x509_certificate(identity.ca_pem)
    issued = identity.issue(csr_of(Ed25519PrivateKey.generate()), NAME, days=9000)

    assert x509.load_pem_x509_certificate(issued).not_valid_after_utc == ca.not_valid_after_utc
    assert 3600 * DAY < ca.not_valid_after_utc - datetime.now(UTC) < 3700 * DAY


@pytest.mark.parametrize("name", ["", "broker", "a" * 65, "acme/d/x\0", "acme/d/ö", "CN=x,O=y"])
def test_a_name_that_cannot_be_trusted_is_not_put_into_a_certificate(
    identity: Identity, name: str
) -> None:
    with pytest.raises(ValueError, match="name"):
        identity.issue(csr_of(Ed25519PrivateKey.generate()), name)


def small_order_csr() -> bytes:
    """Signed by nobody: for the neutral element as a key, R = A and S = 0 verify any message."""
    key = Ed25519PrivateKey.generate()
    pem = csr_of(key)
    der = x509.load_pem_x509_csr(pem).public_bytes(serialization.Encoding.DER)
    neutral = bytes([1]) + bytes(31)
    der = der.replace(key.public_key().public_bytes_raw(), neutral)
    forged = der[:-64] + neutral + bytes(32)
    return x509.load_der_x509_csr(forged).public_bytes(serialization.Encoding.PEM)


def tampered_csr() -> bytes:
    key, other = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    der = x509.load_pem_x509_csr(csr_of(key)).public_bytes(serialization.Encoding.DER)
    der = der.replace(key.public_key().public_bytes_raw(), other.public_key().public_bytes_raw())
    return x509.load_der_x509_csr(der).public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize(
    ("csr", "reason"),
    [
        (lambda: b"", "cannot be read"),
        (lambda: b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n", "cannot be read"),
        (lambda: csr_of(Ed25519PrivateKey.generate())[:-80], "cannot be read"),
        (lambda: csr_of(Ed25519PrivateKey.generate()) + b" " * 20_000, "bytes"),
        (lambda: csr_of(rsa.generate_private_key(65537, 2048)), "its key is RSA"),
        (lambda: csr_of(ec.generate_private_key(ec.SECP384R1())), "P-256 are taken"),
        (tampered_csr, "not signed by the key it carries"),
        (small_order_csr, "small order"),
    ],
)
def test_a_weak_or_broken_request_is_refused_with_the_reason(
    identity: Identity, csr: Callable[[], bytes], reason: str
) -> None:
    with pytest.raises(Problem) as refused:
        identity.issue(csr(), NAME)

    assert refused.value.status == 422
    assert reason in refused.value.detail
    assert refused.value.hint


def test_small_order_forgery_would_pass_the_signature_check() -> None:
    assert x509.load_pem_x509_csr(small_order_csr()).is_signature_valid


def test_new_names_reissue_the_server_certificate_and_nothing_else(
    identity: Identity, tmp_path: Path
) -> None:
    before = certificate_of(identity)
    moved = Identity.open(tmp_path / "identity", names=["[2001:db8::1]", "New.Example.org."])

    san = certificate_of(moved).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert set(san.value.get_values_for_type(x509.DNSName)) == {"new.example.org", "localhost"}
    addresses = {str(address) for address in san.value.get_values_for_type(x509.IPAddress)}
    assert addresses == {"2001:db8::1", "127.0.0.1", "::1"}
    assert certificate_of(moved) != before
    assert moved.ca_sha256 == identity.ca_sha256
    assert moved.verify_keys_raw == identity.verify_keys_raw


def test_a_command_that_names_nothing_leaves_the_certificate_alone(
    identity: Identity, tmp_path: Path
) -> None:
    before = certificate_of(identity)

    assert certificate_of(Identity.open(tmp_path / "identity")) == before


@pytest.mark.parametrize("name", ["https://broker", "broker:8443", "a..b", "", "bröker.example"])
def test_a_name_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(IdentityUnusable, match="neither a DNS name nor an IP address"):
        Identity.open(tmp_path / "identity", names=[name])


def test_the_server_certificate_is_reissued_in_the_last_third_of_its_life(
    identity: Identity, tmp_path: Path
) -> None:
    now = datetime.now(UTC)
    before = certificate_of(identity)
    names = ["broker.example.org", "192.0.2.7"]

    def at(days: int) -> x509.Certificate:
        return certificate_of(
            Identity.open(tmp_path / "identity", names=names, now=now + days * DAY)
        )

    assert at(260) == before
    assert at(270) != before


async def test_renewal_reaches_the_contexts_in_use(tmp_path: Path) -> None:
    identity = Identity.open(tmp_path / "identity", now=datetime.now(UTC) - 265 * DAY)
    device = Device(identity, tmp_path)

    async def served(port: int) -> bytes | None:
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=device.context())
        secure: ssl.SSLObject = writer.get_extra_info("ssl_object")
        writer.transport.abort()
        return secure.getpeercert(binary_form=True)

    async with server(identity.server_context()) as port:
        first = await served(port)
        assert not identity.renew(datetime.now(UTC) - DAY)
        assert await served(port) == first

        assert identity.renew()
        second = await served(port)
    assert second != first
    assert second == certificate_of(identity).public_bytes(serialization.Encoding.DER)


def test_a_first_use_that_was_cut_short_is_finished(identity: Identity, tmp_path: Path) -> None:
    directory = tmp_path / "cut"
    directory.mkdir()
    shutil.copy(tmp_path / "identity" / "ca.key", directory)

    assert Identity.open(directory).ca_sha256 != identity.ca_sha256


@pytest.mark.parametrize("name", ["ca.pem", "ca.key"])
def test_a_lost_ca_is_never_replaced_silently(
    identity: Identity, tmp_path: Path, name: str
) -> None:
    (tmp_path / "identity" / name).unlink()

    with pytest.raises(IdentityUnusable, match="restore both from a backup"):
        Identity.open(tmp_path / "identity")


def test_a_ca_with_another_ones_key_is_refused(identity: Identity, tmp_path: Path) -> None:
    Identity.open(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "ca.key", tmp_path / "identity" / "ca.key")

    with pytest.raises(IdentityUnusable, match="do not fit together"):
        Identity.open(tmp_path / "identity")


def test_a_server_certificate_of_another_ca_is_reissued(identity: Identity, tmp_path: Path) -> None:
    other = Identity.open(tmp_path / "other", names=["broker.example.org", "192.0.2.7"])
    for file in other.server_files:
        shutil.copy(file, tmp_path / "identity" / file.name)

    certificate_of(Identity.open(tmp_path / "identity")).verify_directly_issued_by(
        x509.load_pem_x509_certificate(identity.ca_pem)
    )


@pytest.mark.parametrize(
    "content", [b"", b"-----BEGIN PRIVATE KEY-----\nAA\n-----END PRIVATE KEY-----"]
)
def test_damaged_signing_keys_are_not_replaced_silently(
    identity: Identity, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "identity" / "signing.pem").write_bytes(content)

    with pytest.raises(IdentityUnusable, match="restore it from a backup"):
        Identity.open(tmp_path / "identity")


def test_a_clock_that_was_never_set_makes_no_ca(tmp_path: Path) -> None:
    with pytest.raises(IdentityUnusable, match="clock says 1970"):
        Identity.open(tmp_path / "identity", now=datetime(1970, 1, 1, 0, 5, tzinfo=UTC))

    assert not (tmp_path / "identity" / "ca.pem").exists()


def test_a_clock_outside_the_cas_life_is_named(identity: Identity, tmp_path: Path) -> None:
    with pytest.raises(IdentityUnusable, match="set the clock"):
        Identity.open(tmp_path / "identity", now=datetime(2001, 1, 1, tzinfo=UTC))


def test_processes_that_start_together_agree_on_one_ca(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from fedml_broker.identity import Identity; "
        "i = Identity.open(Path(sys.argv[1])); print(i.ca_sha256.hex(), *sorted(i.verify_keys_raw))"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, tmp_path / "identity"],
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    said = {process.communicate(timeout=30)[0] for process in started}

    assert len(said) == 1
    assert len(said.pop().split()) == 3


def test_an_order_signed_after_a_rotation_is_believed_by_devices_that_slept_through_it(
    identity: Identity, tmp_path: Path
) -> None:
    known = {
        key_id: Ed25519PublicKey.from_public_bytes(raw)
        for key_id, raw in identity.verify_keys_raw.items()
    }
    order = Order(device="node-7", counter=1, lifetime_s=60.0, what=Drain(on=True))
    first = identity.signing_key

    now = identity.rotate_signing_key()

    assert now == fingerprint(identity.signing_key.public_key()) in known
    assert verify(sign(order, identity.signing_key), known, "node-7") == order
    assert fingerprint(first.public_key()) not in identity.verify_keys_raw
    assert len(identity.verify_keys_raw) == 2
    again = Identity.open(tmp_path / "identity")
    assert again.verify_keys_raw == identity.verify_keys_raw
    assert fingerprint(again.signing_key.public_key()) == now


@pytest.mark.parametrize(
    ("peer", "name"),
    [
        (None, None),
        ({}, None),
        ({"subject": ((("commonName", NAME),),)}, NAME),
        ({"subject": ((("organizationName", "x"),), (("commonName", NAME),))}, NAME),
        ({"subject": ((("commonName", "a"),), (("commonName", "b"),))}, None),
        ({"subject": ()}, None),
    ],
)
def test_a_peer_has_one_name_or_none(peer: dict[str, object] | None, name: str | None) -> None:
    assert common_name(peer) == name


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")
async def test_openssl_accepts_both_ends(identity: Identity, device: Device) -> None:
    async with server(identity.mqtt_context()) as port:
        client = await asyncio.create_subprocess_exec(
            *("openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-verify_return_error"),
            *("-CAfile", identity.ca_file, "-verify_ip", "127.0.0.1", "-x509_strict", "-quiet"),
            *("-cert", device.certificate, "-key", device.key),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        said, complaints = await client.communicate(b"who am I?\n")
    assert said.decode().strip() == NAME, complaints.decode()


MOSQUITTO = """
listener {port} 127.0.0.1
cafile {ca}
certfile {certificate}
keyfile {key}
require_certificate true
use_identity_as_username true
allow_anonymous false
acl_file {acl}
log_dest stderr
log_type all
persistence false
user root
"""


@contextmanager
def mosquitto(identity: Identity, directory: Path) -> Iterator[int]:
    """A real one that lets each device write under its own name; yields the port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    acl, config = directory / "acl", directory / "mosquitto.conf"
    acl.write_text("pattern readwrite fed/1/%u/up/#\n\nuser broker\ntopic readwrite fed/#\n")
    acl.chmod(0o600)
    certificate, key = identity.server_files
    config.write_text(
        MOSQUITTO.format(port=port, ca=identity.ca_file, certificate=certificate, key=key, acl=acl)
    )
    process = subprocess.Popen(
        ["mosquitto", "-c", config], stderr=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stderr is not None
    log = process.stderr
    lines = []
    for line in log:
        lines.append(line)
        if "running" in line:
            break
    else:
        pytest.fail("".join(lines))
    drain = threading.Thread(target=log.read)
    drain.start()
    try:
        yield port
    finally:
        process.terminate()
        process.wait(timeout=10)
        drain.join()
        log.close()


def mqtt_client(context: ssl.SSLContext, client_id: str) -> mqtt.Client:
    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=client_id, protocol=mqtt.MQTTv5)
    client.tls_set_context(context)
    return client


@pytest.mark.skipif(shutil.which("mosquitto") is None, reason="needs Mosquitto")
def test_mosquitto_takes_an_ed25519_device_and_confines_it_to_its_name(
    identity: Identity, device: Device, tmp_path: Path
) -> None:
    arrived: list[tuple[str, bytes | bytearray]] = []
    all_there, ready, subscribed = threading.Event(), threading.Event(), threading.Event()

    def take(_client: object, _data: object, message: mqtt.MQTTMessage) -> None:
        arrived.append((message.topic, message.payload))
        if message.payload == b"last":
            all_there.set()

    with mosquitto(identity, tmp_path) as port:
        broker = mqtt_client(identity.client_context(), "broker")
        broker.on_message = take
        broker.on_connect = lambda client, *_: client.subscribe("fed/#", qos=1)
        broker.on_subscribe = lambda *_: subscribed.set()
        broker.connect("127.0.0.1", port)
        broker.loop_start()
        assert subscribed.wait(10)

        node = mqtt_client(device.context(), "acme.node-7")
        node.on_connect = lambda *_: ready.set()
        node.connect("127.0.0.1", port)
        node.loop_start()
        assert ready.wait(10)
        node.publish("fed/1/acme/d/other/up/hb", b"not mine", qos=1).wait_for_publish(10)
        node.publish(f"fed/1/{NAME}/up/hb", b"mine", qos=1).wait_for_publish(10)
        node.publish(f"fed/1/{NAME}/up/hb", b"last", qos=1).wait_for_publish(10)
        assert all_there.wait(10)
        for client in (node, broker):
            client.disconnect()
            client.loop_stop()

    assert arrived == [(f"fed/1/{NAME}/up/hb", b"mine"), (f"fed/1/{NAME}/up/hb", b"last")]
