# SPDX-License-Identifier: Apache-2.0
"""One simulated machine: says what an agent says, and does nothing.

It checks the signature under every order, takes what it is offered, says that it runs, and after a
drawn time that it has ended. A result is said again until the broker has acknowledged it. Logs and
files are what a real agent has beside that; they travel over HTTPS and are not simulated.
"""

import os
import time
from collections import Counter
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

import mqtt5
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedml_broker.mqtt import wire
from fedml_broker.mqtt.clock import Clock, Timer
from fedml_broker.mqtt.pipe import Pipe, Pool
from fedml_broker.mqtt.tls import Tls
from fedml_broker.mqtt.wire import Violation
from fedml_protocol import topics
from fedml_protocol.devices import Heartbeat, Presence, TaskBeat
from fedml_protocol.envelope import OLDEST_SCHEMA, SCHEMA, Body, Envelope, pack, unpack
from fedml_protocol.errors import ProtocolError
from fedml_protocol.ids import uuid7
from fedml_protocol.keys import verify
from fedml_protocol.launch import LaunchSpec
from fedml_protocol.tasks import (
    FINAL,
    Accept,
    Cancel,
    Cancelled,
    Drain,
    Offer,
    Progress,
    Reject,
    RejectReason,
    Result,
    ResultAck,
    Resync,
    SignedOrder,
    TaskState,
)

_SESSION_S = 24 * 3600
_WILL_DELAY_S = 5
_RECEIVE_MAXIMUM = 64
_CONFIRM_EVERY = 4
# A result that was not acknowledged is said again after this long.
_AGAIN_S = 10.0

_Key = tuple[str, int]


@dataclass(slots=True)
class Tally:
    """What all simulated machines have done and met with.

    Attributes:
        accepted_at: Run -> when its offer was accepted, on the fleet's clock.
        troubles: What should not happen, in words, and how often it did.
    """

    beats: int = 0
    sent: int = 0
    received: int = 0
    ended: int = 0
    acknowledged: int = 0
    accepted_at: dict[str, float] = field(default_factory=dict)
    troubles: Counter[str] = field(default_factory=Counter)


class Surroundings(Pool, Protocol):
    """What a machine needs of the fleet."""

    tally: Tally
    clock: Clock
    rng: Random
    verify_keys: dict[str, Ed25519PublicKey]
    heartbeat_s: float
    task_s: float

    def ready(self, agent: "Agent") -> None:
        """It is connected, and the broker has confirmed its subscription."""

    def lost(self, agent: "Agent") -> None:
        """Its connection has ended."""

    def acknowledged(self) -> None:
        """The broker has acknowledged one of its results."""


