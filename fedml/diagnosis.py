# SPDX-License-Identifier: Apache-2.0
"""Everything between a person's machine and his runs, looked at one by one, each with a next step.

What comes later rests on what comes before: where there is no address, nothing is asked of it.
Nothing is changed by looking. MQTT is not looked at: people do not use it, only machines do, and
`fedml-agent diagnose` looks at it there.
"""

import importlib.util
import shutil
import socket
import ssl
import stat
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import urllib3
from urllib3.exceptions import HTTPError, InsecureRequestWarning

from fedml import session
from fedml.client import Client
from fedml.environment import ours
from fedml.errors import BrokerRefused, FedMLError, NotLoggedIn
from fedml.session import Session

OK, NOTE, WRONG = "ok", "note", "not ok"
# Beyond this, certificates start or end at the wrong moment, and times of logs mislead.
CLOCK_S = 60.0
# With less, a workspace cannot be packed and a model not be downloaded.
DISK_BYTES = 1_000_000_000
_TIMEOUT_S = 8.0
_LOGIN_AGAIN = "`fedml login KEY` with a new key from the broker's admin"
_SET_CLOCK = "set this machine's clock: `timedatectl set-ntp true`, or `date -s`"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line. A note is nothing that keeps anybody from working.

    Attributes:
        state: One of `OK`, `NOTE`, `WRONG`.
        next: What to do; empty where there is nothing to do.
    """

    name: str
    state: str
    text: str
    next: str = ""


def findings(home: Path) -> Iterator[Finding]:
    """Look at everything, and give each thing as soon as it is known."""
    yield _versions()
    yield from _disk(home)
    try:
        found = session.load(home)
    except NotLoggedIn as error:
        yield Finding(name="login", state=WRONG, text=str(error), next=error.hint)
        return
    except FedMLError as error:  # in a job, whose broker is asked for its certificate
        yield Finding(name="login", state=WRONG, text=str(error), next=error.hint)
        return
    yield _login(home, found)
    yield from _broker(found)


def _versions() -> Finding:
    missing = [name for name in ("numpy", "torch") if importlib.util.find_spec(name) is None]
    if not missing:
        return Finding(name="fedml", state=OK, text=f"version {ours()}, with NumPy and torch")
    text = f"version {ours()}, without {' and '.join(missing)}: nothing is simulated or trained"
    extra = "sim" if missing == ["numpy"] else "train"
    text += " here with it" if missing == ["torch"] else " here"
    return Finding(name="fedml", state=NOTE, text=text, next=f"pip install 'fedml-agent[{extra}]'")


def _disk(home: Path) -> Iterator[Finding]:
    places = {"home": home, "here": Path.cwd(), "scratch": Path(tempfile.gettempdir())}
    for name, place in places.items():
        there = next(folder for folder in (place, *place.parents) if folder.exists())
        free = shutil.disk_usage(there).free
        text = f"{free / 1e9:.1f} GB are free at {place}"
        if free >= DISK_BYTES:
            yield Finding(name=f"disk {name}", state=OK, text=text)
        else:
            yield Finding(name=f"disk {name}", state=WRONG, text=text, next="make room there")


def _login(home: Path, found: Session) -> Finding:
    file = home / "user" / "session.json"
    if not file.exists():
        return Finding(name="login", state=OK, text=f"the key of this run, at {found.url}")
    mode = stat.S_IMODE(file.stat().st_mode)
    if mode & 0o077:
        text = f"{file} holds your token, and others can read it (mode {mode:o})"
        return Finding(name="login", state=WRONG, text=text, next=f"chmod 600 {file}")
    return Finding(name="login", state=OK, text=f"at {found.url}, kept in {file.parent}")


def _broker(found: Session) -> Iterator[Finding]:
    url = urlsplit(found.url)
    host, port = url.hostname or "", url.port or 443
    for finding in _reach(host, port):
        yield finding
        if finding.state == WRONG:
            return
    ahead_s = _ahead(found.url)
    if ahead_s is not None:
        yield _clock(ahead_s)
    tls = _tls(found, host, port, ahead_s)
    yield tls
    if tls.state != WRONG:
        yield from _api(Client(found))


def _reach(host: str, port: int) -> Iterator[Finding]:
    try:
        addresses = {str(info[4][0]) for info in socket.getaddrinfo(host, port)}
    except (OSError, UnicodeError) as error:
        hint = "is the name right? `getent hosts NAME` asks the same; DNS, or /etc/hosts, must know"
        text = f"{host} has no address: {error}"
        yield Finding(name="dns", state=WRONG, text=text, next=hint)
        return
    yield Finding(name="dns", state=OK, text=f"{host} is {', '.join(sorted(addresses))}")
    try:
        began = time.monotonic()
        socket.create_connection((host, port), _TIMEOUT_S).close()
    except OSError as error:
        hint = "is `fedml-broker up` running there? Does a firewall let this port through?"
        text = f"nobody listens at {host}:{port}: {error}"
        yield Finding(name="tcp", state=WRONG, text=text, next=hint)
        return
    took_ms = (time.monotonic() - began) * 1000
    yield Finding(name="tcp", state=OK, text=f"{host}:{port} in {took_ms:.0f} ms")


def _ahead(url: str) -> float | None:
    """How far our clock is ahead; asked without trust, since a wrong clock is why there is none."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", InsecureRequestWarning)
            pool = urllib3.PoolManager(ssl_context=context, retries=False, timeout=_TIMEOUT_S)
            date = pool.request("GET", f"{url}/v1/health").headers.get("Date")
    except (HTTPError, OSError):
        return None  # the lines on TLS and the API say why
    return None if date is None else time.time() - parsedate_to_datetime(date).timestamp()


