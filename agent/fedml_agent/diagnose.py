# SPDX-License-Identifier: Apache-2.0
"""Everything that the agent on this machine needs, looked at one by one, each with a next step.

What comes later rests on what comes before: where there is no address, nothing is asked of it, and
the finding says so. Nothing is changed by looking: a running agent is asked what it sees, and only
where none runs (its lock is held meanwhile) is an MQTT session opened, which is closed at once and
keeps its queue.
"""

import importlib.util
import json
import os
import socket
import sqlite3
import ssl
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedml_agent import containers, control, hardware, policy_file, room, sandbox
from fedml_agent.control import NotRunning
from fedml_agent.errors import AgentError, AlreadyRunning, HomeUnusable, NotLoggedIn
from fedml_agent.home import Home, Membership
from fedml_agent.namespaces import CGROUPS, HIDE, NETWORK

OK, NOTE, WRONG = "ok", "note", "not ok"
# Beyond this, times in logs mislead and certificates start or end at the wrong moment.
CLOCK_S = 60.0
_TIMEOUT_S = 8.0
_DAY_S = 86400.0
_LOGIN_AGAIN = "`fedml-agent logout`, then `fedml-agent login KEY` with a new key"
_SET_CLOCK = "set this machine's clock: `timedatectl set-ntp true`, or `date -s`"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line. A note is nothing that keeps the agent from working.

    Attributes:
        state: One of `OK`, `NOTE`, `WRONG`.
        next: What to do; empty where there is nothing to do.
    """

    name: str
    state: str
    text: str
    next: str = ""


class Diagnosis:
    """Looks at one home; `findings` gives each thing as soon as it is known."""

    def __init__(self, home: Home, *, nvml: Any = None) -> None:
        self._home = home
        self._nvml = nvml
        self._policy = policy_file.load_or_refuse(home.policy)
        self._membership: Membership | None = None
        self._agent: dict[str, Any] | None = None
        self._offset_s: float | None = None  # how far our clock is ahead of the broker's

    def findings(self) -> Iterator[Finding]:
        """Look at everything."""
        yield from self._look_at_home()
        yield from self._look_at_agent()
        yield self._look_at_policy()
        yield from self._look_at_membership()
        if self._membership is not None:
            yield from self._look_at_broker(self._membership)
        yield self._look_at_disk()
        yield self._look_at_journal()
        yield from self._look_at_gpus()
        yield from self._look_at_sandbox()
        yield self._look_at_containers()
        yield self._look_at_worker()

    # ------------------------------------------------------------------ this machine

    def _look_at_home(self) -> Iterator[Finding]:
        root = self._home.root
        try:
            mode = stat.S_IMODE(root.stat().st_mode)
        except FileNotFoundError:
            hint = "`fedml-agent login KEY` makes it"
            yield Finding(name="home", state=NOTE, text=f"{root} is not there yet", next=hint)
            return
        except OSError as error:
            text = f"{root} cannot be looked at: {error.strerror}"
            yield Finding(name="home", state=WRONG, text=text, next="run this as the agent's user")
            return
        if not os.access(root, os.R_OK | os.W_OK | os.X_OK):
            owner = root.stat().st_uid
            text = f"{root} belongs to user {owner} and user {os.geteuid()} cannot use it"
            yield Finding(name="home", state=WRONG, text=text, next="run this as that user")
        elif mode & 0o022:
            text = f"{root} can be written by others (mode {mode:o})"
            yield Finding(name="home", state=WRONG, text=text, next=f"chmod 700 {root}")
        else:
            yield Finding(name="home", state=OK, text=str(root))

    def _look_at_agent(self) -> Iterator[Finding]:
        try:
            self._agent = control.ask(self._home.control)
        except NotRunning:
            pass
        else:
            up_s, pid = self._agent["up_s"], self._agent["pid"]
            text = f"runs as pid {pid}, for {up_s:.0f} s"
            yield Finding(name="agent", state=OK, text=text)
            if self._agent["refusing"]:
                text = f"it takes no task: {self._agent['refusing']}"
                # Closing hours are what its owner wants.
                state = NOTE if text.endswith("(tasks.hours)") else WRONG
                yield Finding(name="offers", state=state, text=text, next="see the lines below")
            if self._agent["draining"]:
                text = "it takes no task: the broker's admin has drained this machine, or it stops"
                hint = "ask him: `fedml-broker devices drain --off` uses it again"
                yield Finding(name="draining", state=NOTE, text=text, next=hint)
            if self._agent["alarms"]:
                text = f"{self._agent['alarms']} messages were refused: forged, damaged or replayed"
                hint = "read the agent's log: who else can write to its MQTT topics?"
                yield Finding(name="alarms", state=WRONG, text=text, next=hint)
            return
        if not os.access(self._home.root, os.W_OK):
            return
        try:
            with self._home.locked():
                pass
        except AlreadyRunning as error:
            text = f"{error}, and does not answer on {self._home.control}"
            hint = "it may be starting, or hang: look at its log, or end it and start it again"
            yield Finding(name="agent", state=WRONG, text=text, next=hint)
        except HomeUnusable as error:
            hint = error.hint
            yield Finding(name="agent", state=WRONG, text=str(error), next=hint)
        else:
            text = "none runs on this home"
            yield Finding(name="agent", state=NOTE, text=text, next="start it: `fedml-agent run`")

    def _look_at_policy(self) -> Finding:
        path = self._home.policy
        if self._policy.broken:
            hint = "mend the file; `fedml-agent policy check` reads it as the agent does"
            return Finding(name="policy", state=WRONG, text=self._policy.broken, next=hint)
        text = str(path) if path.exists() else f"the defaults: there is no {path}"
        return Finding(name="policy", state=OK, text=text)

    def _look_at_disk(self) -> Finding:
        place = self._home.root
        while not os.path.exists(place):  # noqa: PTH110 - which raises where we may not look
            place = place.parent
        free, keep = room.disk_free(place), self._policy.disk_reserve
        text = f"{free / 1e9:.1f} GB are free, {keep / 1e9:.1f} GB must stay free"
        if free >= keep:
            return Finding(name="disk", state=OK, text=text)
        hint = f"make room where {place} lies, or lower resources.disk_reserve in policy.toml"
        return Finding(name="disk", state=WRONG, text=f"{text}: no task is taken", next=hint)

    def _look_at_journal(self) -> Finding:
        path = self._home.private / "journal.db"
        if not os.path.exists(path):  # noqa: PTH110
            return Finding(name="journal", state=OK, text="none yet: no agent has run here")
        try:
            with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5)) as db:
                verdict = str(db.execute("PRAGMA quick_check").fetchone()[0])
        except sqlite3.DatabaseError as error:
            verdict = str(error)
        if verdict != "ok":
            hint = "restart the agent: it sets the damaged file aside and begins a new one"
            return Finding(name="journal", state=WRONG, text=f"{path}: {verdict}", next=hint)
        aside = sorted(path.parent.glob(f"{path.name}.damaged-*"))
        if aside:
            text = f"sound; an earlier one was damaged and is kept as {aside[-1]}"
            hint = "look at the disk's health; the file may be deleted"
            return Finding(name="journal", state=NOTE, text=text, next=hint)
        return Finding(name="journal", state=OK, text=str(path))

    def _look_at_gpus(self) -> Iterator[Finding]:
        found = hardware.inventory(nvml=self._nvml).accelerators
        if found.absent:
            yield Finding(name="gpu", state=OK, text=f"none: {found.absent}")
        for gpu in found.gpus:
            name = f"gpu {gpu.index}"
            if gpu.fault:
                hint = "`nvidia-smi` says more; until it is mended the GPU is not let out"
                yield Finding(name=name, state=WRONG, text=f"out of order: {gpu.fault}", next=hint)
            else:
                yield Finding(name=name, state=OK, text=f"{gpu.name}, {gpu.uuid}")

    def _look_at_sandbox(self) -> Iterator[Finding]:
        found = sandbox.capabilities()
        cut = not self._policy.federated_network
        said = ""
        for name in sandbox.PROMISED:
            can = self._as_the_agent_says(name) or found[name]
            if can.works:
                yield Finding(name=f"sandbox {name}", state=OK, text=f"by {can.by}")
                continue
            state, text = NOTE, f"tasks run without it: {can.why_not}"
            if name in self._policy.require:
                state = WRONG
                text = f"no task is taken, since the policy requires it: {can.why_not}"
            elif name == NETWORK and cut:
                state, text = WRONG, f"no federated task is taken: {can.why_not}"
            hint = unlock(name)
            if said and state == NOTE and name != CGROUPS:
                hint = f"as for {said}"  # it is a long line
            said = said or f"sandbox {name}"
            yield Finding(name=f"sandbox {name}", state=state, text=text, next=hint)

    def _as_the_agent_says(self, name: str) -> sandbox.Capability | None:
        """Control groups are delegated to the agent's service, and not to the shell we are in."""
        if self._agent is None:
            return None
        if why := self._agent["sandbox_missing"].get(name):
            return sandbox.Capability(False, why)
        return sandbox.Capability(True, by=self._agent["sandbox"].get(name, ""))

    def _look_at_containers(self) -> Finding:
        wanted = self._policy.engine
        engine = containers.found(wanted)
        if isinstance(engine, str):
            hint = "only if jobs shall bring images: `apt-get install podman`, or start Docker"
            if wanted is not None:
                hint = f"mend {wanted}, or take the line `engine` out of policy.toml"
            return Finding(name="containers", state=NOTE, text=engine, next=hint)
        if not self._policy.containers:
            text = f"{engine} is here, and the policy lets no job bring an image"
            hint = "to let them: `[containers] allow = true` in policy.toml"
            return Finding(name="containers", state=NOTE, text=text, next=hint)
        return Finding(name="containers", state=OK, text=f"jobs may bring images, for {engine}")

    def _look_at_worker(self) -> Finding:
        missing = [name for name in ("numpy", "fedml") if importlib.util.find_spec(name) is None]
        if not missing:
            return Finding(name="federated", state=OK, text="NumPy and the library are here")
        text = f"no federated tasks are taken: {', '.join(missing)} not installed"
        hint = "`pip install 'fedml-agent[sim]'`, or [train] with torch"
        return Finding(name="federated", state=NOTE, text=text, next=hint)

    # ------------------------------------------------------------------ membership

    def _look_at_membership(self) -> Iterator[Finding]:
        try:
            found = self._membership = self._home.membership()
        except (NotLoggedIn, HomeUnusable) as error:
            yield Finding(name="login", state=WRONG, text=str(error), next=error.hint)
            return
        text = f"device {found.device} of {found.url}, tenant {found.tenant}"
        yield Finding(name="login", state=OK, text=text)

    def _look_at_certificate(self) -> Finding:
        try:
            trouble, text = _compare(self._home)
        except (OSError, ValueError) as error:
            trouble, text = str(error), ""
        if trouble:
            return Finding(name="certificate", state=WRONG, text=trouble, next=_LOGIN_AGAIN)
        ours = x509.load_pem_x509_certificate(self._home.certificate.read_bytes())
        now = time.time() - (self._offset_s or 0.0)
        left = ours.not_valid_after_utc.timestamp() - now
        if left > 0:
            text = f"{text}, good for {left / _DAY_S:.1f} days; the agent renews it by itself"
            return Finding(name="certificate", state=OK, text=text)
        text = f"{text}, ended {-left / _DAY_S:.1f} days ago"
        hint = "start the agent: it gets a new one with this device's key"
        return Finding(name="certificate", state=NOTE, text=text, next=hint)

    # ------------------------------------------------------------------ the broker

    def _look_at_broker(self, member: Membership) -> Iterator[Finding]:
        url = urlsplit(member.url)
        host, port = url.hostname or "", url.port or 443
        seen: dict[str, str] = {}
        for what, at in (("https", (host, port)), ("mqtt", (member.mqtt_host, member.mqtt_port))):
            for finding in _reach(what, *at):
                seen[what] = finding.state
                yield finding
                if finding.state == WRONG:
                    break
        if seen["https"] != WRONG:
            date = _date_without_trust(host, port)
            self._offset_s = None if date is None else time.time() - date
            if self._offset_s is not None:
                yield self._look_at_clock(self._offset_s)
        yield self._look_at_certificate()
        if seen["https"] != WRONG:
            yield from self._look_at_https(member, host, port)
        yield from self._look_at_mqtt(member, reachable=seen["mqtt"] != WRONG)

    def _look_at_clock(self, ahead_s: float) -> Finding:
        text = f"{abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} the broker's"
        if abs(ahead_s) <= CLOCK_S:
            return Finding(name="clock", state=OK, text=text)
        text = f"{_span(abs(ahead_s))} {'ahead of' if ahead_s > 0 else 'behind'} the broker's"
        hint = f"{_SET_CLOCK}; if the broker's is the wrong one, tell its admin"
        return Finding(name="clock", state=WRONG, text=text, next=hint)

    def _look_at_https(self, member: Membership, host: str, port: int) -> Iterator[Finding]:
        try:
            context = ssl.create_default_context(cafile=str(self._home.ca))
        except (OSError, ssl.SSLError) as error:
            text = f"cannot read {self._home.ca}: {error}"
            yield Finding(name="tls", state=WRONG, text=text, next=_LOGIN_AGAIN)
            return
        try:
            with (
                socket.create_connection((host, port), _TIMEOUT_S) as plain,
                context.wrap_socket(plain, server_hostname=host) as link,
            ):
                version = link.version()
        except ssl.SSLCertVerificationError as error:
            yield self._blame(error, host)
            return
        except OSError as error:
            text = f"no TLS on {host}:{port}: {error}"
            hint = "something else answers there: is this the broker's HTTPS port?"
            yield Finding(name="tls", state=WRONG, text=text, next=hint)
            return
        text = f"{version}, the broker's CA is the one of the login key"
        yield Finding(name="tls", state=OK, text=text)
        yield self._look_at_api(member, host, port, context)

    def _blame(self, error: ssl.SSLCertVerificationError, host: str) -> Finding:
        """Say what a certificate that cannot be verified means."""
        # X509_V_ERR_CERT_NOT_YET_VALID and _HAS_EXPIRED (openssl verify(1)).
        if error.verify_code in (9, 10):
            text = f"the broker's certificate: {error.verify_message}, by this machine's clock"
            if self._offset_s is not None and abs(self._offset_s) > CLOCK_S:
                return Finding(name="tls", state=WRONG, text=text, next=_SET_CLOCK)
            hint = "ask the broker's admin: `fedml-broker doctor`"
            return Finding(name="tls", state=WRONG, text=text, next=hint)
        if error.verify_code in (62, 64):  # host name, IP address
            text = f"the broker's certificate is not for {host}: {error.verify_message}"
            hint = "ask the broker's admin for a key with an address that its certificate names"
            return Finding(name="tls", state=WRONG, text=text, next=hint)
        text = f"who answers at {host} is not the broker of the login key: {error.verify_message}"
        hint = f"somebody is in between, or the broker was set up anew: then {_LOGIN_AGAIN}"
        return Finding(name="tls", state=WRONG, text=text, next=hint)

    def _look_at_api(
        self, member: Membership, host: str, port: int, context: ssl.SSLContext
    ) -> Finding:
        try:
            context.load_cert_chain(self._home.certificate, self._home.key)
        except (OSError, ssl.SSLError) as error:
            text = f"this device's certificate cannot be used: {error}"
            return Finding(name="api", state=WRONG, text=text, next=_LOGIN_AGAIN)
        try:
            health, body = _get(host, port, context, "GET", "/v1/health")
            # A blob that nobody has, asked for as this device: 404 is what a member hears.
            status, _ = _get(host, port, context, "HEAD", f"/v1/blobs/{'0' * 64}")
        except (OSError, HTTPException) as error:
            text = f"{member.url} does not answer: {error}"
            hint = "ask the broker's admin: `fedml-broker status`"
            return Finding(name="api", state=WRONG, text=text, next=hint)
        if health != 200 or not _is_broker(body):
            text = f"{member.url}/v1/health answers {health}, and not as a broker does"
            hint = "is a proxy in between? This port must lead to the broker itself"
            return Finding(name="api", state=WRONG, text=text, next=hint)
        if status in (401, 403):
            text = f"the broker does not take this device's certificate ({status})"
            hint = f"was it revoked or removed? Ask the broker's admin; then {_LOGIN_AGAIN}"
            return Finding(name="api", state=WRONG, text=text, next=hint)
        if status >= 500:
            text = f"the broker is in trouble: it answers {status}"
            hint = "ask its admin: `fedml-broker doctor`"
            return Finding(name="api", state=WRONG, text=text, next=hint)
        return Finding(name="api", state=OK, text=f"{member.url} knows this device")

    def _look_at_mqtt(self, member: Membership, *, reachable: bool) -> Iterator[Finding]:
        if self._agent is not None:
            if self._agent["link"] == "up":
                yield Finding(name="mqtt", state=OK, text="the running agent is connected")
            else:
                text = f"the running agent is not connected: {self._agent['link']}"
                hint = "see the lines above; it tries again by itself, once a minute at least"
                yield Finding(name="mqtt", state=WRONG, text=text, next=hint)
            return
        if not reachable:
            return
        try:
            # Whoever starts an agent meanwhile is told that another one works here, which beats
            # taking its session from it.
            with self._home.locked():
                said = _connect(self._home, member)
        except AlreadyRunning:
            text = "not tried: an agent holds this home"
            yield Finding(name="mqtt", state=NOTE, text=text, next="ask again when it answers")
        except HomeUnusable as error:
            text = f"not tried: {error}"
            yield Finding(name="mqtt", state=NOTE, text=text, next="ask again when that is mended")
        except (AgentError, OSError, ValueError) as error:
            text = f"{member.mqtt_host}:{member.mqtt_port}: {error}"
            hint = "see the lines above; else ask the broker's admin: `fedml-broker status`"
            yield Finding(name="mqtt", state=WRONG, text=text, next=hint)
        else:
            if said == "Success":
                text = f"{member.mqtt_host}:{member.mqtt_port} takes this device's connection"
                yield Finding(name="mqtt", state=OK, text=text)
            else:
                text = f"the broker refuses this device's connection: {said}"
                yield Finding(name="mqtt", state=WRONG, text=text, next=_LOGIN_AGAIN)


