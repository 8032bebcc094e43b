# SPDX-License-Identifier: Apache-2.0
"""Workflows that the broker carries out: submitted from a file, seen, stopped, resumed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fedml.client import Client, Seen, Told, silent
from fedml.errors import RunFailed
from fedml.launch import sent
from fedml.runs import Run
from fedml.workflowfile import Step, read_workflow


def submit(client: Client, file: Path, *, told: Told = silent) -> str:
    """Submit a workflow file, with all that its steps need; the workflow's id.

    Raises:
        ConfigError: The file, or one that it names, is wrong.
        BrokerRefused: A step can never run, or the broker says no for another reason.
        BrokerUnreachable: No answer.
    """
    name, steps = read_workflow(file)
    return submit_steps(client, name, steps, told=told)


def submit_steps(client: Client, name: str, steps: Sequence[Step], *, told: Told = silent) -> str:
    """The same of steps that have been read."""
    return client.submit_workflow({"name": name, "steps": _bodies(client, steps, told)})


def resume(
    client: Client, workflow: str, file: Path | None = None, *, told: Told = silent
) -> dict[str, Any]:
    """Another try of a workflow that has ended, with the steps of a file if one is given.

    Returns:
        `workflow`: its id; `again`: the steps that run again, by name.

    Raises:
        ConfigError, BrokerRefused, BrokerUnreachable: As for `submit`.
    """
    body: dict[str, Any] = {}
    if file is not None:
        body["steps"] = _bodies(client, read_workflow(file)[1], told)
    found: dict[str, Any] = client.call("POST", f"{_url(workflow)}/resume", body)
    return found


def listed(client: Client, limit: int = 50) -> list[dict[str, Any]]:
    """The newest workflows, newest first."""
    found: list[dict[str, Any]] = client.call("GET", f"/v1/workflows?limit={limit}")["workflows"]
    return found


def delete(client: Client, workflow: str) -> int:
    """Forget a workflow that has ended; how many bytes the broker has free now."""
    return int(client.call("DELETE", _url(workflow))["freed_bytes"])


class WorkflowRun:
    """One workflow of one broker, as it was when it was last looked at.

    Attributes:
        id: Unique for ever.
        details: Everything that the broker says of it; `refresh` looks again.
    """

    def __init__(self, client: Client, details: Mapping[str, Any]) -> None:
        self.id = str(details["id"])
        self.details = dict(details)
        self._client = client

    @classmethod
    def find(cls, client: Client, workflow: str) -> WorkflowRun:
        """The workflow with this id, or the newest with this name.

        Raises:
            BrokerRefused: There is none.
        """
        return cls(client, client.call("GET", _url(workflow)))

    def __repr__(self) -> str:
        return f"<WorkflowRun {self.id} {self.state}>"

    @property
    def name(self) -> str:
        """As its file calls it."""
        return str(self.details["name"])

    @property
    def state(self) -> str:
        """RUNNING, FINISHED, FAILED or STOPPED."""
        return str(self.details["state"])

    @property
    def ended(self) -> bool:
        """Whether nothing will happen any more."""
        return self.details["ended_at"] is not None

    @property
    def steps(self) -> dict[str, dict[str, Any]]:
        """Each step by its name: `state`, `run`, `cause`, `outputs`, `needs` …"""
        return {step["name"]: step for step in self.details["steps"]}

    def run_of(self, step: str) -> Run:
        """The run of a step in this try.

        Raises:
            BrokerRefused: It has none.
        """
        return Run.find(self.steps[step]["run"] or step, at=self._client)

    def refresh(self) -> WorkflowRun:
        """Look again; itself."""
        self.details = dict(self._client.call("GET", _url(self.id)))
        return self

    def follow(self, *, stay: bool = True, seen: Seen | None = None) -> Iterator[dict[str, Any]]:
        """The steps of its latest try as they go, until it has ended: `step` events, and `end`.

        Args:
            stay: Until it has ended; otherwise only what there is by now.
            seen: Kept up to date; given again to a second call, nothing is told twice.
        """
        seen = seen or Seen()
        seen.event = max(seen.event, self.details["since"])
        return self._client.follow(self.id, of="workflows", logs=False, stay=stay, seen=seen)

    def stop(self) -> None:
        """Ask for its end; again is harmless. `wait` tells when it has come."""
        self._client.call("POST", f"{_url(self.id)}/stop")

    def resume(self, file: Path | str | None = None) -> list[str]:
        """Another try, once it has ended; the steps that run again."""
        again = resume(self._client, self.id, None if file is None else Path(file))["again"]
        self.refresh()
        return list(again)

    def wait(self, *, check: bool = False) -> WorkflowRun:
        """Until it has ended; itself.

        Raises:
            RunFailed: With `check`: it did not finish. The text names the steps and why.
        """
        for _ in self.follow():
            pass
        self.refresh()
        if check and self.state != "FINISHED":
            raise RunFailed(f"{self.name} ({self.id}) {self.state}{self.blame()}", self.next_step())
        return self

    def blame(self) -> str:
        """The steps that did not finish by themselves, and why; a line each."""
        bad = [s for s in self.steps.values() if s["state"] in ("FAILED", "STOPPED")]
        return "".join(f"\n  {s['name']} {s['state']}: {s['cause']}" for s in bad)

    def next_step(self) -> str:
        """What a person may type now."""
        return f"fedml workflow resume {self.id}" if self.state != "FINISHED" else ""


def sent_request(client: Client, step: Step, told: Told = silent) -> dict[str, Any]:
    """What a step asks of the broker; its workspace is there."""
    request = {**sent(client, step.request, step.workspace, step.file, told), "name": step.name}
    return request if step.kind == "federate" else {**request, "follow": False}


def _bodies(client: Client, steps: Sequence[Step], told: Told) -> list[dict[str, Any]]:
    """Steps as the broker takes them."""
    return [
        {
            "name": step.name,
            step.kind: sent_request(client, step, told),
            "needs": list(step.needs),
            "when": str(step.when),
            "inputs": dict(step.inputs),
        }
        for step in steps
    ]


def _url(workflow: str) -> str:
    return f"/v1/workflows/{quote(workflow, safe='')}"
