# SPDX-License-Identifier: Apache-2.0
"""What agents report over MQTT, turned into steps of the dispatcher.

Returning from `take` is the commit: only then is the agent's message acknowledged. What a device
says wrongly is its own fault: counted, logged in one line, acknowledged, and never an exception.
"""

import logging
from collections import Counter

from fedml_broker.dispatch import Dispatcher
from fedml_broker.fleet import Fleet, Machine
from fedml_protocol import topics
from fedml_protocol.devices import Heartbeat, Presence
from fedml_protocol.envelope import Envelope, unpack
from fedml_protocol.errors import ProtocolError
from fedml_protocol.tasks import Accept, Cancelled, Progress, Reject, Result

log = logging.getLogger(__name__)


class Reports:
    """The one subscriber of everything that devices publish."""

    def __init__(self, fleet: Fleet, dispatcher: Dispatcher) -> None:
        self.refused: Counter[str] = Counter()
        self._fleet = fleet
        self._dispatcher = dispatcher

    async def take(self, topic: str, payload: bytes) -> None:
        """Handle one message of one device."""
        try:
            address, _ = topics.parse_topic(topic)
            envelope = unpack(payload)
        except ProtocolError as error:
            self._refuse(topic, str(error))
            return
        if envelope.device != address.device:
            self._refuse(topic, f"it says it comes from {envelope.device}")
            return
        machine = self._fleet.get(address.device)
        if machine is None or machine.address != address:
            self._refuse(topic, "the device is not enrolled here, or was revoked")
            return
        await self._act(machine, envelope)

    async def _act(self, machine: Machine, envelope: Envelope) -> None:
        dispatcher, body = self._dispatcher, envelope.body
        match body:
            case Heartbeat():
                before = self._fleet.away(machine)
                if self._fleet.heard(machine.address.device, envelope.boot_n, body) is not None:
                    await dispatcher.beat(machine, body, envelope.seq)
                    if self._fleet.away(machine) != before:
                        dispatcher.wake()
            case Presence(online=True):
                if envelope.boot_n >= machine.boot_n:
                    await dispatcher.online(machine)
            case Presence():
                self._fleet.gone(machine.address.device, body.boot_n)
            case Accept():
                await dispatcher.accept(machine, body, envelope.seq)
            case Reject():
                await dispatcher.reject(machine, body)
            case Progress():
                await dispatcher.progress(machine, body)
            case Result():
                await dispatcher.result(machine, body)
            case Cancelled():
                log.debug("%s: %s was not there to cancel", machine.name, body.task)
            case _:
                self._refuse(machine.name, f"a device does not send {type(body).__name__}")

    def _refuse(self, who: str, why: str) -> None:
        self.refused[who] += 1
        log.warning("a message of %s was refused: %s", who, why)
