# SPDX-License-Identifier: Apache-2.0
"""Jobs that wait for each other, with the names that FedML's scripts use.

Where every job stands in a file, the broker carries the workflow out, as it does for `fedml
workflow run`: it goes on without the script. A job of a script's own class has code that only this
process has; then this process starts each job when those before it have finished, by the same plan.
"""

import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedml import api, workflows
from fedml.errors import ConfigError, RunFailed
from fedml.workflow.file_jobs import FileJob
from fedml.workflow.jobs import Job, JobStatus
from fedml.workflows import WorkflowRun
from fedml_protocol.workflow import BadGraph, Graph, StepState, check, levels, plan
from fedml_protocol.workflow import Node as Needs

# Between two looks at jobs of the script's own.
_LOOK_S = 0.2
# What a job does that is not of the script's own.
_OURS = ("run", "status", "kill", "get_outputs", "append_input", "set_inputs")


class WorkflowFailed(RunFailed, ValueError):
    """A job did not finish; the text says which, and why. FedML's scripts expect a ValueError."""


class WorkflowType(IntEnum):
    """What a workflow is for; nothing depends on it."""

    WORKFLOW_TYPE_TRAIN = 0
    WORKFLOW_TYPE_DEPLOY = 1


@dataclass(frozen=True)
class Node:
    """A job in the graph."""

    name: str
    job: Job


@dataclass(frozen=True)
class Metadata:
    """The graph: what each node depends on, and the nodes in the order of their levels."""

    nodes: frozenset[Node]
    topological_order: tuple[frozenset[Node], ...]
    graph: Mapping[Node, frozenset[Node]]


@dataclass(frozen=True)
class AdjacencyList:
    """A job and those that it depends on."""

    job: Job
    dependencies: Sequence[Job]


