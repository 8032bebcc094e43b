# SPDX-License-Identifier: Apache-2.0
"""An endpoint in a process of its own, to be killed: `python serve.py DATABASE` prints its port."""

import asyncio
import sys
from pathlib import Path

from fedml_broker.mqtt.endpoint import Endpoint, Limits


async def serve(path: Path) -> None:
    endpoint = Endpoint(
        path,
        authenticate=lambda packet, certificate: packet.client_id,
        may_publish=lambda identity, topic: True,
        may_subscribe=lambda identity, topic_filter: True,
        limits=Limits(max_queued_messages=100_000, restart_grace_s=0.0),
    )
    async with endpoint:
        sys.stdout.write(f"{endpoint.port}\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


asyncio.run(serve(Path(sys.argv[1])))
