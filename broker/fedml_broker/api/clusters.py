# SPDX-License-Identifier: Apache-2.0
"""Clusters of reserved machines."""

from typing import TYPE_CHECKING, Any

from fedml_broker.api.call import Call

if TYPE_CHECKING:
    from fedml_broker.app import Broker


class Handlers:
    """For whoever reserves machines."""

    def __init__(self, broker: "Broker") -> None:
        self._broker = broker

    async def list_clusters(self, call: Call) -> Any:
        """The clusters of the tenant."""
        return {"clusters": await self._broker.clusters.every(call.user.tenant)}

    async def show_cluster(self, call: Call) -> Any:
        """One cluster with its machines and its runs that have not ended."""
        return await self._broker.clusters.show(call.user.tenant, call.part("cluster"))

    async def create_cluster(self, call: Call) -> Any:
        """Reserve machines under a name."""
        return await self._broker.clusters.create(call.user, call.body)

    async def start_cluster(self, call: Call) -> Any:
        """Reserve the machines of a stopped cluster again."""
        return await self._broker.clusters.start(call.user, call.part("cluster"))

    async def stop_cluster(self, call: Call) -> Any:
        """Give the machines of a cluster back; what runs on them goes on."""
        return await self._broker.clusters.stop(call.user, call.part("cluster"))

    async def autostop_cluster(self, call: Call) -> Any:
        """Stop a cluster by itself when it has been idle for some minutes."""
        minutes = call.body.minutes
        return await self._broker.clusters.autostop(call.user, call.part("cluster"), minutes)

    async def remove_cluster(self, call: Call) -> Any:
        """Forget a cluster, and stop its runs."""
        name, by = call.part("cluster"), call.user.name
        stopped = await self._broker.clusters.remove(call.user, name)
        for run in stopped:
            await self._broker.stop_run(await self._broker.runs.row(run), by)
        return {"cluster": name, "stopped": stopped}
