# SPDX-License-Identifier: Apache-2.0
"""Workflows from Python: scripts as users of FedML write them, and jobs that stand in files."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedml
from fedml import api
from fedml.errors import ConfigError, RunFailed
from fedml.workflow import (
    FederateJob,
    Job,
    JobStatus,
    LaunchJob,
    NullJob,
    TrainJob,
    Workflow,
    WorkflowFailed,
)
from tests.place import APP, Place

# As it is: a job that runs in the script's own process, and a class of its own around TrainJob.
SCRIPT = '''
import logging
import os

from fedml.workflow.customized_jobs.train_job import TrainJob
from fedml.workflow.jobs import Job, JobStatus
from fedml.workflow.workflow import Workflow

MY_API_KEY = "0123456789abcdef"


class SplitJob(Job):
    """Runs in this process, as a job of the user's own."""

    def __init__(self, name):
        super().__init__(name)
        self.done = False

    def run(self):
        logging.info("splitting")
        self.output_data_dict = {"rows": 120}
        self.done = True

    def status(self):
        return JobStatus.FINISHED if self.done else JobStatus.UNDETERMINED

    def kill(self):
        pass


class MyTrainJob(TrainJob):
    def __init__(self, name, job_yaml_absolute_path=None, job_api_key=None):
        super().__init__(
            name, job_yaml_absolute_path=job_yaml_absolute_path, job_api_key=job_api_key
        )
        self.run_id = None

    def run(self):
        super().run()

    def status(self):
        return super().status()

    def kill(self):
        super().kill()


def show_workflow_metadata(workflow):
    print("graph", workflow.metadata.graph)
    print("nodes", workflow.metadata.nodes)
    print("topological_order", workflow.metadata.topological_order)
    print("loop", workflow.loop)


if __name__ == "__main__":
    working_directory = os.path.dirname(os.path.abspath(__file__))
    train_job_yaml = os.path.join(working_directory, "train.yaml")

    split_job = SplitJob(name="split_job")
    train_job = MyTrainJob(
        name="train_job", job_yaml_absolute_path=train_job_yaml, job_api_key=MY_API_KEY
    )
    workflow = Workflow(name="train_workflow", loop=False)
    workflow.add_job(split_job)
    workflow.add_job(train_job, dependencies=[split_job])
    workflow.run()

    show_workflow_metadata(workflow)
    print(f"Final status of the workflow is as follows. {workflow.get_workflow_status()}")
    print(f"Output of the workflow is as follows. {workflow.get_workflow_output()}")
    print(f"Output of all jobs is as follows. {workflow.get_all_jobs_outputs()}")
