# SPDX-License-Identifier: Apache-2.0
"""What the agent tells systemd about itself: sd_notify(3) and the watchdog, without libsystemd.

Started by anything else than a unit with `Type=notify`, nothing here has an effect. A unit with
`WatchdogSec=` restarts an agent whose loop hangs: the loop says WATCHDOG=1 at least every
`watchdog_interval_s`.

Tasks must not inherit `VARIABLES`: a task that uses sd_notify would speak for the agent.
"""

import os
import socket
from collections.abc import Mapping

VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")

# systemd reads at once; a socket that stays full this long belongs to a systemd that hangs itself.
_FULL_SOCKET_S = 1.0


def ready(status: str | None = None, *, env: Mapping[str, str] = os.environ) -> bool:
    """Say that the agent has started: units ordered after it may start now."""
    return notify("READY=1", *_status(status), env=env)


def stopping(status: str | None = None, *, env: Mapping[str, str] = os.environ) -> bool:
    """Say that the agent is on its way down."""
    return notify("STOPPING=1", *_status(status), env=env)


def status(text: str, *, env: Mapping[str, str] = os.environ) -> bool:
    """Set the line that `systemctl status` shows."""
    return notify(*_status(text), env=env)


def alive(*, env: Mapping[str, str] = os.environ) -> bool:
    """Say that the agent's loop still turns."""
    return notify("WATCHDOG=1", env=env)


def notify(*assignments: str, env: Mapping[str, str] = os.environ) -> bool:
    """Send assignments such as ``READY=1`` in one datagram.

    Returns:
        Whether systemd was told. Never raises because systemd is away: the agent lives without.

    Raises:
        ValueError: An assignment holds a line break, which would begin another one.
    """
    address = env.get("NOTIFY_SOCKET", "")
    if any("\n" in one for one in assignments):
        raise ValueError(f"one line each, please: {assignments!r}")
    if address.startswith("@"):  # a name in the abstract namespace, which no file shows
        address = "\0" + address[1:]
    elif not address.startswith("/"):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.settimeout(_FULL_SOCKET_S)
        try:
            sender.sendto("\n".join(assignments).encode(), address)
        except OSError:
            return False
    return True


def watchdog_interval_s(*, env: Mapping[str, str] = os.environ) -> float | None:
    """Give the seconds between two `alive`: half of the limit, as sd_watchdog_enabled(3) advises.

    None where no watchdog waits for this process.
    """
    limit_us = env.get("WATCHDOG_USEC", "")
    # Set for another process: the variables were inherited, as by a shell that systemd started.
    meant_for = env.get("WATCHDOG_PID") or str(os.getpid())
    if not limit_us.isdecimal() or int(limit_us) == 0 or meant_for != str(os.getpid()):
        return None
    return int(limit_us) / 2e6


def _status(text: str | None) -> tuple[str, ...]:
    return () if text is None else ("STATUS=" + " ".join(text.splitlines()),)
