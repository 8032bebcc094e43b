# SPDX-License-Identifier: Apache-2.0
"""Where the agent keeps things, and who it is.

HOME/agent/policy.toml        the machine owner's say
HOME/agent/private/           never visible to a task: keys, certificate, journal
HOME/agent/tasks/             one directory for each task (and epoch) that is here
HOME/agent/sessions/          warm workers of federated runs
HOME/agent/packages/          fetched packages, by hash
HOME/agent/environments/      virtual environments that jobs require
HOME/agent/logs/              of tasks that have ended
HOME/agent/lock, control      held and served by the running agent
"""

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from fedml_agent.errors import AlreadyRunning, HomeUnusable, NotLoggedIn
from fedml_protocol.topics import Address

DEFAULT = "~/.fedml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """What an enrolment has brought.

    Attributes:
        url: The broker's HTTPS address.
        verify_keys: Ed25519 public keys (hex) under their ids: who may give orders.
    """

    url: str
    tenant: str
    device: str
    mqtt_host: str
    mqtt_port: int
    heartbeat_s: float
    verify_keys: dict[str, str]

    @property
    def address(self) -> Address:
        """Who this machine is to the broker."""
        return Address(self.tenant, self.device)


class Home:
    """The directory of one agent."""

    def __init__(self, root: Path) -> None:
        self.root = root / "agent"

    @classmethod
    def find(cls, given: str | None) -> "Home":
        """`--home`, or FEDML_HOME, or ~/.fedml."""
        return cls(Path(given or os.environ.get("FEDML_HOME") or DEFAULT).expanduser().absolute())

    @property
    def private(self) -> Path:
        """Hidden from every task."""
        return self.root / "private"

    @property
    def policy(self) -> Path:
        """The machine owner's file."""
        return self.root / "policy.toml"

    @property
    def tasks(self) -> Path:
        """Directories of tasks."""
        return self.root / "tasks"

    @property
    def sessions(self) -> Path:
        """Directories of warm workers."""
        return self.root / "sessions"

    @property
    def packages(self) -> Path:
        """Fetched packages."""
        return self.root / "packages"

    @property
    def environments(self) -> Path:
        """Virtual environments of jobs."""
        return self.root / "environments"

    @property
    def logs(self) -> Path:
        """Logs of tasks that have ended."""
        return self.root / "logs"

    @property
    def control(self) -> Path:
        """The socket on which the running agent answers `status`."""
        return self.root / "control"

    @property
    def key(self) -> Path:
        """The device's private key."""
        return self.private / "device.key"

    @property
    def certificate(self) -> Path:
        """The device's certificate."""
        return self.private / "device.crt"

    @property
    def ca(self) -> Path:
        """The broker's CA certificate."""
        return self.private / "ca.crt"

    def make(self) -> None:
        """Create what is missing, for the owner only.

        Raises:
            HomeUnusable: The disk or its permissions do not allow it.
        """
        try:
            for folder in (
                self.root,
                self.private,
                self.tasks,
                self.sessions,
                self.packages,
                self.environments,
                self.logs,
            ):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise HomeUnusable(
                f"cannot use {self.root}: {error.strerror}", "choose another place with --home"
            ) from error

    def membership(self) -> Membership:
        """Who this machine is.

        Raises:
            NotLoggedIn: It has not joined a broker.
            HomeUnusable: The file cannot be read.
        """
        file = self.private / "membership.json"
        try:
            return Membership(**json.loads(file.read_text()))
        except FileNotFoundError as error:
            raise NotLoggedIn(
                "this machine has not joined a broker yet", "`fedml-agent login KEY`"
            ) from error
        except (OSError, ValueError, TypeError) as error:
            raise HomeUnusable(
                f"cannot read {file}: {error}", "`fedml-agent logout`, then login again"
            ) from error

    def remember(self, membership: Membership) -> None:
        """Write down who this machine is."""
        write_private(
            self.private / "membership.json", json.dumps(asdict(membership), indent=1).encode()
        )

    def next_boot(self) -> int:
        """The number of this start: one more than the last, kept apart from the journal."""
        file = self.private / "boot"
        try:
            number = int(file.read_text()) + 1
        except (FileNotFoundError, ValueError):
            number = 1
        write_private(file, str(number).encode())
        return number

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the home: the lock ends with the process, however that ends.

        Raises:
            AlreadyRunning: Another agent holds it.
            HomeUnusable: The disk or its permissions do not allow it.
        """
        self.make()
        path = self.root / "lock"
        with _writing(path):
            file = path.open("a+")
        with contextlib.closing(file):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                pid = file.read().strip()
                raise AlreadyRunning(
                    f"another agent (pid {pid or '?'}) works on {self.root}",
                    "stop it, or give this one a home of its own with --home",
                ) from error
            # Not through the file's buffer: what a full disk refuses would be tried once more, as
            # it is closed.
            with _writing(path):
                os.ftruncate(file.fileno(), 0)
                os.write(file.fileno(), str(os.getpid()).encode())
            yield


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise HomeUnusable(
            f"cannot write {path}: {error.strerror}",
            "make room on that disk" if full else "are it and its folder this user's?",
        ) from error


def write_private(path: Path, data: bytes) -> None:
    """Replace a file as a whole, readable by its owner only, and wait until it is on the disk.

    Raises:
        HomeUnusable: The disk or its permissions do not allow it.
    """
    beside = path.with_name(path.name + ".new")
    with _writing(path):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        number = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            with os.fdopen(number, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            beside.unlink(missing_ok=True)
            raise
        beside.replace(path)