def _clock(ahead_s: float) -> Finding:
    text = f"{abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} the broker's"
    if abs(ahead_s) <= CLOCK_S:
        return Finding(name="clock", state=OK, text=text)
    hint = f"{_SET_CLOCK}; if the broker's is the wrong one, tell its admin"
    return Finding(name="clock", state=WRONG, text=text, next=hint)


def _tls(found: Session, host: str, port: int, ahead_s: float | None) -> Finding:
    try:
        with (
            socket.create_connection((host, port), _TIMEOUT_S) as plain,
            found.context().wrap_socket(plain, server_hostname=host) as link,
        ):
            text = f"{link.version()}, the broker's CA is the one that you logged in with"
            return Finding(name="tls", state=OK, text=text)
    except ssl.SSLCertVerificationError as error:
        return _blame(error, host, ahead_s)
    except ssl.SSLError as error:
        text = f"no TLS with {host}:{port}: {error.reason or error}"
        hint = "something else answers there: is this the broker's HTTPS port?"
        return Finding(name="tls", state=WRONG, text=text, next=hint)
    except (OSError, ValueError) as error:
        text = f"no TLS with {host}:{port}: {error}"
        return Finding(name="tls", state=WRONG, text=text, next=_LOGIN_AGAIN)


def _blame(error: ssl.SSLCertVerificationError, host: str, ahead_s: float | None) -> Finding:
    """What a certificate that cannot be verified means."""
    # X509_V_ERR_CERT_NOT_YET_VALID and _HAS_EXPIRED (openssl verify(1)).
    if error.verify_code in (9, 10):
        text = f"the broker's certificate: {error.verify_message}, by this machine's clock"
        off = ahead_s is not None and abs(ahead_s) > CLOCK_S
        hint = _SET_CLOCK if off else "ask the broker's admin: `fedml-broker doctor`"
        return Finding(name="tls", state=WRONG, text=text, next=hint)
    if error.verify_code in (62, 64):  # host name, IP address
        text = f"the broker's certificate is not for {host}: {error.verify_message}"
        hint = "ask the broker's admin for a key with an address that its certificate names"
        return Finding(name="tls", state=WRONG, text=text, next=hint)
    text = f"who answers at {host} is not the broker of your login: {error.verify_message}"
    hint = f"somebody is in between, or the broker was set up anew: then {_LOGIN_AGAIN}"
    return Finding(name="tls", state=WRONG, text=text, next=hint)


def _api(client: Client) -> Iterator[Finding]:
    try:
        version = str(client.call("GET", "/v1/health")["version"])
    except (FedMLError, ValueError, KeyError, TypeError) as error:
        hint = "is this the broker's HTTPS port, and no proxy's? `fedml-broker doctor` there"
        text = f"the broker's API does not answer: {error}"
        yield Finding(name="api", state=WRONG, text=text, next=hint)
        return
    if version == ours():
        yield Finding(name="api", state=OK, text=f"the broker's version is {version}, as ours")
    else:
        text = f"the broker's version is {version}, ours is {ours()}"
        hint = "what only the newer one knows is refused with a word"
        yield Finding(name="api", state=NOTE, text=text, next=hint)
    try:
        whose = client.call("GET", "/v1/whoami")
    except FedMLError as error:
        yield Finding(name="token", state=WRONG, text=str(error), next=error.hint)
        return
    text = f"{whose['name']}, {whose['role']} of {whose['tenant']}"
    if whose["role"] == "viewer":
        hint = "an admin can grant more: `fedml-broker users role`"
        yield Finding(name="token", state=NOTE, text=f"{text}: starts no runs", next=hint)
    else:
        yield Finding(name="token", state=OK, text=text)
    yield _machines(client)


def _machines(client: Client) -> Finding:
    try:
        found: list[dict[str, Any]] = client.call("GET", "/v1/devices")["devices"]
    except BrokerRefused as error:  # a job's own key
        return Finding(name="machines", state=NOTE, text=str(error))
    online = [device["name"] for device in found if device["status"] == "online"]
    text = f"{len(online)} of {len(found)} are online"
    if online:
        return Finding(name="machines", state=OK, text=text)
    hint = "`fedml-agent run` on one of them" if found else "`fedml-broker keys create` makes a key"
    return Finding(name="machines", state=NOTE, text=f"{text}: runs wait", next=hint)
