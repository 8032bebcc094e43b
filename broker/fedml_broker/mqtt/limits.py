# SPDX-License-Identifier: Apache-2.0
"""What the endpoint allows, what it counts, and how it says no to a client."""

from dataclasses import dataclass, fields

NEVER = 0xFFFFFFFF
"""A Session Expiry Interval that means: never (MQTT 5, 3.1.2.11.2)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Every bound and time-out of the endpoint; `_s` is seconds, `_bytes` is bytes.

    Attributes:
        max_packet_bytes: Larger packets are answered with 0x95. A control message is at most
            128 KiB; the rest is room for topic and properties.
        receive_maximum: QoS 1 messages that one client may have unacknowledged (0x93 beyond).
        max_inflight: The same towards clients, if they allow that many.
        max_queued_messages: Waiting for one session. When full, a publisher whose message no
            other session took is told 0x97; nothing acknowledged is ever dropped to make room.
        max_total_queued_bytes: The same over all sessions, for this process's memory.
        max_handling: Running handler calls for one client before its socket is left unread.
        connect_timeout_s: From the open socket (and for the TLS handshake) to CONNECT.
        max_keep_alive_s: Clients that ask for more, or for none, are told this one.
        max_session_expiry_s: Longer wishes are cut to this; `NEVER` allows everything.
        restart_grace_s: After a restart, how long a client has to come back before the will
            that it had left with the previous process is published.
        write_high_water_bytes: Unsent bytes at which a client counts as a slow reader.
        linger_s: How long a closed connection may take to send its last bytes.
        drain_s: How long a shutdown waits for running handlers.
    """

    max_packet_bytes: int = (128 + 16) * 1024
    receive_maximum: int = 64
    topic_alias_maximum: int = 16
    max_inflight: int = 64
    max_queued_messages: int = 1_000
    max_queued_bytes: int = 4 * 1024 * 1024
    max_total_queued_bytes: int = 512 * 1024 * 1024
    max_subscriptions: int = 64
    max_topic_levels: int = 32
    max_retained: int = 200_000
    max_retained_bytes: int = 256 * 1024 * 1024
    max_connections: int = 20_000
    max_handling: int = 256
    connect_timeout_s: float = 10.0
    max_keep_alive_s: int = 600
    max_session_expiry_s: int = 14 * 24 * 3600
    restart_grace_s: float = 60.0
    write_high_water_bytes: int = 256 * 1024
    linger_s: float = 5.0
    drain_s: float = 5.0

    def __post_init__(self) -> None:
        if not 0 < self.receive_maximum <= 0xFFFF or not 0 < self.max_inflight <= 0xFFFF:
            raise ValueError("receive_maximum and max_inflight must be between 1 and 65535")
        if not 0 < self.max_keep_alive_s <= 0xFFFF:
            raise ValueError("max_keep_alive_s must be between 1 and 65535 seconds")
        if not 64 <= self.max_packet_bytes <= 0xFFFFFFF:
            raise ValueError("max_packet_bytes must be between 64 bytes and 256 MiB")


@dataclass(frozen=True, slots=True)
class Refusal:
    """What `authenticate` returns for a client that may not come in.

    Attributes:
        reason: CONNACK reason code >= 0x80, for instance 0x87 (not authorised), 0x8A (banned).
        text: For the client's log.
    """

    reason: int = 0x87
    text: str = ""


@dataclass(slots=True)
class Counters:
    """Since the endpoint was made. All but `connections` and `queued_bytes` only grow."""

    connections: int = 0
    connected: int = 0
    refused: int = 0
    violations: int = 0
    received: int = 0
    delivered: int = 0
    not_authorised: int = 0
    unmatched: int = 0
    queued_bytes: int = 0
    dropped_slow_reader: int = 0
    dropped_queue_full: int = 0
    dropped_expired: int = 0
    dropped_too_large: int = 0
    dropped_session_ended: int = 0
    handler_errors: int = 0

    def as_dict(self) -> dict[str, int]:
        """The same by name, for a metrics page."""
        return {field.name: getattr(self, field.name) for field in fields(self)}
