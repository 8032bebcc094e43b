# SPDX-License-Identifier: Apache-2.0
"""MQTT topics: built and taken apart in one place; the device is the unit of access control.

    fed/1/{tenant}/d/{device}/up/{presence|hb|task}     the device publishes
    fed/1/{tenant}/d/{device}/dn/{task|ctl|ack}         the device subscribes

The device's MQTT client id is `{tenant}/d/{device}`, which is also its certificate's common name:
with it, one pattern of an external broker's access list covers every device.
"""

from dataclasses import dataclass

from fedml_protocol.errors import MalformedMessage
from fedml_protocol.ids import check_id

ROOT = "fed/1"

UP_PRESENCE = "up/presence"
UP_HEARTBEAT = "up/hb"
UP_TASK = "up/task"
DN_TASK = "dn/task"
DN_CONTROL = "dn/ctl"
DN_ACK = "dn/ack"

CHANNELS = frozenset({UP_PRESENCE, UP_HEARTBEAT, UP_TASK, DN_TASK, DN_CONTROL, DN_ACK})

_PUBLISHED = frozenset({UP_PRESENCE, UP_HEARTBEAT, UP_TASK})
_SUBSCRIBED = frozenset({"dn/#", DN_TASK, DN_CONTROL, DN_ACK})

ALL_UP = f"{ROOT}/+/d/+/up/#"


@dataclass(frozen=True, slots=True)
class Address:
    """One device of one tenant."""

    tenant: str
    device: str

    def __post_init__(self) -> None:
        check_id(self.tenant, "tenant")
        check_id(self.device, "device")

    @property
    def client_id(self) -> str:
        """The MQTT client id, and the common name of the device's certificate."""
        return f"{self.tenant}/d/{self.device}"

    def topic(self, channel: str) -> str:
        """The topic of one channel of this device."""
        if channel not in CHANNELS:
            raise MalformedMessage(f"no such channel: {channel[:60]!r}")
        return f"{ROOT}/{self.client_id}/{channel}"

    @property
    def down(self) -> str:
        """The filter a device subscribes."""
        return f"{ROOT}/{self.client_id}/dn/#"


def parse_client_id(client_id: str) -> Address:
    """The device behind an MQTT client id.

    Raises:
        MalformedMessage: It is not a device's.
    """
    tenant, mark, device = (*client_id.split("/"), "", "", "")[:3]
    if mark != "d" or client_id.count("/") != 2:
        raise MalformedMessage(f"not a device's client id: {client_id[:100]!r}")
    return Address(tenant, device)


def parse_topic(topic: str) -> tuple[Address, str]:
    """The device and the channel of a topic.

    Raises:
        MalformedMessage: Not a topic of this protocol.
    """
    parts = topic.split("/")
    if len(parts) != 7 or f"{parts[0]}/{parts[1]}" != ROOT or parts[3] != "d":
        raise MalformedMessage(f"not a topic of this protocol: {topic[:200]!r}")
    channel = f"{parts[5]}/{parts[6]}"
    if channel not in CHANNELS:
        raise MalformedMessage(f"no such channel: {channel[:60]!r}")
    return Address(parts[2], parts[4]), channel


def may_publish(client_id: str, topic: str) -> bool:
    """A device may publish on its own `up/` channels, nowhere else."""
    return _below(client_id, topic) in _PUBLISHED


def may_subscribe(client_id: str, topic_filter: str) -> bool:
    """A device may subscribe to its own `dn/` channels, one by one or all; to nothing else."""
    return _below(client_id, topic_filter) in _SUBSCRIBED


def _below(client_id: str, topic: str) -> str:
    """What follows the device's own root; empty when the topic is another's."""
    try:
        address = parse_client_id(client_id)
    except MalformedMessage:  # a user's connection, or a name that would itself be a wildcard
        return ""
    root = f"{ROOT}/{address.client_id}/"
    return topic[len(root) :] if topic.startswith(root) else ""
