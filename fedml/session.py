# SPDX-License-Identifier: Apache-2.0
"""Who the person is to which broker: HOME/user/, written by `fedml login`.

A job that has no login of its own is its run: the broker gives it a key, which is good for this run
alone and until it ends.
"""

import functools
import hashlib
import json
import os
import ssl
import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import urllib3
from urllib3.exceptions import HTTPError, InsecureRequestWarning

from fedml.errors import BrokerRefused, BrokerUnreachable, ConfigError, NotLoggedIn
from fedml_protocol.errors import BadKey
from fedml_protocol.keys import Scope, parse_login_key

# Where a job finds the key of its run.
RUN_KEY = "FEDML_RUN_API_KEY"


@dataclass(frozen=True, slots=True)
class Session:
    """One person at one broker. `ca` is the broker's CA certificate (PEM)."""

    url: str
    token: str = field(repr=False)
    ca: str = field(repr=False)

    def context(self) -> ssl.SSLContext:
        """TLS that trusts this broker and nobody else."""
        return ssl.create_default_context(cadata=self.ca)


def find_home(given: str | None = None) -> Path:
    """`--home`, or FEDML_HOME, or ~/.fedml."""
    return Path(given or os.environ.get("FEDML_HOME") or "~/.fedml").expanduser().absolute()


def login(home: Path, key_text: str) -> Session:
    """Keep a user's key, once it is one of the broker's (see `of_key`)."""
    session = of_key(key_text)
    keep(home, session)
    return session


def keep(home: Path, session: Session) -> None:
    """Keep a session where only its owner can read it."""
    folder = home / "user"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    beside = folder / "session.json.new"
    beside.unlink(missing_ok=True)
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(json.dumps(asdict(session)))
    beside.replace(folder / "session.json")


def of_key(key_text: str, scope: Scope = Scope.USER) -> Session:
    """A key as a session; its broker's CA has been compared with the key.

    Raises:
        ConfigError: Not a key of this scope.
        BrokerUnreachable: Nobody answers at its address.
        BrokerRefused: Another broker answers there.
    """
    try:
        key = parse_login_key(key_text, scope)
    except BadKey as error:
        raise ConfigError(str(error)) from error
    return replace(pinned(key.url, key.ca_sha256.hex()), token=key.secret.hex())


def pinned(url: str, ca_sha256: str) -> Session:
    """A session of nobody, at the broker whose CA certificate has this hash. Raises as `of_key`."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with warnings.catch_warnings():
            # That this connection proves nothing is the point; the hash below decides.
            warnings.simplefilter("ignore", InsecureRequestWarning)
            pool = urllib3.PoolManager(ssl_context=context, retries=False, timeout=10)
            pem = pool.request("GET", f"{url}/v1/ca").data.decode(errors="replace")
    except (HTTPError, OSError) as error:
        raise BrokerUnreachable(
            f"nobody answers at {url}", "is `fedml-broker up` running there?"
        ) from error
    try:
        der = ssl.PEM_cert_to_DER_cert(pem)
    except ValueError as error:
        raise BrokerRefused(f"{url} does not answer as a broker does") from error
    if hashlib.sha256(der).hexdigest() != ca_sha256:
        raise BrokerRefused(
            f"the broker at {url} is not the one that made this key",
            "somebody may be in between, or it was set up anew: ask its admin for a new key",
        )
    return Session(url, "", pem)


def logout(home: Path) -> None:
    """Forget the token of this home; again is harmless."""
    (home / "user" / "session.json").unlink(missing_ok=True)


def load(home: Path) -> Session:
    """The session of this home, or else, in a job, that of its run.

    Raises:
        NotLoggedIn: There is neither.
    """
    try:
        return Session(**json.loads((home / "user" / "session.json").read_text()))
    except FileNotFoundError as error:
        if key := os.environ.get(RUN_KEY):
            return _of_run(key)
        raise NotLoggedIn(
            "you have not logged in here",
            "`fedml login KEY` (from `fedml-broker users token NAME`)",
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise NotLoggedIn(
            f"the stored login cannot be read: {error}", "`fedml login KEY`"
        ) from error


@functools.cache
def _of_run(key: str) -> Session:
    return of_key(key, Scope.RUN)
