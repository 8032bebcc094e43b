# SPDX-License-Identifier: Apache-2.0
"""The broker's own CA and keys: who the broker is, and who may call itself a device.

Everything lies in one directory (0700, files 0600), written on first use:

    ca.pem      ca.key        the CA, ECDSA P-256, 10 years. Login keys pin its SHA-256: were it
                              lost, every machine would have to log in again, so it is never made
                              anew where a broker has lived before
    server.pem  server.key    HTTPS and MQTT; P-256, because browsers refuse Ed25519
    broker.pem  broker.key    client certificate with CN `broker`, for an external MQTT broker
    signing.pem               two Ed25519 keys, current and next: orders are signed with the first

Certificates begin an hour in the past: a device's clock that is a little slow costs nothing.
Nothing here revokes: the broker looks each connection's name up in its own tables.
"""

import fcntl
import ipaddress
import logging
import os
import re
import secrets
import ssl
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedml_broker.problems import Problem
from fedml_protocol.keys import fingerprint

log = logging.getLogger(__name__)

BROKER_NAME = "broker"
COMMON_NAME_MAX = 64  # X.520's ub-common-name; a longer name does not go into a certificate

_BACKDATED = timedelta(hours=1)
_CA_LIFE = timedelta(days=3653)
_LEAF_LIFE = timedelta(days=397)
_ALWAYS_NAMED = ("localhost", "127.0.0.1", "::1")
_CSR_MAX_BYTES = 16 * 1024
_COMMON_NAME = re.compile(r"[A-Za-z0-9._/-]{1,64}")
_PEM_KEY = re.compile(rb"-----BEGIN PRIVATE KEY-----.+?-----END PRIVATE KEY-----\n?", re.DOTALL)

# The Ed25519 points of small order (RFC 8032, section 5.1; canonical and not): with one of them as
# a public key, anybody can make a signature that verifies. The sign bit is masked before looking.
_SMALL_ORDER = frozenset(
    bytes.fromhex(point)
    for point in (
        "0000000000000000000000000000000000000000000000000000000000000000",
        "0100000000000000000000000000000000000000000000000000000000000000",
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    )
)


class IdentityUnusable(Exception):
    """The files of the identity are incomplete or do not fit together; the person must decide."""


