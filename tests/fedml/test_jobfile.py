# SPDX-License-Identifier: Apache-2.0
"""Job files: what they ask for, and what is said of a wrong one."""

import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from fedml.errors import ConfigError
from fedml.jobfile import read_job
from fedml.jobkeys import EXAMPLE, GIB


def _job(folder: Path, text: str) -> Path:
    file = folder / "job.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("job: echo\nbootstrp: x\n", r"line 2: unknown key `bootstrp`; did you mean `bootstrap`\?"),
        ("job: echo\ncomputing:\n  minimum_num_gpu: 1\n", r"line 3: .*`minimum_num_gpus`\?"),
        ("job: echo\nxyzzy: 1\n", r"line 2: unknown key `xyzzy`; known are job, "),
        ("job: echo\njob: echo\n", "line 2: `job` is there twice"),
        ("job: echo\nretries: lots\n", "line 2: `retries` must be a whole number.* 'lots'"),
        ("job: echo\nretries: -1\n", "line 2: `retries` must be a whole number"),
        ("job: echo\nretries: true\n", "line 2: `retries` must be a whole number"),
        ("job: echo\ndeadline: .inf\n", "line 2: `deadline` must be a number"),
        ("job: echo\ncomputing: 2\n", "line 2: `computing` must be a mapping"),
        ("job: echo\nenvironment_variables: [A]\n", "line 2: .* must be a mapping"),
        ("job: echo\nenvironment_variables:\n  A: [1]\n", "line 2: .* must be text"),
        ("job: {run_on_windows: dir}\n", "line 1: `job` has no `run_on_posix`"),
        ("bootstrap: echo\n", "there is no `job`"),
        ("job: ''\n", "there is no `job`"),
        ("- job\n", "a mapping of keys is expected"),
        ("job: [\n", r"is not YAML: (.|\n)*line 2"),
        ("job: echo\nworkspace: nowhere\n", "workspace .*nowhere is not a directory"),
        ("job: echo\nrun: echo\n", "`run` says the same as `job`"),
        ("job: echo\nresources: {}\ncomputing: {}\n", "`resources` says the same as `computing`"),
        ("job: echo\nexpert_mode: {executable_file: a}\n", "says the same as `job`"),
        ("expert_mode: {executable_interpreter: sh}\n", "no `expert_mode.executable_file`"),
        ("run: echo\nnum_nodes: 0\n", "line 2: `num_nodes` must be at least 1"),
        ("job: a\npriority: urgent\n", "must be low, normal, high or a number from -100 to 100"),
        ("job: a\npriority: 101\n", "must be low, normal, high or a number from -100 to 100"),
        ("job: a\ncomputing: {maximum_cost_per_hour: much}\n", "must be a price such as 2.5"),
        (
            "job: a\nrestarts: 1\nresources: {job_recovery: {max_restarts_on_errors: 2}}\n",
            "the same",
        ),
        ("job: echo\njob_type: launch\n", "line 2: `job_type` must be one of train, "),
        ("job: echo\ncomputing: {device_type: TPU}\n", "must be one of CPU, GPU, hybrid"),
        ("job: echo\ncomputing: {memory: lots}\n", "`computing.memory` must be a size"),
        ("job: echo\ncomputing: {cpus: 4x}\n", "`computing.cpus` must be a number"),
        ("run: a\nresources: {accelerators: [T4, L4]}\n", "must name one kind of GPU"),
        ("run: a\nresources: {accelerators: 'T4:half'}\n", "whole number of GPUs"),
        ("job: a\ndata_args: 3\n", "line 2: `data_args` must be a mapping"),
        ("job: a\ndata_args: {a-b: 1, a_b: 2}\n", "would both be the variable A_B"),
        ("job: a\ndata_arg: {a: 1}\n", "line 2: .*`data_args`"),
        ("job: a\nsecrets: [NOT_SET_HERE]\n", "`secrets.NOT_SET_HERE` has no value here"),
        ("job: a\nsecrets: {A: abc}\n", "`secrets.A` is too short to be hidden"),
        ("job: a\nsecrets: A\n", "line 2: `secrets` must be a list of names"),
        ("job: echo\njob_type: serve\n", "`job_type` is serve, and there is no `service`"),
        ("job: echo\nservice: {port: 0}\n", "line 2: `service.port` must be a port from 1"),
        ("job: echo\nservice: {port: 80, ports: 80}\n", "`service.ports` says the same"),
        ("job: echo\nservice: {readiness_probe: up}\n", "must be a path such as /ready"),
        ("job: echo\nservice: {readiness_probe: {url: /}}\n", "has the key 'url'"),
        (
            "job: echo\nservice: {prot: 80}\n",
            "line 2: unknown key `service.prot`; did you mean `port`",
        ),
        ("job: echo\nservice: {}\nnetwork: none\n", "a service needs the network"),
        ("job: echo\njob_type: federate\n", "`job_type` is federate: a federated run, not a job"),
    ],
)
def test_a_wrong_job_file_is_told_where_and_what(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=r"job\.yaml") as caught:
        read_job(_job(tmp_path, text))
    assert caught.match(said)