class Agent:
    """One machine, from its enrolment to the end of the simulation.

    Attributes:
        certificate: Certificate and key, PEM.
        line: The open connection, or None.
    """

    __slots__ = (
        "_address",
        "_beats",
        "_counter",
        "_draining",
        "_fleet",
        "_held",
        "_owed",
        "_seq",
        "_slots",
        "_timer",
        "certificate",
        "line",
        "number",
    )

    def __init__(
        self,
        fleet: Surroundings,
        number: int,
        address: topics.Address,
        certificate: bytes,
        slots: int,
    ) -> None:
        self.number = number
        self.certificate = certificate
        self.line: Line | None = None
        self._address = address
        self._fleet = fleet
        self._slots = slots
        self._seq = 0
        self._beats = 0
        self._counter = 0
        self._draining = False
        self._held: dict[_Key, TaskState] = {}
        self._owed: dict[_Key, float] = {}
        self._timer: Timer | None = None

    # ------------------------------------------------------------------ its connection

    def connect(self) -> bytes:
        """CONNECT, with its last will."""
        will = mqtt5.Will(
            self._address.topic(topics.UP_PRESENCE),
            payload=self._pack(self._presence(online=False)),
            qos=mqtt5.QoS.AT_LEAST_ONCE,
            retain=True,
            will_delay_interval=_WILL_DELAY_S,
        )
        return mqtt5.ConnectPacket(
            self._address.client_id,
            clean_start=False,
            will=will,
            keep_alive=max(60, round(3 * self._fleet.heartbeat_s)),
            session_expiry_interval=_SESSION_S,
            receive_max=_RECEIVE_MAXIMUM,
        ).write()

    def subscribe(self) -> bytes:
        """SUBSCRIBE to all that the broker has for it."""
        wish = mqtt5.TopicFilter(self._address.down, max_qos=mqtt5.QoS.AT_LEAST_ONCE)
        return mqtt5.SubscribePacket(1, [wish]).write()

    def greet(self) -> None:
        """The connection stands: presence and heartbeat, as a real agent does."""
        self._say(topics.UP_PRESENCE, self._presence(online=True), retain=True)
        self._beat()
        self._fleet.ready(self)

    def dropped(self) -> None:
        """The connection has ended."""
        self.line = None
        self.stop()
        self._fleet.lost(self)

    def stop(self) -> None:
        """No further heartbeat."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # ------------------------------------------------------------------ what it says

    def _beat(self) -> None:
        if self.line is None:
            return
        now = self._fleet.clock.now()
        for key, said_at in self._owed.items():
            if now - said_at > _AGAIN_S:
                self._end(key, self._held[key])
        beat = Heartbeat(
            free_slots=max(0, self._slots - len(self._held)),
            tasks=tuple(
                TaskBeat(task=task, epoch=epoch, state=state)
                for (task, epoch), state in self._held.items()
            ),
            disk_free_bytes=100 << 30,
            clock_ms=time.time_ns() // 1_000_000,
            draining=self._draining,
            cpu_percent=12.5,
            memory_used_bytes=2 << 30,
        )
        self._beats += 1
        self._fleet.tally.beats += 1
        self._say(topics.UP_HEARTBEAT, beat, qos=0 if self._beats % _CONFIRM_EVERY else 1)
        self._timer = self._fleet.clock.call_later(self._fleet.heartbeat_s, self._beat)

    def _say(self, channel: str, body: Body, *, qos: int = 1, retain: bool = False) -> None:
        if self.line is None:
            return
        topic = self._address.topic(channel).encode()
        head = len(topic).to_bytes(2, "big") + topic
        self._fleet.tally.sent += 1
        # One number after the other: far fewer than 65,535 are ever unanswered.
        packet_id = self._seq % 0xFFFF + 1 if qos else 0
        self.line.send(wire.publish(2 * qos | retain, head, packet_id, self._pack(body)))

    def _pack(self, body: Body) -> bytes:
        self._seq += 1
        return pack(
            Envelope(
                device=self._address.device,
                body=body,
                msg_id=uuid7(time.time_ns() // 1_000_000, os.urandom(10)),
                boot_n=1,
                seq=self._seq,
            )
        )

    def _presence(self, *, online: bool) -> Presence:
        return Presence(
            online=online,
            boot_n=1,
            oldest_schema=OLDEST_SCHEMA,
            newest_schema=SCHEMA,
            agent_version="simulated",
        )

    # ------------------------------------------------------------------ what it hears

    def hear(self, payload: bytes) -> None:
        """One message of the broker."""
        tally = self._fleet.tally
        tally.received += 1
        try:
            body = unpack(payload).body
            if isinstance(body, ResultAck):
                self._acknowledged((body.task, body.epoch))
                return
            if not isinstance(body, SignedOrder):
                tally.troubles[f"a broker does not send {type(body).__name__}"] += 1
                return
            order = verify(body, self._fleet.verify_keys, self._address.device)
        except ProtocolError as error:
            tally.troubles[str(error)] += 1
            return
        if order.counter <= self._counter:  # a replay, or a redelivery
            return
        self._counter = order.counter
        match order.what:
            case Offer():
                self._offered(order.what)
            case Cancel():
                self._cancelled((order.what.task, order.what.epoch))
            case Drain():
                self._draining = order.what.on
            case Resync():
                self.stop()
                self._beat()

    def _offered(self, offer: Offer) -> None:
        key = offer.task, offer.epoch
        if key in self._held:
            return
        full = len(self._held) - len(self._owed) >= self._slots
        if full or self._draining or not isinstance(offer.spec, LaunchSpec):
            reason = (
                RejectReason.SLOTS
                if full
                else RejectReason.DRAINING
                if self._draining
                else RejectReason.UNSUPPORTED
            )
            self._fleet.tally.troubles[f"an offer was rejected: {reason.name.lower()}"] += 1
            self._say(topics.UP_TASK, Reject(task=offer.task, epoch=offer.epoch, reason=reason))
            return
        self._held[key] = TaskState.RUNNING
        self._fleet.tally.accepted_at.setdefault(offer.run, self._fleet.clock.now())
        self._say(topics.UP_TASK, Accept(task=offer.task, epoch=offer.epoch))
        self._say(
            topics.UP_TASK,
            Progress(task=offer.task, epoch=offer.epoch, state=TaskState.RUNNING),
        )
        lasts_s = self._fleet.task_s * self._fleet.rng.uniform(0.5, 1.5)
        self._fleet.clock.call_later(lasts_s, self._over, key)

    def _over(self, key: _Key) -> None:
        if self._held.get(key) is TaskState.RUNNING:
            self._fleet.tally.ended += 1
            self._end(key, TaskState.FINISHED)

    def _cancelled(self, key: _Key) -> None:
        if key not in self._held:
            self._say(topics.UP_TASK, Cancelled(task=key[0], epoch=key[1]))
        elif self._held[key] not in FINAL:
            self._end(key, TaskState.STOPPED)

    def _end(self, key: _Key, state: TaskState) -> None:
        self._held[key] = state
        self._owed[key] = self._fleet.clock.now()
        code = 0 if state is TaskState.FINISHED else None
        self._say(topics.UP_TASK, Result(task=key[0], epoch=key[1], state=state, exit_code=code))

    def _acknowledged(self, key: _Key) -> None:
        if self._owed.pop(key, None) is not None:
            del self._held[key]
            self._fleet.acknowledged()


class Line(Pipe):
    """One connection of one machine."""

    __slots__ = ("_agent", "_tally")

    def __init__(self, agent: Agent, fleet: Surroundings, tls: Tls) -> None:
        super().__init__(fleet, tls)
        self._agent = agent
        self._tally = fleet.tally
        agent.line = self

    def opened(self) -> None:
        assert self._tls is not None
        self._transport.write(self._tls.begin())

    def buffer_updated(self, nbytes: int) -> None:
        assert self._tls is not None
        fresh = not self._tls.established
        super().buffer_updated(nbytes)
        if fresh and self._tls.established and not self.closing:
            self.send(self._agent.connect())

    def received(self, data: bytes) -> int:
        at, end = 0, len(data)
        try:
            while end - at >= 2:
                length, body = wire.read_varint(data, at + 1, end)
                if not body or body + length > end:
                    break
                self._take(data, at, body, body + length)
                at = body + length
        except Violation as violation:
            self._give_up(f"the broker broke the protocol: {violation}")
            return end
        return at

    def _take(self, data: bytes, at: int, body: int, stop: int) -> None:
        kind = data[at] >> 4
        if kind == wire.PUBLISH:
            after = body + 2 + (data[body] << 8 | data[body + 1])
            packet_id = 0
            if data[at] & 0x06:
                packet_id = data[after] << 8 | data[after + 1]
                after += 2
            length, start = wire.read_varint(data, after, stop)
            self._agent.hear(data[start + length : stop])
            if packet_id and not self.closing:
                self.send(wire.puback(packet_id))
        elif kind == wire.PUBACK:
            if stop - body > 2 and data[body + 2] >= 0x80:
                self._tally.troubles[f"the broker refused a message: 0x{data[body + 2]:02X}"] += 1
        else:
            self._answered(wire.read(data, at, body, stop))

    def _answered(self, packet: mqtt5.Packet) -> None:
        match packet:
            case mqtt5.ConnAckPacket():
                if int(packet.reason_code):
                    self._give_up(f"the broker refused a connection: {packet.reason_code.name}")
                else:
                    self.send(self._agent.subscribe())
            case mqtt5.SubAckPacket():
                self._agent.greet()
            case mqtt5.DisconnectPacket():
                self._give_up(f"the broker ended a connection: {packet.reason_code.name}")

    def _give_up(self, why: str) -> None:
        self._tally.troubles[why] += 1
        self.end()

    def goodbye(self) -> None:
        """DISCONNECT, without a will."""
        if not self.closing:
            self.send(mqtt5.DisconnectPacket().write())
            self.end()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._agent.line is self:
            self._agent.dropped()