'''

PROGRAM = """
from fedml.workflow.customized_jobs.train_job import TrainJob

if __name__ == "__main__":
    print("Hi everyone, I am an launch job.")
    inputs = TrainJob.get_inputs()
    print("inputs", inputs)
    TrainJob.set_outputs({"accuracy": 0.5, "seen": inputs["split_job"]["rows"]})
"""

JOB = """
workspace: train
job: |
  "{python}" main_entry.py
job_type: train
computing:
  minimum_num_gpus: 0
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A broker with one agent."""
    with Place(tmp_path_factory.mktemp("place")) as place:
        place.agent("one")
        yield place


@pytest.fixture(autouse=True)
def home(place: Place, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the admin is logged in, as FEDML_HOME says."""
    monkeypatch.setenv("FEDML_HOME", str(place.folder / "me"))
    return place.folder / "me"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with a script, a job file, and the program that it runs."""
    (tmp_path / "train").mkdir()
    (tmp_path / "train/main_entry.py").write_text(PROGRAM)
    (tmp_path / "train.yaml").write_text(JOB.format(python=sys.executable))
    (tmp_path / "main.py").write_text(SCRIPT)
    return tmp_path


def test_a_script_of_fedmls_runs_as_it_is(files: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(files / "main.py")],
        env=dict(os.environ),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "loop False" in lines
    assert lines[2].startswith("topological_order (frozenset({Node(name='split_job'")
    assert lines[-3:] == [
        "Final status of the workflow is as follows. JobStatus.FINISHED",
        "Output of the workflow is as follows. {'accuracy': 0.5, 'seen': 120}",
        "Output of all jobs is as follows. {'split_job': {'rows': 120}, "
        "'train_job': {'accuracy': 0.5, 'seen': 120}}",
    ]


def test_jobs_that_are_files_are_one_workflow_at_the_broker(files: Path) -> None:
    (files / "split.yaml").write_text(
        'job: |\n  echo rows=7 >> "$FEDML_OUTPUT"\n  echo text > "$FEDML_OUTPUT_DIR/text"\n'
    )
    (files / "show.yaml").write_text("job: cat text\n")
    split = LaunchJob("split_job", files / "split.yaml")
    train = TrainJob(name="train job", job_yaml_absolute_path=str(files / "train.yaml"))
    show = LaunchJob("show", files / "show.yaml", inputs={"text": "split_job/text"})
    workflow = Workflow("python")
    workflow.add_job(train, dependencies=[split])
    workflow.add_job(split)
    workflow.add_job(show, dependencies=[train])
    workflow.run()
    assert workflow.get_workflow_status() is JobStatus.FINISHED
    assert train.get_outputs() == {"accuracy": 0.5, "seen": 7}
    found = api.workflow_show(str(workflow.id))
    assert [found.steps[n]["run"] for n in ("split_job", "train_job", "show")] == [
        split.run_id,
        train.run_id,
        show.run_id,
    ]
    assert "".join(api.Run.find(str(show.run_id)).logs()) == "text\n"
    assert set(found.steps["show"]["needs"]) == {"train_job", "split_job"}


def test_a_job_that_fails_is_told_with_its_cause_and_the_others_do_not_begin(files: Path) -> None:
    (files / "bad.yaml").write_text("job: exit 4\n")
    bad, after = LaunchJob("bad", files / "bad.yaml"), LaunchJob("after", files / "train.yaml")
    workflow = Workflow("fails")
    workflow.add_job(bad)
    workflow.add_job(after, dependencies=[bad])
    with pytest.raises(WorkflowFailed, match="bad FAILED: its command ended with exit code 4"):
        workflow.run()
    assert (bad.status(), after.run_id) == (JobStatus.FAILED, None)
    assert workflow.get_workflow_status() is JobStatus.FAILED
    # And mended, from the same names.
    (files / "bad.yaml").write_text('job: echo rows=1 >> "$FEDML_OUTPUT"\n')
    (files / "flow.yaml").write_text(
        "steps:\n  bad: {job: bad.yaml}\n  after: {needs: bad, job: {job: 'true'}}\n"
    )
    found = api.workflow_resume("fails", files / "flow.yaml").wait(check=True)
    assert found.id == workflow.id
    assert api.workflow_list()[0]["steps"] == {"bad": "FINISHED", "after": "FINISHED"}


def test_a_model_goes_from_a_federated_job_to_the_next(files: Path) -> None:
    (files / "app").mkdir()
    (files / "app/app.py").write_text(APP)
    (files / "run.yaml").write_text("app: app.py\nworkspace: app\nrounds: 1\nclients: {count: 1}\n")
    (files / "use.yaml").write_text("job: test -s model/model.safetensors && echo $AFTER\n")
    train = FederateJob("train", files / "run.yaml")
    env = {"AFTER": "${{ steps.train.outputs.round }} rounds"}
    use = LaunchJob("use", files / "use.yaml", inputs={"model": "train"}, env=env)
    workflow = fedml.workflow.Workflow("model")
    workflow.add_job(train)
    workflow.add_job(use)
    workflow.run()
    assert "".join(api.Run.find(str(use.run_id)).logs()) == "1 rounds\n"


class _Stuck(Job):
    """Runs until it is killed."""

    killed = False

    def run(self) -> None:
        """At once."""

    def status(self) -> JobStatus:
        return JobStatus.FAILED if self.killed else JobStatus.RUNNING

    def kill(self) -> None:
        self.killed = True


def test_jobs_of_ones_own_are_killed_when_another_fails(files: Path) -> None:
    (files / "bad.yaml").write_text("job: exit 4\n")
    stuck, bad = _Stuck("stuck"), LaunchJob("bad", files / "bad.yaml")
    workflow = Workflow("mixed")
    workflow.add_job(stuck)
    workflow.add_job(bad)
    with pytest.raises(ValueError, match="jobs of the workflow mixed failed: bad"):
        workflow.run()
    assert stuck.killed
    assert bad.status() is JobStatus.FAILED


def test_a_loop_begins_again_until_a_job_ends_it() -> None:
    workflow = Workflow("loop", loop=True)

    class Third(NullJob):
        count = 0

        def run(self) -> None:
            self.count += 1
            workflow.loop = self.count < 3
            self.output_data_dict = {"count": self.count, **self.input_data_dict}

    workflow.add_job(Third("third"))
    workflow.set_workflow_input({"from": "outside"})
    workflow.run()
    assert workflow.get_workflow_output() == {"count": 3, "from": "outside"}


def test_mistakes_are_named() -> None:
    workflow = Workflow("wrong")
    one, two, lost = NullJob("one"), NullJob("two"), NullJob("lost")
    workflow.add_job(one, dependencies=[two])
    with pytest.raises(ValueError, match="already exists"):
        workflow.add_job(one)
    with pytest.raises(TypeError, match="instances of"):
        workflow.add_job("two")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="one needs two, which is no step"):
        workflow.run()
    workflow.add_job(two, dependencies=[one])
    with pytest.raises(ConfigError, match="one → two → one"):
        workflow.run()
    assert workflow.get_job_status("nobody") is JobStatus.UNDETERMINED
    assert lost.status() is JobStatus.FINISHED
    assert issubclass(WorkflowFailed, RunFailed)