@dataclass(frozen=True, slots=True)
class _Pair:
    """A certificate with its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


class Identity:
    """Who this broker is. Made by `Identity.open`; thread-safe for reading."""

    def __init__(
        self, directory: Path, ca: _Pair, signing: tuple[Ed25519PrivateKey, Ed25519PrivateKey]
    ) -> None:
        self._dir = directory
        self._ca = ca
        self._signing = signing
        self._names: tuple[str, ...] = ()
        self._contexts: weakref.WeakSet[ssl.SSLContext] = weakref.WeakSet()

    @classmethod
    def open(
        cls, directory: Path, *, names: Sequence[str] | None = None, now: datetime | None = None
    ) -> "Identity":
        """The identity in `directory`, made on first use.

        Args:
            names: DNS names and IP addresses under which machines reach the broker; localhost is
                always among them. None: whatever the server certificate says already, for
                commands that only need the CA or the signing keys.
            now: The time, for tests; timezone-aware.

        Raises:
            IdentityUnusable: Files are missing or do not fit together; the text says what to do.
        """
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(directory):
            _tighten(directory)
            ca = _open_ca(directory, now or datetime.now(UTC))
            identity = cls(directory, ca, _open_signing(directory))
            identity._names = _all_names(_names_in(directory) if names is None else names)
            identity._renew(now or datetime.now(UTC))
        return identity

    @property
    def ca_pem(self) -> bytes:
        """The CA's certificate, PEM."""
        return self._ca.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def ca_sha256(self) -> bytes:
        """32 bytes: SHA-256 of the CA's certificate in DER, as login keys carry it."""
        return self._ca.certificate.fingerprint(hashes.SHA256())

    @property
    def ca_file(self) -> Path:
        """Where the CA's certificate lies, for an external MQTT broker's `cafile`."""
        return self._dir / "ca.pem"

    @property
    def server_files(self) -> tuple[Path, Path]:
        """Certificate (with the CA behind it) and key of the server."""
        return self._dir / "server.pem", self._dir / "server.key"

    @property
    def broker_files(self) -> tuple[Path, Path]:
        """Certificate and key with which the broker itself is a client of an external broker."""
        return self._dir / "broker.pem", self._dir / "broker.key"

    @property
    def signing_key(self) -> Ed25519PrivateKey:
        """Signs orders now."""
        return self._signing[0]

    @property
    def verify_keys_raw(self) -> dict[str, bytes]:
        """Key id to the 32 bytes of the public key: current and next, as devices are given them."""
        public = [key.public_key() for key in self._signing]
        return {fingerprint(key): key.public_bytes_raw() for key in public}

    def rotate_signing_key(self) -> str:
        """Sign with the next key from now on, and make another next one.

        Devices that know the two present keys accept the new one at once; those that missed two
        rotations must fetch the keys again.

        Returns:
            The id of the key that signs now.
        """
        with _locked(self._dir):
            # Read again: a command beside the running broker may have rotated meanwhile.
            _, following = _open_signing(self._dir)
            self._signing = (following, Ed25519PrivateKey.generate())
            _write(self._dir / "signing.pem", b"".join(_key_pem(key) for key in self._signing))
        return fingerprint(self.signing_key.public_key())

    def renew(self, now: datetime | None = None) -> bool:
        """Reissue what has less than a third of its life left; call it once a day.

        Contexts that were handed out use the new certificates for their next connections.

        Returns:
            Whether anything was reissued.
        """
        with _locked(self._dir):
            renewed = self._renew(now or datetime.now(UTC))
        if renewed:
            for context in self._contexts:
                context.load_cert_chain(*self._files_of(context))
        return renewed

    def issue(
        self, csr_pem: bytes, common_name: str, days: int = 30, *, now: datetime | None = None
    ) -> bytes:
        """A client certificate for the key in `csr_pem`, named `common_name`, in PEM.

        Of the request only the key counts: its subject and extensions are ignored.

        Args:
            csr_pem: PKCS #10 with an Ed25519 or P-256 key, signed by that key.
            common_name: Ours to choose: ``{tenant}/d/{device}``, 1 to 64 characters.
            days: Life from now on; never longer than the CA's.

        Raises:
            Problem: 422; the request is broken, not signed by its key, or its key is of a kind that
                we do not take.
            ValueError: `common_name` cannot stand in a certificate.
        """
        if not _COMMON_NAME.fullmatch(common_name) or common_name == BROKER_NAME:
            raise ValueError(
                f"a certificate's name is 1 to {COMMON_NAME_MAX} of letters, digits and '._/-', "
                f"and not {BROKER_NAME!r}; got {common_name[:100]!r}"
            )
        key = _key_of_csr(csr_pem)
        moment = now or datetime.now(UTC)
        certificate = self._sign_leaf(
            key,
            common_name,
            ExtendedKeyUsageOID.CLIENT_AUTH,
            moment=moment,
            life=timedelta(days=days),
        )
        return certificate.public_bytes(serialization.Encoding.PEM)

    def server_context(self) -> ssl.SSLContext:
        """For HTTPS: TLS 1.2 or newer; a client certificate is optional, but must be ours.

        A client with an expired certificate fails the handshake: it comes without one.
        """
        return self._context(ssl.PROTOCOL_TLS_SERVER, ssl.CERT_OPTIONAL)

    def mqtt_context(self) -> ssl.SSLContext:
        """For MQTT: TLS 1.2 or newer, and a client certificate of ours."""
        context = self._context(ssl.PROTOCOL_TLS_SERVER, ssl.CERT_REQUIRED)
        # No agent resumes a session, and a ticket holds its whole certificate: two a connection.
        context.num_tickets = 0
        return context

    def client_context(self) -> ssl.SSLContext:
        """For our own connection to an external MQTT broker whose certificate is from our CA."""
        return self._context(ssl.PROTOCOL_TLS_CLIENT, ssl.CERT_REQUIRED)

    def _context(self, protocol: int, verify: ssl.VerifyMode) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(*self._files_of(context))
        context.load_verify_locations(cadata=self.ca_pem.decode())
        context.verify_mode = verify
        self._contexts.add(context)
        return context

    def _files_of(self, context: ssl.SSLContext) -> tuple[Path, Path]:
        client = context.protocol == ssl.PROTOCOL_TLS_CLIENT
        return self.broker_files if client else self.server_files

    def _renew(self, moment: datetime) -> bool:
        """Reissue the leaves where needed. The caller holds the lock."""
        renewed = False
        for files, name, usage, wanted in (
            (self.server_files, "fedml-broker", ExtendedKeyUsageOID.SERVER_AUTH, self._names),
            (self.broker_files, BROKER_NAME, ExtendedKeyUsageOID.CLIENT_AUTH, ()),
        ):
            if self._is_good(files, wanted, moment):
                continue
            key = ec.generate_private_key(ec.SECP256R1())
            certificate = self._sign_leaf(
                key.public_key(), name, usage, moment=moment, life=_LEAF_LIFE, names=wanted
            )
            # Key first: a certificate that is there always has its key, a crash between the two
            # leaves a pair that does not fit, and the next start sees that and issues again.
            _write(files[1], _key_pem(key))
            _write(files[0], certificate.public_bytes(serialization.Encoding.PEM) + self.ca_pem)
            log.info("issued %s, good until %s", files[0].name, certificate.not_valid_after_utc)
            renewed = True
        return renewed

    def _is_good(self, files: tuple[Path, Path], names: Sequence[str], moment: datetime) -> bool:
        pair = _read_pair(*files)
        if pair is None:
            return False
        certificate = pair.certificate
        try:
            certificate.verify_directly_issued_by(self._ca.certificate)
        except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
            log.warning("%s was not issued by our CA: issuing it again", files[0].name)
            return False
        begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        return (
            _sans(certificate) == set(names)
            and begin <= moment
            and end - moment >= (end - begin) / 3
        )

    def _sign_leaf(
        self,
        key: ec.EllipticCurvePublicKey | Ed25519PublicKey,
        common_name: str,
        usage: x509.ObjectIdentifier,
        *,
        moment: datetime,
        life: timedelta,
        names: Sequence[str] = (),
    ) -> x509.Certificate:
        ca = self._ca.certificate
        builder = (
            _builder(common_name, ca.subject, key, moment, life, latest=ca.not_valid_after_utc)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._ca.key.public_key()),
                critical=False,
            )
        )
        if names:
            san = x509.SubjectAlternativeName([_general_name(name) for name in names])
            builder = builder.add_extension(san, critical=False)
        return builder.sign(self._ca.key, hashes.SHA256())


