# SPDX-License-Identifier: Apache-2.0
"""Workflows that the broker carries out. FedML's own names for them are in `fedml.workflow`."""

from pathlib import Path
from typing import Any

from fedml import workflows
from fedml.api.account import Home, connect
from fedml.workflows import WorkflowRun


def workflow_run(file: Path | str, *, home: Home = None) -> WorkflowRun:
    """Submit a workflow file; the workflow, which has only begun."""
    client = connect(home=home)
    return WorkflowRun.find(client, workflows.submit(client, Path(file)))


def workflow_list(*, limit: int = 50, home: Home = None) -> list[dict[str, Any]]:
    """The newest workflows, newest first, with the states of their steps."""
    return workflows.listed(connect(home=home), limit)


def workflow_show(name: str, *, home: Home = None) -> WorkflowRun:
    """One workflow by its id, or the newest of a name."""
    return WorkflowRun.find(connect(home=home), name)


def workflow_wait(name: str, *, check: bool = False, home: Home = None) -> WorkflowRun:
    """Until it has ended; with `check`, RunFailed if it did not finish."""
    return workflow_show(name, home=home).wait(check=check)


def workflow_stop(name: str, *, home: Home = None) -> None:
    """Ask for its end."""
    workflow_show(name, home=home).stop()


def workflow_resume(name: str, file: Path | str | None = None, *, home: Home = None) -> WorkflowRun:
    """Run again what has not finished, and what hangs on it; with `file`, what has changed, too."""
    found = workflow_show(name, home=home)
    found.resume(file)
    return found


def workflow_delete(name: str, *, home: Home = None) -> int:
    """Forget a workflow that has ended; how many bytes the broker has free now."""
    return workflows.delete(connect(home=home), name)
