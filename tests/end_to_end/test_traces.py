# SPDX-License-Identifier: Apache-2.0
"""One trace per run: spans of the command, the broker and the agent, at a real OTLP receiver."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from fedml_protocol.tracing import in_trace, run_trace, span_id
from tests.place import Place, command

OUTER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
# Of the spans of a launched job.
SERVICES = {
    "submit launch": "fedml",
    "run launch": "fedml-broker",
    "queue": "fedml-broker",
    "offer": "fedml-broker",
    "result": "fedml-broker",
    "task": "fedml-agent",
    "unpack": "fedml-agent",
    "command": "fedml-agent",
}


class Collector:
    """Takes spans over OTLP/HTTP; `wait` until some of these names are there."""

    def __init__(self) -> None:
        self.spans: list[dict[str, Any]] = []
        self._new = threading.Condition()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer._take(ExportTraceServiceRequest.FromString(body))
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def _take(self, request: ExportTraceServiceRequest) -> None:
        with self._new:
            for resource in request.resource_spans:
                named = {a.key: a.value.string_value for a in resource.resource.attributes}
                for scope in resource.scope_spans:
                    for span in scope.spans:
                        facts = {a.key: a.value.string_value for a in span.attributes}
                        self.spans.append(
                            {
                                "service": named["service.name"],
                                "name": span.name,
                                "trace": span.trace_id.hex(),
                                "id": span.span_id.hex(),
                                "parent": span.parent_span_id.hex(),
                                "began": span.start_time_unix_nano,
                                "ended": span.end_time_unix_nano,
                                "status": span.status.code,
                                "facts": facts,
                            }
                        )
            self._new.notify_all()

    def wait(self, trace: str, names: set[str]) -> dict[str, dict[str, Any]]:
        """The spans of a trace by name, once these are there."""

        def there() -> bool:
            return names <= {span["name"] for span in self._of(trace)}

        with self._new:
            assert self._new.wait_for(there, 40), self.spans
            return {span["name"]: span for span in self._of(trace)}

    def _of(self, trace: str) -> list[dict[str, Any]]:
        return [span for span in self.spans if span["trace"] == trace]


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    found = Collector()
    serving = threading.Thread(target=found.server.serve_forever)
    serving.start()
    yield found
    found.server.shutdown()
    serving.join()
    found.server.server_close()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Place]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        patch.delenv("TRACEPARENT", raising=False)
        with Place(tmp_path_factory.mktemp("place")) as place:
            place.agent("one")
            yield place


def launch(place: Place, job: str, folder: Path, code: int = 0, **env: str) -> tuple[str, str]:
    """By the command; the run and what the job printed."""
    (folder / "job.yaml").write_text(f"workspace: .\njob: {job}\n")
    done = subprocess.run(
        command("fedml", "launch", str(folder / "job.yaml")),
        env={**os.environ, **env, "FEDML_HOME": str(place.folder / "me")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    run = next(word for word in done.stderr.split() if word.startswith("r-"))
    return run, done.stdout


def test_a_run_is_one_trace_from_the_command_to_the_machine_and_back(
    place: Place, collector: Collector, tmp_path: Path
) -> None:
    run, printed = launch(place, "echo $TRACEPARENT", tmp_path)
    spans = collector.wait(run_trace(run), set(SERVICES))
    assert {name: span["service"] for name, span in spans.items()} == SERVICES
    ids = {span["id"]: name for name, span in spans.items()}
    assert {name: ids.get(span["parent"], "") for name, span in spans.items()} == {
        "submit launch": "",
        "run launch": "submit launch",
        "queue": "run launch",
        "offer": "run launch",
        "result": "run launch",
        "task": "run launch",
        "unpack": "task",
        "command": "task",
    }
    assert all(span["began"] <= span["ended"] for span in spans.values())
    assert spans["task"]["began"] <= spans["command"]["began"] <= spans["command"]["ended"]
    assert spans["run launch"]["facts"]["fedml.state"] == "FINISHED"
    # What the job tells itself hangs below its command.
    assert printed == f"00-{run_trace(run)}-{spans['command']['id']}-01\n"


def test_a_run_of_somebody_who_traces_is_part_of_his_trace(
    place: Place, collector: Collector, tmp_path: Path
) -> None:
    run, printed = launch(place, "echo $TRACEPARENT; exit 3", tmp_path, code=3, TRACEPARENT=OUTER)
    spans = collector.wait(OUTER[3:35], set(SERVICES))
    assert spans["submit launch"]["parent"] == OUTER[36:52]
    assert printed.strip() == in_trace(OUTER, span_id("command", f"{run}-t", 1))
    assert {name for name, span in spans.items() if span["status"] == 2} == {
        "run launch", "result", "task", "command",
    }  # fmt: skip


def test_nothing_of_opentelemetry_is_imported_unless_it_is_configured() -> None:
    code = (
        "import sys, fedml_agent.daemon, fedml.client\n"
        "from fedml_agent.traces import Traces\n"
        "Traces().close()\n"
        "assert not [m for m in sys.modules if m.startswith('opentelemetry')]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PATH": "/usr/bin"})


def test_a_missing_library_is_said_and_harms_nothing() -> None:
    code = (
        "import sys, warnings\n"
        "sys.modules['opentelemetry'] = None\n"
        "from fedml_protocol.tracing import Tracer\n"
        "with warnings.catch_warnings(record=True) as told:\n"
        "    warnings.simplefilter('always')\n"
        "    assert Tracer.configured('x') is None\n"
        "assert 'fedml-agent[otel]' in str(told[0].message)\n"
    )
    env = {"PATH": "/usr/bin", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


def test_stages_of_a_federated_run_are_in_the_trace_of_the_run(
    place: Place, collector: Collector
) -> None:
    run = place.federate(rounds=1)
    assert place.end(run)["state"] == "FINISHED"
    names = {"run federate", "queue", "offer", "task", "result"}
    spans = collector.wait(run_trace(run), names)
    assert spans["task"]["parent"] == spans["run federate"]["id"]
