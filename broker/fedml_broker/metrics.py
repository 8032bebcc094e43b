# SPDX-License-Identifier: Apache-2.0
"""What Prometheus scrapes: numbers of this process, in a registry of their own.

No label takes its values from outside: states, directions and the routes of our own table are all
there is, so that the number of series does not grow with tenants, machines or runs.
"""

import shutil
import time
from collections import Counter as Tally
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING

from aiohttp import web
from aiohttp.typedefs import Middleware
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from fedml_broker.tasks import Task
from fedml_protocol.tasks import FINAL, TaskState
from fedml_protocol.workflow import StepState

if TYPE_CHECKING:
    from fedml_broker.app import Broker

# These last as long as somebody looks: that is no latency.
_STREAMS = ("/v1/runs/{run}/follow", "/v1/watch")

_LATENCY = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0)
_WAIT = (0.1, 0.5, 1.0, 5.0, 30.0, 120.0, 600.0, 3600.0, 4 * 3600.0, 24 * 3600.0)
_COMMIT = (0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2.0)
_PIECES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_AGGREGATOR = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0, 120.0, 600.0)


class Metrics:
    """The counters of one broker; its parts call these where something happens."""

    def __init__(self, broker: "Broker") -> None:
        self._registry = CollectorRegistry()
        self._requests = self._counter(
            "requests", "Answers of the HTTPS API.", "method", "route", "status"
        )
        self._latency = self._histogram(
            "request_seconds", "From a request's head to its answer's end.", _LATENCY, "route"
        )
        self._messages = self._counter("messages", "MQTT messages of and to devices.", "direction")
        self._blob_bytes = self._counter("blob_bytes", "Bytes of blobs over HTTPS.", "direction")
        self._ended = self._counter("tasks_ended", "Tasks that have ended.", "state")
        self._wait = self._histogram(
            "wait_seconds", "From a job's queueing to a machine that takes it.", _WAIT
        )
        self._workflows = self._counter("workflows_ended", "Workflows that have ended.", "state")
        self._rounds = self._counter("rounds", "Rounds, or versions, that have a model.")
        self._aggregator = self._histogram(
            "aggregator_seconds", "From a question to an aggregator to its answer.", _AGGREGATOR
        )
        self._pieces = self._histogram("store_batch_pieces", "Writes in one commit.", _PIECES)
        self._commit = self._histogram("store_commit_seconds", "Of one commit, whole.", _COMMIT)
        # So that a rate is there before the first time.
        for way in ("in", "out"):
            self._blob_bytes.labels(way)
        self._message = {way: self._messages.labels(way) for way in ("in", "out")}
        for state in FINAL:
            self._ended.labels(state.name)
        for end in (StepState.FINISHED, StepState.FAILED, StepState.STOPPED):
            self._workflows.labels(end)
        self._registry.register(_Now(broker))
        ProcessCollector(registry=self._registry)

    def _counter(self, name: str, help_: str, *labels: str) -> Counter:
        return Counter(f"fedml_broker_{name}", help_, labels, registry=self._registry)

    def _histogram(
        self, name: str, help_: str, buckets: tuple[float, ...], *labels: str
    ) -> Histogram:
        return Histogram(
            f"fedml_broker_{name}", help_, labels, buckets=buckets, registry=self._registry
        )

    def message(self, direction: str) -> None:
        """One was taken (`in`) or handed to MQTT (`out`)."""
        self._message[direction].inc()

    def blob(self, direction: str, size: int) -> None:
        """Bytes of a blob went `in` or `out`."""
        self._blob_bytes.labels(direction).inc(size)

    def ended(self, state: TaskState) -> None:
        """A task has ended."""
        self._ended.labels(state.name).inc()

    def taken(self, task: Task) -> None:
        """A machine has taken a task."""
        if task.kind == "launch":
            self._wait.observe(time.time() - task.moments.get("queued", task.since))

    def workflow_ended(self, state: StepState) -> None:
        """A workflow has ended, or a new try of it has."""
        self._workflows.labels(state).inc()

    def round(self) -> None:
        """A round has its model."""
        self._rounds.inc()

    def asked(self, seconds: float) -> None:
        """An aggregator has answered."""
        self._aggregator.observe(seconds)

    def committed(self, pieces: int, seconds: float) -> None:
        """The store has committed; called in its writer's thread."""
        self._pieces.observe(pieces)
        self._commit.observe(seconds)

    @property
    def middleware(self) -> Middleware:
        """Counts and times requests; outermost, so that it sees what errors are answered with."""

        @web.middleware
        async def measure(
            request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
        ) -> web.StreamResponse:
            begun = time.perf_counter()
            response = await handler(request)
            resource = request.match_info.route.resource
            # Neither paths nor methods of others: anybody could fill our memory with them.
            method, route = ("", "")
            if resource is not None:
                method, route = request.method, resource.canonical
            self._requests.labels(method, route, f"{response.status // 100}xx").inc()
            if route not in _STREAMS:
                self._latency.labels(route).observe(time.perf_counter() - begun)
            return response

        return measure

    def page(self) -> web.Response:
        """Everything, in Prometheus' text format."""
        return web.Response(
            body=generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST}
        )


class _Now(Collector):
    """What is read when it is asked for."""

    def __init__(self, broker: "Broker") -> None:
        self._broker = broker

    def describe(self) -> Iterable[Metric]:
        """Nothing: the parts that it reads are not there yet when it is registered."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """The present state of the broker's parts."""
        broker = self._broker
        tasks = GaugeMetricFamily(
            "fedml_broker_tasks", "Tasks that have not ended.", labels=["state"]
        )
        states: Tally[TaskState] = Tally(broker.dispatcher.states())
        for state in TaskState:
            if state not in FINAL:
                tasks.add_metric([state.name], states[state])
        yield tasks
        online = sum(broker.fleet.online(machine) for machine in broker.fleet)
        count = sum(1 for _ in broker.fleet)
        free = shutil.disk_usage(broker.config.home).free
        for name, text, value in (
            ("agents", "Agents that have joined and were not revoked.", count),
            ("workflows", "Workflows that have not ended.", broker.workflows.open),
            ("agents_online", "Agents that beat.", online),
            ("mqtt_connected", "Whether a message would leave at once.", broker.post.connected),
            ("disk_free_bytes", "On the disk of the broker's home.", free),
            ("up_seconds", "Since this process began.", time.monotonic() - broker.started_at),
        ):
            yield GaugeMetricFamily(f"fedml_broker_{name}", text, value=value)
        yield CounterMetricFamily(
            "fedml_broker_messages_refused",
            "Messages of devices that were refused.",
            value=sum(broker.reports.refused.values()),
        )
