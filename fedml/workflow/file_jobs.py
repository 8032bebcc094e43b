# SPDX-License-Identifier: Apache-2.0
"""Jobs of a workflow that stand in files: the broker carries them out, as steps of a workflow.

Alone, or beside jobs of a script's own, each is a run that the script starts and looks at.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from fedml import api, runfile
from fedml.errors import ConfigError
from fedml.runs import Run
from fedml.workflow.jobs import Job, JobStatus
from fedml.workflowfile import Step, make_step
from fedml.workflows import sent_request
from fedml_protocol.workflow import When


class FileJob(Job):
    """A job file or a run file.

    Attributes:
        run_id: Of its run; None: it has not begun.
        error: Why it could not start; empty: it could.
    """

    kind: ClassVar[str]

    def __init__(
        self,
        name: str,
        file: Path | str,
        *,
        inputs: Mapping[str, str] | None = None,
        env: Mapping[str, str] | None = None,
        config: Mapping[str, Any] | None = None,
        when: str = "finished",
        home: Path | str | None = None,
    ) -> None:
        """
        Args:
            inputs: Path in its workspace -> STEP or STEP/FILE: files that another job leaves.
            env: More variables of a job; `${{ steps.NAME.outputs.VALUE }}` are values of others.
            config: More of a federated run's configuration; with values of others, too.
            when: Once those that it depends on are over: `finished`, `failed` or `always`.
            home: Where the login is, as for `fedml.api`.
        """
        super().__init__(name)
        self.file = Path(file)
        self.inputs = dict(inputs or {})
        self.env = dict(env or {})
        self.config = dict(config or {})
        self.when = When(when)
        self.home = home
        self.run_id: str | None = None
        self.error = ""

    def step(self, needs: Iterable[str] = (), *, name: str = "") -> Step:
        """The same, as a step of a workflow; what it was given goes along.

        Raises:
            ConfigError: Its file is wrong.
        """
        env = dict(self.env)
        federated = self.kind == "federate" or runfile.is_federated_job(self.file)
        if self.input_data_dict and not federated:
            env.setdefault("FEDML_INPUTS", json.dumps(self.input_data_dict))
        return make_step(
            name or self.name,
            self.kind,
            self.file,
            needs=needs,
            when=self.when,
            inputs=self.inputs,
            env=env,
            config=self.config,
        )

    def run(self) -> None:
        """Submit it as a run of its own.

        Raises:
            ConfigError: Its file is wrong, or it gets something from another job.
            BrokerRefused: It can never run.
        """
        step = self.step()
        if step.needs or self.when is not When.FINISHED:
            raise ConfigError(
                f"the job {self.name} gets something from another one ({', '.join(step.needs)})",
                "the broker hands it on, in a workflow all of whose jobs are files",
            )
        client = api.connect(home=self.home)
        word = "federate" if step.kind == "federate" else "launch"
        self.run_id = client.submit(word, sent_request(client, step))

    def status(self) -> JobStatus:
        """Where its run is; without one, whether it will ever have one."""
        if self.run_id is None:
            return JobStatus.FAILED if self.error else JobStatus.PROVISIONING
        return JobStatus.get_job_status_from_run_status(self._found().state)

    def kill(self) -> None:
        """Ask for the end of its run."""
        if self.run_id is not None:
            self._found().stop()

    def get_outputs(self) -> dict[Any, Any]:
        """The values that it has left by name."""
        if self.run_id is not None:
            self.output_data_dict = dict(self._found().outputs)
        return self.output_data_dict

    def _found(self) -> Run:
        return api.run_show(str(self.run_id), home=self.home)


class LaunchJob(FileJob):
    """A job file, as `fedml launch` takes it: also one that is a federated run."""

    kind = "job"


class DeployJob(FileJob):
    """A job file with `service`: it has finished when the service answers, and stays up."""

    kind = "deploy"

    def status(self) -> JobStatus:
        """Finished as soon as it answers."""
        if self.run_id is None:
            return super().status()
        found = self._found()
        if found.details.get("endpoint") is not None:
            return JobStatus.FINISHED
        return JobStatus.FAILED if found.ended else JobStatus.RUNNING


class FederateJob(FileJob):
    """A run file, or a file of FedML's, as `fedml federate` takes it."""

    kind = "federate"