def common_name(peer: Mapping[str, object] | None) -> str | None:
    """Who the peer is, from `ssl.SSLObject.getpeercert()`; None without one certain name.

    The chain was checked in the handshake; whether the name is still welcome is in our tables.
    """
    subject = (peer or {}).get("subject")
    if not isinstance(subject, tuple):
        return None
    found = [value for rdn in subject for name, value in rdn if name == "commonName"]
    return found[0] if len(found) == 1 else None


def _key_of_csr(csr_pem: bytes) -> ec.EllipticCurvePublicKey | Ed25519PublicKey:
    title = "The certificate request is not usable"
    hint = "make an Ed25519 key and sign a new request with it"
    if len(csr_pem) > _CSR_MAX_BYTES:
        raise Problem(422, title, f"it has {len(csr_pem)} bytes, {_CSR_MAX_BYTES} are enough", hint)
    try:
        csr = x509.load_pem_x509_csr(csr_pem)
        key = csr.public_key()
        signed = csr.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise Problem(422, title, f"it cannot be read: {error}", hint) from error
    if not signed:
        raise Problem(422, title, "it is not signed by the key it carries", hint)
    match key:
        case Ed25519PublicKey():
            raw = key.public_bytes_raw()
            if raw[:31] + bytes([raw[31] & 0x7F]) in _SMALL_ORDER:
                raise Problem(422, title, "its Ed25519 key is a point of small order", hint)
            return key
        case ec.EllipticCurvePublicKey() if isinstance(key.curve, ec.SECP256R1):
            return key
    kind = type(key).__name__.removeprefix("_").removesuffix("PublicKey")
    raise Problem(422, title, f"its key is {kind}; Ed25519 and ECDSA P-256 are taken", hint)