def test_secrets_come_from_the_file_its_variables_or_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "from-the-terminal")
    text = "job: a\nenvironment_variables: {LOGIN: ana-1234, SEED: 7}\nsecrets: [LOGIN, HF_TOKEN]\n"
    request, _ = read_job(_job(tmp_path, text))
    assert request["env"] == {"LOGIN": "ana-1234", "SEED": "7", "HF_TOKEN": "from-the-terminal"}
    assert request["secrets"] == ["HF_TOKEN", "LOGIN"]
    request, _ = read_job(_job(tmp_path, "job: a\nsecrets: {PASS: 'word', HF_TOKEN: }\n"))
    assert request["env"] == {"PASS": "word", "HF_TOKEN": "from-the-terminal"}


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        read_job(tmp_path / "none.yaml")


def test_values_of_variables_and_labels_stay_as_they_are_written(tmp_path: Path) -> None:
    text = "job: echo\nenvironment_variables: {A: 1, B: yes, C: 007, D: }\nlabels: {on: off}\n"
    request, workspace = read_job(_job(tmp_path, text))
    assert request["env"] == {"A": "1", "B": "yes", "C": "007", "D": ""}
    assert request["labels"] == {"on": "off"}
    assert workspace is None


def test_what_is_not_given_has_its_default(tmp_path: Path) -> None:
    request, _ = read_job(_job(tmp_path, "job: echo\ncomputing:\n"))
    assert request == {
        "command": "echo",
        "bootstrap": "",
        "name": "job",
        "env": {},
        "needs": {"gpus": 0},
        "labels": {},
        "nodes": 1,
        "priority": 0,
        "cluster": "",
        "retries": 3,
        "restarts": 0,
        "deadline_s": 0.0,
        "grace_s": 10.0,
    }


def test_a_job_file_of_fedml_is_read_and_what_has_no_effect_is_named(tmp_path: Path) -> None:
    (tmp_path / "hello_world").mkdir()
    file = _job(
        tmp_path,
        """
workspace: hello_world
job_type: train
job_subtype: generate_training
bootstrap:
  run_on_posix: pip install -r requirements.txt
  run_on_windows: exit 1
job: |
  python3 hello_world.py
computing:
  minimum_num_gpus: 1
  maximum_cost_per_hour: $3000
  resource_type: A100-80G
""",
    )
    request, workspace = read_job(file)
    assert request["command"] == "python3 hello_world.py\n"
    assert request["bootstrap"] == "pip install -r requirements.txt"
    assert request["needs"] == {"gpus": 1, "gpu_model": "A100-80G"}
    assert request["max_price_per_hour"] == 3000
    assert workspace == tmp_path / "hello_world"


def test_an_older_job_file_of_fedml_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "bootstrap.sh").write_text("echo ready\n")
    file = _job(
        tmp_path,
        """
workspace: src
job: python3 train.py -m $FEDML_MODEL_NAME -dp $FEDML_DATASET_PATH
environment_args: {bootstrap: bootstrap.sh}
gpu_requirements: {minimum_num_gpus: 2, maximum_cost_per_hour: $1.75}
docker: {image: fedml/launch:1, ports: [30001]}
fedml_data_args: {dataset_name: mnist, dataset_path: ./dataset}
model_args: {model_name: lr, output_dim: '10'}
run_api_key: a1b2c3d4e5
""",
    )
    with pytest.warns(UserWarning, match="has no effect") as told:
        request, _ = read_job(file)
    assert [str(one.message).partition("`")[2].partition("`")[0] for one in told] == [
        "docker.ports",
        "run_api_key",
    ]
    assert not any("a1b2c3d4e5" in str(one.message) for one in told)
    assert request["bootstrap"] == "bash bootstrap.sh"
    assert request["needs"]["gpus"] == 2
    assert request["env"] == {
        "FEDML_DATASET_NAME": "mnist",
        "FEDML_DATASET_PATH": "./dataset",
        "FEDML_ENV_FEDML_DATA_ARGS_DATASET_NAME": "mnist",
        "FEDML_ENV_FEDML_DATA_ARGS_DATASET_PATH": "./dataset",
        "FEDML_ENV_MODEL_ARGS_MODEL_NAME": "lr",
        "FEDML_ENV_MODEL_ARGS_OUTPUT_DIM": "10",
        "FEDML_MODEL_NAME": "lr",
        "FEDML_MODEL_OUTPUT_DIM": "10",
    }