# ---------------------------------------------------------------------- small print


def _reach(what: str, host: str, port: int) -> Iterator[Finding]:
    """Find the address, then connect to it."""
    name = f"{what} port"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        text = f"the name {host} leads nowhere: {error.strerror or error}"
        hint = f"is this machine on the network? Does its DNS know the name: `getent hosts {host}`"
        yield Finding(name=name, state=WRONG, text=text, next=hint)
        return
    addresses = sorted({str(one[4][0]) for one in found})
    try:
        with socket.create_connection((host, port), _TIMEOUT_S):
            pass
    except ConnectionRefusedError:
        text = f"{host}:{port} ({', '.join(addresses)}): nobody listens there"
        hint = "is the broker up? On its machine: `fedml-broker status`"
        yield Finding(name=name, state=WRONG, text=text, next=hint)
    except OSError as error:
        text = f"{host}:{port} ({', '.join(addresses)}): {error.strerror or error}"
        hint = f"is a firewall in between? This machine must be able to connect to TCP port {port}"
        yield Finding(name=name, state=WRONG, text=text, next=hint)
    else:
        text = f"{host}:{port} ({', '.join(addresses)})"
        yield Finding(name=name, state=OK, text=text)


def _date_without_trust(host: str, port: int) -> float | None:
    """The broker's clock. Its answer proves nothing, and nothing but this rests on it.

    It is asked without a look at certificates, since a wrong clock is what makes good ones fail.
    """
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with closing(HTTPSConnection(host, port, timeout=_TIMEOUT_S, context=context)) as link:
            before = time.monotonic()
            link.request("GET", "/v1/health")
            date = link.getresponse().headers.get("Date", "")
            # It was written in between, and its fraction of a second was cut off.
            return parsedate_to_datetime(date).timestamp() + 0.5 + (time.monotonic() - before) / 2
    except (OSError, HTTPException, ValueError):
        return None


