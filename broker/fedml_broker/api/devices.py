# SPDX-License-Identifier: Apache-2.0
"""Devices, as people see and steer them."""

from typing import TYPE_CHECKING, Any

import msgspec

from fedml_broker.api.call import Call
from fedml_protocol.tasks import Drain
from fedml_protocol.topics import Address

if TYPE_CHECKING:
    from fedml_broker.app import Broker


class Labels(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Labels to put on a device, and names of labels to take off."""

    put: dict[str, str] = {}
    remove: list[str] = []


class DrainBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whether the device is to be drained."""

    on: bool = True


class Handlers:
    """For whoever looks after machines."""

    def __init__(self, broker: "Broker") -> None:
        self._broker = broker

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
