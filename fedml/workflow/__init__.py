# SPDX-License-Identifier: Apache-2.0
"""Workflows from Python, with the names that FedML's scripts use.

    from fedml.workflow import FederateJob, LaunchJob, Workflow

    prepare = LaunchJob("prepare", "prepare.yaml")
    train = FederateJob("train", "run.yaml", inputs={"rows.txt": "prepare/rows.txt"})
    workflow = Workflow("heart")
    workflow.add_job(prepare)
    workflow.add_job(train, dependencies=[prepare])
    workflow.run()

That is what `fedml workflow run` does with a file. See docs/workflow.md.
"""

from fedml.workflow.customized_jobs.model_deploy_job import ModelDeployJob
from fedml.workflow.customized_jobs.model_inference_job import ModelInferenceJob
from fedml.workflow.customized_jobs.train_job import TrainJob
from fedml.workflow.file_jobs import DeployJob, FederateJob, LaunchJob
from fedml.workflow.jobs import Job, JobStatus, NullJob
from fedml.workflow.workflow import Workflow, WorkflowFailed, WorkflowType

__all__ = [
    "DeployJob",
    "FederateJob",
    "Job",
    "JobStatus",
    "LaunchJob",
    "ModelDeployJob",
    "ModelInferenceJob",
    "NullJob",
    "TrainJob",
    "Workflow",
    "WorkflowFailed",
    "WorkflowType",
]
