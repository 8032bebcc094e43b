# SPDX-License-Identifier: Apache-2.0
"""Orders as they come: verified, checked against the owner's policy, written down, then obeyed.

The order of the checks is the order of trust: the signature first, then whether it is a replay or
was held back, then the machine owner's say, then room. Nothing of an offer runs before all of them
have passed, and its row is on the disk before the message is acknowledged.
"""

import datetime
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedml_agent import containers, sandbox
from fedml_agent.home import Home, Membership
from fedml_agent.journal import Entry, Journal
from fedml_agent.policy import Policy, Request, check
from fedml_agent.room import Room, disk_free
from fedml_protocol.envelope import unpack
from fedml_protocol.errors import BadSignature, ProtocolError, UnsupportedMessage
from fedml_protocol.keys import verify
from fedml_protocol.launch import LaunchSpec
from fedml_protocol.tasks import (
    Accept,
    Cancel,
    CloseSession,
    Drain,
    Offer,
    Order,
    Reject,
    RejectReason,
    ResultAck,
    Resync,
    SignedOrder,
    Tail,
    TaskState,
)

log = logging.getLogger(__name__)

# An order may have been on its way for so long when its lifetime begins.
_TRANSIT_S = 30.0

# What a refusal is to the broker, when it stands and when it may pass: only in the latter case will
# it offer the task to this machine again.
_PASSING = (RejectReason.POLICY_REFUSED, RejectReason.NOT_NOW)
_REASONS = {
    "tasks.at_once": (RejectReason.POLICY_REFUSED, RejectReason.SLOTS),
    "resources.gpus": (RejectReason.POLICY_REFUSED, RejectReason.RESOURCES),
    "resources.cpus": (RejectReason.POLICY_REFUSED, RejectReason.RESOURCES),
    "resources.memory": (RejectReason.POLICY_REFUSED, RejectReason.RESOURCES),
    "resources.disk_reserve": (RejectReason.POLICY_REFUSED, RejectReason.DISK),
}


class Obeying(Protocol):
    """What orders make happen; the daemon does it."""

    def begin(self, entry: Entry) -> None:
        """A task was taken: run it."""
        ...

    def answer(self, body: Accept | Reject) -> None:
        """Tell the broker; nobody waits for it to arrive."""
        ...

    def cancel(self, order: Cancel) -> None:
        """End a task."""
        ...

    def drain(self, on: bool) -> None:
        """Take no more offers, or take them again."""
        ...

    def tail(self, task: str, on: bool) -> None:
        """Somebody watches a log."""
        ...

    def resync(self) -> None:
        """Say at once what runs here."""
        ...

    def close_session(self, session: str) -> None:
        """A federated run is over."""
        ...

    def confirmed(self, task: str, epoch: int) -> None:
        """The broker has a result."""
        ...