def test_a_bootstrap_that_names_no_file_is_shell_lines(tmp_path: Path) -> None:
    for said in ("true", "missing.sh", "echo a; echo b"):
        text = f"workspace: .\njob: a\nenvironment_args: {{bootstrap: '{said}'}}\n"
        assert read_job(_job(tmp_path, text))[0]["bootstrap"] == said


def test_what_the_example_names_may_all_be_switched_on(tmp_path: Path) -> None:
    request, workspace = read_job(_job(tmp_path, re.sub(r"(?m)^#(?! \S)", "", EXAMPLE)))
    assert request["needs"] == {
        "gpus": 1,
        "gpu_model": "RTX-4090",
        "gpu_memory_bytes": 20 * GIB,
        "cpus": 1,
        "memory_bytes": GIB // 4,
        "disk_bytes": math.ceil(0.1 * GIB),
    }
    assert request["env"] == {
        "SEED": "7",
        "DEMO_PASSWORD": "correct-horse",
        "FEDML_ENV_TRAINING_PARAMS_EPOCHS": "3",
    }
    assert request["secrets"] == ["DEMO_PASSWORD"]
    assert request["service"] == {"path": "/ready"}
    assert workspace == tmp_path
    bare, none = read_job(_job(tmp_path, EXAMPLE))
    assert (bare["needs"], bare["env"], none) == ({"gpus": 0}, {}, None)


def test_free_sections_become_variables_whatever_they_hold(tmp_path: Path) -> None:
    text = """
job: echo
data_args: {dataset: mnist, download: yes, part-file: 007, none: }
training_params:
  lr: 1e-3
  optimizer: {name: sgd, betas: [0.9, 0.99]}
my_own_args: {a: b}
environment_variables: {FEDML_ENV_MY_OWN_ARGS_A: mine}
"""
    request, _ = read_job(_job(tmp_path, text))
    assert request["env"] == {
        "FEDML_ENV_DATA_ARGS_DATASET": "mnist",
        "FEDML_ENV_DATA_ARGS_DOWNLOAD": "yes",
        "FEDML_ENV_DATA_ARGS_PART_FILE": "007",
        "FEDML_ENV_DATA_ARGS_NONE": "",
        "FEDML_ENV_TRAINING_PARAMS_LR": "1e-3",
        "FEDML_ENV_TRAINING_PARAMS_OPTIMIZER_NAME": "sgd",
        "FEDML_ENV_TRAINING_PARAMS_OPTIMIZER_BETAS": "[0.9, 0.99]",
        "FEDML_ENV_MY_OWN_ARGS_A": "mine",
    }