def _builder(
    common_name: str,
    issuer: x509.Name | None,
    key: ec.EllipticCurvePublicKey | Ed25519PublicKey,
    moment: datetime,
    life: timedelta,
    *,
    latest: datetime | None = None,
) -> x509.CertificateBuilder:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    end = moment + life
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer or subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(moment - _BACKDATED)
        .not_valid_after(end if latest is None else min(end, latest))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(*, digital_signature: bool = False, ca: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _open_ca(directory: Path, moment: datetime) -> _Pair:
    certificate_file, key_file = directory / "ca.pem", directory / "ca.key"
    pair = _read_pair(certificate_file, key_file)
    if pair is None:
        # Only a key, or nothing: the first use, perhaps cut short. Anything more was a broker.
        lived = [
            name for name in ("ca.pem", "server.pem", "signing.pem") if (directory / name).exists()
        ]
        if lived:
            raise IdentityUnusable(
                f"{certificate_file} and {key_file} are missing or do not fit together, yet "
                f"{lived[0]} is there: restore both from a backup. A new CA would lock out every "
                "machine that has logged in; if that is what you want, move the directory away"
            )
        return _make_ca(certificate_file, key_file, moment)
    begin, end = pair.certificate.not_valid_before_utc, pair.certificate.not_valid_after_utc
    if not begin <= moment <= end:
        raise IdentityUnusable(
            f"the CA is good from {begin:%Y-%m-%d} to {end:%Y-%m-%d}, and this machine's clock "
            f"says {moment:%Y-%m-%d %H:%M} UTC: set the clock, then start again"
        )
    return pair


def _make_ca(certificate_file: Path, key_file: Path, moment: datetime) -> _Pair:
    if moment.year < 2025:
        raise IdentityUnusable(
            f"this machine's clock says {moment:%Y-%m-%d}: set it first, the CA that is made now "
            "has to be good for ten years"
        )
    key = ec.generate_private_key(ec.SECP256R1())
    # A name of its own per CA: clients that know two brokers must not mix their CAs up.
    name = f"fedml-broker CA {secrets.token_hex(4)}"
    certificate = (
        _builder(name, None, key.public_key(), moment, _CA_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(ca=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    _write(key_file, _key_pem(key))
    _write(certificate_file, certificate.public_bytes(serialization.Encoding.PEM))
    log.info("made a new CA in %s", certificate_file.parent)
    return _Pair(certificate, key)


def _open_signing(directory: Path) -> tuple[Ed25519PrivateKey, Ed25519PrivateKey]:
    file = directory / "signing.pem"
    if not file.exists():
        made = (Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate())
        _write(file, b"".join(_key_pem(key) for key in made))
        return made
    try:
        keys = [
            serialization.load_pem_private_key(pem, password=None)
            for pem in _PEM_KEY.findall(file.read_bytes())
        ]
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise IdentityUnusable(f"{file} is damaged ({error}): restore it from a backup") from error
    match keys:
        case [Ed25519PrivateKey() as current, Ed25519PrivateKey() as following]:
            return current, following
    raise IdentityUnusable(f"{file} should hold two Ed25519 keys: restore it from a backup")


def _read_pair(certificate_file: Path, key_file: Path) -> _Pair | None:
    """The certificate and its key; None when one is missing, unreadable or not the other's."""
    try:
        certificate = x509.load_pem_x509_certificate(certificate_file.read_bytes())
        key = serialization.load_pem_private_key(key_file.read_bytes(), password=None)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        log.warning("%s or its key cannot be read: %s", certificate_file, error)
        return None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        return None
    return _Pair(certificate, key) if certificate.public_key() == key.public_key() else None


def _all_names(names: Sequence[str]) -> tuple[str, ...]:
    """Canonical, in order, each once, with localhost's."""
    return tuple(dict.fromkeys(_canonical(name) for name in (*names, *_ALWAYS_NAMED)))


def _canonical(name: str) -> str:
    bare = name.strip().removeprefix("[").removesuffix("]").lower().removesuffix(".")
    try:
        return str(ipaddress.ip_address(bare))
    except ValueError:
        pass  # not an address, then a DNS name
    if not re.fullmatch(r"(\*\.)?[a-z0-9_]([a-z0-9_.-]{0,251}[a-z0-9_])?", bare) or ".." in bare:
        raise IdentityUnusable(
            f"{name!r} is neither a DNS name nor an IP address: give the bare name under which "
            "machines reach this broker, without https:// or a port"
        )
    return bare


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _names_in(directory: Path) -> list[str]:
    pair = _read_pair(directory / "server.pem", directory / "server.key")
    return sorted(_sans(pair.certificate)) if pair else []


def _sans(certificate: x509.Certificate) -> set[str]:
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return set()
    return set(found.get_values_for_type(x509.DNSName)) | {
        str(address) for address in found.get_values_for_type(x509.IPAddress)
    }


def _key_pem(key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _write(file: Path, data: bytes) -> None:
    """Whole or not at all, readable by us alone."""
    part = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        part.replace(file)
    except OSError as error:
        error.filename = error.filename or str(file)  # of a full disk, the system names none
        raise
    finally:
        part.unlink(missing_ok=True)
    directory = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One process at a time: a command beside the starting broker must not make a second CA."""
    lock = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _tighten(directory: Path) -> None:
    """Take from others what a copy or a backup may have given them."""
    files = [file for file in directory.iterdir() if file.is_file()]
    for path, mode in ((directory, 0o700), *((file, 0o600) for file in files)):
        if path.stat().st_mode & 0o077:
            log.warning("%s was open to other users: closing it", path)
            path.chmod(mode)