class Workflow:
    """A workflow by its name.

    Attributes:
        jobs: By name, each with those that it depends on.
        id: Of the workflow at the broker; None: this process carries it out, or it has not begun.
    """

    def __init__(
        self,
        name: str,
        loop: bool = False,
        api_key: str | None = None,
        workflow_type: WorkflowType = WorkflowType.WORKFLOW_TYPE_DEPLOY,
        *,
        home: Path | str | None = None,
    ) -> None:
        """
        Args:
            loop: Begin again when all is over, until it is set to False.
            api_key: Has no effect: the login is that of `fedml login`.
            home: Where the login is, as for `fedml.api`.
        """
        self.name = name
        self.loop = loop
        self.api_key = api_key
        self.workflow_type = workflow_type
        self.home = home
        self.id: str | None = None
        self.jobs: dict[str, AdjacencyList] = {}
        self.input: dict[Any, Any] = {}

    @property
    def metadata(self) -> Metadata | None:
        """The graph; None: there are no jobs.

        Raises:
            ConfigError: It is none.
        """
        if not self.jobs:
            return None
        graph = self._graph()
        nodes = {name: Node(name, one.job) for name, one in self.jobs.items()}
        return Metadata(
            nodes=frozenset(nodes.values()),
            topological_order=tuple(frozenset(nodes[n] for n in level) for level in levels(graph)),
            graph=MappingProxyType(
                {nodes[n]: frozenset(nodes[d] for d in its.needs) for n, its in graph.items()}
            ),
        )

    def add_job(self, job: Job, dependencies: Sequence[Job] | None = None) -> None:
        """Add a job, and say which ones must have finished before it begins.

        Raises:
            TypeError: Something is not a job.
            ValueError: There is a job of this name.
        """
        dependencies = list(dependencies or ())
        if not all(isinstance(one, Job) for one in (job, *dependencies)):
            raise TypeError("a workflow has jobs: instances of fedml.workflow.Job")
        if job.name in self.jobs:
            raise ValueError(f"Job {job.name} already exists in workflow.")
        job.dependencies = dependencies
        self.jobs[job.name] = AdjacencyList(job=job, dependencies=dependencies)

    def run(self) -> None:
        """Carry it out, and return when all is over.

        Raises:
            WorkflowFailed: A job did not finish. What hangs on it has not begun.
            ConfigError: A file is wrong, or the jobs cannot be put in an order.
        """
        self._graph()
        while True:
            if all(_is_ours(one.job) for one in self.jobs.values()):
                self._run_at_the_broker()
            else:
                self._run_here()
            if not self.loop:
                return

    def get_job_status(self, job_name: str) -> JobStatus:
        """Where a job is."""
        found = self.jobs.get(job_name)
        return JobStatus.UNDETERMINED if found is None else found.job.status()

    def get_workflow_status(self) -> JobStatus:
        """FINISHED if all jobs are, FAILED if one has, else RUNNING."""
        found = {one.job.status() for one in self.jobs.values()}
        if JobStatus.FAILED in found:
            return JobStatus.FAILED
        return JobStatus.FINISHED if found == {JobStatus.FINISHED} else JobStatus.RUNNING

    def set_workflow_type(self, workflow_type: WorkflowType) -> None:
        """What it is for; nothing depends on it."""
        self.workflow_type = workflow_type

    def set_workflow_input(self, input: dict[Any, Any]) -> None:  # noqa: A002 - FedML's name
        """What its first job gets."""
        self.input = input

    def get_workflow_output(self) -> dict[Any, Any]:
        """What its last job has left."""
        order = [name for level in levels(self._graph()) for name in level]
        return self.jobs[order[-1]].job.get_outputs()

    def get_all_jobs_outputs(self) -> dict[str, dict[Any, Any]]:
        """What each job has left."""
        return {name: one.job.get_outputs() for name, one in self.jobs.items()}

    @staticmethod
    def get_workflow(workflow_name: str | None = None) -> "Workflow":
        """An empty one by its name, or that of FEDML_CURRENT_WORKFLOW."""
        return Workflow(workflow_name or os.environ.get("FEDML_CURRENT_WORKFLOW", "workflow"))

    # ------------------------------------------------------------------ small print

    def _graph(self) -> Graph:
        graph = {n: Needs(tuple(d.name for d in a.dependencies)) for n, a in self.jobs.items()}
        try:
            check(graph)
        except BadGraph as error:
            raise ConfigError(f"the workflow {self.name}: {error}", error.hint) from error
        return graph

    def _set_input(self) -> None:
        if self.input:
            order = levels(self._graph())
            self.jobs[order[0][0]].job.set_inputs(self.input)

    def _run_at_the_broker(self) -> None:
        """As one workflow; what has become of each job is told when it is over."""
        self._set_input()
        client = api.connect(home=self.home)
        names = {name: re.sub(r"[^A-Za-z0-9_-]", "_", name) for name in self.jobs}
        steps = []
        files = {n: one.job for n, one in self.jobs.items() if isinstance(one.job, FileJob)}
        for name, job in files.items():
            needs = [names[d.name] for d in self.jobs[name].dependencies]
            steps.append(job.step(needs, name=names[name]))
        self.id = workflows.submit_steps(client, self.name, steps)
        found = WorkflowRun.find(client, self.id).wait()
        for name, job in files.items():
            its = found.steps[names[name]]
            job.workflow_id, job.run_id = self.id, its["run"] or None
            job.error = its["cause"]
        if found.state != "FINISHED":
            text = f"the workflow {self.name} ({self.id}) {found.state}{found.blame()}"
            raise WorkflowFailed(text, found.next_step())

    def _run_here(self) -> None:
        """Job by job, from this process."""
        self._set_input()
        graph = self._graph()
        states = dict.fromkeys(graph, StepState.WAITING)
        while (now := plan(graph, states)).end is None:
            for name in now.begin:
                job = self.jobs[name].job
                for needed in self.jobs[name].dependencies:
                    job.append_input(needed.name, needed.get_outputs())
                job.run()
                states[name] = StepState.RUNNING
            bad = self._look(states)
            if bad:
                for name, state in states.items():
                    if state is StepState.RUNNING or name in bad:
                        self.jobs[name].job.kill()
                raise WorkflowFailed(f"jobs of the workflow {self.name} failed: {', '.join(bad)}")
            if StepState.RUNNING in states.values():
                time.sleep(_LOOK_S)

    def _look(self, states: dict[str, StepState]) -> list[str]:
        """Note which jobs have finished; those that have not, and do not go on."""
        bad = []
        for name, state in states.items():
            if state is not StepState.RUNNING:
                continue
            status = self.jobs[name].job.status()
            if status is JobStatus.FINISHED:
                states[name] = StepState.FINISHED
            elif status not in (JobStatus.RUNNING, JobStatus.PROVISIONING):
                bad.append(name)
        return bad


def _is_ours(job: Job) -> bool:
    """Whether a job does nothing but what its file says: the broker can do that."""
    ours = all(getattr(type(job), n).__module__.startswith("fedml.workflow") for n in _OURS)
    return ours and isinstance(job, FileJob)