@pytest.mark.parametrize(
    ("computing", "needs", "optional", "unused"),
    [
        ("{minimum_num_gpus: 2}", {"gpus": 2}, False, []),
        ("{resource_type: T4}", {"gpus": 1, "gpu_model": "T4"}, False, []),
        ("{device_type: GPU}", {"gpus": 1}, False, []),
        ("{device_type: gpu, minimum_num_gpus: 0}", {"gpus": 1}, False, []),
        ("{device_type: CPU}", {"gpus": 0}, False, []),
        ("{device_type: , resource_type: , minimum_num_gpus: 0}", {"gpus": 0}, False, []),
        ("{minimum_num_gpus: 0, resource_type: T4}", {"gpus": 0}, False, ["resource_type"]),
        (
            "{device_type: CPU, minimum_num_gpus: 1, resource_type: T4}",
            {"gpus": 0},
            False,
            ["minimum_num_gpus", "resource_type"],
        ),
        ("{device_type: hybrid, minimum_num_gpus: 2}", {"gpus": 2}, True, []),
        ("{device_type: hybrid}", {"gpus": 1}, True, []),
        ("{cpus: 4+, memory: 512MB}", {"gpus": 0, "cpus": 4, "memory_bytes": 512_000_000}, 0, []),
        (
            "{memory: 1.5GiB, disk: 2TB}",
            {"gpus": 0, "memory_bytes": 3 * GIB // 2, "disk_bytes": 2 * 10**12},
            0,
            [],
        ),
    ],
)
def test_what_computing_asks_of_a_machine(
    tmp_path: Path, computing: str, needs: dict[str, object], optional: bool, unused: list[str]
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        request, _ = read_job(_job(tmp_path, f"job: echo\ncomputing: {computing}\n"))
    assert request["needs"] == needs
    assert request.get("gpus_optional", False) == optional
    said = [str(warning.message).split("`")[1] for warning in caught]
    assert said == [f"computing.{name}" for name in unused]


def test_any_resource_takes_gpus_of_any_model_and_does_without(tmp_path: Path) -> None:
    text = "job: echo\ncomputing: {minimum_num_gpus: 2, resource_type: RTX-4090, cpus: 3}\n"
    request, _ = read_job(_job(tmp_path, text), any_resource=True)
    assert request["needs"] == {"gpus": 2, "cpus": 3}
    assert request["gpus_optional"] is True


def test_skypilots_names_mean_the_same(tmp_path: Path) -> None:
    text = """
name: sky
workdir: .
num_nodes: 3
resources: {accelerators: "A100:2", cpus: 4+, memory: 16+, disk_size: 100, use_spot: false,
            job_recovery: {strategy: FAILOVER, max_restarts_on_errors: 4}}
envs: {A: 1}
setup: echo ready
run: echo go
"""
    request, workspace = read_job(_job(tmp_path, text))
    assert workspace == tmp_path
    assert (request["name"], request["bootstrap"], request["command"]) == (
        "sky",
        "echo ready",
        "echo go",
    )
    assert request["env"] == {"A": "1"}
    assert (request["nodes"], request["restarts"]) == (3, 4)
    assert request["needs"] == {
        "gpus": 2,
        "gpu_model": "A100",
        "cpus": 4,
        "memory_bytes": 16 * GIB,
        "disk_bytes": 100 * GIB,
    }


@pytest.mark.parametrize(
    ("service", "asked"),
    [
        ("", {}),
        ("{port: 2345}", {"port": 2345}),
        ("{port: 80, readiness_probe: /ready}", {"port": 80, "path": "/ready"}),
        (
            "{ports: 80, replicas: 1, readiness_probe: {path: /up, initial_delay_seconds: 30}}",
            {"port": 80, "path": "/up", "within_s": 30.0},
        ),
    ],
)
def test_a_service_says_where_it_answers_and_when_it_is_ready(
    tmp_path: Path, service: str, asked: dict[str, Any]
) -> None:
    request, _ = read_job(_job(tmp_path, f"job: serve\nservice: {service}\n"))
    assert request["service"] == asked


@pytest.mark.parametrize(
    ("accelerators", "model", "count"),
    [("A100", "A100", 1), ("{T4: 4}", "T4", 4), ("T4:8", "T4", 8)],
)
def test_accelerators_in_each_of_their_forms(
    tmp_path: Path, accelerators: str, model: str, count: int
) -> None:
    text = f"run: echo\nresources:\n  accelerators: {accelerators}\n"
    request, _ = read_job(_job(tmp_path, text))
    assert (request["needs"]["gpu_model"], request["needs"]["gpus"]) == (model, count)


def test_expert_mode_is_the_command_that_it_stands_for(tmp_path: Path) -> None:
    text = """
expert_mode:
  executable_interpreter: python3
  executable_file_folder: my src
  executable_file: train.py
  executable_conf_option: --cf
  executable_conf_file_folder: config
  executable_conf_file: fedml_config.yaml
  executable_args: --rank 0 --role client
  data_location: /data/mnist
  bootstrap: echo ready
"""
    request, workspace = read_job(_job(tmp_path, text))
    assert request["command"] == (
        "python3 'my src/train.py' --cf config/fedml_config.yaml --rank 0 --role client"
    )
    assert request["bootstrap"] == "echo ready"
    assert request["env"] == {"FEDML_ENV_EXPERT_MODE_DATA_LOCATION": "/data/mnist"}
    assert workspace == tmp_path
    request, _ = read_job(_job(tmp_path, "expert_mode: {executable_file: go.sh}\n"))
    assert request["command"] == "./go.sh"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("job: echo\ncontainerize: false\ndocker: {image: a}\n", "docker"),
        ("run: echo\nresources: {image_id: ami-1}\n", "resources.image_id"),
        ("job: echo\njob_subtype: cross_silo\n", "job_subtype"),
        ("run: echo\nresources: {use_spot: true}\n", "resources.use_spot"),
        ("run: echo\nresources: {cloud: aws}\n", "resources.cloud"),
    ],
)
def test_a_switch_that_changes_nothing_here_is_named(tmp_path: Path, text: str, key: str) -> None:
    with pytest.warns(UserWarning, match=f"`{key}` has no effect: "):
        read_job(_job(tmp_path, text))