def _get(
    host: str, port: int, context: ssl.SSLContext, method: str, path: str
) -> tuple[int, bytes]:
    with closing(HTTPSConnection(host, port, timeout=_TIMEOUT_S, context=context)) as link:
        link.request(method, path)
        answer = link.getresponse()
        return answer.status, answer.read(65536)


def _is_broker(body: bytes) -> bool:
    try:
        return bool(json.loads(body)["status"] == "ok")
    except (ValueError, KeyError, TypeError):
        return False


def _compare(home: Home) -> tuple[str, str]:
    """What is wrong with key and certificate, or else what they are."""
    key = serialization.load_pem_private_key(home.key.read_bytes(), None)
    if not isinstance(key, Ed25519PrivateKey):
        return f"{home.key} is not an Ed25519 key", ""
    if (mode := stat.S_IMODE(home.key.stat().st_mode)) & 0o077:
        return f"{home.key} can be read by others (mode {mode:o}): it may be known", ""
    ours = x509.load_pem_x509_certificate(home.certificate.read_bytes())
    raw = serialization.Encoding.Raw, serialization.PublicFormat.Raw
    theirs = ours.public_key()
    if theirs != key.public_key():
        return f"{home.certificate} is not for the key {home.key}", ""
    authority = x509.load_pem_x509_certificate(home.ca.read_bytes())
    try:
        ours.verify_directly_issued_by(authority)
    except (InvalidSignature, TypeError, ValueError):
        return f"{home.certificate} was not issued by the broker's CA in {home.ca}", ""
    return "", f"of key {key.public_key().public_bytes(*raw).hex()[:8]}…"


