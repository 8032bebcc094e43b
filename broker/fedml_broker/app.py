# SPDX-License-Identifier: Apache-2.0
"""The broker: everything that lives and dies together, in one lifespan.

`Broker.running` nests what must outlive what: the store outlives the MQTT endpoint, which outlives
the drivers of runs, which outlive the HTTPS server. What is killed instead of stopped loses
nothing: each part reads at its start what it needs from the store.
"""

import asyncio
import contextlib
import errno
import logging
import socket
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

import mqtt5
import sqlalchemy as sa
from aiohttp import web
from sqlalchemy import Connection

from fedml_broker import audit, runs
from fedml_broker.accounts import Accounts
from fedml_broker.audit import Refusals, SignInRefused
from fedml_broker.blobs import Blobs
from fedml_broker.clusters import Clusters
from fedml_broker.devices import Devices
from fedml_broker.dispatch import Dispatcher
from fedml_broker.federate import Federation
from fedml_broker.fleet import Fleet
from fedml_broker.forward import Forwarder
from fedml_broker.identity import Identity, common_name
from fedml_broker.launch import Launcher
from fedml_broker.leases import Timing
from fedml_broker.metrics import Metrics
from fedml_broker.mqtt import Post
from fedml_broker.mqtt.endpoint import Endpoint, Refusal
from fedml_broker.mqtt.external import ExternalPost
from fedml_broker.observe import Observer
from fedml_broker.orders import Orders
from fedml_broker.problems import Problem
from fedml_broker.reports import Reports
from fedml_broker.routes import application
from fedml_broker.runs import Runs
from fedml_broker.sessions import Sessions
from fedml_broker.step_kinds import kinds
from fedml_broker.storage import Storage
from fedml_broker.store import Store
from fedml_broker.tables import DEFAULT_TENANT, blob_refs, settings
from fedml_broker.tasks import Task
from fedml_broker.traces import Traces
from fedml_broker.tracking import Tracker
from fedml_broker.watch import Watch
from fedml_broker.workflow import Workflows
from fedml_protocol import topics
from fedml_protocol.errors import MalformedMessage
from fedml_protocol.tasks import TaskState

if TYPE_CHECKING:
    from fedml_broker.oidc import Provider, SignIns

log = logging.getLogger(__name__)

HTTPS_PORT = 8443
MQTTS_PORT = 8883


# Of a body, for each connection; with aiohttp's 64 KB a large upload costs noticeably more CPU.
_READ_BYTES = 256 * 1024


class PortInUse(Exception):
    """Somebody else listens there; the text says on what and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How one broker is run.

    Attributes:
        home: Everything it keeps lies below; nothing is written elsewhere.
        host: The address to listen on.
        name: Under which machines reach it; goes into the login keys and the certificate.
        https_port, mqtt_port: 0 chooses a free one at the first start, and keeps it.
        external_mqtt: ``mqtts://host:port`` of another broker; empty: the embedded endpoint.
        provider: With whom people may sign in; None: with their keys alone.
        forward_mlflow: Of an MLflow server to which all that runs record is sent on, or empty.
    """

    home: Path
    host: str = "127.0.0.1"
    name: str = "localhost"
    https_port: int = HTTPS_PORT
    mqtt_port: int = MQTTS_PORT
    external_mqtt: str = ""
    forward_mlflow: str = ""
    timing: Timing = field(default_factory=Timing)
    disk_reserve_bytes: int = 1 << 30
    provider: "Provider | None" = None