def test_switches_that_are_off_are_not_spoken_of(tmp_path: Path) -> None:
    read_job(
        _job(
            tmp_path,
            "job: echo\ncontainerize: false\njob_type:\njob_subtype: general_training\n"
            "computing: {allow_cross_cloud_resources: false}\n",
        )
    )


def test_requirements_are_a_list_or_a_file_in_the_workspace(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "r.txt").write_text("numpy==2.0  # why\n./a.whl")
    for text, wanted in (
        ("requirements: [numpy==2.0, tqdm]\n", "numpy==2.0\ntqdm\n"),
        ("requirements: |\n  numpy==2.0\n  tqdm\n", "numpy==2.0\ntqdm\n"),
        ("workspace: w\nrequirements: r.txt\n", "numpy==2.0  # why\n./a.whl\n"),
        ("requirements:\n", None),
        ("", None),
    ):
        request, _ = read_job(_job(tmp_path, f"job: echo\n{text}"))
        assert request.get("requirements") == wanted


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("requirements: r.txt\n", "there is no file r.txt in the workspace"),
        ("workspace: w\nrequirements: ../job.yaml\n", "there is no file ../job.yaml"),
        ("workspace: w\nrequirements: numpy\n", "there is no file numpy"),
        ("requirements: [-e .]\n", "'-e .' cannot be: an environment may be shared"),
        ("requirements: {a: b}\n", "line 2: `requirements` must be text"),
        ("requirements: [[a]]\n", "line 2: `requirements` must be text"),
    ],
)
def test_requirements_that_cannot_be_are_refused_with_a_way_out(
    tmp_path: Path, text: str, said: str
) -> None:
    (tmp_path / "w").mkdir()
    with pytest.raises(ConfigError, match=said):
        read_job(_job(tmp_path, f"job: echo\n{text}"))


def container(folder: Path, text: str) -> Any:
    return read_job(_job(folder, f"job: echo\n{text}"))[0].get("container")


def test_a_container_is_asked_for_by_its_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert container(tmp_path, "docker: {image: 'python:3.12'}\n") == {"image": "python:3.12"}
    assert container(tmp_path, "resources: {image_id: 'docker:a/b'}\n") == {"image": "a/b"}
    assert container(tmp_path, "docker: {image: '', registry: ''}\ncontainerize: false\n") is None
    monkeypatch.setenv("LAB", "open sesame")
    text = """containerize: true
docker:
  image: torch:2
  registry: registry.example.org/lab
  username: ana
  password: $LAB
  volumes: [/srv/scans:/data:ro, "/scratch:/scratch"]
"""
    assert container(tmp_path, text) == {
        "image": "registry.example.org/lab/torch:2",
        "registry": "registry.example.org",
        "username": "ana",
        "password": "open sesame",
        "mounts": [
            {"source": "/srv/scans", "target": "/data", "writable": False},
            {"source": "/scratch", "target": "/scratch", "writable": True},
        ],
    }
    assert read_job(_job(tmp_path, "job: a\nnetwork: None\n"))[0]["network"] == "none"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("containerize: true\n", "there is no `docker.image`"),
        ("docker: {mounts: [/a:/b]}\n", "there is no `docker.image`"),
        ("docker: {image: a, mounts: ['data:/b']}\n", "absolute paths such as /srv/data:/data:ro"),
        ("docker: {image: a, mounts: ['/a:/b:z']}\n", "absolute paths such as"),
        ("docker: {image: a, mounts: ['/a:/b'], volumes: ['/a:/b']}\n", "says the same as"),
        ("docker: {image: a}\nresources: {image_id: 'docker:b'}\n", "says the same as"),
        ("docker: {image: a, username: u, password: $NOT_SET_HERE}\n", "export NOT_SET_HERE="),
        ("network: lan\n", "must be one of full, none"),
    ],
)
def test_a_container_that_cannot_be_says_why(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        container(tmp_path, text)
    assert says in f"{refusal.value} {refusal.value.hint}"