class Intake:
    """Takes every message that the broker sends."""

    def __init__(
        self,
        home: Home,
        journal: Journal,
        membership: Membership,
        room: Room,
        policy: Callable[[], Policy],
        devices: tuple[tuple[int | str | None, ...], ...],
        obeying: Obeying,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.refusing = ""
        self.draining = False
        self.alarms = 0
        self._home = home
        self._journal = journal
        self._membership = membership
        self._room = room
        self._policy = policy
        self._devices = devices
        self._obeying = obeying
        self._clock = clock
        # When (monotonic) the broker told us that it had sent all orders up to a number.
        self._sent: deque[tuple[float, int]] = deque(maxlen=8)
        self._keys: dict[str, Ed25519PublicKey] = {}
        self.use_keys(membership.verify_keys)

    def use_keys(self, keys: Mapping[str, str]) -> None:
        """Whose orders are obeyed: Ed25519 public keys (hex) under their ids."""
        self._keys = {
            name: Ed25519PublicKey.from_public_bytes(bytes.fromhex(raw))
            for name, raw in keys.items()
        }

    def sent_by_now(self, counter: int) -> None:
        """The broker has sent every order up to this number: they are older than this moment.

        So the lifetime of an order that somebody holds back ends, whatever any clock says.
        """
        self._sent.append((self._clock(), counter))

    async def take(self, topic: str, payload: bytes) -> None:
        """Handle one message; on return it may be acknowledged."""
        try:
            body = unpack(payload).body
            if isinstance(body, ResultAck):
                self._obeying.confirmed(body.task, body.epoch)
            elif isinstance(body, SignedOrder):
                self._obey(verify(body, self._keys, self._membership.device))
            else:
                self._alarm(f"a broker does not send {type(body).__name__}")
        except BadSignature as error:
            self._alarm(f"an order was refused: {error}")
        except UnsupportedMessage as error:
            log.warning("a message of a newer broker was left alone: %s", error)
        except ProtocolError as error:
            self._alarm(f"a message on {topic} was refused: {error}")

    def _obey(self, order: Order) -> None:
        what = order.what
        now = self._clock()
        for since, counter in self._sent:
            if order.counter <= counter and now - since > order.lifetime_s + _TRANSIT_S:
                self._alarm(f"order {order.counter} came after its lifetime and was refused")
                if isinstance(what, Offer):
                    self._reject(what, RejectReason.STALE, "this offer came after its lifetime")
                return
        match what:
            case Offer():
                self._offer(order, what)
            case Cancel():
                self._obeying.cancel(what)
            case Drain(on=on) if order.counter <= self._journal.drain_counter:
                self._alarm("an old order to drain came again and was refused")
            case Drain(on=on):
                self._journal.set_drain_counter(order.counter)
                self.draining = on
                self._obeying.drain(on)
            case Tail(task=task, on=on):
                self._obeying.tail(task, on)
            case Resync():
                self._obeying.resync()
            case CloseSession(session=session):
                self._obeying.close_session(session)

    def _offer(self, order: Order, offer: Offer) -> None:
        known = self._journal.get(offer.task, offer.epoch)
        if known is not None:  # said twice: the answer may have been lost
            if known.result is None:
                self._obeying.answer(Accept(task=offer.task, epoch=offer.epoch))
            elif known.confirmed:
                # A broker that knows of its result takes no notice; one that was restored from a
                # backup, and has forgotten it, offers the task again under another epoch.
                self._reject(offer, RejectReason.STALE, "it did this before the broker forgot it")
            return
        epochs = [e.offer.epoch for e in self._journal.of_task(offer.task)]
        if order.counter <= self._journal.floor or max(epochs, default=0) > offer.epoch:
            self._alarm(f"an old offer of {offer.task} came again and was refused")
            self._reject(offer, RejectReason.STALE, "this offer is a replay")
            return
        refusal = self._refusal(offer)
        if refusal is not None:
            self._reject(offer, *refusal)
            return
        self._give_up_older(offer)
        gpus = self._room.take(room_name(offer), offer.needs)
        entry = Entry(offer=offer, counter=order.counter, state=TaskState.LEASED, gpus=gpus)
        self._journal.add(entry)
        self._obeying.answer(Accept(task=offer.task, epoch=offer.epoch))
        self._obeying.begin(entry)

    def _refusal(self, offer: Offer) -> tuple[RejectReason, str] | None:
        """Why this offer is not taken; None: it is."""
        if self.draining:
            return RejectReason.DRAINING, "this agent takes no more tasks"
        policy = self._policy()
        refused = check(policy, self._request(offer))
        if refused is not None:
            return _REASONS.get(refused.rule, _PASSING)[refused.passing], str(refused)
        if isinstance(offer.spec, LaunchSpec) and offer.spec.container is not None:
            engine = containers.here(policy)
            if isinstance(engine, str):
                return RejectReason.UNSUPPORTED, f"this machine runs no containers: {engine}"
        if room_name(offer) in self._room.taken:
            return None
        if len(self._room.taken) >= self._room.slots:
            return RejectReason.SLOTS, f"{len(self._room.taken)} tasks run already"
        free = self._room.free_devices(offer.needs)
        if len(free) < offer.needs.gpus:
            return RejectReason.RESOURCES, f"{len(free)} fitting GPUs are free"
        return None

    def _request(self, offer: Offer) -> Request:
        spec, needs = offer.spec, offer.needs
        launched = isinstance(spec, LaunchSpec)
        container = spec.container if isinstance(spec, LaunchSpec) else None
        return Request(
            kind="launch" if launched else "federate",
            publisher=offer.publisher.replace("/", "_"),
            tenant=self._membership.tenant,
            at=datetime.datetime.now().astimezone().time(),
            # A session holds its room already: its next stage does not ask for it twice.
            held=self._room.held(but=room_name(offer)),
            disk_free=disk_free(self._home.root),
            epsilon_spent=0.0,
            devices=self._devices,
            cannot=sandbox.cannot() if container is None else containers.cannot(self._policy()),
            commands=launched,
            installs=isinstance(offer.spec, LaunchSpec) and bool(offer.spec.requirements.strip()),
            gpus=needs.gpus,
            cpus=float(needs.cpus),
            memory=needs.memory_bytes,
            disk=needs.disk_bytes,
            deadline_s=offer.deadline_s or None,
            network=isinstance(spec, LaunchSpec) and not spec.offline,
            serves=isinstance(spec, LaunchSpec) and spec.service is not None,
            image="" if container is None else containers.full_name(container.image),
            mounts=()
            if container is None
            else tuple((one.source, one.writable) for one in container.mounts),
        )

    def _give_up_older(self, offer: Offer) -> None:
        """An older epoch of the task is still here: the broker has fenced it off already."""
        for entry in self._journal.of_task(offer.task):
            if entry.result is None:
                self._obeying.cancel(
                    Cancel(task=entry.key[0], epoch=entry.key[1], grace_s=0, reason="superseded")
                )

    def _reject(self, offer: Offer, reason: RejectReason, detail: str) -> None:
        log.info("the offer of %s was not taken: %s", offer.task, detail)
        self._obeying.answer(
            Reject(task=offer.task, epoch=offer.epoch, reason=reason, detail=detail[:2000])
        )

    def _alarm(self, text: str) -> None:
        self.alarms += 1
        log.error("%s", text)


def room_name(offer: Offer) -> str:
    spec = offer.spec
    return offer.task if isinstance(spec, LaunchSpec) else spec.session