class Broker:
    """All parts of one broker, wired."""

    def __init__(self, config: Settings, store: Store, identity: Identity) -> None:
        self.config = config
        self.store = store
        self.identity = identity
        self.version = our_version()
        self.started_at = time.monotonic()
        self.url = ""
        self.mqtt_url = ""
        self.fleet = Fleet(heartbeat_s=config.timing.heartbeat_s)
        self.blobs = Blobs(config.home / "blobs", reserve_bytes=config.disk_reserve_bytes)
        self.observer = Observer(store, config.home / "logs")
        self.runs = Runs(store)
        self.storage = Storage(store, self.blobs)
        self.tracker = Tracker(store, self.observer, self.blobs)
        self.refusals = Refusals(store)
        self.watch = Watch()
        self.fleet.on_change = self.watch.device
        self.observer.on_change.append(self.watch.run)
        self.metrics = Metrics(self)
        self.traces = Traces()
        store.on_commit = self.metrics.committed
        self.blobs.on_bytes = self.metrics.blob
        # These need ports, which are known once they are open.
        self.post: Post
        self.orders: Orders
        self.devices: Devices
        self.accounts: Accounts
        self.sessions: Sessions
        self.dispatcher: Dispatcher
        self.clusters: Clusters
        self.launcher: Launcher
        self.federation: Federation
        self.workflows: Workflows
        self.reports: Reports
        self.sign_ins: SignIns | None = None

    @classmethod
    @asynccontextmanager
    async def running(cls, config: Settings) -> AsyncIterator[Self]:
        """A broker that serves inside this context.

        Raises:
            PortInUse: Another process listens there.
        """
        config.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        identity = Identity.open(config.home / "identity", names=[config.name, config.host])
        store = await asyncio.to_thread(Store.open, config.home / "broker.db")
        try:
            broker = cls(config, store, identity)
            async with broker._serving():
                yield broker
        finally:
            await asyncio.to_thread(store.close)

    @asynccontextmanager
    async def _serving(self) -> AsyncIterator[None]:
        config = self.config
        async with contextlib.AsyncExitStack() as stack:
            # Bound first, so that keys can name the port; served last, when everything is there.
            listener = await self._bind("https_port", config.https_port)
            stack.callback(listener.close)
            stack.push_async_callback(asyncio.to_thread, self.traces.close)
            self.url = f"https://{config.name}:{listener.getsockname()[1]}"
            self.post = await self._open_post()
            self._wire()
            stack.callback(self.blobs.close)
            await self.store.write(self._note_identity)
            await self.devices.load()
            await self.clusters.load()
            await self.dispatcher.load()
            await self._enter_post(stack)
            await self.blobs.sweep(self._referenced)
            runner = web.AppRunner(
                application(self, self.metrics.middleware),
                access_log=None,
                shutdown_timeout=1.0,
                read_bufsize=_READ_BYTES,
            )
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            async with asyncio.TaskGroup() as loops:
                tasks = [
                    loops.create_task(self.dispatcher.serve(), name="broker.dispatch"),
                    loops.create_task(self._keep_house(), name="broker.house"),
                    loops.create_task(self.refusals.serve(), name="broker.refusals"),
                ]
                if config.forward_mlflow:
                    forwarder = Forwarder(self.store, config.forward_mlflow)
                    tasks.append(loops.create_task(forwarder.serve(), name="broker.forward"))
                await self.federation.resume()
                await self.workflows.take_up()
                await web.SockSite(
                    runner, listener, ssl_context=self.identity.server_context()
                ).start()
                try:
                    yield
                finally:
                    await self.workflows.close()
                    await self.federation.close()
                    for task in tasks:
                        task.cancel()

    def _wire(self) -> None:
        """Everything that needs the addresses."""
        timing = self.config.timing
        self.orders = Orders(self.store, self.identity, self.post)
        self.orders.on_sent = partial(self.metrics.message, "out")
        self.devices = Devices(self.store, self.fleet, self.identity)
        self.accounts = Accounts(self.store, url=self.url, ca_sha256=self.identity.ca_sha256)
        if self.config.provider is not None:
            from fedml_broker.oidc import SignIns

            self.sign_ins = SignIns(self.config.provider, self.store, self.accounts, url=self.url)
        self.sessions = Sessions(
            self.store, self.accounts, url=self.url, ca_sha256=self.identity.ca_sha256
        )
        self.dispatcher = Dispatcher(self.store, self.fleet, self.orders, self.blobs, timing)
        self.dispatcher.on_waiting = self._waits
        self.dispatcher.on_noted = self.observer.wake
        self.dispatcher.on_ended = self.metrics.ended
        self.dispatcher.on_accepted = self._taken
        self.dispatcher.on_result = self.traces.ended
        self.clusters = Clusters(self.store, self.fleet, self.dispatcher)
        self.launcher = Launcher(
            self.store,
            self.fleet,
            self.dispatcher,
            self.observer,
            self.blobs,
            self.traces,
            self.accounts,
        )
        self.federation = Federation(
            self.store,
            self.fleet,
            self.dispatcher,
            self.observer,
            self.blobs,
            self.config.home,
        )
        self.federation.traces = self.traces
        self.federation.on_round = self.metrics.round
        self.federation.on_answer = self.metrics.asked
        self.dispatcher.on_together = self.launcher.together
        self.dispatcher.on_serves = self.launcher.serves
        self.dispatcher.works = {"launch": self.launcher, "federate": self.federation}
        self.workflows = Workflows(
            self.store,
            self.accounts,
            self.observer,
            self.blobs,
            self.runs,
            kinds(self.launcher, self.federation, self.blobs),
            self.stop_run,
            self.waiting,
        )
        self.workflows.on_ended = self.metrics.workflow_ended
        self.reports = Reports(self.fleet, self.dispatcher)
        self.post.subscribe(topics.ALL_UP, self._take)

    async def _take(self, topic: str, payload: bytes) -> None:
        self.metrics.message("in")
        await self.reports.take(topic, payload)

    # ------------------------------------------------------------------ what routes ask for

    def waiting(self, run: str) -> str:
        """What a run waits for, in words; empty when it does not."""
        return self.federation.waiting(run) or self.dispatcher.waiting(run)

    async def listed(self, tenant: str, **which: Any) -> list[dict[str, Any]]:
        """Runs of a tenant, as `Runs.newest` takes its arguments; those that wait say for what."""
        rows = await self.runs.newest(tenant, **which)
        for row in rows:
            if row["ended_at"] is None:
                row["waiting"] = self.waiting(row["id"])
        return rows

    def _taken(self, task: Task) -> None:
        self.traces.accepted(task)
        self.metrics.taken(task)

    def _waits(self, run: str) -> None:
        self.observer.wake(run)
        self.workflows.waits(run)

    async def queue(self, tenant: str, limit: int) -> list[dict[str, Any]]:
        """The first runs that wait for machines, in their order, each with what keeps it."""
        order = self.dispatcher.queued(tenant)[:limit]
        rows = await self.runs.named(order)
        return [
            {
                **rows[run],
                "position": position,
                "priority": self.dispatcher.priority(run),
                "reasons": self.dispatcher.reasons(run),
            }
            for position, run in enumerate(order, 1)
            if run in rows
        ]

    async def stop_run(self, run: dict[str, Any], by: str, *, itself: bool = False) -> None:
        """End a run; `itself`: a job of it asks. Asking again is harmless."""
        if not await self.store.write(lambda tx: runs.stop_asked(tx, run["id"], by, itself=itself)):
            return
        if run["kind"] == "federate":
            self.federation.stop(run["id"], by)
        elif run["kind"] == runs.TRACKED:  # its program is elsewhere; it may record on
            await self.store.write(lambda tx: runs.end(tx, run["id"], TaskState.STOPPED))
        else:
            await self.dispatcher.stop_run(run["id"], f"stopped by {by}")
        self.observer.ring(run["id"])

    # ------------------------------------------------------------------ addresses

    async def _bind(self, name: str, port: int) -> socket.socket:
        """A bound socket; a port that was chosen once is kept: keys that are out name it."""
        kept = await self._setting(name)
        wanted = port or int(kept or 0)
        try:
            listener = socket.create_server((self.config.host, wanted), backlog=1024)
        except OSError as error:
            raise _port_error(error, self.config.host, wanted) from error
        await self._keep_setting(name, listener.getsockname()[1])
        return listener

    async def _open_post(self) -> Post:
        if self.config.external_mqtt:
            return self._external(self.config.external_mqtt)
        return Endpoint(
            self.config.home / "mqtt.db",
            authenticate=self._authenticate,
            may_publish=topics.may_publish,
            may_subscribe=topics.may_subscribe,
            refused=self._refused,
            host=self.config.host,
            port=self.config.mqtt_port or int(await self._setting("mqtt_port") or 0),
            ssl_context=self.identity.mqtt_context(),
        )

    def _external(self, address: str) -> ExternalPost:
        """A broker of somebody else's; machines prove to it who they are with certificates."""
        parts = urlsplit(address)
        if parts.scheme != "mqtts" or not parts.hostname:
            raise ValueError(f"--mqtt takes mqtts://HOST:PORT, got {address!r}")
        return ExternalPost(
            parts.hostname,
            parts.port or MQTTS_PORT,
            ssl_context=self.identity.client_context(),
        )

    async def _enter_post(self, stack: contextlib.AsyncExitStack) -> None:
        try:
            await stack.enter_async_context(self.post)
        except OSError as error:
            raise _port_error(error, self.config.host, self.config.mqtt_port) from error
        if isinstance(self.post, Endpoint):
            await self._keep_setting("mqtt_port", self.post.port)
            self.devices.mqtt = (self.config.name, self.post.port)
        else:
            parts = urlsplit(self.config.external_mqtt)
            self.devices.mqtt = (parts.hostname or "", parts.port or MQTTS_PORT)
        self.mqtt_url = "mqtts://{}:{}".format(*self.devices.mqtt)

    def _authenticate(
        self, connect: mqtt5.ConnectPacket, peer: Mapping[str, Any] | None
    ) -> str | Refusal:
        """Who an MQTT client is: the name in its certificate, if we still know it."""
        name = common_name(peer)
        try:
            known = name is not None and self.devices.known(topics.parse_client_id(name))
        except MalformedMessage:
            known = False
        if name is None or not known:
            return Refusal(text="this device is not known here: revoked, or removed")
        return name

    def _refused(self, peer: Mapping[str, Any] | None, why: str, address: str) -> None:
        """An MQTT client was not let in."""
        try:
            whose = topics.parse_client_id(common_name(peer) or "")
        except MalformedMessage:  # a certificate that is missing, not ours, or of no device
            refused = SignInRefused(403, why)
        else:
            refused = SignInRefused(403, why, tenant=whose.tenant, thing=whose.device)
        self.refusals.note_soon(refused, address)

    async def _setting(self, name: str) -> Any:
        return await self.store.read(lambda tx: _setting(tx, name))

    def _note_identity(self, tx: Connection) -> None:
        """Have the audit name a CA or signing keys that this store has not seen before.

        Compared at each start, because they are made before there is a store to tell.
        """
        kept = _setting(tx, "identity")
        known = kept or {"ca": "", "signing": []}
        ca, signing = self.identity.ca_sha256.hex(), list(self.identity.verify_keys_raw)
        if ca != known["ca"]:
            audit.note(tx, DEFAULT_TENANT, audit.BROKER, "ca.new", ca)
        for key in signing:
            if key not in known["signing"]:
                audit.note(tx, DEFAULT_TENANT, audit.BROKER, "signing-key.new", key)
        if {"ca": ca, "signing": signing} != kept:
            _keep_setting(tx, "identity", {"ca": ca, "signing": signing})

    async def _keep_setting(self, name: str, value: Any) -> None:
        await self.store.write(lambda tx: _keep_setting(tx, name, value))

    # ------------------------------------------------------------------ house-keeping

    async def _keep_house(self) -> None:
        """Once a minute: write down who was seen; renew our own certificate in time."""
        while True:
            await asyncio.sleep(60)
            try:
                await self.devices.seen()
                await self.refusals.flush()
                await self.clusters.stop_idle()
                if self.identity.renew():
                    log.info("the broker's own certificate was renewed")
            except (Problem, OSError) as error:
                log.warning("house-keeping: %s", error)

    async def _referenced(self) -> set[str]:
        query = sa.select(blob_refs.c.sha256)
        return await self.store.read(lambda tx: set(tx.execute(query).scalars()))


def our_version() -> str:
    """The installed version, or that of a source tree."""
    try:
        return version("fedml-agent")
    except PackageNotFoundError:
        return "0+source"


def _port_error(error: OSError, host: str, port: int) -> Exception:
    if error.errno == errno.EADDRINUSE:
        return PortInUse(
            f"port {port} on {host} is taken by another program; "
            "stop it, or choose another port (0 chooses a free one)"
        )
    unknown = (error.errno or 0) < 0  # of getaddrinfo: the name is nobody's
    if unknown or error.errno in (errno.EACCES, errno.EADDRNOTAVAIL):
        # Python adds the address once more, in brackets.
        why = (error.strerror or "").partition(" (while attempting")[0]
        return PortInUse(f"cannot listen on {host} port {port}: {why}")
    return error


def _setting(tx: Connection, name: str) -> Any:
    return tx.execute(sa.select(settings.c.value).where(settings.c.name == name)).scalar()


def _keep_setting(tx: Connection, name: str, value: Any) -> None:
    tx.execute(settings.delete().where(settings.c.name == name))
    tx.execute(settings.insert().values(name=name, value=value))