def _connect(home: Home, member: Membership) -> str:
    """Open the device's MQTT session and leave at once; the broker's word on it.

    The session goes on (no clean start, the same expiry), nothing is subscribed, and what arrives
    is not acknowledged: so the agent finds everything that was waiting for it.
    """
    import paho.mqtt.client as paho
    from paho.mqtt.enums import CallbackAPIVersion
    from paho.mqtt.packettypes import PacketTypes
    from paho.mqtt.properties import Properties

    from fedml_agent.link import SESSION_S
    from fedml_agent.login import mqtt_context

    answered = threading.Event()
    said: list[str] = []

    def on_connect(client: paho.Client, _: Any, __: Any, reason: Any, ___: Any) -> None:
        said.append(str(reason))
        answered.set()
        client.disconnect()

    client = paho.Client(
        CallbackAPIVersion.VERSION2,
        client_id=member.address.client_id,
        protocol=paho.MQTTv5,
        manual_ack=True,
        reconnect_on_failure=False,
    )
    client.tls_set_context(mqtt_context(home))
    client.on_connect = on_connect
    client.on_disconnect = lambda *_: answered.set()
    properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
    properties.SessionExpiryInterval = SESSION_S
    properties.ReceiveMaximum = 1
    client.connect(member.mqtt_host, member.mqtt_port, 30, clean_start=False, properties=properties)
    client.loop_start()
    try:
        if not answered.wait(_TIMEOUT_S):
            raise OSError(f"no answer to CONNECT within {_TIMEOUT_S:g} s")
    finally:
        client.loop_stop()
    if not said:
        raise OSError("it closes the connection without an answer")
    return said[0]


def unlock(protection: str) -> str:
    """What the machine's owner can do to get a protection."""
    steps = (
        "allow user namespaces: `unshare --user --mount --pid --fork true` must work for the "
        "agent's user (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone, "
        "kernel.apparmor_restrict_unprivileged_userns; in a container: its seccomp profile)"
    )
    if protection == CGROUPS:
        return (
            "in the unit of the service: `Delegate=yes`, `DelegateSubgroup=agent` (systemd 254); "
            "in a container: its own cgroup namespace and a /sys/fs/cgroup that can be written. "
            "Without it memory is limited process by process"
        )
    if protection == HIDE:
        return (
            f"{steps}, or use a kernel with Landlock (Linux 5.13). To run tasks all the same, "
            "which can then read the agent's key: `[sandbox] require = []` in policy.toml"
        )
    if protection == NETWORK:
        return f"{steps}, or let workers use it: `[network] federated = true` in policy.toml"
    return steps


def _span(seconds: float) -> str:
    if seconds >= 1.5 * _DAY_S:
        return f"{seconds / _DAY_S:.1f} days"
    return f"{seconds / 3600:.1f} hours" if seconds >= 7200 else f"{seconds / 60:.0f} minutes"
