# SPDX-License-Identifier: Apache-2.0
"""Job files as users of FedML and SkyPilot write them, on a broker and two machines.

One machine has no GPU, the other has three: the names and sizes are what NVML tells of such cards,
by `tests/fakes/nvml.py`. The files lie in `jobs/` and are launched by the command, unchanged.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedml import api
from tests.fakes.nvml import GIB, environment
from tests.place import Place, command

JOBS = Path(__file__).parent / "jobs"
A100 = "NVIDIA A100 80GB PCIe"
GPUS = [
    {"uuid": "GPU-t4", "name": "Tesla T4", "memory": 15 * GIB},
    {"uuid": "GPU-a", "name": A100, "memory": 80 * GIB},
    {"uuid": "GPU-b", "name": A100, "memory": 80 * GIB},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A broker with the machines `plain` and `gpus`."""
    gpus = tmp_path_factory.mktemp("nvml") / "gpus.json"
    gpus.write_text(json.dumps({"driver": "550.54.15", "cuda": 12040, "gpus": GPUS}))
    with Place(tmp_path_factory.mktemp("place")) as place:
        place.agent("plain")
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment(gpus).items():
                patch.setenv(name, value)
            place.agent("gpus")
        yield place


def launch(
    place: Place, name: str, *more: str, code: int = 0
) -> "subprocess.CompletedProcess[str]":
    """`fedml launch` of one of the files."""
    done = subprocess.run(
        command("fedml", "launch", str(JOBS / name / "job.yaml"), *more),
        env={**os.environ, "FEDML_HOME": str(place.folder / "me")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
    return done


def without_effect(said: str) -> list[str]:
    """The keys that were warned of, in their order."""
    return [line.split("`")[1] for line in said.splitlines() if line.startswith("warning: ")]


def test_hello_world_gets_the_gpu_that_it_names_on_a_machine_with_others(place: Place) -> None:
    done = launch(place, "hello_world")
    assert "Hello, world, from rank 0 of 1 with <GPU-a>\n" in done.stdout
    assert done.stdout.startswith("current job id: r-")
    assert "runs on gpus" in done.stderr
    assert without_effect(done.stderr) == []


def test_sections_reach_the_program_and_what_is_of_the_hosted_service_is_named(
    place: Place,
) -> None:
    done = launch(place, "vision")
    assert done.stdout.splitlines() == [
        "ready",
        "FEDML_ENV_DATA_ARGS_DATASET_NAME=mnist",
        "FEDML_ENV_DATA_ARGS_DATASET_PATH=./dataset",
        "FEDML_ENV_DATA_ARGS_DATA_BS=1e-2",
        "FEDML_ENV_MODEL_ARGS_INPUT_DIM=784",
        "FEDML_ENV_MODEL_ARGS_MODEL_CACHE_PATH=/tmp/models",
        "FEDML_ENV_TRAINING_PARAMS_LAYERS=[128, 10]",
        "FEDML_ENV_TRAINING_PARAMS_LEARNING_RATE=0.001",
        "FEDML_ENV_TRAINING_PARAMS_SHUFFLE=true",
    ]
    assert without_effect(done.stderr) == [
        "fedml_env",
        "framework_type",
        "job_args",
        "docker",
    ]


def test_expert_mode_runs_without_the_gpu_that_nobody_has_because_it_is_hybrid(
    place: Place,
) -> None:
    done = launch(place, "expert")
    assert done.stdout == (
        "in work\n--cf config/fedml_config.yaml --rank 0 --role client\n"
        "common_args:\n  training_type: cross_silo\ndata: ~/fedml_data\n"
    )
    assert "no machine has 1 × RTX-4090: it runs without GPUs" in done.stderr
    assert without_effect(done.stderr) == []


def test_a_task_of_skypilot_runs_with_its_own_variables(place: Place) -> None:
    done = launch(place, "sky")
    assert done.stdout == "train.toml for 3 epochs on 2 GPUs, node 0 of 1\n"
    assert without_effect(done.stderr) == [
        "resources.infra",
        "resources.use_spot",
        "file_mounts",
    ]


def test_a_dry_run_says_of_each_machine_what_it_lacks(place: Place, tmp_path: Path) -> None:
    place.finishes(place.launch("true", needs={"gpus": 1}))  # that machine is there
    told = json.loads(launch(place, "sky", "--dry-run", "--json").stdout)
    assert [(m["name"], m["fits"], m["rank"], m["why"]) for m in told["machines"]] == [
        ("gpus", "now", 0, "0 of its 2 places are taken"),
        ("plain", "never", None, "has no GPU, 2 are asked for"),
    ]
    file = tmp_path / "job.yaml"
    file.write_text("run: nvidia-smi\nresources: {accelerators: 'A100-80GB:3'}\n")
    done = launch(place, str(tmp_path), "--dry-run", code=6)
    assert f"has 2 × {A100}, 1 × Tesla T4: 2 of 3 are A100-80GB" in done.stdout


def test_a_busy_model_is_waited_for_though_another_gpu_is_free(place: Place) -> None:
    needs = {"gpus": 2, "gpu_model": "A100"}
    run = place.launch("echo begun; sleep 600", needs=needs)
    place.until(run, lambda item: "begun" in item.get("log", {}).get("text", ""), logs=True)
    done = launch(place, "hello_world", "--dry-run")
    assert "gpus     later  busy: 0 of 2 GPUs of the model A100-80G are free" in done.stdout
    assert "it would wait for one of them" in done.stderr
    place.client.call("POST", f"/v1/runs/{run}/stop")
    place.end(run)


def test_a_federated_job_learns_what_its_configuration_alone_learns(place: Place) -> None:
    done = launch(place, "federated", "--json")
    warned = [line.partition("`")[2] for line in done.stderr.splitlines() if "warning" in line]
    assert [line for line in warned if line.startswith("fedml_env` has no effect")]
    assert [line for line in warned if line.startswith("bootstrap` has no effect: a federated")]
    assert [line for line in warned if line.startswith("dataset`: mnist")]
    told = [json.loads(line) for line in done.stdout.splitlines()]
    found = place.client.call("GET", f"/v1/runs/{told[0]['run']}")
    assert (found["kind"], found["name"], found["state"]) == ("federate", "job", "FINISHED")
    accuracies = [r["metrics"]["devices.accuracy"] for r in found["rounds"] if r["model"]]
    assert len(accuracies) == 3
    assert accuracies[-1] > 0.5 > accuracies[0]
    config = JOBS / "federated" / "silos" / "config" / "fedml_config.yaml"
    alone = subprocess.run(
        command("fedml", "federate", str(config), "--json"),
        env={**os.environ, "FEDML_HOME": str(place.folder / "me")},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    alone_run = json.loads(alone.stdout.splitlines()[0])["run"]
    assert place.model(told[0]["run"]) == place.model(alone_run)


def test_scripts_of_a_federated_job_bring_data_model_and_training(place: Place) -> None:
    run = json.loads(launch(place, "federated_own", "--json").stdout.splitlines()[0])["run"]
    found = place.client.call("GET", f"/v1/runs/{run}")
    assert found["name"] == "own-scripts"
    # The server's script begins with 10; a round adds the mean of 2 and 2.5: the job file's shift,
    # and the step of its command line times the number of the client.
    means = [r["metrics"]["devices.w"] for r in found["rounds"] if r["model"]]
    assert means == [10.0, 12.25, 14.5]
    lines = {line for line in place.stdout(run).splitlines() if line.startswith("rank")}
    assert lines == {f"rank {rank} of north: step 0.5, shift 2.0" for rank in (1, 2)}


def test_a_script_with_a_model_of_its_own_trains_on_machines_that_have_what_it_asks_for(
    place: Place,
) -> None:
    refused = launch(place, "federated_net", code=6)
    assert "2 machines are asked for, 1 fit" in refused.stderr
    assert "plain: has no GPU" in refused.stderr
    done = launch(place, "federated_net", "--any-resource", "--json")
    assert "`dataset`: mnist" in done.stderr
    run = json.loads(done.stdout.splitlines()[0])["run"]
    rounds = place.client.call("GET", f"/v1/runs/{run}")["rounds"]
    accuracies = [r["metrics"]["devices.accuracy"] for r in rounds if r["model"]]
    assert accuracies[-1] > 0.3 > accuracies[0]


def test_a_dry_run_of_a_federated_job_names_its_clients(place: Place) -> None:
    found = json.loads(launch(place, "federated", "--dry-run", "--json").stdout)
    assert found["nodes"] == 2
    assert [(m["name"], m["fits"], m["rank"]) for m in found["machines"]] == [
        ("gpus", "now", 1),
        ("plain", "now", 2),
    ]


def test_strict_refuses_a_federated_job_on_a_stand_in(place: Place) -> None:
    before = place.client.call("GET", "/v1/runs")["runs"][0]["id"]
    done = launch(place, "federated", "--strict", code=2)
    assert "fedml_config.yaml: `dataset`: mnist" in done.stderr
    assert place.client.call("GET", "/v1/runs")["runs"][0]["id"] == before


def test_a_federated_job_trains_on_the_machines_of_its_cluster_alone(place: Place) -> None:
    devices = [agent.device for agent in place.agents.values()]
    place.client.call("POST", "/v1/clusters", {"name": "half", "devices": devices[:1]})
    refused = launch(place, "federated_own", "-c", "half", code=6)
    assert "2 machines are asked for, 1 fit" in refused.stderr
    assert "gpus: is not in the cluster half" in refused.stderr
    place.client.call("DELETE", "/v1/clusters/half")
    place.client.call("POST", "/v1/clusters", {"name": "all", "devices": devices})
    launch(place, "federated_own", "-c", "all")
    nobody = launch(place, "federated_own", "-c", "nobody", code=6)
    assert "no machine is reserved as nobody" in nobody.stderr
    place.client.call("DELETE", "/v1/clusters/all")


def test_python_packages_and_workflows_start_federated_jobs_too(
    place: Place, tmp_path: Path
) -> None:
    job, home = JOBS / "federated_own" / "job.yaml", place.folder / "me"
    built = api.federate_build(job, tmp_path)
    run = api.launch(job, package=str(built), home=home).wait(check=True)
    assert run.metrics[-1]["devices.w"] == 14.5

    result = api.launch_job_on_cluster(job, "made", home=home)
    assert result.result_code == 0, result.result_msg
    assert result.result_object is not None
    assert result.result_object.wait(check=True).details["spec"]["cluster"] == "made"
    place.client.call("DELETE", "/v1/clusters/made")

    flow = tmp_path / "flow.yaml"
    flow.write_text(f"steps: {{train: {{job: {job}}}}}")
    ended = api.workflow_run(flow, home=home).wait(check=True)
    assert ended.run_of("train").details["kind"] == "federate"
    assert ended.steps["train"]["outputs"]["values"]["devices.w"] == "14.5"
