# SPDX-License-Identifier: Apache-2.0
"""The configuration of a Mosquitto (>= 2.0, better 2.0.15) that serves one broker and its devices.

A client is what its certificate says: the common name is user name and client id at once, and for
a device it is `{tenant}/d/{device}`, so that one pattern of the access list serves every device.
Queue limits are explicit: Mosquitto's own defaults drop silently at 1,000 messages. Before 2.0.15
it closes a connection that was taken over without saying so (0x8E).
"""

import os
import pwd
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

CONFIG, ACCESS = "mosquitto.conf", "access.acl"

# The agent's window and the embedded endpoint's defaults, so that both backends behave alike.
_MAX_INFLIGHT, _MAX_QUEUED, _MAX_QUEUED_BYTES = 64, 1_000, 4 * 1024 * 1024
_MAX_PACKET_BYTES = (128 + 16) * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Mosquitto:
    """What one private Mosquitto needs to know.

    Attributes:
        port: TLS listener.
        ca_file: Certificates that clients' certificates must descend from.
        cert_file, key_file: The server's own.
        revocations_file: Certificate revocation list, if there is one; read again on SIGHUP.
        broker: Common name of the broker's own client certificate.
        groups: Client id -> topics of the groups it belongs to (`fed/1/{tenant}/g/{group}/dn`).
        session_expiry_s: How long an absent device's session is kept.
    """

    port: int
    ca_file: Path
    cert_file: Path
    key_file: Path
    host: str = "127.0.0.1"
    revocations_file: Path | None = None
    broker: str = "broker"
    groups: Mapping[str, Iterable[str]] = field(default_factory=dict)
    session_expiry_s: int = 14 * 24 * 3600

    def write(self, folder: Path) -> Path:
        """Write configuration and access list; the file to start `mosquitto -c` with.

        Writing again and sending SIGHUP to Mosquitto puts a changed access list into force.

        Raises:
            ValueError: A path or a client id cannot be written into such a file.
        """
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        (folder / ACCESS).write_text(self.access_list())
        config = folder / CONFIG
        config.write_text(self.configuration(folder))
        return config

    def configuration(self, folder: Path) -> str:
        """The text of `mosquitto.conf`; persistence and access list live in `folder`."""
        lines = [
            # Started as root, it would otherwise become a user who cannot read these files.
            f"user {pwd.getpwuid(os.getuid()).pw_name}",
            "per_listener_settings false",
            "allow_anonymous false",
            f"acl_file {_plain(folder / ACCESS)}",
            "persistence true",
            f"persistence_location {_plain(folder)}/",
            "autosave_interval 30",
            f"persistent_client_expiration {max(1, self.session_expiry_s // 3600)}h",
            "queue_qos0_messages false",
            f"max_inflight_messages {_MAX_INFLIGHT}",
            f"max_queued_messages {_MAX_QUEUED}",
            f"max_queued_bytes {_MAX_QUEUED_BYTES}",
            f"max_packet_size {_MAX_PACKET_BYTES}",
            "max_keepalive 600",
            "set_tcp_nodelay true",
            "log_dest stderr",
            "connection_messages true",
            f"listener {self.port} {_plain(self.host)}",
            f"cafile {_plain(self.ca_file)}",
            f"certfile {_plain(self.cert_file)}",
            f"keyfile {_plain(self.key_file)}",
            "tls_version tlsv1.2",
            "require_certificate true",
            "use_identity_as_username true",
            "use_username_as_clientid true",
            "max_qos 1",
        ]
        if self.revocations_file is not None:
            lines.append(f"crlfile {_plain(self.revocations_file)}")
        return "\n".join(lines) + "\n"

    def access_list(self) -> str:
        """The text of the access list: who may read and write which topics."""
        lines = [
            f"user {_plain(self.broker)}",
            "topic read fed/1/+/d/+/up/#",
            # To clear the retained "online" of a device that was removed.
            "topic write fed/1/+/d/+/up/presence",
            "topic write fed/1/+/d/+/dn/#",
            "topic write fed/1/+/g/+/dn",
        ]
        for client, topics in sorted(self.groups.items()):
            lines += [
                f"user {_plain(client)}",
                *(f"topic read {_plain(t)}" for t in sorted(topics)),
            ]
        # Patterns come last and are for every user: %u is the common name of the certificate.
        lines += ["pattern write fed/1/%u/up/#", "pattern read fed/1/%u/dn/#"]
        return "\n".join(lines) + "\n"


def _plain(value: Path | str) -> str:
    """A value that cannot add a line or a wildcard of its own."""
    text = str(value)
    if not text or not text.isprintable() or text != text.strip() or "#" in text or "+" in text:
        raise ValueError(f"{text!r} cannot stand in a Mosquitto configuration")
    return text
