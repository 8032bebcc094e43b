# SPDX-License-Identifier: Apache-2.0
"""What an agent says about itself and its machine.

agent -> broker   Presence    topic `up/presence`, retained, also as the will
agent -> broker   Heartbeat   topic `up/hb`
"""

from dataclasses import dataclass

from fedml_protocol.errors import MalformedMessage
from fedml_protocol.ids import check_id, check_port
from fedml_protocol.tasks import TaskState

# An agent that has lost the broker tries again after at most so many heartbeat intervals: so a
# broker that comes back knows how long it may take until it has heard everybody, and a large fleet,
# whose heartbeats are rare, does not come back all at once.
RECONNECT_BEATS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Presence:
    """Online or offline: a hint for people. Scheduling believes only heartbeats.

    Attributes:
        boot_n: The will of an older boot is ignored.
        oldest_schema, newest_schema: The range of schemas that the agent speaks.
    """

    online: bool
    boot_n: int
    oldest_schema: int
    newest_schema: int
    inventory_sha256: str = ""
    agent_version: str = ""

    def __post_init__(self) -> None:
        if not 1 <= self.oldest_schema <= self.newest_schema:
            raise MalformedMessage("schemas must be a range that starts at 1 or later")


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuReading:
    """One accelerator at this moment."""

    uuid: str
    utilisation_percent: float = 0.0
    memory_used_bytes: int = 0
    temperature_c: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskBeat:
    """One task that the agent holds.

    Attributes:
        port: Of a service, where it answers at this moment; 0: nowhere.
    """

    task: str
    epoch: int
    state: TaskState
    port: int = 0

    def __post_init__(self) -> None:
        check_id(self.task, "task")
        check_port(self.port)
        if self.epoch < 1:
            raise MalformedMessage(f"epoch must be >= 1, got {self.epoch}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """Everything the agent holds: it renews leases and heals lost messages.

    Attributes:
        tasks: The whole set, results that wait for their acknowledgement among them.
        clock_ms: The agent's wall clock, to show by how much it is off.
        refusing: Why no offer would be taken now; empty when offers are welcome.
    """

    free_slots: int
    tasks: tuple[TaskBeat, ...] = ()
    disk_free_bytes: int = 0
    clock_ms: int = 0
    draining: bool = False
    cpu_percent: float = 0.0
    memory_used_bytes: int = 0
    gpus: tuple[GpuReading, ...] = ()
    refusing: str = ""
