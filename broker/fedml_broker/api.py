# SPDX-License-Identifier: Apache-2.0
"""What each URL does: a check of who asks, a call into a word, an answer.

The table of URLs is `routes.py`. A handler gets the request with its caller already known (`user`
or `device`), and its body already checked against its type.
"""

import asyncio
import gzip
import io
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import sqlalchemy as sa
from aiohttp import web

from fedml_broker import audit, observe, runs
from fedml_broker.accounts import User
from fedml_broker.audit import SignInRefused
from fedml_broker.devices import Inventory
from fedml_broker.identity import common_name
from fedml_broker.observe import LogFile
from fedml_broker.problems import Problem
from fedml_broker.tables import DEFAULT_TENANT, tasks
from fedml_protocol.errors import MalformedMessage
from fedml_protocol.tasks import Drain
from fedml_protocol.topics import Address, parse_client_id

if TYPE_CHECKING:
    from fedml_broker.app import Broker

_MAX_LOG_CHUNK = 4 * 1024 * 1024


class Hello(msgspec.Struct, frozen=True):
    """What an agent says at each start."""

    inventory: Inventory
    agent_version: str


class Resync(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an agent asks about; `sessions`: the federated runs that it keeps something of."""

    sessions: list[str]


class Labels(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Labels to put on a device, and names of labels to take off."""

    put: dict[str, str] = {}
    remove: list[str] = []


class DrainBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whether the device is to be drained."""

    on: bool = True


class KeyRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A login key to be made; no `uses` or `days`: no limit; no `tenant`: the caller's."""

    uses: int | None = 1
    days: float | None = 7.0
    labels: dict[str, str] = {}
    tenant: str = ""


class UserRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A user to be made; no `tenant`: the caller's."""

    name: str
    role: str = "member"
    tenant: str = ""


class RoleRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The role that a user is to have: viewer, member or admin."""

    role: str


class TokenRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A token to be made; no `days`: it never expires."""

    days: float | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """One request whose caller is known."""

    http: web.Request
    body: Any
    caller: User | Address | None

    @property
    def user(self) -> User:
        """The caller, where the route asks for a user."""
        if not isinstance(self.caller, User):
            raise Problem(401, "not signed in", "a user's token is needed", hint="`fedml login`")
        return self.caller

    @property
    def device(self) -> Address:
        """The caller, where the route asks for a device."""
        if not isinstance(self.caller, Address):
            raise Problem(401, "not a device", "a device's certificate is needed")
        return self.caller

    @property
    def owner(self) -> str:
        """Who uploads."""
        return self.device.device if isinstance(self.caller, Address) else f"u/{self.user.name}"

    def part(self, name: str) -> str:
        """A variable part of the path."""
        return self.http.match_info[name]


Handler = Callable[[Call], Awaitable[Any]]


class Api:
    """The handlers, bound to one broker."""

    def __init__(self, broker: "Broker") -> None:
        self._broker = broker

    # ------------------------------------------------------------------ who asks

    async def caller(self, request: web.Request) -> User | Address | None:
        """The user of the bearer token, or else the device of the client certificate."""
        scheme, _, secret = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            try:
                user = await self._broker.accounts.authenticate(bytes.fromhex(secret))
            except ValueError:
                user = None
            if user is None:
                raise SignInRefused(
                    401,
                    "unknown or expired token",
                    "the broker does not know this token",
                    hint="ask an admin for a new one: `fedml-broker users token NAME`",
                )
            return user
        transport = request.transport
        peer = transport.get_extra_info("peercert") if transport is not None else None
        name = common_name(peer)
        if name is None:
            return None
        try:
            address = parse_client_id(name)
        except MalformedMessage:
            return None
        if not self._broker.devices.known(address):
            raise SignInRefused(
                403,
                "this device is not known here",
                f"{address.device} was revoked or removed",
                hint="`fedml-agent logout`, then `fedml-agent login KEY` with a new key",
                tenant=address.tenant,
                thing=address.device,
            )
        return address

    async def refused(self, request: web.Request, refused: SignInRefused) -> None:
        """Somebody was not let in."""
        await self._broker.refusals.note(refused, request.remote or "")

    async def who_grants(self, user: User, role: str) -> str:
        """Whom a user asks for a role, and what they type."""
        admins = await self._broker.accounts.admins(user.tenant)
        names = ", ".join(admins[:3]) or "none is left: ask those who run the broker"
        return (
            f"an admin of {user.tenant!r} can grant it ({names}): "
            f"`fedml-broker users role {user.name} {role}`"
        )

    async def metrics(self, call: Call) -> Any:
        """The numbers of this process, as Prometheus scrapes them."""
        if isinstance(call.caller, User) and call.user.tenant != DEFAULT_TENANT:
            raise Problem(
                403,
                "only those who run the broker",
                f"the numbers are of all tenants, and you are of {call.user.tenant!r}",
                f"ask an admin of {DEFAULT_TENANT!r}",
            )
        return self._broker.metrics.page()

    # ------------------------------------------------------------------ open to all

    async def health(self, call: Call) -> Any:
        """Whether the broker serves."""
        return {"status": "ok", "version": self._broker.version}

    async def ca(self, call: Call) -> Any:
        """The broker's CA certificate. A client compares its hash with the one in its key."""
        return web.Response(
            body=self._broker.identity.ca_pem, content_type="application/x-pem-file"
        )

    async def enrol(self, call: Call) -> Any:
        """Let a machine join with a login key."""
        answer = await self._broker.devices.enrol(call.body)
        self._broker.dispatcher.wake()
        return answer

    async def challenge(self, call: Call) -> Any:
        """A nonce to be signed by a device whose certificate has expired."""
        return {"nonce": self._broker.devices.challenge()}

    async def recover(self, call: Call) -> Any:
        """A new certificate for a device that proves that it has its key."""
        return {"certificate": await self._broker.devices.recover(call.body)}

    # ------------------------------------------------------------------ agents

    async def hello(self, call: Call) -> Any:
        """An agent has started."""
        hello: Hello = call.body
        answer = await self._broker.devices.hello(call.device, hello.inventory, hello.agent_version)
        self._broker.dispatcher.wake()  # it may have more to give than it had
        return answer

    async def renew(self, call: Call) -> Any:
        """A new certificate before the present one ends."""
        return {"certificate": await self._broker.devices.renew(call.device, call.body.csr)}

    async def resync(self, call: Call) -> Any:
        """Which runs are `over`, and the number of the newest order (`counter`)."""
        # Read before the answer: every order up to it was sent earlier.
        counter = await self._broker.orders.last(call.device.device)
        return {"over": await self._broker.runs.over(call.body.sessions), "counter": counter}

    async def put_log(self, call: Call) -> Any:
        """Append a chunk of a task's log; answers how long the log is now."""
        log = LogFile(call.part("task"), _number(call.part("epoch")), call.part("stream"))
        run = await self._run_of(call.device, log.task)
        data = await call.http.read()
        if call.http.headers.get("X-Chunk-Encoding") == "gzip":
            data = await asyncio.to_thread(_gunzip, data)
        offset = _number(call.http.query.get("offset", "0"))
        gap = _number(call.http.query.get("gap", "0"))
        return {"size": await self._broker.observer.append(run, log, offset, data, gap=gap)}

    async def _run_of(self, device: Address, task: str) -> str:
        query = sa.select(tasks.c.run).where(
            tasks.c.id == task, tasks.c.tenant == device.tenant, tasks.c.device == device.device
        )
        run = await self._broker.store.read(lambda tx: tx.execute(query).scalar())
        if run is None:
            raise Problem(403, "not this device's task", f"{task} was offered to another device")
        return str(run)

    # ------------------------------------------------------------------ blobs

    async def head_blob(self, call: Call) -> Any:
        """Whether a blob is here, or how much of an upload."""
        return await self._broker.blobs.head(call.http, call.part("sha256"), call.owner)

    async def get_blob(self, call: Call) -> Any:
        """A blob, or a range of it."""
        return await self._broker.blobs.get(call.http, call.part("sha256"))

    async def expect_blob(self, request: web.Request) -> None:
        """Called before `put_blob` when the client sends ``Expect: 100-continue``."""
        await self._broker.blobs.expect(request)

    async def put_blob(self, call: Call) -> Any:
        """Upload a blob, whole or in parts."""
        return await self._broker.blobs.put(call.http, call.part("sha256"), call.owner)

    # ------------------------------------------------------------------ runs

    async def launch(self, call: Call) -> Any:
        """Queue a job."""
        return await _run_once(self._broker.launcher.submit(call.user, call.body))

    async def match_launch(self, call: Call) -> Any:
        """Where a job would run, machine by machine. Nothing is started."""
        return self._broker.launcher.look(call.user, call.body)

    async def federate(self, call: Call) -> Any:
        """Start a federated run."""
        return await _run_once(self._broker.federation.submit(call.user, call.body))

    async def list_runs(self, call: Call) -> Any:
        """The newest runs. Query: `limit`, `ended_before` (seconds since 1970)."""
        limit = _number(call.http.query.get("limit", "50"))
        before = call.http.query.get("ended_before")
        found = await self._broker.runs.newest(
            call.user.tenant,
            limit=min(limit, 1000),
            ended_before=None if before is None else float(_number(before)),
        )
        return {"runs": found}

    async def show_run(self, call: Call) -> Any:
        """One run: its state, its cause, its tasks, and what it waits for."""
        run = await self._broker.runs.of_tenant(call.user.tenant, call.part("run"))
        row = {**run, "tasks": await self._broker.runs.tasks(run["id"])}
        row["waiting"] = self._broker.waiting(run["id"])
        if run["kind"] == "federate":
            row["rounds"] = await self._broker.runs.rounds(run["id"])
            row["clients"] = await self._broker.runs.clients(run["id"])
        return row

    async def stop_run(self, call: Call) -> Any:
        """Stop a run. Asking again is harmless."""
        run = await self._broker.runs.of_tenant(call.user.tenant, call.part("run"))
        asked = await self._broker.store.write(
            lambda tx: runs.stop_asked(tx, run["id"], call.user.name)
        )
        if asked:
            await self._broker.stop(run, call.user.name)
        return {"state": (await self._broker.runs.row(run["id"]))["state"]}

    async def remove_run(self, call: Call) -> Any:
        """Delete a run that has ended, with its logs and models."""
        run = await self._broker.runs.of_tenant(call.user.tenant, call.part("run"))
        if run["ended_at"] is None:
            raise Problem(
                409, "the run has not ended", f"it is {run['state']}", hint="stop it first"
            )
        by = call.user.name
        # Logs first: should we die in between, the run is still listed and can be removed again.
        await asyncio.to_thread(self._broker.observer.forget, run["id"])
        idle = await self._broker.store.write(lambda tx: runs.remove(tx, run["id"], by))
        sizes = [self._broker.blobs.size(sha256) or 0 for sha256 in idle]
        gone = [await self._broker.blobs.discard(sha256) for sha256 in idle]
        freed = sum(size for size, deleted in zip(sizes, gone, strict=True) if deleted)
        return {"run": run["id"], "freed_bytes": freed}

    async def follow_run(self, call: Call) -> Any:
        """Everything of a run as it happens: newline-delimited JSON, until the run has ended.

        Query: `after` (an event's id), `logs=0` (events only), `stay=0` (only what there is now).
        """
        run = await self._broker.runs.of_tenant(call.user.tenant, call.part("run"))
        after = _number(call.http.query.get("after", "0"))
        logs = call.http.query.get("logs", "1") != "0"
        stay = call.http.query.get("stay", "1") != "0"
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        response.enable_chunked_encoding()
        await response.prepare(call.http)
        async with self._watching(run["id"], logs):
            async for item in self._broker.observer.follow(
                run["id"],
                self._broker.runs,
                self._broker.waiting,
                progress=self._broker.federation.progress,
                after=after,
                logs=logs,
                stay=stay,
            ):
                await response.write(observe.line(item))
        await response.write_eof()
        return response

    @asynccontextmanager
    async def _watching(self, run: str, logs: bool) -> AsyncIterator[None]:
        observer, dispatcher = self._broker.observer, self._broker.dispatcher
        if logs and observer.watch(run, +1) == 1:
            dispatcher.tail(run, on=True)
        try:
            yield
        finally:
            if logs and observer.watch(run, -1) == 0:
                dispatcher.tail(run, on=False)

    # ------------------------------------------------------------------ devices

    async def list_devices(self, call: Call) -> Any:
        """Every device of the tenant."""
        return {"devices": await self._broker.devices.everything(call.user.tenant)}

    async def show_device(self, call: Call) -> Any:
        """One device with its hardware."""
        return await self._broker.devices.show(call.user.tenant, call.part("device"))

    async def label_device(self, call: Call) -> Any:
        """Change a device's labels."""
        body: Labels = call.body
        tenant = call.user.tenant
        labels = await self._broker.devices.label(
            tenant, call.part("device"), body.put, body.remove, by=call.user.name
        )
        self._broker.dispatcher.wake()
        return {"labels": labels}

    async def drain_device(self, call: Call) -> Any:
        """Give a device nothing more; what runs on it goes on."""
        on = call.body.on
        device = await self._broker.devices.drain(
            call.user.tenant, call.part("device"), on, by=call.user.name
        )
        self._broker.dispatcher.wake()
        await self._broker.orders.send(Address(call.user.tenant, device), Drain(on=on))
        return {"device": device, "draining": on}

    async def revoke_device(self, call: Call) -> Any:
        """Shut a device out at once."""
        address = await self._broker.devices.revoke(
            call.user.tenant, call.part("device"), by=call.user.name
        )
        await self._broker.post.disconnect(address.client_id, "revoked by an admin")
        return {"device": address.device}

    async def remove_device(self, call: Call) -> Any:
        """Forget a device."""
        address = await self._broker.devices.remove(
            call.user.tenant, call.part("device"), by=call.user.name
        )
        await self._broker.post.disconnect(address.client_id, "removed by an admin")
        return {"device": address.device}

    # ------------------------------------------------------------------ accounts

    async def list_keys(self, call: Call) -> Any:
        """The login keys of the tenant."""
        return {"keys": await self._broker.accounts.list_keys(call.user.tenant)}

    async def create_key(self, call: Call) -> Any:
        """A new login key; its secret is shown this once."""
        body: KeyRequest = call.body
        key_id, key = await self._broker.accounts.create_key(
            call.user,
            uses=body.uses,
            days=body.days,
            labels=body.labels,
            tenant=_tenant(call.user, body.tenant),
        )
        return {"id": key_id, "key": key}

    async def revoke_key(self, call: Call) -> Any:
        """No further machine joins with this key."""
        await self._broker.accounts.revoke_key(
            call.user.tenant, call.part("key"), by=call.user.name
        )
        return {"id": call.part("key")}

    async def list_users(self, call: Call) -> Any:
        """The users of the tenant."""
        return {"users": await self._broker.accounts.list_users(call.user.tenant)}

    async def create_user(self, call: Call) -> Any:
        """A new user."""
        body: UserRequest = call.body
        tenant = _tenant(call.user, body.tenant)
        by = audit.user(call.user.name)
        await self._broker.accounts.create_user(body.name, body.role, tenant, by=by)
        return {"name": body.name, "role": body.role, "tenant": tenant}

    async def set_role(self, call: Call) -> Any:
        """Another role for a user."""
        name, role = call.part("user"), call.body.role
        by, of = audit.user(call.user.name), _only_of(call.user)
        await self._broker.accounts.set_role(name, role, by=by, of=of)
        return {"name": name, "role": role}

    async def create_token(self, call: Call) -> Any:
        """A new token of a user; shown this once."""
        name = call.part("user")
        by, of = audit.user(call.user.name), _only_of(call.user)
        return {"key": await self._broker.accounts.create_token(name, call.body.days, by=by, of=of)}

    async def list_audit(self, call: Call) -> Any:
        """The audit of the tenant, newest first.

        Query: `user`, `action` (``run.stop``; ``run`` for all that was done to runs), `since`
        (seconds since 1970), `before` (an entry's number), `limit`.
        """
        query = call.http.query
        named = query.get("user")
        since, before = (
            None if (text := query.get(name)) is None else _number(text)
            for name in ("since", "before")
        )
        limit = min(_number(query.get("limit", "100")), 1000)
        found = await self._broker.store.read(
            lambda tx: audit.entries(
                tx,
                tenant=call.user.tenant,
                actor=None if named is None else audit.user(named),
                action=query.get("action"),
                since=since,
                before=before,
                limit=limit,
            )
        )
        return {"entries": found}

    async def whoami(self, call: Call) -> Any:
        """The user behind the token."""
        user = call.user
        return {"name": user.name, "tenant": user.tenant, "role": user.role}

    async def status(self, call: Call) -> Any:
        """The broker at a glance."""
        broker = self._broker
        found = await broker.devices.everything(call.user.tenant)
        states: dict[str, int] = {}
        for row in await broker.runs.newest(call.user.tenant, limit=1000):
            states[row["state"]] = states.get(row["state"], 0) + 1
        return {
            "version": broker.version,
            "url": broker.url,
            "mqtt": broker.mqtt_url,
            "up_s": time.monotonic() - broker.started_at,
            "devices": len(found),
            "online": sum(d["status"] == "online" for d in found),
            "runs": states,
            "refused_messages": sum(broker.reports.refused.values()),
        }


async def _run_once(submission: Awaitable[str]) -> dict[str, str]:
    """The run, also when a repeated request has overtaken this one on its way into the store."""
    try:
        return {"run": await submission}
    except runs.SubmittedBefore as known:
        return {"run": known.run}


def _tenant(user: User, named: str) -> str:
    """For whom something is made: the admins of the first tenant may name another one.

    Raises:
        Problem: 403.
    """
    if named and named != user.tenant and user.tenant != DEFAULT_TENANT:
        raise Problem(
            403,
            "only your own tenant",
            f"you are of {user.tenant!r}; other tenants belong to the admins of {DEFAULT_TENANT!r}",
        )
    return named or user.tenant


def _only_of(user: User) -> str | None:
    """Whose users he manages: those of his tenant, or of the first tenant everybody's (None)."""
    return None if user.tenant == DEFAULT_TENANT else user.tenant


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise Problem(422, "not a whole number", repr(text[:40]))
    return int(text)


def _gunzip(data: bytes) -> bytes:
    """At most `_MAX_LOG_CHUNK`, whatever the compressed bytes promise."""
    try:
        with gzip.open(io.BytesIO(data)) as stream:
            text = stream.read(_MAX_LOG_CHUNK + 1)
    except (OSError, EOFError) as error:
        raise Problem(422, "not gzip", str(error)) from error
    if len(text) > _MAX_LOG_CHUNK:
        raise Problem(413, "the chunk is too large", f"at most {_MAX_LOG_CHUNK} bytes")
    return text
